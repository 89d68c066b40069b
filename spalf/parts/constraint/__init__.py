"""Constraints: a value and a budget in one unit. The engine alone forms g = value / budget - 1."""

from spalf.parts.constraint.causal import Causal, CausalBlend
from spalf.parts.constraint.dictionary import Drift, Orthogonality
from spalf.parts.constraint.reconstruction import Faithfulness

__all__ = ["Causal", "CausalBlend", "Drift", "Faithfulness", "Orthogonality"]
