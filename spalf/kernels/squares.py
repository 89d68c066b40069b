"""Sums of squares in two passes over the data, one forward and one back; plain autograd takes six.

On CUDA the scalars stay on the device. Once a Triton backend has been made, the passes that multiply by them are its.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def _fits(t: Tensor) -> bool:
    # Triton launches where the process is, not where the tensors are.
    return (
        t.is_cuda
        and t.dtype == torch.float32
        and t.is_contiguous()
        and t.numel() > 0
        and t.get_device() == torch.cuda.current_device()
    )


def _passes(*tensors: Tensor) -> Any:
    """The Triton passes where they can take these tensors; None: plain torch has to do."""
    if torch.is_grad_enabled():  # somebody differentiates a gradient: kernels leave no graph
        return None
    # The Triton backend brings them: where "torch" was chosen, or Triton cannot compile, they are not there.
    return sys.modules.get("spalf.kernels.affine") if all(map(_fits, tensors)) else None


def _doubled(v: Tensor, by: Tensor) -> Tensor:
    """2 by v, `by` a scalar."""
    passes = _passes(v, by)
    out: Tensor = v * (2 * by) if passes is None else passes.double(v, by)
    return out


def _dot(a: Tensor, b: Tensor) -> Tensor:
    out: Tensor = torch.dot(a.reshape(-1), b.reshape(-1))
    return out


class _Squares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return _dot(v, v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        v: Tensor = ctx.saved_tensors[0]
        return _doubled(v, grads[0])


class _Quadratic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v_BD: Tensor, form_DD: Tensor) -> Tensor:
        half_BD = v_BD @ form_DD
        ctx.save_for_backward(half_BD)
        return _dot(v_BD, half_BD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        half_BD: Tensor = ctx.saved_tensors[0]
        return _doubled(half_BD, grads[0]), None


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v_BD: Tensor, gain: Tensor, shift_D: Tensor) -> Tensor:
        ctx.save_for_backward(v_BD, gain)
        passes = _passes(v_BD, gain, shift_D)
        out: Tensor = torch.addcmul(shift_D, v_BD, gain) if passes is None else passes.forward(v_BD, gain, shift_D)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v_BD, gain = ctx.saved_tensors
        grad_BD = grads[0]
        needs, passes = ctx.needs_input_grad, _passes(grad_BD, v_BD, gain)
        if passes is not None and all(needs):
            to_v_BD, to_gain, to_shift_D = passes.backward(grad_BD, v_BD, gain)
            return to_v_BD, to_gain, to_shift_D
        return (
            grad_BD * gain if needs[0] else None,
            _dot(grad_BD, v_BD) if needs[1] else None,
            grad_BD.sum(0) if needs[2] else None,
        )


def sum_of_squares(v: Tensor) -> Tensor:
    """Sum of the squares of all entries, a scalar."""
    out: Tensor = _Squares.apply(v)  # type: ignore[no-untyped-call]
    return out


def quadratic_form(v_BD: Tensor, form_DD: Tensor) -> Tensor:
    """Sum over rows of v A v', A symmetric and constant, a scalar: one product, whose result is half the gradient."""
    out: Tensor = _Quadratic.apply(v_BD, form_DD)  # type: ignore[no-untyped-call]
    return out


def affine(v_BD: Tensor, gain: Tensor, shift_D: Tensor) -> Tensor:
    """gain v + shift, gain a scalar."""
    out: Tensor = _Affine.apply(v_BD, gain, shift_D)  # type: ignore[no-untyped-call]
    return out
