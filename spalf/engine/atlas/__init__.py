"""The features of a dictionary, one record each: what fires it, what it does, what lies near it."""

from spalf.engine.atlas.build import atlas
from spalf.engine.atlas.firings import Firings, firings
from spalf.engine.atlas.records import DECADES, Anchored, Atlas, Feature, Pairs, Place

__all__ = ["DECADES", "Anchored", "Atlas", "Feature", "Firings", "Pairs", "Place", "atlas", "firings"]
