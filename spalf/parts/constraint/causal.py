"""Constraints on what the language model does with the reconstruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from attrs import field
from attrs.validators import ge, gt, in_, lt
from torch import Tensor

from spalf.core.recipe import Derived, Plan
from spalf.core.slots import constraint, from_knob
from spalf.core.values import Raw, Sequences, View, White
from spalf.engine.language import mean_kl, patch_after_first
from spalf.parts.constraint.derived import measured
from spalf.parts.constraint.reconstruction import squared_error


def _kl(view: View, sequences: Sequences, fn: Callable[[Raw], Raw]) -> Tensor:
    """Nats per position, in the model whose hooked activations are replaced by `fn` of them after the first one."""
    with torch.no_grad():
        original_STV = view.stream.logits(sequences)
    return mean_kl(original_STV, view.stream.logits(sequences, patch_after_first(fn)), sequences.real_ST)


def _mean(view: View) -> Callable[[Raw], Raw]:
    """Mean ablation: every activation becomes the mean of the calibration sample."""

    def ablate(x_STD: Raw) -> Raw:
        white = torch.zeros(x_STD.shape[-1], dtype=torch.float32, device=x_STD.device)
        return Raw(view.metric.raw(White(white)).to(x_STD.dtype).expand_as(x_STD))

    return ablate


@constraint("causal")
class Causal:
    """KL(original || patched) in nats per position <= a budget, with a live gradient through the language model.

    The patched model reads reconstructions at the hook on `sequences` whole contexts per step, the first position left
    clean; the original model gives no gradient.

    The budget is measured on entering, on `calibration` contexts: `share` times the KL found there. It is attainable
    wherever training stands and asks for an improvement that reconstruction error alone has not given. An absolute
    budget is asked for by `recovered` > 0: (1 - recovered) times the KL of mean ablation; a value that is right for the
    explained variance may be out of reach for it, and training then ends infeasible.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    partial: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    sequences: int = field(default=4, validator=gt(0))
    share: float = field(default=0.8, validator=[gt(0.0), lt(1.0)])
    recovered: float = field(default=0.0, validator=[ge(0.0), lt(1.0)])
    calibration: int = field(default=64, validator=gt(0))

    @torch.no_grad()
    def budget(self, view: View) -> Tensor:
        fn = _mean(view) if self.recovered else view.reconstruct
        total = torch.zeros((), device=view.forward.white_BD.device)
        done = 0
        while done < self.calibration:
            n = min(self.sequences, self.calibration - done)
            total = total + n * _kl(view, view.stream.sequences(n), fn)
            done += n
        factor = 1 - self.recovered if self.recovered else self.share
        return factor * total / done

    def value(self, view: View) -> Tensor:
        return _kl(view, view.stream.sequences(self.sequences), view.reconstruct)

    def derive(self, plan: Plan) -> list[Derived]:
        """The budget's row for `spalf compile`."""
        absolute = f"(1 - {self.recovered:g}) * KL of mean ablation"
        return measured(self, plan, absolute if self.recovered else f"{self.share:g} * KL on entering")


@constraint("causal_blend")
class CausalBlend:
    """The published blend .5 (e / tau - 1) + .5 KL / mean(KL) <= 0, for reproduction only: it has no feasible point.

    The second half is .5 at any KL, because it is divided by its own running mean, so the blend equals e / (2 tau) > 0
    for every imperfect reconstruction and the multiplier grows without end. Written as value / 1 - 1 with the batch's
    own KL as the running mean, which any decay has on average. `live` False repeats the published pass, whose patched
    model ran without autograd: its KL moves the violation and trains nothing.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    partial: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    r2: float = from_knob("R2_target", validator=[gt(0.0), lt(1.0)])
    space: str = field(default="raw", validator=in_(("raw", "white")))
    sequences: int = field(default=4, validator=gt(0))
    live: bool = False

    def budget(self, view: View) -> Tensor:
        return torch.ones((), device=view.forward.white_BD.device)

    def value(self, view: View) -> Tensor:
        tau = (1 - self.r2) * view.metric.variance(self.space).detach()
        error = squared_error(view, self.space)
        with torch.set_grad_enabled(self.live and torch.is_grad_enabled()):
            kl = _kl(view, view.stream.sequences(self.sequences), view.reconstruct)
        # g + 1 = .5 (e / tau - 1) + .5 KL / mean(KL) + 1
        return 0.5 * error / tau + 0.5 * kl / kl.detach().clamp(min=1e-12) + 0.5
