"""Sparse operations on lists: one dense product to find the entries that matter, all else over those entries alone.

Shape letters as in spalf/core/values.py; N listed entries of all rows together, sorted by row.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from attrs import define
from torch import Tensor
from torch.nn.functional import embedding_bag
from torch.utils.weak import WeakTensorKeyDictionary

from spalf.core.protocols import Autoencoder
from spalf.core.values import Code, White

# Entries of the pre-activation held at once: 32 MiB of float32 stay near the cache, and the product is still large.
_BLOCK = 2**23


def _starts(count: Tensor) -> Tensor:
    """Where each group starts, from the groups' sizes."""
    return count.cumsum(0) - count


@define(eq=False)
class Layout:
    """The listed entries of a code, sorted by row, and the same sorted by feature once a gradient asks for it.

    `flat_N` is an entry's place in the lists read row by row. Entries are taken by `index_select`, which on a CPU is
    several times as fast as indexing with brackets.
    """

    row_N: Tensor
    feature_N: Tensor
    flat_N: Tensor
    starts_B: Tensor
    width: int
    _turned: tuple[Tensor, Tensor, Tensor] | None = None

    def take(self, value_BK: Tensor) -> Tensor:
        """One value per entry [N]."""
        return value_BK.reshape(-1).index_select(0, self.flat_N)

    def put(self, value_N: Tensor, like_BK: Tensor) -> Tensor:
        """One value per entry as lists, padding 0."""
        out = torch.zeros(like_BK.shape, dtype=value_N.dtype, device=value_N.device)
        out.view(-1).index_copy_(0, self.flat_N, value_N)
        return out

    def by_row(self, value_N: Tensor, weight_FD: Tensor) -> Tensor:
        """out[b] = sum of value * weight[feature] over the entries of row b: [B, D]."""
        return embedding_bag(self.feature_N, weight_FD, self.starts_B, mode="sum", per_sample_weights=value_N)

    def by_feature(self, value_N: Tensor, x_BD: Tensor) -> Tensor:
        """out[f] = sum of value * x[row] over the entries of feature f: [F, D].

        Sorted by feature this is the same gather as `by_row`, and needs neither a scatter nor a transposed matrix.
        """
        if self._turned is None:
            order_N = self.feature_N.argsort(stable=True)
            starts_F = _starts(torch.bincount(self.feature_N, minlength=self.width))
            self._turned = order_N, self.row_N.index_select(0, order_N), starts_F
        order_N, turned_N, starts_F = self._turned
        value_N = value_N.index_select(0, order_N)
        return embedding_bag(turned_N, x_BD, starts_F, mode="sum", per_sample_weights=value_N)

    def dots(self, grad_BD: Tensor, weight_FD: Tensor) -> Tensor:
        """<grad_b, weight_f> of every entry [N], without an [N, D] temporary; autograd does not reach this."""
        out: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            grad_BD, weight_FD, self.feature_N, self.starts_B, self.row_N, 0
        )
        return out


# Of lists that are in use, so that `decode` and every gradient find what `encode` knew; forgotten with the lists.
_LAYOUTS: MutableMapping[Tensor, Layout] = WeakTensorKeyDictionary()


def _layout(row_N: Tensor, feature_N: Tensor, rows: int, width: int) -> tuple[Layout, int]:
    """The layout of entries sorted by row, and the length K of the longest list, at least 1."""
    count_B = torch.bincount(row_N, minlength=rows)
    listed = max(1, int(count_B.max())) if rows else 1
    starts_B = _starts(count_B)
    # place within the row + row * K
    shift_B = torch.arange(rows, device=row_N.device) * listed - starts_B
    flat_N = torch.arange(row_N.shape[0], device=row_N.device) + shift_B.index_select(0, row_N)
    return Layout(row_N=row_N, feature_N=feature_N, flat_N=flat_N, starts_B=starts_B, width=width), listed


def _layout_of(index_BK: Tensor, width: int) -> Layout:
    """The layout of a code's lists: what `encode` found, as long as the lists are its own."""
    held = _LAYOUTS.get(index_BK)
    if held is None:
        row_N, entry_N = (index_BK < width).nonzero().T
        flat_N = row_N * index_BK.shape[1] + entry_N
        starts_B = _starts((index_BK < width).sum(1))
        feature_N = index_BK.reshape(-1).index_select(0, flat_N)
        held = Layout(row_N=row_N, feature_N=feature_N, flat_N=flat_N, starts_B=starts_B, width=width)
    return held


