"""A run in a notebook: its dictionary beside its language model."""

from spalf.loaded.records import Codes, Patched, Steered, Told
from spalf.loaded.run import SEQUENCES, Loaded

__all__ = ["SEQUENCES", "Codes", "Loaded", "Patched", "Steered", "Told"]
