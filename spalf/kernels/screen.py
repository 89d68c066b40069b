"""Which entries of a product can exceed a bound: found by a product of bfloat16 operands that errs on the safe side.

Shape letters as in spalf/core/values.py; C rows of a block, W columns of the widened operands. With u = 2^-8 the unit
roundoff of bfloat16, |x.w - x^.w^| <= (2 u + u^2) ||x|| ||w||, and a sum of W float32 terms adds less than 2^-12 of
that for W <= 2048. Both, and the bound, are columns of the product itself: an entry that it leaves negative is below
its bound whatever was rounded.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from spalf.kernels.layout import places

LEAST = 1 << 26
"""Multiplications below which a second look is not worth its operations."""

WIDEST = 2040
"""Most columns whose float32 sum is covered."""

_ROUNDOFF = 2.0**-8
_SUM = 2.0**-12
# The margin's own two factors are rounded too, by u each.
_MARGIN = (2 * _ROUNDOFF + _ROUNDOFF**2 + _SUM) * (1 + 3 * _ROUNDOFF)


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it; without them such a product is slower than float32's."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    has_library: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_library and any(ask() for ask in asked if ask is not None)


def pays(x_CD: Tensor, weight_FD: Tensor) -> bool:
    """Whether `candidates` and a look at them are faster than the product in float32."""
    is_covered = x_CD.dtype == torch.float32 and x_CD.shape[1] <= WIDEST and not x_CD.is_cuda
    return is_covered and x_CD.numel() * weight_FD.shape[0] >= LEAST and _multiplies_bfloat16()


def candidates(x_CD: Tensor, weight_FD: Tensor, least_F: Tensor) -> Tensor:
    """Places in [C, F], read row by row and ascending, of all entries x.w > least, and of few others.

    Nothing is said of rows or features that are not finite. Takes no gradient.
    """
    d_model = x_CD.shape[1]
    bound_F = least_F - _SUM * least_F.abs()
    x_CW, weight_FW = (m.new_zeros(m.shape[0], d_model + 8, dtype=torch.bfloat16) for m in (x_CD, weight_FD))
    x_CW[:, :d_model], weight_FW[:, :d_model] = x_CD, weight_FD
    x_CW[:, d_model] = torch.linalg.vector_norm(x_CD, dim=1)
    weight_FW[:, d_model] = _MARGIN * torch.linalg.vector_norm(weight_FD, dim=1)
    # The bound in three parts of 8 bits each, which are exact.
    x_CW[:, d_model + 1 : d_model + 4] = 1.0
    for part in range(1, 4):
        weight_FW[:, d_model + part] = -bound_F
        bound_F = bound_F + weight_FW[:, d_model + part]
    out_CF = x_CW @ weight_FW.T
    # Sign and zero are those of the bits read as a whole number, which numpy compares in vectors.
    return places(torch.from_numpy(np.greater(out_CF.view(torch.int16).numpy(), 0)))
