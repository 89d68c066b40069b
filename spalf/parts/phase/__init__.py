"""Phases: `calibrate` and `reweigh` measure; `constrained`, and `resampling` on top of it, train by gradient."""

from __future__ import annotations

from spalf.parts.phase.calibrate import Calibrate, CalibrateState
from spalf.parts.phase.constrained import Constrained
from spalf.parts.phase.resampling import Resampling
from spalf.parts.phase.reweigh import Reweigh, ReweighState

__all__ = ["Calibrate", "CalibrateState", "Constrained", "Resampling", "Reweigh", "ReweighState"]
