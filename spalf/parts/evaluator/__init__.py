"""Evaluators: finite named numbers about a state, on documents that training never saw."""

from spalf.parts.evaluator.absorption import FeatureAbsorption
from spalf.parts.evaluator.consistency import Consistency
from spalf.parts.evaluator.downstream import DownstreamLoss
from spalf.parts.evaluator.drift import DriftFidelity
from spalf.parts.evaluator.frontier import SparsityFrontier
from spalf.parts.evaluator.geometry import Geometry
from spalf.parts.evaluator.probing import SparseProbing
from spalf.parts.evaluator.tokens import TokenFeatures
from spalf.parts.evaluator.truth import GroundTruth

__all__ = [
    "Consistency",
    "DownstreamLoss",
    "DriftFidelity",
    "FeatureAbsorption",
    "Geometry",
    "GroundTruth",
    "SparseProbing",
    "SparsityFrontier",
    "TokenFeatures",
]
