"""Sparse operations on lists: one dense product to find the entries that matter, all else over those entries alone.

Shape letters as in spalf/core/values.py; N listed entries of all rows together, sorted by row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from spalf.core.protocols import Autoencoder
from spalf.core.values import Code, White
from spalf.kernels.reference import positions

# Entries of the pre-activation held at once: 32 MiB of float32 stay near the cache, and the product is still large.
_BLOCK = 2**23


def _starts(key_N: Tensor, n: int) -> Tensor:
    """Where each of `n` groups starts in the ascending `key_N`."""
    count = torch.bincount(key_N, minlength=n)
    return count.cumsum(0) - count


def _sum_by_row(row_N: Tensor, feature_N: Tensor, value_N: Tensor, weight_FD: Tensor, rows: int) -> Tensor:
    """out[b] = sum of value * weight[feature] over the entries of row b: [rows, D]."""
    return embedding_bag(feature_N, weight_FD, _starts(row_N, rows), mode="sum", per_sample_weights=value_N)


def _sum_by_feature(row_N: Tensor, feature_N: Tensor, value_N: Tensor, x_BD: Tensor, width: int) -> Tensor:
    """out[f] = sum of value * x[row] over the entries of feature f: [width, D].

    Sorted by feature this is the same gather as `_sum_by_row`, and needs neither a scatter nor a transposed matrix.
    """
    sorted_N, order_N = feature_N.sort(stable=True)
    return _sum_by_row(sorted_N, row_N[order_N], value_N[order_N], x_BD, width)


class _Listed(torch.autograd.Function):
    """Pre-activations that are already computed, at listed entries, with the gradient of y W_enc' + b_enc."""

    @staticmethod
    def forward(
        ctx: Any, white_BD: Tensor, weight_FD: Tensor, bias_F: Tensor, pre_BK: Tensor, index_BK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(white_BD, weight_FD, index_BK)
        return pre_BK.view_as(pre_BK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        white_BD, weight_FD, index_BK = ctx.saved_tensors
        width = weight_FD.shape[0]
        row_N, entry_N = (grads[0] != 0).nonzero().T
        value_N, feature_N = grads[0][row_N, entry_N], index_BK[row_N, entry_N]
        grad_white = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_white = _sum_by_row(row_N, feature_N, value_N, weight_FD, white_BD.shape[0])
        if ctx.needs_input_grad[1]:
            grad_weight = _sum_by_feature(row_N, feature_N, value_N, white_BD, width)
        if ctx.needs_input_grad[2]:
            grad_bias = value_N.new_zeros(width).index_add_(0, feature_N, value_N)
        return grad_white, grad_weight, grad_bias, None, None


class _Decode(torch.autograd.Function):
    """z W_dec over listed entries; the gradient at z reaches every listed entry, those with z = 0 included."""

    @staticmethod
    def forward(ctx: Any, z_BK: Tensor, weight_FD: Tensor, index_BK: Tensor) -> Tensor:
        ctx.save_for_backward(z_BK, weight_FD, index_BK)
        row_N, entry_N = (z_BK != 0).nonzero().T
        return _sum_by_row(row_N, index_BK[row_N, entry_N], z_BK[row_N, entry_N], weight_FD, z_BK.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        z_BK, weight_FD, index_BK = ctx.saved_tensors
        grad_BD, width = grads[0].contiguous(), weight_FD.shape[0]
        grad_z = grad_weight = None
        if ctx.needs_input_grad[0]:
            row_N, entry_N = (index_BK < width).nonzero().T
            feature_N, starts_B = index_BK[row_N, entry_N], _starts(row_N, z_BK.shape[0])
            # <g_b, w_f> per entry without an [N, D] temporary; autograd reaches this only by a second forward pass
            dots_N = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                grad_BD, weight_FD, feature_N, starts_B, row_N, 0
            )
            grad_z = torch.zeros_like(z_BK).index_put_((row_N, entry_N), dots_N)
        if ctx.needs_input_grad[1]:
            row_N, entry_N = (z_BK != 0).nonzero().T
            feature_N, value_N = index_BK[row_N, entry_N], z_BK[row_N, entry_N]
            grad_weight = _sum_by_feature(row_N, feature_N, value_N, grad_BD, width)
        return grad_z, grad_weight, None


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
        row_N, feature_N = (pre_CF > reach_F).nonzero().T
        found += row_N.shape[0]
        if found > limit * (start + block_CD.shape[0]):
            return None
        parts.append((row_N + start, feature_N, pre_CF[row_N, feature_N]))
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
        place_N, count_B = positions(row_N, rows)
        listed = max(1, int(count_B.max())) if rows else 1
        index_BK = torch.full((rows, listed), width, dtype=torch.int64, device=white_BD.device)
        index_BK[row_N, place_N] = feature_N
        listed_BK = pre_N.new_zeros(rows, listed)
        listed_BK[row_N, place_N] = pre_N
    pre_BK: Tensor = _Listed.apply(white_BD, sae.W_enc_FD, sae.b_enc_F, listed_BK, index_BK)  # type: ignore[no-untyped-call]
    z_BK, gate_BK = sae.activator(pre_BK, index_BK)
    overflow = torch.zeros((), dtype=torch.bool, device=white_BD.device)
    return Code(pre_BK=pre_BK, gate_BK=gate_BK, z_BK=z_BK, index_BK=index_BK, width=width, overflow=overflow)


def decode(code: Code, sae: Autoencoder) -> White:
    """z @ W_dec [B, D] of a compact code, without gain and bias."""
    assert code.index_BK is not None, "a dense code has no lists"
    out: Tensor = _Decode.apply(code.z_BK, sae.W_dec_FD, code.index_BK)  # type: ignore[no-untyped-call]
    return White(out)
