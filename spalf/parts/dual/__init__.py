"""Duals: how the multipliers lam_M move. M constraints; stepped on the filter's ticks.

v is the fast filtered violation of this tick, v_previous that of the last one. Every law projects onto
[0, limit]; a multiplier that sits at `limit` says that its constraint is out of reach.
"""

from __future__ import annotations

from spalf.parts.dual.adrc import Adrc, AdrcLiteral, AdrcState, ObserverState
from spalf.parts.dual.classic import Ascent, NuPi, NuPiState, Pi
from spalf.parts.dual.law import LIMIT, LamState
from spalf.parts.dual.tracking import AdrcTracking, TrackingState

__all__ = [
    "LIMIT",
    "Adrc",
    "AdrcLiteral",
    "AdrcState",
    "AdrcTracking",
    "Ascent",
    "LamState",
    "NuPi",
    "NuPiState",
    "ObserverState",
    "Pi",
    "TrackingState",
]
