"""Lists of a fixed length per row, made, read and turned over by the kernels in `device`; nothing here waits for them.

Shape letters as in spalf/core/values.py; N entries of all lists together, sorted by feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
import triton
from attrs import frozen
from torch import Tensor

from spalf.kernels import device
from spalf.kernels.reference import matmul

COLUMNS = 2048
"""Features per block of pre-activations: what a block's scan reads still lies in the cache, most of it."""

_BITS = 32
"""Parts of a row's block, at most: a word has a bit for each."""

_ROUNDING = 2.0**-20
"""Several times what float32 rounds a sum or a difference of two numbers by, relative to their size."""

PART, SCAN_WARPS = 128, 1
"""Columns of a block that are looked at together where one of them is near its reach, by a program of so many warps:
within one warp a running count needs no barrier."""

SUM_SLICE, SUM_K, SUM_WARPS = 256, 4, 1
"""Columns of a program of `gather_sum`, entries that it reads at once, and its warps: one reads half a KiB of each row,
and more would wait for each other at the end."""

DOTS_SLICE, DOTS_K, DOTS_WARPS = 256, 8, 1
"""The same of `gather_dots`. A slice of 65,536 rows in bfloat16, 34 MB, stays in the cache."""


def power_of_2(n: int, least: int, most: int) -> int:
    """The power of 2 at or above `n`, within bounds that are powers of 2."""
    return max(least, min(most, 1 << max(0, n - 1).bit_length()))


@frozen(kw_only=True, eq=False)
class Lists:
    """Listed entries per row: feature [B, K] (padding is the width), pre-activation [B, K], and how many matter [B].

    `count_B` may exceed K: then the list of that row is cut. `total` bounds the entries of all rows together.
    """

    index_BK: Tensor
    pre_BK: Tensor
    count_B: Tensor
    total: int

    @cached_property
    def overflow(self) -> Tensor:
        """Whether a row lists more than K entries, or all together more than `total`; a scalar on the device."""
        return (self.count_B > self.index_BK.shape[1]).any() | (self.count_B.sum() > self.total)


def nothing(device: torch.device) -> Lists:
    """Lists of no row."""
    index_BK = torch.zeros((0, 1), dtype=torch.int64, device=device)
    count_B = torch.zeros(0, dtype=torch.int32, device=device)
    return Lists(index_BK=index_BK, pre_BK=index_BK.float(), count_B=count_B, total=0)


