"""The recipes of a suite: its base with what was set, and what each method of ours makes of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from spalf import plugins
from spalf.assembly import compile as compiler
from spalf.assembly import toml
from spalf.assembly.convert import Converter
from spalf.assembly.toml import Table
from spalf.bench.suite import VARIED, Method, Suite
from spalf.core.recipe import Plan
from spalf.errors import Problem, RecipeError

PLACES = ("model", "text", "held_out_from", "path")
"""Options of a source that say where something lies on this machine: the numbers do not depend on them."""
QUIET = {"save_every": 1_000_000_000, "keep": 1, "track": []}
"""Runs of a suite leave one checkpoint, which is measured and thrown away."""


@frozen(kw_only=True, eq=False)
class Base:
    """The recipe of a suite with the suite's evaluators: as text has it, compiled, and filled with every default."""

    table: Table
    plan: Plan
    filled: Table

    @property
    def provides(self) -> frozenset[str]:
        return self.plan.facts.provides


def base_of(suite: Suite, sets: Sequence[str]) -> Base:
    """The recipe that a suite names, changed by `sets`. Raises RecipeError."""
    table = _changed({**own_of(suite), "evaluator": {}}, sets)
    evaluators = suite.evaluators
    if not evaluators:
        provides = compiled({**table, "evaluator": {}})[0].facts.provides
        wanted = {"logits": "downstream_loss", "truth": "ground_truth"}
        evaluators = {name: {} for need, name in wanted.items() if need in provides}
    table = _changed({**own_of(suite), "evaluator": evaluators}, sets)
    plan, filled = compiled(table)
    return Base(table=table, plan=plan, filled=filled)


def _changed(table: Table, sets: Sequence[str]) -> Table:
    for text in sets:
        table = toml.merge(table, toml.setting(text))
    return toml.dropped(table)


def own_of(suite: Suite) -> Table:
    """The recipe that a suite file describes, before anything is set. Raises RecipeError."""
    return toml.merge(toml.read(suite.base), suite.table)


def compiled(table: Table) -> tuple[Plan, Table]:
    """A table's plan, and the table with every default filled in. Raises RecipeError."""
    _, registry = plugins.load()
    plan = compiler.compile(table, registry)
    return plan, Converter(registry).unstructure(plan.recipe)


def recipe_of(base: Base, method: Method) -> Table:
    """The table of a method of ours, before what is varied: no evaluator, for the suite measures.

    A method that names a recipe takes the source, budget, width and calibration of the base, and the rest from there.
    Raises RecipeError.
    """
    table = copy.deepcopy(base.table)
    if method.recipe:
        table = toml.read(method.recipe)
        table |= {key: base.table[key] for key in ("source", "budget", "record") if key in base.table}
        table = toml.merge(table, {"knobs": {"F": base.plan.knobs.F}})
        samples = base.table.get("phase", {}).get("calibrate", {}).get("samples")
        if samples and "calibrate" in table.get("phase", {}):
            table = toml.merge(table, {"phase": {"calibrate": {"samples": samples}}})
    table = toml.merge(table, {"record": QUIET, "name": "job"})
    change = {k: v for k, v in method.table.items() if k != VARIED}
    table = toml.dropped(toml.merge(table, change)) | {"evaluator": {}}
    varied = method.table.get(VARIED)
    return toml.merge(table, _multiplied(table, varied["key"], varied["factor"])) if varied else table


def _multiplied(table: Table, key: str, factor: float) -> Table:
    """A setting: the value that `key` has once everything is filled in, times `factor`; a whole number stays one."""
    value: Any = compiled(table)[1]
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or value == 0:
        said = "no number" if not isinstance(value, int | float) or isinstance(value, bool) else "0: it is derived"
        raise RecipeError([Problem(key, f"is {said}, so no factor changes it", "leave it out of vary.keys")])
    changed = value * factor
    return set_to(key, max(1, round(changed)) if isinstance(value, int) else changed)


def set_to(key: str, value: float) -> Table:
    """A table that holds one number at a dotted key."""
    return toml.setting(f"{key}={written(value)}")


def written(value: float) -> str:
    """A number as a recipe has it: 64, 0.001."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def without_places(filled: Table) -> Table:
    """What of a filled recipe determines the numbers: not its name, its record, or where its files lie."""
    out = {k: v for k, v in filled.items() if k not in ("name", "record")}
    out["source"] = {k: v for k, v in filled.get("source", {}).items() if k not in PLACES}
    return out


def named(suite: Suite) -> Table:
    """What the suite's own recipe calls its places, whatever they are set to on this machine."""
    own = own_of(suite).get("source", {})
    return {key: own[key] for key in PLACES if isinstance(own, dict) and key in own}
