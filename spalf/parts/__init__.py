"""What spalf ships, offered through the same hook as anyone's. A module, or a package, per slot."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

from spalf.core.slots import SLOTS, ComponentRef
from spalf.hooks import hookimpl


@hookimpl
def spalf_components() -> list[type]:
    """The built-in components, slot by slot, in the order of their names."""
    return [cls for slot in SLOTS for cls in _labelled(slot)]


def _labelled(slot: str) -> list[type]:
    """Labelled classes that the slot's module, or the modules of its package, define."""
    found: list[tuple[str, type]] = []
    for module in _modules(f"{__name__}.{slot}"):
        for value in vars(module).values():
            ref = vars(value).get("__spalf__") if isinstance(value, type) else None
            if isinstance(ref, ComponentRef) and value.__module__ == module.__name__:
                found.append((ref.use, value))
    return [cls for _, cls in sorted(found, key=lambda pair: pair[0])]


def _modules(name: str) -> Iterator[ModuleType]:
    module = importlib.import_module(name)
    yield module
    for inner in pkgutil.iter_modules(getattr(module, "__path__", ())):
        yield importlib.import_module(f"{name}.{inner.name}")