def scan(
    white_BD: Tensor,
    weight_FD: Tensor,
    bias_F: Tensor,
    reach_F: Tensor,
    capacity: int,
    compute: str = "float32",
    total: int = 0,
) -> Lists:
    """Entries of white @ weight' + bias above `reach`, ascending, at most `capacity` per row; never [B, F].

    `total`: how many there may be in all rows together; 0 for as many as the lists hold.
    """
    rows, width = white_BD.shape[0], weight_FD.shape[0]
    at = white_BD.device
    index_BK = torch.full((rows, capacity), width, dtype=torch.int64, device=at)
    pre_BK = torch.zeros((rows, capacity), device=at)
    count_B = torch.zeros(rows, dtype=torch.int32, device=at)
    bias_F, reach_F = bias_F.float().contiguous(), reach_F.float().contiguous()
    cut_F = reach_F - bias_F
    cut_F -= _ROUNDING * (reach_F.abs() + bias_F.abs())  # a sum that rounds to above `reach` is not to be missed
    if compute == "bfloat16":
        white_BD = white_BD.bfloat16()  # once, not in every block
    for first in range(0, width, COLUMNS):
        pre_BC = matmul(white_BD, weight_FD[first : first + COLUMNS].T, compute)
        columns = pre_BC.shape[1]
        block = power_of_2(columns, 16, COLUMNS)
        part = max(min(PART, block), block // _BITS)
        device.compact_columns[(rows,)](
            pre_BC,
            bias_F,
            reach_F,
            cut_F,
            index_BK,
            pre_BK,
            count_B,
            columns,
            first,
            capacity,
            PARTS=triton.cdiv(block, part),
            PART=part,
            num_warps=SCAN_WARPS,
        )
    return Lists(
        index_BK=index_BK, pre_BK=pre_BK, count_B=count_B, total=min(total or rows * capacity, rows * capacity)
    )


def gather_sum(index_BK: Tensor, z_BK: Tensor, count_B: Tensor, weight_FD: Tensor) -> Tensor:
    """out[b] = sum_k z[b, k] weight[index[b, k]], [B, D] float32."""
    (rows, capacity), dim = index_BK.shape, weight_FD.shape[1]
    out_BD = torch.empty((rows, dim), device=z_BK.device)
    block = power_of_2(dim, 16, SUM_SLICE)
    device.gather_sum[(rows, triton.cdiv(dim, block))](
        index_BK, z_BK.contiguous(), count_B, weight_FD, out_BD, capacity, dim,
        BLOCK_K=SUM_K, BLOCK_D=block, num_warps=SUM_WARPS,
    )  # fmt: skip
    return out_BD


@frozen(kw_only=True, eq=False)
class Dots:
    """<grad[b], weight[index[b, k]]> by slices of the columns, [S, B, K]; beyond a list they are not set."""

    parts_SBK: Tensor
    count_B: Tensor

    @property
    def block(self) -> int:
        """Entries that a program takes at once."""
        return power_of_2(self.parts_SBK.shape[2], 16, 256)

    def sum(self, add_BK: Tensor | None = None) -> Tensor:
        """The products [B, K], plus `add`; 0 beyond a list."""
        (slices, rows, capacity), out_BK = self.parts_SBK.shape, torch.empty_like(self.parts_SBK[0])
        device.fold_dots[(rows,)](
            self.parts_SBK, out_BK if add_BK is None else add_BK, self.count_B, out_BK,
            slices, rows * capacity, capacity, ADD=add_BK is not None, BLOCK=self.block, num_warps=1,
        )  # fmt: skip
        return out_BK


def gather_dots(
    index_BK: Tensor, count_B: Tensor, grad_BD: Tensor, weight_FD: Tensor, only_BK: Tensor | None = None
) -> Dots:
    """<grad[b], weight[index[b, k]]>; with `only`, 0 for entries where it is 0."""
    (rows, capacity), dim = index_BK.shape, weight_FD.shape[1]
    block = power_of_2(dim, 16, DOTS_SLICE)
    slices = triton.cdiv(dim, block)
    out_SBK = torch.empty((slices, rows, capacity), device=grad_BD.device)
    device.gather_dots[(rows, slices)](
        index_BK, count_B, index_BK if only_BK is None else only_BK, grad_BD.contiguous(), weight_FD, out_SBK,
        rows, capacity, dim, ONLY=only_BK is not None, BLOCK_K=DOTS_K, BLOCK_D=block, num_warps=DOTS_WARPS,
    )  # fmt: skip
    return Dots(parts_SBK=out_SBK, count_B=count_B)


@frozen(kw_only=True, eq=False)
class ByFeature:
    """The entries of one or several lists sorted by feature, rows ascending within one: a sparse matrix turned over.

    Entry n came from place `from_N[n]` of the flattened lists and lies in row `row_N[n]`; feature f has the entries
    from `starts_F1[f]` to `starts_F1[f + 1]`. `order_F` names the features by falling count: one that fires on every
    row takes as long as thousands of others, so it has to start first.
    """

    from_N: Tensor
    row_N: Tensor
    starts_F1: Tensor
    order_F: Tensor

    def take(self, value_BK: Tensor) -> Tensor:
        """One value per entry, in the order of the features, [N]."""
        return value_BK.reshape(-1)[self.from_N]


def turn_over(all_lists: Sequence[Lists], width: int) -> ByFeature:
    """Sort the entries of lists by feature; the rows of a second one count on from those of the first.

    A stable sort, so that the sums over a feature's entries have one order. Nothing waits for the device. Entries are
    packed before they are sorted: most of a list is padding, for one row in thousands lists ten times the mean.
    """
    at, many = all_lists[0].index_BK.device, sum(lists.total for lists in all_lists)
    key_N = torch.full((many,), width, dtype=torch.int32, device=at)
    place_N, row_N = (torch.zeros(many, dtype=torch.int32, device=at) for _ in range(2))
    first, first_place, first_row = 0, 0, 0
    for lists in all_lists:
        rows, capacity = lists.index_BK.shape
        span = slice(first, first + lists.total)
        listed_B = lists.count_B.clamp(max=capacity)
        if rows == 0:
            continue
        device.pack[(rows,)](
            lists.index_BK, lists.count_B, listed_B.cumsum(0) - listed_B,
            key_N[span], place_N[span], row_N[span], capacity, lists.total, first_place, first_row,
            BLOCK=power_of_2(capacity, 16, 256), num_warps=1,
        )  # fmt: skip
        first, first_place, first_row = span.stop, first_place + rows * capacity, first_row + rows
    sorted_N, from_N = torch.sort(key_N, stable=True)
    edge_F1 = torch.arange(width + 1, dtype=torch.int32, device=at)
    starts_F1 = torch.searchsorted(sorted_N, edge_F1).to(torch.int32)
    order_F = (starts_F1[1:] - starts_F1[:-1]).argsort(descending=True)
    return ByFeature(from_N=place_N[from_N], row_N=row_N[from_N], starts_F1=starts_F1, order_F=order_F.to(torch.int32))


def sum_by_feature(by: ByFeature, value_N: Tensor, x_BD: Tensor, width: int) -> Tensor:
    """out[f] = sum of value * x[row] over the entries of feature f, [F, D] float32; deterministic."""
    dim = x_BD.shape[1]
    out_FD = torch.empty((width, dim), device=x_BD.device)
    block = power_of_2(dim, 16, 1024)
    device.sum_by_feature[(width, triton.cdiv(dim, block))](
        by.starts_F1,
        by.row_N,
        value_N.contiguous(),
        x_BD.contiguous(),
        out_FD,
        by.order_F,
        value_N.numel(),
        dim,
        BLOCK_N=4,
        BLOCK_D=block,
    )
    return out_FD


def by_feature(found: Lists, value_BK: Tensor, x_BD: Tensor, width: int) -> Tensor:
    """out[f] = sum of value * x[row] over the entries of feature f: a whole gradient matrix [F, D]."""
    by = turn_over([found], width)
    return sum_by_feature(by, by.take(value_BK), x_BD, width)
