"""Thresholds scaled after training: what L0 a dictionary needs for which error, and what it reaches at a given L0.

At scale s a threshold t becomes t + (s - 1) |t|, which is s t where it is positive; where all are 0 (relu) there is
nothing to multiply, and s - 1 is the threshold of all features. A dictionary that keeps its k largest entries keeps
k / s of them. Scale 1 is the trained dictionary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spalf.core.state import TrainingState
from spalf.core.values import Code, Raw, White

LEAST = 0.05
"""Entries below this share of their threshold matter at no useful L0: leaving them out keeps the sort small."""


@torch.no_grad()
def rescaled(state: TrainingState, white_BD: White, scale: float) -> Code:
    """The dense code at `scale`; scale 1 is the trained code."""
    code, activator = state.sae.encode(white_BD, dense=True), state.sae.activator
    size_BF = code.pre_BK.abs() if activator.signed else code.pre_BK
    if activator.k:
        gate_BF = _largest(size_BF, max(1, round(activator.k / scale)))
    else:
        gate_BF = size_BF > activator.threshold_F() + (scale - 1.0) * _unit_F(state)
    slope_F, shift_F = activator.affine_F() or (torch.ones_like(code.pre_BK[0]), torch.zeros_like(code.pre_BK[0]))
    z_BF = torch.where(gate_BF, (slope_F * size_BF + shift_F).clamp(min=0), 0.0)
    selected = Code(
        pre_BK=code.pre_BK,
        gate_BK=(z_BF > 0).to(z_BF.dtype),
        z_BK=z_BF * code.pre_BK.sign() if activator.signed else z_BF,
        index_BK=None,
        width=code.width,
        overflow=code.overflow,
    )
    return state.sae.refined(white_BD, selected)


def _unit_F(state: TrainingState) -> Tensor:
    """How far one unit of scale moves each threshold."""
    threshold_F = state.sae.activator.threshold_F()
    return threshold_F.abs().clamp(min=1e-6) if bool((threshold_F != 0).any()) else torch.ones_like(threshold_F)


def _largest(size_BF: Tensor, k: int) -> Tensor:
    """True at the `k` largest positive entries of each row."""
    top = size_BF.topk(min(k, size_BF.shape[-1]), dim=-1)
    return torch.zeros_like(size_BF, dtype=torch.bool).scatter_(-1, top.indices, top.values > 0)


@torch.no_grad()
def scale_for_l0(state: TrainingState, white_BD: White, l0: float) -> float:
    """The scale at which these rows have `l0` active features on average, to one entry of all of them.

    A quantile of pre-activation / threshold: the middle of the gap between the last entry in and the first one out.
    """
    if state.sae.activator.k:
        return state.sae.activator.k / max(1.0, l0)
    activator, unit_F, ratios = state.sae.activator, _unit_F(state), []
    for few_BD in _chunks(white_BD):
        pre_BF = state.sae.encode(White(few_BD), dense=True).pre_BK
        size_BF = pre_BF.abs() if activator.signed else pre_BF
        ratio = 1.0 + (size_BF - activator.threshold_F()) / unit_F
        ratios.append(ratio[ratio > LEAST].cpu())
    pooled = torch.cat([torch.tensor([LEAST]), *ratios])
    rank = min(len(pooled) - 1, round(l0 * white_BD.shape[0]))
    out = float(pooled.kthvalue(len(pooled) - rank).values)
    return 2.0 * out if rank == 0 else (out + float(pooled.kthvalue(len(pooled) - rank + 1).values)) / 2


@torch.no_grad()
def r2_at_l0(state: TrainingState, x_BD: Raw, l0: float, space: str) -> float:
    """Explained variance in `space` that this dictionary reaches when its thresholds are scaled to `l0`."""
    white_BD = state.metric.white(x_BD)
    scale = scale_for_l0(state, white_BD, l0)
    error = torch.zeros((), dtype=torch.float64, device=x_BD.device)
    for few_BD in _chunks(white_BD):
        code = rescaled(state, White(few_BD), scale)
        e_BD = White(few_BD - state.sae.decode(code))
        error += (state.metric.raw_direction(e_BD) if space == "raw" else e_BD).square().sum(dtype=torch.float64)
    return 1.0 - float(error) / x_BD.shape[0] / float(state.metric.variance(space))


def _chunks(white_BD: White) -> Iterator[Tensor]:
    yield from torch.split(white_BD, 2048)
