"""The plan and the summary as rows: derived numbers, results against targets, measures with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spalf.core.recipe import Plan
from spalf.engine.bootstrap import HIGH, LOW
from spalf.report.numbers import short
from spalf.report.rundir import RunRecord

FRONTIER = ("l0", "r2_raw", "ce")
"""Measures that a frontier gives at each scale of the thresholds, as `l0@1.5`."""


def parameters(plan: Plan, measured: Mapping[str, float]) -> list[dict[str, Any]]:
    """Every derived number: path, value, formula, origin.

    `calibrated` is set where the run has settled the value; it is null where the run has not come to it yet.
    """
    rows = []
    for d in plan.derived:
        row: dict[str, Any] = {"path": d.path, "value": short(d.value, 9), "formula": d.formula, "origin": d.origin}
        if d.value is None:
            row |= {"value": short(_settled(d.path, measured), 9), "calibrated": True}
        rows.append(row)
    return rows


def _settled(path: str, measured: Mapping[str, float]) -> float | None:
    """A run's measured numbers go by the path within the slot: `causal.budget` of `constraint.causal.budget`."""
    return measured.get(path, measured.get(path.partition(".")[2]))


def evaluation(record: RunRecord, later: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Each evaluator with its documents and its measures: name, value, and low and high where it gives an interval.

    `later` is what has been measured since the run ended; it takes the place of the summary's.

    The measures of a frontier, which come at several scales, are points of their own.
    """
    ended = record.summary.get("evaluators")
    scalars = {**(ended if isinstance(ended, Mapping) else {}), **(later or {})}
    return [_evaluator(str(name), values) for name, values in scalars.items() if isinstance(values, Mapping)]


def _evaluator(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    points: dict[float, dict[str, Any]] = {}
    for key, value in values.items():
        stem = key.removesuffix(LOW).removesuffix(HIGH)
        if (stem != key and stem in values) or key == "documents":
            continue
        row = {"name": key, "value": short(value, 6)}
        ends = [short(values.get(key + end), 6) for end in (LOW, HIGH)]
        if None not in ends:
            row |= {"low": ends[0], "high": ends[1]}
        measure, _, scale = key.partition("@")
        at = _float(scale)
        if measure in FRONTIER and at is not None:
            points.setdefault(at, {"scale": at})[measure] = row
        else:
            rows.append(row)
    out: dict[str, Any] = {"name": name, "rows": rows}
    if points:
        out["points"] = [points[at] for at in sorted(points)]
    if "documents" in values:
        out["documents"] = short(values["documents"], 9)
    return out


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def headline(plan: Plan, record: RunRecord) -> dict[str, Any]:
    """What a run is and how it ended: facts, knobs, strata, versions, and the summary but for its evaluators."""
    said = {k: v for k, v in record.summary.items() if k not in ("evaluators", "versions")}
    return {
        "name": plan.recipe.name,
        "model": plan.facts.model,
        "hook": plan.facts.hook,
        "d_model": plan.facts.d_model,
        "F": plan.knobs.F,
        "l0_target": plan.knobs.L0_target,
        "r2_target": plan.knobs.R2_target,
        "rows": dict(plan.rows),
        "seed": plan.recipe.seed,
        "tokens": plan.recipe.budget.tokens,
        "batch": plan.recipe.budget.batch,
        "components": dict(plan.origins),
        "versions": dict(record.summary.get("versions") or {}),
        "summary": said,
    }
