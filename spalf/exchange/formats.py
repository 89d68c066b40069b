"""The formats by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from spalf.errors import ExchangeError
from spalf.exchange import dictionary_learning, plain, saelens, sparsify
from spalf.exchange.dictionary import Dictionary

WRITERS: Mapping[str, Callable[[Dictionary, Path, torch.dtype], Path]] = {
    "saelens": saelens.write,
    "dictionary_learning": dictionary_learning.write,
}
"""Formats of other libraries; spalf's own, "safetensors", is written by engine/export.py."""
READERS: Mapping[str, Callable[[Path], Dictionary]] = {
    "safetensors": plain.read,
    "saelens": saelens.read,
    "dictionary_learning": dictionary_learning.read,
    "sparsify": sparsify.read,
}


def read(path: str | Path, format: str) -> Dictionary:
    """The dictionary in a folder. Raises ExchangeError at an unknown format, and where the folder cannot be read."""
    if format not in READERS:
        raise ExchangeError(f'there is no format "{format}" (use {", ".join(READERS)})')
    return READERS[format](Path(path))
