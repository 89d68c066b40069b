"""Sums of squares in two passes over the data, one forward and one back; plain autograd takes six."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
        return v * (2 * grads[0])


class _Quadratic(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v_BD: Tensor, form_DD: Tensor) -> Tensor:
        half_BD = v_BD @ form_DD
        ctx.save_for_backward(half_BD)
        return _dot(v_BD, half_BD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        half_BD: Tensor = ctx.saved_tensors[0]
        return half_BD * (2 * grads[0]), None


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v_BD: Tensor, gain: Tensor, shift_D: Tensor) -> Tensor:
        ctx.save_for_backward(v_BD, gain)
        return torch.addcmul(shift_D, v_BD, gain)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v_BD, gain = ctx.saved_tensors
        grad_BD = grads[0]
        needs = ctx.needs_input_grad
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
