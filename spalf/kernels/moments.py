"""How Adam's moments of a matrix are kept: as torch keeps them, in bfloat16, or in 8 bits.

In 8 bits (after arXiv 2110.02861, with a scale for each row in place of a block) a moment is sign, code and its row's
power of 2, S <= max x < 2 S. A magnitude x is kept as the float32 x / S + 2^-14, cut to 3 bits of mantissa (the mean)
or 4 (the mean of squares): of even precision over 14 octaves below the row's largest, then evenly spaced down to 0. A
linear code would end at a 127th: coordinates whose gradients are a hundredth of the row's largest would be noise.
The step keeps no mean of squares below 2^-18 S, so that it never divides by what has been rounded away.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from spalf.core.state import Learner
from spalf.kernels.steps import FLOOR_BITS

_FLOOR_BITS: int = FLOOR_BITS.value
_FLOOR = 2.0**-14
_MANTISSA = {torch.int8: 3, torch.uint8: 4}
_AT_ONCE = 1 << 24
"""Numbers that are turned into codes and back at a time, so that little memory is taken on the way."""


@frozen(eq=False)
class Coded:
    """A moment in 8 bits: int8 [F, D] of a mean, uint8 of a mean of squares, and each row's power of 2, float32 [F]."""

    code_FD: Tensor
    scale_F: Tensor

    @classmethod
    def zeros(cls, like_FD: Tensor, dtype: torch.dtype) -> Coded:
        code_FD = torch.zeros(like_FD.shape, dtype=dtype, device=like_FD.device)
        return cls(code_FD, torch.zeros(len(like_FD), device=like_FD.device))

    @classmethod
    def of(cls, x_FD: Tensor, dtype: torch.dtype) -> Coded:
        """To the nearest code; what `unpacked` has given comes back bit for bit, as numbers."""
        out = cls.zeros(x_FD, dtype)
        for rows in out._parts():
            few_RD = x_FD[rows].float()
            out.scale_F[rows] = _power(few_RD.abs().amax(1), 23 - _MANTISSA[dtype])
            out.code_FD[rows] = _code(few_RD, out.scale_F[rows, None], dtype)
        return out

    def unpacked(self) -> Tensor:
        """Float32 [F, D]."""
        out_FD = torch.empty(self.code_FD.shape, device=self.code_FD.device)
        shift = 23 - _MANTISSA[self.code_FD.dtype]
        for rows in self._parts():
            code_RD = self.code_FD[rows].int()
            size_RD = ((code_RD.abs() << shift) + _FLOOR_BITS).view(torch.float32) - _FLOOR
            out_FD[rows] = size_RD * self.scale_F[rows, None] * code_RD.sign()
        return out_FD

    def clear_(self, rows: Tensor) -> None:
        """Zero these rows."""
        self.code_FD[rows] = 0

    def _parts(self) -> Iterator[slice]:
        (height, dim) = self.code_FD.shape
        step = max(1, _AT_ONCE // max(1, dim))
        return (slice(start, start + step) for start in range(0, height, step))


def _power(largest_R: Tensor, shift: int) -> Tensor:
    """The power of 2 below each row's largest number; the next one where rounding has moved that over the edge.

    A number that is a code's by one power is none's by the others, up to their last bit.
    """
    power_R = (largest_R.view(torch.int32) & 0x7F800000).view(torch.float32)
    out_R = power_R.clone()
    for factor in (0.5, 2.0, 1.0):
        shifted_R = torch.where(power_R > 0, largest_R / (factor * power_R), 0.0) + _FLOOR
        is_code_R = (shifted_R.view(torch.int32) & ((1 << shift) - 1)) == 0
        out_R = torch.where(is_code_R, factor * power_R, out_R)
    return out_R


def _code(x_RD: Tensor, scale_R1: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest code of each number; of one above 0 that stands for a mean of squares, not 0."""
    shift = 23 - _MANTISSA[dtype]
    shifted_RD = torch.where(scale_R1 > 0, x_RD.abs() / scale_R1, 0.0) + _FLOOR
    code_RD = (shifted_RD.view(torch.int32) - _FLOOR_BITS + (1 << (shift - 1))) >> shift
    if dtype == torch.uint8:
        return code_RD.maximum((x_RD > 0).int()).to(dtype)
    return torch.where(x_RD < 0, -code_RD, code_RD).to(dtype)


def _state(learner: Learner, parameter: Tensor) -> dict[str, Any]:
    """What the optimizer keeps of a parameter, with a count of steps."""
    state: dict[str, Any] = learner.optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
    return state


def full(learner: Learner, parameter: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """(steps done, first moment, second moment) in `dtype`, made where there are none, as torch's Adam makes them."""
    state = _state(learner, parameter)
    for name in ("exp_avg", "exp_avg_sq"):
        held = state.get(name)
        if held is None:
            state[name] = torch.zeros_like(parameter, dtype=dtype)
        elif isinstance(held, Coded):
            state[name] = held.unpacked().to(dtype)
        elif held.dtype != dtype:
            state[name] = held.to(dtype)
    return state["step"], state["exp_avg"], state["exp_avg_sq"]


def coded(learner: Learner, parameter: Tensor) -> tuple[Tensor, Coded, Coded]:
    """The same in 8 bits."""
    state = _state(learner, parameter)
    for name, dtype in (("exp_avg", torch.int8), ("exp_avg_sq", torch.uint8)):
        held = state.get(name)
        if held is None:
            state[name] = Coded.zeros(parameter, dtype)
        elif not isinstance(held, Coded):
            state[name] = Coded.of(held, dtype)
    return state["step"], state["exp_avg"], state["exp_avg_sq"]
