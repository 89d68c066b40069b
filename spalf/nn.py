"""The dictionary: two [F, D] matrices, biases, an activator and named row ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from attrs import evolve
from torch import Tensor, nn

from spalf.core.protocols import Activator, Metric
from spalf.core.values import Code, Machine, White, per_entry
from spalf.kernels.squares import affine


def form_of(metric: Metric, like: Tensor) -> Tensor:
    """A metric's form A [D, D] in the type and on the device of `like`: W^-2, scaled so that tr A = D."""
    unit_DD = torch.eye(metric.d_model).to(like)
    form_DD = metric.raw_direction(White(metric.raw_direction(White(unit_DD))))
    return form_DD / form_DD.diagonal().mean()


class StratifiedAutoencoder(nn.Module):
    """y_hat = gain * z W_dec + b_dec with z = activation(y W_enc' + b_enc), all in whitened coordinates.

    An activator with `pre_bias` reads (y - b_dec) W_enc' + b_enc; under one that `owns_bias`, b_enc is zero and frozen.

    The gain is one trained scalar, kept as its logarithm, so that the rows of both matrices can stay at unit scale:
    folding a small gain into the encoder makes Adam's relative steps there large enough to diverge.

    It starts in evaluation mode; a training step puts it into training mode for as long as it lasts.

    Shapes: W_enc_FD, W_dec_FD [F, D]; b_enc_F [F]; b_dec_D [D]; log_gain scalar. All float32.
    """

    form_DD: Tensor

    def __init__(self, d_model: int, rows: Mapping[str, int], activator: Activator, machine: Machine) -> None:
        super().__init__()
        self.width = sum(rows.values())
        self._rows: dict[str, slice] = {}
        start = 0
        for name, n in rows.items():
            self._rows[name] = slice(start, start + n)
            start += n
        self.machine = machine
        self.W_enc_FD = nn.Parameter(torch.zeros(self.width, d_model, device=machine.device))
        self.W_dec_FD = nn.Parameter(torch.zeros(self.width, d_model, device=machine.device))
        self.b_enc_F = nn.Parameter(torch.zeros(self.width, device=machine.device))
        self.b_dec_D = nn.Parameter(torch.zeros(d_model, device=machine.device))
        self.log_gain = nn.Parameter(torch.zeros((), device=machine.device))
        self._activator = cast(nn.Module, activator).to(machine.device)
        self.b_enc_F.requires_grad_(not activator.owns_bias)
        self._refines = getattr(activator, "refinement_F", lambda: None)() is not None
        if self._refines:
            self.register_buffer("form_DD", torch.eye(d_model, device=machine.device))
        self.eval()

    @property
    def rows(self) -> Mapping[str, slice]:
        """Row range of each stratum, in order."""
        return self._rows

    @property
    def activator(self) -> Activator:
        return cast(Activator, self._activator)

    def encode(self, white_BD: White, dense: bool = False) -> Code:
        """The code of whitened rows; `dense` lists every entry."""
        read_BD = White(white_BD - self.b_dec_D) if self.activator.pre_bias else white_BD
        return self.refined(white_BD, self.machine.ops.encode(read_BD, self, dense))

    def refined(self, white_BD: White, code: Code) -> Code:
        """z <- [z + s <e A, w> / gain]+ where a feature is on, with e the error that z leaves and s a step per feature.

        A descent step of e A e', on the support that the encoder has chosen: what co-active rows count twice is taken
        off. A is the form by which errors count: that of model space (`measure_by`), or another one (`weigh_by`).
        """
        step_F = self.activator.refinement_F() if self._refines else None
        if step_F is None:
            return code
        at_once_BK = self.machine.ops.refine(code, white_BD, step_F, self.form_DD, self)
        if at_once_BK is not None:
            return evolve(code, z_BK=at_once_BK)
        error_BD = White(white_BD - self.decode(code))
        pull_BK = self.machine.ops.correlate(code, error_BD @ self.form_DD, self)
        step_BK = per_entry(step_F, code.index_BK, self.machine.ops.deterministic)
        moved_BK = (code.z_BK + step_BK * pull_BK / self.log_gain.exp()).relu()
        # An entry that is off keeps its z of 0 and that z's gradient, which the threshold's surrogate needs.
        return evolve(code, z_BK=code.z_BK + code.gate_BK.detach() * (moved_BK - code.z_BK))

    @torch.no_grad()
    def measure_by(self, metric: Metric) -> None:
        """Take the metric's form: e A e' is the squared error in model space, scaled so that tr A = D."""
        if self._refines:
            self.weigh_by(form_of(metric, self.form_DD))

    @torch.no_grad()
    def weigh_by(self, form_DD: Tensor) -> None:
        """Take a form [D, D], symmetric and positive, in place of the metric's: by it errors count from now on."""
        self.form_DD.copy_(form_DD)

    def decode(self, code: Code) -> White:
        """Whitened reconstruction [B, D]."""
        summed_BD: Tensor = self.machine.mesh.sum(self.machine.ops.decode(code, self))
        return White(affine(summed_BD, self.log_gain.exp(), self.b_dec_D))
