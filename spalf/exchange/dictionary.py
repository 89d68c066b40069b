"""A trained dictionary on raw activations, in the plain form that the files of other libraries hold.

Shape letters: B rows, F features, D d_model. A feature is a row, in both matrices; the formats turn them around.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from attrs import evolve, field, fields, frozen
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.engine.export import fold
from spalf.errors import ExchangeError

Activation = Literal["relu", "jumprelu", "topk", "gated"]
ONE_SCALE = 1e-5
"""Relative spread of decoder lengths below which they count as one, so that unit rows keep the order of codes."""


@frozen(kw_only=True)
class About:
    """Where a dictionary's activations come from, and what else its file says of it."""

    model: str = ""
    hook: str = ""
    """In TransformerLens' names, such as blocks.6.hook_resid_post."""
    context: int = 0
    bos: bool = False
    dataset: str = ""
    details: Mapping[str, Any] = field(factory=dict)
    """Of the run that trained it, as JSON holds it."""

    @property
    def layer(self) -> int | None:
        """The block that the hook's name gives, or None."""
        found = re.search(r"\b(?:blocks|layers|h)\.(\d+)\b", self.hook)
        return int(found[1]) if found else None


@frozen(kw_only=True, eq=False)
class Dictionary:
    """p = x W_enc' + b_enc, with x - b_dec for x where `centred`; x_hat = z W_dec + b_dec.

    relu: z = max(0, p). jumprelu: z = max(0, p) where p > threshold. topk: z = max(0, p) of the k largest p of a row.
    gated: with u = p - b_enc, z = max(0, exp(r_mag) u + b_enc) where u + b_gate > 0.
    A jumprelu with `step` refines them once: z = max(0, z + step * (x - x_hat) W_dec') where z > 0.
    All tensors are float64 on the CPU.
    """

    activation: Activation
    W_enc_FD: Tensor
    W_dec_FD: Tensor
    b_enc_F: Tensor
    b_dec_D: Tensor
    threshold_F: Tensor | None = None
    step_F: Tensor | None = None
    k: int = 0
    b_gate_F: Tensor | None = None
    r_mag_F: Tensor | None = None
    centred: bool = False
    about: About = field(factory=About)

    @property
    def width(self) -> int:
        return self.W_enc_FD.shape[0]

    @property
    def d_model(self) -> int:
        return self.W_enc_FD.shape[1]

    def gate(self) -> tuple[Tensor, Tensor]:
        """(b_gate, r_mag) [F] of a gated dictionary."""
        assert self.b_gate_F is not None
        assert self.r_mag_F is not None
        return self.b_gate_F, self.r_mag_F

    def tensors(self) -> dict[str, Tensor]:
        """Those it has, by field name."""
        held = {a.name: getattr(self, a.name) for a in fields(Dictionary)}
        return {name: value for name, value in held.items() if isinstance(value, Tensor)}

    def encode(self, x_BD: Tensor) -> Tensor:
        """Codes [B, F] of raw activations, in float64: what the class says, for checks and small batches."""
        x_BD = x_BD.double()
        z_BF = self._selected(x_BD - self.b_dec_D if self.centred else x_BD)
        if self.step_F is None:
            return z_BF
        pull_BF = (x_BD - self.decode(z_BF)) @ self.W_dec_FD.T
        return (z_BF + self.step_F * pull_BF).relu() * (z_BF > 0)

    def _selected(self, x_BD: Tensor) -> Tensor:
        """Codes before a refinement of what the encoder's rows read."""
        linear_BF = x_BD @ self.W_enc_FD.T
        pre_BF = linear_BF + self.b_enc_F
        if self.activation == "gated":
            b_gate_F, r_mag_F = self.gate()
            return (linear_BF * r_mag_F.exp() + self.b_enc_F).relu() * (linear_BF + b_gate_F > 0)
        if self.activation == "topk":
            top = pre_BF.topk(min(self.k, self.width), dim=1)
            return torch.zeros_like(pre_BF).scatter(1, top.indices, top.values.relu())
        if self.threshold_F is not None:
            return pre_BF.relu() * (pre_BF > self.threshold_F)
        return pre_BF.relu()

    def decode(self, z_BF: Tensor) -> Tensor:
        """Raw activations [B, D] of codes."""
        return z_BF @ self.W_dec_FD + self.b_dec_D

    def recentred(self, centred: bool) -> Dictionary:
        """The same function, its encoder reading x - b_dec, or x."""
        if centred == self.centred:
            return self
        sign = 1.0 if centred else -1.0
        shift_F = sign * (self.W_enc_FD @ self.b_dec_D)
        if self.activation != "gated":
            return evolve(self, centred=centred, b_enc_F=self.b_enc_F + shift_F)
        b_gate_F, r_mag_F = self.gate()
        b_enc_F = self.b_enc_F + r_mag_F.exp() * shift_F
        return evolve(self, centred=centred, b_enc_F=b_enc_F, b_gate_F=b_gate_F + shift_F)

    def rounded(self, dtype: torch.dtype) -> Dictionary:
        """The same with matrices that `dtype` holds and vectors that float32 does.

        Biases take up what rounding the encoder does to b_dec, which is near the mean of the activations: what rounding
        adds then acts on x - b_dec, not on x.
        """
        near = {name: tensor.to(_kept_as(name, dtype)).double() for name, tensor in self.tensors().items()}
        lost_F = torch.zeros_like(self.b_enc_F)
        if not self.centred:
            lost_F = self.W_enc_FD @ self.b_dec_D - near["W_enc_FD"] @ near["b_dec_D"]
        if self.activation == "gated":
            b_gate_F, r_mag_F = self.gate()
            near["b_gate_F"] = (b_gate_F + lost_F).float().double()
            lost_F = r_mag_F.exp() * lost_F
        near["b_enc_F"] = (self.b_enc_F + lost_F).float().double()
        changes: dict[str, Any] = dict(near)
        return evolve(self, **changes)

    def refuse_negative_thresholds(self, library: str) -> None:
        """Raises ExchangeError: a library that rectifies first cannot give the negative codes that they let through."""
        if self.threshold_F is not None and bool((self.threshold_F < 0).any()):
            n = int((self.threshold_F < 0).sum())
            raise ExchangeError(
                f"{n} of {self.width} thresholds are negative, and {library} rectifies before it compares "
                "(export it as safetensors)"
            )

    def refuse_step(self, library: str) -> None:
        """Raises ExchangeError: a library without refinement would give other codes on the same support."""
        if self.step_F is not None:
            raise ExchangeError(
                f"codes are refined after their selection, and {library} has no such form (train with the preset "
                "spalf_plain, or export it as safetensors)"
            )


