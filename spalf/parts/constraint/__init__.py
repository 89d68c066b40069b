"""Constraints: a value and a budget in one unit. The engine alone forms g = value / budget - 1."""

from spalf.parts.constraint.causal import Causal, CausalBlend
from spalf.parts.constraint.dictionary import Drift, Orthogonality
from spalf.parts.constraint.reconstruction import Faithfulness
from spalf.parts.constraint.sparsity import L0Rate, L1Rate

__all__ = ["Causal", "CausalBlend", "Drift", "Faithfulness", "L0Rate", "L1Rate", "Orthogonality"]
