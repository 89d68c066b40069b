"""What every law of multipliers shares."""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from spalf.core.values import Signal

LIMIT = 1e3
"""Default bound of a multiplier; lam is relative objective per relative budget, of order 1 in a healthy run."""


@frozen(kw_only=True, eq=False)
class LamState:
    """Multipliers alone: `v_previous` is the signal's."""

    lam_M: Tensor


def projected(state_M: Tensor, wanted_M: Tensor, signal: Signal, limit: float) -> Tensor:
    """`wanted_M` in [0, limit] where a constraint is on, and `state_M` where it is off."""
    return torch.where(signal.on_M, wanted_M.clamp(0.0, limit), state_M)
