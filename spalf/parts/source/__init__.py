"""Where activations come from."""

from __future__ import annotations

from spalf.parts.source.activations import Activations
from spalf.parts.source.difference import Difference
from spalf.parts.source.huggingface import Huggingface
from spalf.parts.source.synthetic import Synthetic
from spalf.parts.source.transformer_lens import TransformerLens

__all__ = ["Activations", "Difference", "Huggingface", "Synthetic", "TransformerLens"]
