"""Co-activation and anchor distance on lists: nothing of the size F x F or F x D, nothing that waits for the device.

Shape letters as in spalf/core/values.py; R sampled rows, S entries kept of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from spalf.core.values import White
from spalf.kernels import passes, steps
from spalf.kernels.lists import Lists, power_of_2
from spalf.kernels.update import Away, Pull, Shares, row_block

GRAM = 64
"""Most active features of a row that its Gram matrix holds."""


@frozen(eq=False)
class Picked:
    """Entries of each sampled row that its Gram matrix holds, those that are left over at the end, all [R, S]."""

    index_RS: Tensor
    """Feature, 0 where nothing is left."""
    listed_RS: Tensor
    """The same with the width there, as lists have their padding."""
    on_RS: Tensor
    """int32, 1 where there is an entry."""
    one_RS: Tensor
    """The same in float32."""


def picked(
    index_BK: Tensor, gate_BK: Tensor, sample_R: Tensor, features: tuple[int, int], width: int, draw: torch.Generator
) -> Picked:
    """Of each sampled row at most GRAM entries that are on and of `features`, a uniform subset where there are more."""
    samples, capacity = sample_R.shape[0], index_BK.shape[1]
    keep, at = min(capacity, GRAM), index_BK.device
    key_RK = torch.rand((samples, capacity), generator=draw, device=at) if capacity > GRAM else gate_BK
    index_RS, listed_RS = torch.empty((2, samples, keep), dtype=torch.int64, device=at)
    on_RS, one_RS = (torch.empty((samples, keep), dtype=t, device=at) for t in (torch.int32, torch.float32))
    passes.pick[(samples,)](
        index_BK.contiguous(),
        gate_BK.contiguous(),
        sample_R,
        key_RK,
        index_RS,
        listed_RS,
        on_RS,
        one_RS,
        capacity,
        keep,
        width,
        *features,
        KEYED=capacity > GRAM,
        BLOCK_K=power_of_2(capacity, 16, 1 << 16),
        BLOCK_S=power_of_2(keep, 16, GRAM),
        CHUNK=16,
        num_warps=power_of_2(capacity // 128, 4, 16),
    )
    return Picked(index_RS, listed_RS, on_RS, one_RS)


class _Rows(torch.autograd.Function):
    """weight[index] of what is picked, in the precision of `low`; where nothing is left there is no gradient."""

    @staticmethod
    def forward(ctx: Any, weight_FD: Tensor, pick: Picked, low_FD: Tensor, shares: Shares) -> Tensor:
        ctx.pick, ctx.shares, ctx.shape = pick, shares, weight_FD.shape
        return low_FD[pick.index_RS]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pick, (width, dim) = ctx.pick, ctx.shape
        listed_N1 = pick.listed_RS.view(-1, 1)
        grad_ND = grads[0].reshape(-1, dim)
        if ctx.shares.open:
            # A list of one entry per row, with z = 1: the same sum as a decoder's.
            one_N1 = pick.one_RS.view(-1, 1)
            found = Lists(index_BK=listed_N1, pre_BK=one_N1, count_B=pick.on_RS.view(-1), total=len(listed_N1))
            ctx.shares.add(found, one_N1, grad_ND)
            return None, None, None, None
        out = torch.zeros(width + 1, dim, device=grad_ND.device)
        return out.index_add_(0, listed_N1[:, 0], grad_ND.float())[:width], None, None, None


class _Cosines(torch.autograd.Function):
    """Mean over samples of the mean squared cosine of rows [R, S, D] that are on; samples with a pair count.

    From the Gram matrices alone, G_ij^2 / (G_ii G_jj): no normalised copy of the rows. They are float32 even of rows in
    bfloat16, and symmetric, so that their gradient at the rows is one product.
    """

    @staticmethod
    def forward(ctx: Any, rows_RSD: Tensor, on_RS: Tensor) -> Tensor:
        (samples, size), gram_RSS = on_RS.shape, _gram(rows_RSD)
        out_2R, force_RSS = torch.empty((2, samples), device=on_RS.device), torch.empty_like(gram_RSS)
        passes.cosines[(samples,)](
            gram_RSS,
            on_RS,
            out_2R,
            force_RSS,
            samples,
            size,
            BLOCK_S=power_of_2(size, 16, GRAM),
        )
        total, counted = out_2R.sum(1).unbind()
        counted = counted.clamp(min=1)
        ctx.save_for_backward(rows_RSD, force_RSS, counted)
        return total / counted

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rows_RSD, force_RSS, counted = ctx.saved_tensors
        scaled_RSS = torch.empty_like(force_RSS, dtype=rows_RSD.dtype)
        torch.mul(force_RSS, 2 * grads[0] / counted, out=scaled_RSS)
        return scaled_RSS @ rows_RSD, None


def _gram(rows_RSD: Tensor) -> Tensor:
    """x x' of each block, float32."""
    if rows_RSD.dtype != torch.bfloat16:
        return rows_RSD @ rows_RSD.mT
    if rows_RSD.is_cuda:
        return torch.bmm(rows_RSD, rows_RSD.mT, out_dtype=torch.float32)
    return rows_RSD.float() @ rows_RSD.float().mT


