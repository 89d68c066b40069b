"""What the lines of a suite say: methods at each setting over seeds, and ours against the best peer at equal L0."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from attrs import field, frozen

from spalf.bench.choice import Read, best, read_at
from spalf.bench.results import Line
from spalf.bench.suite import Method, Suite

LOWER = ("fvu", "ce_gap", "kl")
"""Measures of which less is better, and that are compared at equal L0."""
HIGHER = ("mcc", "f1", "uniqueness")
"""Measures of which more is better, likewise."""


@frozen(kw_only=True)
class Row:
    """A method at one setting: each measure's values, one per seed."""

    method: Method
    setting: float
    lr: float | None
    seeds: tuple[int, ...]
    values: Mapping[str, tuple[float, ...]] = field(hash=False)

    def mean(self, measure: str) -> float | None:
        held = self.values.get(measure, ())
        return sum(held) / len(held) if held else None

    def spread(self, measure: str) -> float | None:
        """The sample standard deviation over seeds; None for fewer than two."""
        held = self.values.get(measure, ())
        if len(held) < 2:
            return None
        mean = sum(held) / len(held)
        return math.sqrt(sum((v - mean) ** 2 for v in held) / (len(held) - 1))


@frozen(kw_only=True)
class Against:
    """A measure of ours over the best peer's at the same L0."""

    ratio: float
    peer: str
    is_extrapolated: bool


def current(suite: Suite, lines: Iterable[Line]) -> list[Line]:
    """The lines of a suite that count: the newest of each job that is done, where no key is looked at.

    A job is what its line says of it: a line made by an older default of a recipe gives way to a newer one.
    """
    held: dict[tuple[object, ...], Line] = {}
    for line in lines:
        if line.get("suite") == suite.name and line["status"] == "done":
            job = line["job"]
            about = ("method", "axis", "setting", "lr", "seed", "share", "seeds")
            held[tuple(str(job.get(name)) for name in about)] = line
    return list(held.values())


def rates(suite: Suite, lines: Sequence[Line]) -> dict[str, float | None]:
    """The rate of each method: the best of its sweep so far; None where there is nothing to choose or no line yet."""
    out: dict[str, float | None] = {}
    for method in suite.methods:
        if len(method.lr) < 2:
            out[method.name] = method.lr[0] if method.lr else None
        else:
            assert method.sweep is not None, "suite.read asks for a sweep where there are several rates"
            out[method.name] = best(swept(method, lines), method.sweep)
    return out


def swept(method: Method, lines: Sequence[Line]) -> list[Line]:
    """The lines of a method's sweep."""
    sweep = method.sweep
    if sweep is None:
        return []
    return [
        line
        for line in lines
        if line["job"]["method"] == method.name
        and line["kind"] != "agreement"
        and line["job"]["lr"] in method.lr
        and line["job"]["setting"] in sweep.at
        and line["job"]["seed"] == sweep.seed
        and line["job"]["share"] == sweep.share
    ]


def rows(suite: Suite, lines: Sequence[Line]) -> list[Row]:
    """Every method at every setting of which there is a line, in the suite's order."""
    chosen, out = rates(suite, lines), []
    for method in suite.methods:
        for setting in method.axis.values:
            held = [
                line
                for line in lines
                if line["kind"] != "agreement"
                and line["job"]["method"] == method.name
                and line["job"]["setting"] == setting
                and line["job"]["share"] == 1.0
                and line["job"]["lr"] == chosen[method.name]
                and line["job"]["seed"] in method.seeds
            ]
            held.sort(key=lambda line: line["job"]["seed"])
            if held:
                out.append(_row(method, setting, chosen[method.name], held))
    return out


def _row(method: Method, setting: float, lr: float | None, lines: Sequence[Line]) -> Row:
    names = dict.fromkeys(name for line in lines for name in line["measures"])
    values = {n: tuple(float(x["measures"][n]) for x in lines if x["measures"].get(n) is not None) for n in names}
    return Row(
        method=method,
        setting=setting,
        lr=lr,
        seeds=tuple(line["job"]["seed"] for line in lines),
        values=values,
    )


def against(row: Row, every: Sequence[Row], measure: str) -> Against | None:
    """A row of ours over the best peer at its L0; None where no peer's curve reaches there or there is no number."""
    own, l0 = row.mean(measure), row.mean("l0")
    if own is None or l0 is None:
        return None
    curves: dict[str, list[tuple[float, float]]] = {}
    for other in every:
        x, y = other.mean("l0"), other.mean(measure)
        if other.method.peer and x is not None and y is not None:
            curves.setdefault(other.method.title, []).append((x, y))
    found: dict[str, Read] = {}
    for title, points in curves.items():
        read = read_at(points, l0)
        if read is not None:
            found[title] = read
    if not found:
        return None
    sign = 1.0 if measure in LOWER else -1.0
    title = min(found, key=lambda t: (sign * found[t].value, t))
    return Against(ratio=own / found[title].value, peer=title, is_extrapolated=found[title].is_extrapolated)
