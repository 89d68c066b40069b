"""Sparse operations on lists: one dense product to find the entries that matter, all else over those entries alone.

Shape letters as in spalf/core/values.py; N listed entries of all rows together, sorted by row; A those that are active.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from spalf.core.protocols import Autoencoder
from spalf.core.values import Code, White
from spalf.kernels import screen
from spalf.kernels.layout import Layout, layout_of_lists, layout_of_places, places

# Entries of the pre-activation held at once: 32 MiB of float32 stay near the cache, and the product is still large.
_BLOCK = 2**23

# Candidates of the screening product per entry that is allowed, above which a dense code is certain enough. On trained
# dictionaries a quarter more are candidates than are listed.
_CANDIDATES = 2

# Of lists that are in use, so that `decode` and every gradient find what `encode` knew; forgotten with the lists.
_LAYOUTS: MutableMapping[Tensor, Layout] = WeakTensorKeyDictionary()


def _layout_of(index_BK: Tensor, width: int) -> Layout:
    """The layout of a code's lists: what `encode` found, as long as the lists are its own."""
    held = _LAYOUTS.get(index_BK)
    if held is None:
        held = layout_of_lists(places(index_BK < width), index_BK, width)
    return held


class _Listed(torch.autograd.Function):
    """Pre-activations that are already computed, at listed entries, with the gradient of y W_enc' + b_enc."""

    @staticmethod
    def forward(
        ctx: Any, white_BD: Tensor, weight_FD: Tensor, bias_F: Tensor, pre_BK: Tensor, index_BK: Tensor, layout: Layout
    ) -> Tensor:
        ctx.save_for_backward(white_BD, weight_FD, index_BK)
        ctx.layout = layout
        return pre_BK.view_as(pre_BK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        white_BD, weight_FD, index_BK = ctx.saved_tensors
        layout: Layout = ctx.layout
        kept = _reached(layout, grads[0], index_BK)
        value_A = kept.take(grads[0])
        grad_white = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_white = kept.by_row(value_A, weight_FD)
        if ctx.needs_input_grad[1]:
            grad_weight = kept.by_feature(value_A, white_BD)
        if ctx.needs_input_grad[2]:
            grad_bias = value_A.new_zeros(layout.width).index_add_(0, kept.feature_N, value_A)
        return grad_white, grad_weight, grad_bias, None, None, None


def _reached(layout: Layout, grad_BK: Tensor, index_BK: Tensor) -> Layout:
    """Of the entries that a gradient reaches: the active ones as a rule, whose order by feature is known by then."""
    if layout.active is not None and grad_BK.numel():
        rest_BK = grad_BK.clone(memory_format=torch.contiguous_format)
        least, most = rest_BK.view(-1).index_fill_(0, layout.active.flat_N, 0.0).aminmax()
        if float(least) == 0.0 == float(most):
            return layout.active
    return layout.among(grad_BK, index_BK)


class _Decode(torch.autograd.Function):
    """z W_dec over listed entries; the gradient at z reaches every listed entry, those with z = 0 included."""

    @staticmethod
    def forward(ctx: Any, z_BK: Tensor, weight_FD: Tensor, index_BK: Tensor, layout: Layout) -> Tensor:
        layout.active = layout.among(z_BK, index_BK)
        z_A = layout.active.take(z_BK)
        ctx.save_for_backward(z_A, weight_FD, index_BK)
        ctx.layout, ctx.active = layout, layout.active
        return layout.active.by_row(z_A, weight_FD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z_A, weight_FD, index_BK = ctx.saved_tensors
        layout: Layout = ctx.layout
        active: Layout = ctx.active
        grad_BD = grads[0].contiguous()
        grad_z = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_z = layout.put(layout.dots(grad_BD, weight_FD), index_BK)
        if ctx.needs_input_grad[1]:
            grad_weight = active.by_feature(z_A, grad_BD)
        return grad_z, grad_weight, None, None


class _Correlate(torch.autograd.Function):
    """<v_b, w> over listed entries, 0 at padding: the transpose of `_Decode` in its weights."""

    @staticmethod
    def forward(ctx: Any, v_BD: Tensor, weight_FD: Tensor, layout: Layout, like_BK: Tensor) -> Tensor:
        ctx.save_for_backward(v_BD, weight_FD)
        ctx.layout = layout
        return layout.put(layout.dots(v_BD.contiguous(), weight_FD), like_BK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v_BD, weight_FD = ctx.saved_tensors
        layout: Layout = ctx.layout
        value_N = layout.take(grads[0])
        grad_v = layout.by_row(value_N, weight_FD) if ctx.needs_input_grad[0] else None
        grad_weight = layout.by_feature(value_N, v_BD) if ctx.needs_input_grad[1] else None
        return grad_v, grad_weight, None, None


def _greater(pre_CF: Tensor, reach_F: Tensor) -> Tensor:
    """pre > reach, [C, F]. On a CPU through numpy, which compares in vectors."""
    if pre_CF.is_cuda:
        return pre_CF > reach_F
    return torch.from_numpy(np.greater(pre_CF.numpy(), reach_F.numpy()))


def _screened(
    block_CD: Tensor, weight_FD: Tensor, bias_F: Tensor, reach_F: Tensor, limit: float
) -> tuple[Tensor, Tensor] | None:
    """(flat_N, pre_N) as `_scan` gives of one block: what may be above reach is found in bfloat16, then computed.

    None where so much may be that the entries surely exceed `limit` per row.
    """
    flat_N = screen.candidates(block_CD, weight_FD, reach_F - bias_F)
    if flat_N.shape[0] > _CANDIDATES * limit * block_CD.shape[0]:
        return None
    layout, _ = layout_of_places(flat_N, block_CD.shape[0], weight_FD.shape[0])
    pre_N = layout.dots(block_CD, weight_FD).add_(bias_F.index_select(0, layout.feature_N))
    kept_N = places(pre_N > reach_F.index_select(0, layout.feature_N))
    return flat_N.index_select(0, kept_N), pre_N.index_select(0, kept_N)


def _scan(
    white_BD: Tensor, weight_FD: Tensor, bias_F: Tensor, reach_F: Tensor, limit: float
) -> tuple[Tensor, Tensor] | None:
    """(flat_N, pre_N) of the entries above reach, by their place in [B, F] read row by row.

    None where they exceed `limit` per row on average.
    """
    rows, width = white_BD.shape[0], weight_FD.shape[0]
    step = min(max(1, rows), max(64, _BLOCK // width))
    buffer_CF = torch.empty(step, width, dtype=white_BD.dtype, device=white_BD.device)
    parts: list[tuple[Tensor, Tensor]] = []
    found = 0
    for start in range(0, rows, step):
        block_CD = white_BD[start : start + step]
        if screen.pays(block_CD, weight_FD):
            screened = _screened(block_CD, weight_FD, bias_F, reach_F, limit)
            if screened is None:
                return None
            flat_N, pre_N = screened
        else:
            pre_CF = torch.addmm(bias_F, block_CD, weight_FD.T, out=buffer_CF[: block_CD.shape[0]])
            flat_N = places(_greater(pre_CF, reach_F))
            pre_N = pre_CF.view(-1).index_select(0, flat_N)
        found += flat_N.shape[0]
        if found > limit * (start + block_CD.shape[0]):
            return None
        parts.append((flat_N + start * width if start else flat_N, pre_N))
    if not parts:
        return torch.zeros(0, dtype=torch.int64, device=white_BD.device), white_BD.new_zeros(0)
    if len(parts) == 1:
        return parts[0]
    flat_N, pre_N = (torch.cat(column) for column in zip(*parts, strict=True))
    return flat_N, pre_N


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
        flat_N, pre_N = found
        rows, width = white_BD.shape[0], sae.width
        layout, listed = layout_of_places(flat_N, rows, width)
        index_BK = torch.full((rows, listed), width, dtype=torch.int64, device=white_BD.device)
        index_BK.view(-1).index_copy_(0, layout.flat_N, layout.feature_N)
        _LAYOUTS[index_BK] = layout
        listed_BK = layout.put(pre_N, index_BK)
    pre_BK: Tensor = _Listed.apply(  # type: ignore[no-untyped-call]
        white_BD, sae.W_enc_FD, sae.b_enc_F, listed_BK, index_BK, layout
    )
    z_BK, gate_BK = sae.activator(pre_BK, index_BK)
    overflow = torch.zeros((), dtype=torch.bool, device=white_BD.device)
    return Code(pre_BK=pre_BK, gate_BK=gate_BK, z_BK=z_BK, index_BK=index_BK, width=width, overflow=overflow)


def decode(code: Code, sae: Autoencoder) -> White:
    """z @ W_dec [B, D] of a compact code, without gain and bias."""
    assert code.index_BK is not None, "a dense code has no lists"
    layout = _layout_of(code.index_BK, code.width)
    out: Tensor = _Decode.apply(code.z_BK, sae.W_dec_FD, code.index_BK, layout)  # type: ignore[no-untyped-call]
    return White(out)


def correlate(code: Code, v_BD: Tensor, sae: Autoencoder) -> Tensor:
    """<v_b, w> of every listed entry, [B, K], 0 at padding."""
    assert code.index_BK is not None, "a dense code has no lists"
    layout = _layout_of(code.index_BK, code.width)
    out: Tensor = _Correlate.apply(v_BD, sae.W_dec_FD, layout, code.index_BK)  # type: ignore[no-untyped-call]
    return out


def per_row(code: Code, rows: slice) -> Tensor:
    """Active features of each row within `rows`, [B], in the code's type; on a CPU through the active entries alone."""
    gate_BK, index_BK = code.gate_BK.detach(), code.index_BK
    if index_BK is None or gate_BK.is_cuda:
        within_BK = 1 if index_BK is None else (index_BK >= rows.start) & (index_BK < rows.stop)
        k_B: Tensor = (gate_BK[:, rows] if index_BK is None else gate_BK * within_BK).sum(-1)
        return k_B
    layout = _layout_of(index_BK, code.width)
    held = layout.active
    if held is None or len(held.flat_N) != int(gate_BK.sum()):
        held = layout.among(gate_BK, index_BK)
    within_A = (held.feature_N >= rows.start) & (held.feature_N < rows.stop)
    return torch.bincount(held.row_N, weights=within_A.to(gate_BK.dtype), minlength=len(gate_BK)).to(gate_BK.dtype)