class _Listed(torch.autograd.Function):
    """Pre-activations that are already computed, at listed entries, with the gradient of y W_enc' + b_enc."""

    @staticmethod
    def forward(
        ctx: Any, white_BD: Tensor, weight_FD: Tensor, bias_F: Tensor, pre_BK: Tensor, layout: Layout
    ) -> Tensor:
        ctx.save_for_backward(white_BD, weight_FD)
        ctx.layout = layout
        return pre_BK.view_as(pre_BK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        white_BD, weight_FD = ctx.saved_tensors
        layout: Layout = ctx.layout
        value_N = layout.take(grads[0])
        grad_white = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_white = layout.by_row(value_N, weight_FD)
        if ctx.needs_input_grad[1]:
            grad_weight = layout.by_feature(value_N, white_BD)
        if ctx.needs_input_grad[2]:
            grad_bias = value_N.new_zeros(layout.width).index_add_(0, layout.feature_N, value_N)
        return grad_white, grad_weight, grad_bias, None, None


class _Decode(torch.autograd.Function):
    """z W_dec over listed entries; the gradient at z reaches every listed entry, those with z = 0 included."""

    @staticmethod
    def forward(ctx: Any, z_BK: Tensor, weight_FD: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(z_BK, weight_FD)
        ctx.layout = layout
        return layout.by_row(layout.take(z_BK), weight_FD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        z_BK, weight_FD = ctx.saved_tensors
        layout: Layout = ctx.layout
        grad_BD = grads[0].contiguous()
        grad_z = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_z = layout.put(layout.dots(grad_BD, weight_FD), z_BK)
        if ctx.needs_input_grad[1]:
            grad_weight = layout.by_feature(layout.take(z_BK), grad_BD)
        return grad_z, grad_weight, None


class _Correlate(torch.autograd.Function):
    """<v_b, w> over listed entries, 0 at padding: the transpose of `_Decode` in its weights."""

    @staticmethod
    def forward(ctx: Any, v_BD: Tensor, weight_FD: Tensor, layout: Layout, like_BK: Tensor) -> Tensor:
        ctx.save_for_backward(v_BD, weight_FD)
        ctx.layout = layout
        return layout.put(layout.dots(v_BD.contiguous(), weight_FD), like_BK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v_BD, weight_FD = ctx.saved_tensors
        layout: Layout = ctx.layout
        value_N = layout.take(grads[0])
        grad_v = layout.by_row(value_N, weight_FD) if ctx.needs_input_grad[0] else None
        grad_weight = layout.by_feature(value_N, v_BD) if ctx.needs_input_grad[1] else None
        return grad_v, grad_weight, None, None


def _above(mask_CF: Tensor) -> Tensor:
    """Where a mask is true, as ascending places in it read row by row.

    Few entries are: words of eight are looked through first, which takes half the time of `nonzero` on a CPU.
    """
    mask_N = mask_CF.reshape(-1)
    if mask_N.numel() % 8 or mask_N.is_cuda:
        return mask_N.nonzero()[:, 0]
    word_W = mask_N.view(torch.int64).nonzero()[:, 0]
    hit_H, byte_H = mask_N.view(-1, 8).index_select(0, word_W).nonzero().T
    at_N: Tensor = word_W.index_select(0, hit_H) * 8 + byte_H
    return at_N


def _scan(
    white_BD: Tensor, weight_FD: Tensor, bias_F: Tensor, reach_F: Tensor, limit: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(row_N, feature_N, pre_N) of the entries above reach, or None where they exceed `limit` per row on average."""
    rows, width = white_BD.shape[0], weight_FD.shape[0]
    step = min(max(1, rows), max(64, _BLOCK // width))
    buffer_CF = torch.empty(step, width, dtype=white_BD.dtype, device=white_BD.device)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    found = 0
    for start in range(0, rows, step):
        block_CD = white_BD[start : start + step]
        pre_CF = torch.addmm(bias_F, block_CD, weight_FD.T, out=buffer_CF[: block_CD.shape[0]])
        flat_N = _above(pre_CF > reach_F)
        found += flat_N.shape[0]
        if found > limit * (start + block_CD.shape[0]):
            return None
        row_N = flat_N // width
        parts.append((row_N + start, flat_N - row_N * width, pre_CF.view(-1).index_select(0, flat_N)))
    if not parts:
        none = torch.zeros(0, dtype=torch.int64, device=white_BD.device)
        return none, none, white_BD.new_zeros(0)
    row_N, feature_N, pre_N = (torch.cat(column) for column in zip(*parts, strict=True))
    return row_N, feature_N, pre_N


def encode(white_BD: White, sae: Autoencoder, limit: float = float("inf")) -> Code | None:
    """The compact code of whitened rows, K being the longest list of the batch.

    None where the entries exceed `limit` per row on average, in a block of rows and those before it: there a dense
    code is faster. The activator has to have a reach. On CUDA the length of the lists waits for the device.
    """
    reach_F = sae.activator.reach_F()
    assert reach_F is not None, "a compact code needs an activator with a reach"
    with torch.no_grad():
        found = _scan(white_BD.detach(), sae.W_enc_FD.detach(), sae.b_enc_F.detach(), reach_F, limit)
        if found is None:
            return None
        row_N, feature_N, pre_N = found
        rows, width = white_BD.shape[0], sae.width
        layout, listed = _layout(row_N, feature_N, rows, width)
        index_BK = torch.full((rows, listed), width, dtype=torch.int64, device=white_BD.device)
        index_BK.view(-1).index_copy_(0, layout.flat_N, feature_N)
        _LAYOUTS[index_BK] = layout
        listed_BK = layout.put(pre_N, index_BK)
    pre_BK: Tensor = _Listed.apply(white_BD, sae.W_enc_FD, sae.b_enc_F, listed_BK, layout)  # type: ignore[no-untyped-call]
    z_BK, gate_BK = sae.activator(pre_BK, index_BK)
    overflow = torch.zeros((), dtype=torch.bool, device=white_BD.device)
    return Code(pre_BK=pre_BK, gate_BK=gate_BK, z_BK=z_BK, index_BK=index_BK, width=width, overflow=overflow)


def decode(code: Code, sae: Autoencoder) -> White:
    """z @ W_dec [B, D] of a compact code, without gain and bias."""
    assert code.index_BK is not None, "a dense code has no lists"
    out: Tensor = _Decode.apply(code.z_BK, sae.W_dec_FD, _layout_of(code.index_BK, code.width))  # type: ignore[no-untyped-call]
    return White(out)


def correlate(code: Code, v_BD: Tensor, sae: Autoencoder) -> Tensor:
    """<v_b, w> of every listed entry, [B, K], 0 at padding."""
    assert code.index_BK is not None, "a dense code has no lists"
    layout = _layout_of(code.index_BK, code.width)
    out: Tensor = _Correlate.apply(v_BD, sae.W_dec_FD, layout, code.index_BK)  # type: ignore[no-untyped-call]
    return out
