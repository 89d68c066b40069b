"""Curves of error against L0: interpolation between a method's own points, and the choice of a learning rate by it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from spalf.bench.suite import Sweep

REACH = 1.1
"""How far beyond a curve's ends, as a factor of L0, its last line is still followed."""
FALL = 0.4
"""Power of L0 by which FVU falls: 0.36 to 0.41 between L0 16 and 128 in docs/benchmarks/quality.md, ours and peers'."""
Points = Sequence[tuple[float, float]]
"""(L0, error) of one method."""


@frozen(kw_only=True)
class Read:
    """A curve's value at an L0, and whether that lies beyond its ends."""

    value: float
    is_extrapolated: bool


def read_at(points: Points, l0: float, reach: float = REACH) -> Read | None:
    """The error at `l0` on straight lines between the logarithms of both.

    None where `l0` is beyond an end by more than the factor `reach`, and where there are fewer than two points (unless
    the only one is there, within a thousandth). Points of one L0 are averaged.
    """
    curve = _averaged(points)
    if not curve or l0 <= 0:
        return None
    low, high = curve[0][0], curve[-1][0]
    if len(curve) == 1:
        return Read(value=curve[0][1], is_extrapolated=False) if abs(l0 / low - 1) < 1e-3 else None
    if not low / reach <= l0 <= high * reach:
        return None
    i = max(1, min(len(curve) - 1, sum(x <= l0 for x, _ in curve)))
    (x0, y0), (x1, y1) = curve[i - 1], curve[i]
    share = (math.log(l0) - math.log(x0)) / (math.log(x1) - math.log(x0))
    value = math.exp(math.log(y0) + share * (math.log(y1) - math.log(y0)))
    return Read(value=value, is_extrapolated=not low <= l0 <= high)


def _averaged(points: Points) -> list[tuple[float, float]]:
    """Means of the points of one L0, by rising L0; what has no logarithm is left out."""
    by_l0: dict[float, list[float]] = {}
    for x, y in points:
        if x > 0 and y > 0:
            by_l0.setdefault(x, []).append(y)
    return [(x, sum(ys) / len(ys)) for x, ys in sorted(by_l0.items())]


def best(lines: Sequence[Mapping[str, Any]], sweep: Sweep) -> float | None:
    """The rate of the most MCC, where all lines have one; else of the least FVU at the sweep's L0; None where none has.

    FVU of a rate with several points is read off the line through them, however far: only rates are compared by it.
    With a single point it is carried to that L0 as FVU falls on the whole: who is given an L0 may miss it. MCC has no
    such law, and is averaged as it is.
    """
    held = [(line["job"]["lr"], line.get("measures") or {}) for line in lines]
    scores: dict[float, float] = {}
    if held and all("mcc" in measures for _, measures in held):
        for lr in {lr for lr, _ in held}:
            own = [measures["mcc"] for rate, measures in held if rate == lr]
            scores[lr] = -sum(own) / len(own)
    else:
        by_rate: dict[float, list[tuple[float, float]]] = {}
        for lr, measures in held:
            if measures.get("fvu") and measures.get("l0"):
                by_rate.setdefault(lr, []).append((measures["l0"], measures["fvu"]))
        for lr, points in by_rate.items():
            found = read_at(points, sweep.l0, reach=math.inf) if len(points) > 1 else None
            scores[lr] = found.value if found else min(y * (x / sweep.l0) ** FALL for x, y in points)
    return min(scores, key=lambda lr: (scores[lr], lr)) if scores else None
