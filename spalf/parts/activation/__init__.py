"""Nonlinearities: which entries of a pre-activation become a code, and what gradient that choice has."""

from spalf.parts.activation.gated import Gated, GatedActivator
from spalf.parts.activation.jumprelu import JumpReLU, JumpReLUActivator, JumpReLUMoreau
from spalf.parts.activation.relu import ReLU, ReLUActivator
from spalf.parts.activation.topk import BatchTopK, BatchTopKActivator, TopK, TopKActivator

__all__ = [
    "BatchTopK",
    "BatchTopKActivator",
    "Gated",
    "GatedActivator",
    "JumpReLU",
    "JumpReLUActivator",
    "JumpReLUMoreau",
    "ReLU",
    "ReLUActivator",
    "TopK",
    "TopKActivator",
]
