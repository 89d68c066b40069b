"""A run over its steps, as columns that a page draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spalf.core.recipe import Plan
from spalf.report.numbers import short
from spalf.report.rundir import Line, RunRecord

POINTS = 800
"""Points per curve: more than a screen shows."""
MEASURES = ("g", "fast", "lam", "rho")
NOT_CURVES = frozenset({"step", "phase", "constraints", "tokens", "change"})


def story(plan: Plan, record: RunRecord) -> dict[str, Any]:
    """Steps, phases, one column per number that was logged, and per constraint its violation, multiplier and penalty.

    A constraint's numbers are null while it is off. Of a long run every n-th line is kept, `every` says which.
    """
    steps = [line for line in record.metrics if line["step"] > 0]
    every = -(-len(steps) // POINTS) or 1
    # Counted from the end: the last line is what a reader looks for.
    kept = steps[::-1][::every][::-1]
    names = sorted({k for line in kept for k, v in line.items() if k not in NOT_CURVES and _is_number(v)})
    return {
        "steps": [line["step"] for line in kept],
        "every": every,
        "log_every": plan.recipe.record.log_every,
        "total": plan.total_steps,
        "phases": _phases(steps),
        "curves": {name: [short(line.get(name)) for line in kept] for name in names},
        "constraints": {name: _constraint(name, kept) for name in plan.constraints},
        "calibration": _calibration(record.metrics),
    }


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _phases(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Stretches of steps, each from the end of the one before; exact to the steps between two lines."""
    out: list[dict[str, Any]] = []
    for line in lines:
        if not out or out[-1]["name"] != line["phase"]:
            out.append({"name": line["phase"], "from": out[-1]["to"] if out else 0, "to": line["step"]})
        out[-1]["to"] = line["step"]
    return out


def _constraint(name: str, lines: Sequence[Line]) -> dict[str, list[float | None]]:
    told = [_told(line, name) for line in lines]
    return {measure: [short(one.get(measure)) for one in told] for measure in MEASURES}


def _told(line: Line, name: str) -> Mapping[str, Any]:
    constraints = line.get("constraints")
    one = constraints.get(name) if isinstance(constraints, Mapping) else None
    return one if isinstance(one, Mapping) and one.get("on", True) else {}


def _calibration(lines: Sequence[Line]) -> list[list[float | None]]:
    """(activations seen, relative change of the covariance) of the lines before the first step."""
    before = [line for line in lines if line["step"] == 0 and _is_number(line.get("tokens"))]
    return [[short(line["tokens"], 9), short(line.get("change"))] for line in before]