def coactivation(
    pick: Picked,
    weight_FD: Tensor,
    low_FD: Tensor,
    direction: Callable[[White], Tensor],
    shares: Shares,
) -> Tensor:
    """Mean over rows of the mean squared cosine between the features of a row that are on; rows with a pair count."""
    rows_RSD: Tensor = _Rows.apply(weight_FD, pick, low_FD, shares)  # type: ignore[no-untyped-call]
    moved_RSD = direction(White(rows_RSD))
    out: Tensor = _Cosines.apply(moved_RSD, pick.on_RS)  # type: ignore[no-untyped-call]
    return out


class _Distance(torch.autograd.Function):
    """||weight[rows] - target||^2; its gradient 2 (weight - target) is added where the rows are updated."""

    @staticmethod
    def forward(ctx: Any, weight_FD: Tensor, target_AD: Tensor, rows: slice, shares: Shares) -> Tensor:
        ctx.save_for_backward(weight_FD, target_AD)
        ctx.rows, ctx.shares, ctx.away_A = rows, shares, _away(weight_FD, target_AD, rows, shares)
        total: Tensor = ctx.away_A.sum()
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight_FD, target_AD = ctx.saved_tensors
        if ctx.shares.open and ctx.shares.pull is None:
            ctx.shares.pull = Pull(rows=ctx.rows, target_AD=target_AD, strength=2 * grads[0], away_A=ctx.away_A)
            return None, None, None, None
        out_FD = torch.zeros_like(weight_FD)
        out_FD[ctx.rows] = 2 * grads[0] * (weight_FD[ctx.rows] - target_AD)
        return out_FD, None, None, None


def _away(weight_FD: Tensor, target_AD: Tensor, rows: slice, shares: Shares) -> Tensor:
    """Each row's squared distance: what the last update left, or one pass over the rows where somebody else wrote."""
    key = Away.key(weight_FD, target_AD, rows)
    if shares.away is None or shares.away.of != key:
        away_A = torch.empty(target_AD.shape[0], device=weight_FD.device)
        steps.square_distances[away_A.shape](
            weight_FD, target_AD, away_A, rows.start, weight_FD.shape[1], **row_block(weight_FD.shape[1])
        )
        shares.away = Away(key, target_AD, away_A)
    return shares.away.away_A


def distance(weight_FD: Tensor, target_AD: Tensor, rows: slice, shares: Shares) -> Tensor:
    """Sum of squared differences between a range of rows and their targets, a scalar."""
    out: Tensor = _Distance.apply(weight_FD, target_AD, rows, shares)  # type: ignore[no-untyped-call]
    return out
