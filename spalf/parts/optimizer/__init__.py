"""Optimizers: the primal rule and its learning rate per parameter.

Each parameter has a group of its own, so that rates can differ; the engine scales all of them by `scale(clock)`.
"""

from __future__ import annotations

from spalf.parts.optimizer.adam import Adam, Adamw
from spalf.parts.optimizer.muon import Muon
from spalf.parts.optimizer.sgd import Sgd

__all__ = ["Adam", "Adamw", "Muon", "Sgd"]
