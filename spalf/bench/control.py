"""Laws that move multipliers, each at its best gains, on a bank of problems with known multipliers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from spalf.bench.control_bank import bank
from spalf.bench.control_loop import EVERY, follow
from spalf.bench.control_measures import FLOORS, measures, score
from spalf.bench.control_plants import Plant
from spalf.parts.dual import Adrc, AdrcTracking, Ascent, NuPi, Pi
from spalf.parts.filter import DualRateEma

Options = Mapping[str, float]

LAWS: Mapping[str, Any] = {"ascent": Ascent, "pi": Pi, "nupi": NuPi, "adrc": Adrc, "adrc_tracking": AdrcTracking}
SHIPPED: Mapping[str, Options] = {"adrc": {"delay": 50.0}, "adrc_tracking": {}}
"""What a preset sets, or has set, of these laws."""
GRIDS: Mapping[str, Mapping[str, Sequence[float]]] = {
    "ascent": {"rate": (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)},
    "pi": {"kp": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0), "ki": (0.05, 0.1, 0.2, 0.4, 0.8)},
    "nupi": {"nu": (-0.5, 0.5, 0.9), "kp": (0.5, 2.0, 8.0), "ki": (0.1, 0.2, 0.4, 0.8)},
    "adrc": {"delay": (20.0, 50.0, 100.0), "memory": (12.0, 50.0, 200.0), "gain": (0.5, 1.0, 2.0)},
    "adrc_tracking": {
        "delay": (10.0, 30.0, 60.0),
        "memory": (12.0, 50.0),
        "boost": (1.0, 3.0, 8.0),
        "reach": (0.2, 100.0),
    },
}


@frozen(kw_only=True)
class Row:
    """One law with one set of options on one problem, or on several: then the means."""

    law: str
    options: Mapping[str, float] = field(hash=False)
    chosen: str
    problem: str
    score: float
    measures: Mapping[str, float] = field(hash=False)


@frozen(kw_only=True)
class Comparison:
    """`rows` holds every law and set of options on every problem; `picks` the ways in which gains were chosen.

    A pick is "tuned" (best mean score over the problems at even places), "shipped" (the preset's options), or
    "per problem" (the best on each, which no single choice reaches).
    """

    rows: tuple[Row, ...] = field(hash=False)
    summary: tuple[Row, ...] = field(hash=False)
    """For each law and way of choosing, the means over all problems, and over those held back ("held back")."""
    picks: tuple[Row, ...] = field(hash=False)


def grid(law: str) -> list[Options]:
    """Every set of options of a law that is tried, the shipped ones first."""
    axes = GRIDS[law]
    points: list[Options] = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [SHIPPED[law], *points] if law in SHIPPED else points


def made(law: str, options: Options) -> Any:
    """The law, settled for the bank's filter and clock."""
    component = LAWS[law](**options)
    if not hasattr(component, "settle"):
        return component
    return component.settle(SimpleNamespace(recipe=SimpleNamespace(filter=DualRateEma(every=EVERY))))


def compare(
    plants: Sequence[Plant] | None = None,
    grids: Mapping[str, Sequence[Options]] | None = None,
    seeds: int = 2,
    tell: Callable[[str], None] | None = None,
) -> Comparison:
    """Run every law with every set of options on every problem. Deterministic; `tell` hears each problem's name."""
    plants = bank() if plants is None else plants
    grids = {law: grid(law) for law in LAWS} if grids is None else grids
    tried = [(law, options) for law, sets in grids.items() for options in sets]
    laws = [made(law, options) for law, options in tried]
    found: list[dict[str, Tensor]] = []
    for plant in plants:
        if tell is not None:
            tell(plant.name)
        measured = measures(plant, follow(plant, laws, seeds))
        found.append({"score": score(measured), **measured})
    # [P, C] of every measure
    table = {name: torch.stack([one[name] for one in found]) for name in ("score", *FLOORS)}
    names = [plant.name for plant in plants]
    rows = [
        _row(law, options, "grid", names[p], table, [p], [c])
        for c, (law, options) in enumerate(tried)
        for p in range(len(plants))
    ]
    picks, summary = [], []
    for law, sets in grids.items():
        mine = [c for c, (name, _) in enumerate(tried) if name == law]
        for way, at in _ways(law, sets, mine, table["score"]).items():
            options = {} if way == "per problem" else tried[at[0]][1]
            picks += [_row(law, options, way, names[p], table, [p], [c]) for p, c in enumerate(at)]
            every, held = list(range(len(at))), list(range(1, len(at), 2))
            summary.append(_row(law, options, way, "all", table, every, at))
            summary.append(_row(law, options, way, "held back", table, held, [at[p] for p in held]))
    return Comparison(rows=tuple(rows), summary=tuple(summary), picks=tuple(picks))


def _ways(law: str, sets: Sequence[Options], mine: Sequence[int], score_PC: Tensor) -> dict[str, list[int]]:
    """For each way of choosing, the configuration taken on each problem."""
    own_PC = score_PC[:, list(mine)]
    count = len(own_PC)
    ways = {"tuned": [mine[int(own_PC[::2].mean(0).argmin())]] * count}
    if law in SHIPPED and SHIPPED[law] in sets:
        ways["shipped"] = [mine[list(sets).index(SHIPPED[law])]] * count
    ways["per problem"] = [mine[int(i)] for i in own_PC.argmin(1)]
    return ways


def _row(
    law: str, options: Options, way: str, problem: str, table: Mapping[str, Tensor], at: Sequence[int], c: Sequence[int]
) -> Row:
    """Means over problems `at`, of configuration c[i] on at[i]."""
    mean = {
        name: float(torch.stack([v_PC[i, j] for i, j in zip(at, c, strict=True)]).mean())
        for name, v_PC in table.items()
    }
    total = mean.pop("score")
    return Row(law=law, options=dict(options), chosen=way, problem=problem, score=total, measures=mean)
