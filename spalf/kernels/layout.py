"""Where the entries of a compact code are: sorted by row, by feature, and those of them that are active.

Shape letters as in spalf/core/values.py; N listed entries of all rows together, sorted by row; A those that are active.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import numpy as np
import torch
from attrs import define
from torch import Tensor
from torch.nn.functional import embedding_bag


def places(mask: Tensor) -> Tensor:
    """Where a mask is true, as ascending places in it read row by row.

    On a CPU words of eight are looked through first: a fifth of the time of `nonzero` where few or some entries are.
    """
    if mask.is_cuda:
        return mask.reshape(-1).nonzero()[:, 0]
    held = mask.reshape(-1).numpy()
    if held.size % 8:
        return torch.from_numpy(np.flatnonzero(held))
    words = held.view(np.int64)
    word_W = np.flatnonzero(words != 0)
    hit_H = np.flatnonzero(words.take(word_W).view(np.bool_))
    return torch.from_numpy((word_W << 3).take(hit_H >> 3) + (hit_H & 7))


def _starts(count: Tensor) -> Tensor:
    """Where each group starts, from the groups' sizes."""
    return count.cumsum(0) - count


@functools.cache
def _sampled() -> Callable[..., Tensor]:
    """torch's product at given places, which says once a process that it is in beta; for no user of ours to read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1), check_invariants=False)
    found: Callable[..., Tensor] = torch.sparse.sampled_addmm
    return found


def csr_places(starts_B: Tensor, feature_N: Tensor) -> tuple[Tensor, Tensor]:
    """Entries sorted by row as `dots` wants them: bounds of the rows, and columns, in 32 bits."""
    ends = starts_B.new_full((1,), feature_N.shape[0])
    return torch.cat([starts_B, ends]).int(), feature_N.int()


def dots(csr: tuple[Tensor, Tensor], x_BD: Tensor, weight_FD: Tensor) -> Tensor:
    """<x_b, weight_f> at the places of `csr_places`, [N]. On a CPU; takes no gradient."""
    shape, none_N = (x_BD.shape[0], weight_FD.shape[0]), x_BD.new_zeros(csr[1].shape[0])
    sampled = _sampled()
    wanted = torch.sparse_csr_tensor(*csr, none_N, shape, check_invariants=False)
    return sampled(wanted, x_BD, weight_FD.T, beta=0.0).values()


def _order(feature_N: Tensor, width: int) -> Tensor:
    """The stable order by feature. On a CPU numbers of 16 bits are sorted by their digits, in a tenth of the time."""
    if feature_N.is_cuda or width > 1 << 16:
        return feature_N.argsort(stable=True)
    return torch.from_numpy(np.argsort(feature_N.numpy().astype(np.uint16), kind="stable"))


@define(eq=False)
class Layout:
    """Entries of a code, sorted by row, and the same sorted by feature once a gradient asks for it.

    `flat_N` is an entry's place in the lists read row by row. Entries are taken by `index_select`, which on a CPU is
    several times as fast as indexing with brackets.
    """

    row_N: Tensor
    feature_N: Tensor
    flat_N: Tensor
    starts_B: Tensor
    width: int
    active: Layout | None = None
    """Of the entries whose code is not 0, once it has been decoded."""
    _turned: tuple[Tensor, Tensor, Tensor] | None = None
    _places: tuple[Tensor, Tensor] | None = None

    def take(self, value_BK: Tensor) -> Tensor:
        """One value per entry [N]."""
        return value_BK.reshape(-1).index_select(0, self.flat_N)

    def put(self, value_N: Tensor, like_BK: Tensor) -> Tensor:
        """One value per entry as lists, 0 elsewhere."""
        out = torch.zeros(like_BK.shape, dtype=value_N.dtype, device=value_N.device)
        out.view(-1).index_copy_(0, self.flat_N, value_N)
        return out

    def by_row(self, value_N: Tensor, weight_FD: Tensor) -> Tensor:
        """out[b] = sum of value * weight[feature] over the entries of row b: [B, D]."""
        return embedding_bag(self.feature_N, weight_FD.detach(), self.starts_B, mode="sum", per_sample_weights=value_N)

    def by_feature(self, value_N: Tensor, x_BD: Tensor) -> Tensor:
        """out[f] = sum of value * x[row] over the entries of feature f: [F, D].

        Sorted by feature this is the same gather as `by_row`, and needs neither a scatter nor a transposed matrix.
        """
        if self._turned is None:
            order_N = _order(self.feature_N, self.width)
            starts_F = _starts(torch.bincount(self.feature_N, minlength=self.width))
            self._turned = order_N, self.row_N.index_select(0, order_N), starts_F
        order_N, turned_N, starts_F = self._turned
        value_N = value_N.index_select(0, order_N)
        return embedding_bag(turned_N, x_BD.detach(), starts_F, mode="sum", per_sample_weights=value_N)

    def dots(self, grad_BD: Tensor, weight_FD: Tensor) -> Tensor:
        """<grad_b, weight_f> of every entry [N], without an [N, D] temporary; autograd does not reach this."""
        if grad_BD.is_cuda:
            out: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                grad_BD, weight_FD, self.feature_N, self.starts_B, self.row_N, 0
            )
            return out
        if self._places is None:
            self._places = csr_places(self.starts_B, self.feature_N)
        return dots(self._places, grad_BD, weight_FD)

    def among(self, value_BK: Tensor, index_BK: Tensor) -> Layout:
        """Of the entries of these lists whose value is not 0: most of a surrogate's window never has one.

        What stands at padding is no entry.
        """
        return layout_of_lists(places((value_BK != 0) & (index_BK < self.width)), index_BK, self.width)


def layout_of_lists(flat_A: Tensor, index_BK: Tensor, width: int) -> Layout:
    """The layout of entries by their ascending places in lists read row by row."""
    rows, listed = index_BK.shape
    # Division is an eighth of the work in 32 bits.
    row_A = (flat_A.int() // listed).long() if index_BK.numel() < 1 << 31 else flat_A // listed
    starts_B = torch.searchsorted(row_A, torch.arange(rows, device=row_A.device))
    feature_A = index_BK.reshape(-1).index_select(0, flat_A)
    return Layout(row_N=row_A, feature_N=feature_A, flat_N=flat_A, starts_B=starts_B, width=width)


def layout_of_places(flat_N: Tensor, rows: int, width: int) -> tuple[Layout, int]:
    """The layout of entries by their ascending places in [B, F], and the length K of the longest list, at least 1."""
    edge_B = torch.arange(rows + 1, device=flat_N.device) * width
    bound_B = torch.searchsorted(flat_N, edge_B)
    starts_B, count_B = bound_B[:-1], bound_B.diff()
    listed = max(1, int(count_B.max())) if rows else 1
    row_N = torch.repeat_interleave(count_B, output_size=flat_N.shape[0])
    # place within the row + row * K
    shift_B = torch.arange(rows, device=flat_N.device) * listed - starts_B
    place_N = torch.arange(flat_N.shape[0], device=flat_N.device) + shift_B.index_select(0, row_N)
    feature_N = torch.sub(flat_N, row_N, alpha=width)
    return Layout(row_N=row_N, feature_N=feature_N, flat_N=place_N, starts_B=starts_B, width=width), listed
