"""Thresholds scaled after training: what L0 a dictionary needs for which error, and what it reaches at a given L0."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spalf.core.state import TrainingState
from spalf.core.values import Code, Raw, White

LEAST = 0.05
"""Entries below this share of their threshold matter at no useful L0: leaving them out keeps the sort small."""


def rescaled(state: TrainingState, white_BD: White, scale: float) -> Code:
    """The dense code with every threshold multiplied by `scale`; scale 1 is the trained code."""
    code = state.sae.encode(white_BD, dense=True)
    gate_BF = (code.pre_BK > scale * state.sae.activator.threshold_F()).to(code.pre_BK.dtype)
    return Code(
        pre_BK=code.pre_BK,
        gate_BK=gate_BF,
        z_BK=code.pre_BK * gate_BF,
        index_BK=None,
        width=code.width,
        overflow=code.overflow,
    )


@torch.no_grad()
def scale_for_l0(state: TrainingState, white_BD: White, l0: float) -> float:
    """The scale at which these rows have `l0` active features on average, to one entry of all of them.

    A quantile of pre-activation / threshold: the middle of the gap between the last entry in and the first one out.
    """
    threshold_F = state.sae.activator.threshold_F()
    ratios: list[Tensor] = []
    for few_BD in _chunks(white_BD):
        ratio = state.sae.encode(White(few_BD), dense=True).pre_BK / threshold_F
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
