"""Summands of the objective, each a ratio: weights and multipliers mean the same for every model.

Errors are taken in whitened coordinates unless an option says otherwise: there the total variance is about d.
"""

from spalf.parts.term.dead import AuxK, PreActivation
from spalf.parts.term.geometry import Discretization, FrameEnergy
from spalf.parts.term.reconstruction import GatedAux, Mse, Nested, RelativeMse
from spalf.parts.term.sparsity import L0, L1, L0Quadratic

__all__ = [
    "L0",
    "L1",
    "AuxK",
    "Discretization",
    "FrameEnergy",
    "GatedAux",
    "L0Quadratic",
    "Mse",
    "Nested",
    "PreActivation",
    "RelativeMse",
]
