"""gain v + shift and multiples of [B, D] by the kernels in `passes`; float32, contiguous, not empty."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from spalf.kernels import passes
from spalf.kernels.lists import power_of_2

_ROWS = 32
"""Rows that a program of the backward pass sums: all programs are at work at once, several on each processor."""
_BLOCK = 4096


def double(v: Tensor, by: Tensor) -> Tensor:
    """2 by v, `by` a scalar on the device."""
    out = torch.empty_like(v)
    passes.scale[(triton.cdiv(v.numel(), _BLOCK),)](v, by, out, v.numel(), FACTOR=2, BLOCK=_BLOCK)
    return out


def forward(v_BD: Tensor, gain: Tensor, shift_D: Tensor) -> Tensor:
    """gain v + shift."""
    (rows, dim), out_BD = v_BD.shape, torch.empty_like(v_BD)
    block = power_of_2(dim, 16, 512)
    grid = (triton.cdiv(rows, 8), triton.cdiv(dim, block))
    passes.affine[grid](v_BD, gain, shift_D, out_BD, rows, dim, BLOCK_B=8, BLOCK_D=block)
    return out_BD


def residual(x_BD: Tensor, v_BD: Tensor, gain: Tensor, shift_D: Tensor, dtype: torch.dtype) -> Tensor:
    """x - gain v - shift, in the type that is asked for."""
    (rows, dim), out_BD = v_BD.shape, torch.empty_like(v_BD, dtype=dtype)
    block = power_of_2(dim, 16, 512)
    grid = (triton.cdiv(rows, 8), triton.cdiv(dim, block))
    passes.residual[grid](x_BD, v_BD, gain, shift_D, out_BD, rows, dim, BLOCK_B=8, BLOCK_D=block)
    return out_BD


def backward(grad_BD: Tensor, v_BD: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients at v, gain and shift; their sums have one order."""
    (rows, dim), at = v_BD.shape, v_BD.device
    block = power_of_2(dim, 16, 512)
    parts, slices = triton.cdiv(rows, _ROWS), triton.cdiv(dim, block)
    to_v_BD, to_gain, to_shift_D = torch.empty_like(v_BD), torch.empty((), device=at), torch.empty(dim, device=at)
    sums_PD, dots_PS = torch.empty((parts, dim), device=at), torch.empty((parts, slices), device=at)
    passes.affine_back[(parts, slices)](
        grad_BD, v_BD, gain, to_v_BD, sums_PD, dots_PS, rows, dim, ROWS=_ROWS, BLOCK_B=4, BLOCK_D=block
    )
    passes.fold[(triton.cdiv(dim, 32),)](
        sums_PD, dots_PS, to_shift_D, to_gain, parts, parts * slices, dim, BLOCK_P=32, BLOCK_D=32
    )
    return to_v_BD, to_gain, to_shift_D
