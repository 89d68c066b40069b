"""Step time over features, active features and batch: one axis at a time from a base shape, and the corners."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

from attrs import frozen

from spalf.bench.peer_steps.measure import Task

WIDTHS = (16_384, 32_768, 65_536, 131_072, 262_144)
L0S = (32, 64, 164, 512)
BATCHES = (2048, 4096, 8192, 16_384)
AXES = ("F", "l0", "batch", "corners")


@frozen(kw_only=True, order=True)
class Shape:
    """d_model, features, active features a row, rows."""

    d: int
    width: int
    l0: int
    batch: int

    def task(self, **rest: Any) -> Task:
        """How it is timed."""
        return Task(d=self.d, width=self.width, l0=self.l0, batch=self.batch, **rest)

    def record(self) -> dict[str, int]:
        """For JSON."""
        return {"d": self.d, "F": self.width, "l0": self.l0, "batch": self.batch}

    def __str__(self) -> str:
        return f"d {self.d}, F {self.width}, L0 {self.l0}, batch {self.batch}"


def grid(base: Shape, axes: Iterable[str]) -> list[Shape]:
    """The points of these axes, each once, in order of size."""
    points: set[Shape] = set()
    for axis in axes:
        if axis == "F":
            points |= {Shape(d=base.d, width=f, l0=base.l0, batch=base.batch) for f in WIDTHS}
        elif axis == "l0":
            points |= {Shape(d=base.d, width=base.width, l0=k, batch=base.batch) for k in L0S}
        elif axis == "batch":
            points |= {Shape(d=base.d, width=base.width, l0=base.l0, batch=b) for b in BATCHES}
        else:
            ends = product((WIDTHS[0], WIDTHS[-1]), (L0S[0], L0S[-1]), (BATCHES[0], BATCHES[-1]))
            points |= {Shape(d=base.d, width=f, l0=k, batch=b) for f, k, b in ends}
    return sorted(points)