def _kept_as(name: str, dtype: torch.dtype) -> torch.dtype:
    """Of a field in a file: half of a matrix is worth having, half of a vector is not."""
    return dtype if name.endswith("_FD") else torch.promote_types(dtype, torch.float32)


def of_state(plan: Plan, state: TrainingState, about: About) -> Dictionary:
    """The state's dictionary with its whitening folded in. Raises ExchangeError where a number is not finite.

    Decoder rows have unit norm, but for an activation that keeps the k largest entries under a whitening that stretches
    rows unequally: there the order is that of the trained codes, so that the rows keep their lengths.
    """
    folded = fold(state.metric, state.sae)
    bad = [name for name, tensor in folded.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise ExchangeError(f"not exported, because these are not finite: {', '.join(bad)}")
    held = {k: v.cpu() for k, v in folded.items()}
    plain = Dictionary(
        activation="jumprelu",
        W_enc_FD=held["W_enc"],
        W_dec_FD=held["W_dec"],
        b_enc_F=held["b_enc"],
        b_dec_D=held["b_dec"],
        threshold_F=held["threshold"],
        step_F=held.get("step"),
        about=about,
    )
    activator = state.sae.activator
    affine = activator.affine_F()
    if activator.k:
        return _selecting(plain, activator.k, held["scale"])
    if affine is not None:
        return _gated(plain, affine[0].detach().double().cpu())
    if plain.step_F is None and not bool(held["threshold"].any()):
        return evolve(plain, activation="relu", threshold_F=None)
    return plain


def _selecting(plain: Dictionary, k: int, scale_F: Tensor) -> Dictionary:
    """By order: of p / scale, which is the order of p where all scales are one."""
    assert plain.threshold_F is not None
    if bool(plain.threshold_F.any()):
        raise ExchangeError("an activation with both k and thresholds has no place in this format (use safetensors)")
    plain = evolve(plain, activation="topk", k=k, threshold_F=None)
    if float(scale_F.max() / scale_F.min()) - 1 < ONE_SCALE:
        return plain
    return evolve(
        plain,
        W_enc_FD=plain.W_enc_FD / scale_F[:, None],
        b_enc_F=plain.b_enc_F / scale_F,
        W_dec_FD=plain.W_dec_FD * scale_F[:, None],
    )


def _gated(plain: Dictionary, slope_F: Tensor) -> Dictionary:
    """A gate on what the magnitude is affine in: p > threshold as p_linear + b_gate > 0, with exp(r_mag) = slope."""
    assert plain.threshold_F is not None
    return evolve(
        plain,
        activation="gated",
        threshold_F=None,
        W_enc_FD=plain.W_enc_FD / slope_F[:, None],
        r_mag_F=slope_F.log(),
        b_gate_F=(plain.b_enc_F - plain.threshold_F) / slope_F,
    )
