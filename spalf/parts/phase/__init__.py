"""Phases: `calibrate` settles what is measured; `constrained`, and `resampling` on top of it, train by gradient."""

from __future__ import annotations

from spalf.parts.phase.calibrate import Calibrate, CalibrateState
from spalf.parts.phase.constrained import Constrained
from spalf.parts.phase.resampling import Resampling

__all__ = ["Calibrate", "CalibrateState", "Constrained", "Resampling"]
