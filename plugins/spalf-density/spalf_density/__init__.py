"""A plugin for spalf: constraint `density` and dual `optimistic`."""

from spalf import hookimpl
from spalf_density.density import Density
from spalf_density.optimistic import Optimistic

__all__ = ["Density", "Optimistic", "spalf_components"]


@hookimpl
def spalf_components() -> list[type]:
    """What this package offers."""
    return [Density, Optimistic]
