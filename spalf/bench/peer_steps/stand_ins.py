"""Empty modules for packages that a library imports and its trainers never call."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


def stand_in(name: str, **attributes: object) -> None:
    """Put an empty module in the place of `name`, unless it is installed."""
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(attributes, __version__="0")
    sys.modules[name] = module
