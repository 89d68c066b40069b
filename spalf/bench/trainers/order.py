"""What a worker is asked for, and stand-ins for what a library imports and training never calls."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Order:
    """One training, complete; read from JSON."""

    library: str
    kind: str
    version: str
    """What the library's version has to be, or "" for any."""
    options: dict[str, Any]
    lr: float | None
    seed: int
    steps: int
    batch: int
    d_model: int
    width: int
    normalise: int
    """Batches for the scale of activations, before the first step."""
    decay: float
    autocast: bool
    device: str
    ring: str
    slots: int
    ready: int
    """File descriptor that tells of batches."""
    freed: int
    """File descriptor that is told of copies."""
    out: str


def read(path: Path) -> Order:
    return Order(**json.loads(path.read_text(encoding="utf-8")))


def stand_in(name: str, **attributes: object) -> None:
    """An empty module for a package that is not installed."""
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(attributes)
    sys.modules[name] = module


def misfit(order: Order, key: str, known: Iterable[str]) -> ValueError:
    """The error of an option that the trainer does not have."""
    return ValueError(f'{order.library}.{order.kind} has no option "{key}" (it has {", ".join(sorted(known))})')
