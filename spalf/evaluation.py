"""Measuring what a run has trained: one run by suites, or several side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import evolve, frozen

from spalf import launch, plugins
from spalf.assembly.hints import suggest
from spalf.assembly.registry import Registry
from spalf.core.protocols import Stream
from spalf.core.recipe import Plan
from spalf.core.slots import ComponentRef, label
from spalf.core.state import TrainingState
from spalf.core.values import Raw, White
from spalf.engine import checkpoint, matching
from spalf.engine import evaluate as measuring
from spalf.engine.bootstrap import HIGH, LOW, Difference, Measured, differences
from spalf.engine.build import build
from spalf.errors import Problem, RecipeError
from spalf.record import write_json

KEPT = "evaluation.json"
"""The file of a run directory that keeps what was measured of its newest checkpoint."""
OWN = "dictionary"
"""The suite that needs no component: L0, explained variance, dead features."""

Scores = dict[str, dict[str, float]]


def evaluate(
    path: str | Path,
    *,
    suites: Sequence[str] = (),
    sets: Sequence[str] = (),
    device: str = "auto",
    keep: bool = False,
) -> Scores:
    """Numbers by suite, measured on documents that training never saw.

    A suite is an evaluator that the recipe declares, by the name of its table, or any other that is installed, by its
    own name, with its defaults. Without `suites`: what the recipe declares and all that spalf ships for such a source.
    With `keep` they are added to evaluation.json of the run directory. Raises RecipeError for a suite that is neither,
    CheckpointError where there is nothing to measure.
    """
    _, registry = plugins.load()
    at, plan, _ = launch.plan_at(path, None, sets)
    more = _undeclared(plan, registry, suites)
    at, plan, _ = launch.plan_at(path, None, [*sets, *(f"evaluator.{name}={{}}" for name in more)])
    state = build(plan, launch.device_of(device))
    checkpoint.load(at, plan, state)
    scores = measuring.evaluate(plan, state, suites)
    if keep:
        _keep(at, scores)
    return scores


def _undeclared(plan: Plan, registry: Registry, suites: Sequence[str]) -> list[str]:
    """Evaluators that are asked for and that the recipe does not declare. Raises RecipeError for one not installed."""
    known = {ref.use for ref in registry if ref.slot == "evaluator"}
    declared = {OWN, *plan.recipe.evaluator}
    wrong = [
        Problem(f"--suite {name}", "is no evaluator", suggest(name, known | declared, "there are"))
        for name in suites
        if name not in known | declared
    ]
    if wrong:
        raise RecipeError(wrong)
    if suites:
        return [name for name in suites if name not in declared]
    used = {label(type(one)).use for one in plan.recipe.evaluator.values()}
    return [name for name in sorted(known - used - declared) if _fits(name, plan, registry)]


def _fits(name: str, plan: Plan, registry: Registry) -> bool:
    """Whether an evaluator is one of spalf's own, needs no option, and can read this plan's source."""
    ref = ComponentRef("evaluator", name)
    cls: Any = registry.resolve("evaluator", name)
    has_defaults = all(a.default is not attrs.NOTHING for a in attrs.fields(cls))
    return has_defaults and cls.needs <= plan.facts.provides and registry.origin(ref).split()[0] == "spalf"


def _keep(at: Path, scores: Scores) -> None:
    """Add to evaluation.json of the run that `at` lies in; what was measured of another checkpoint goes."""
    if at.parent.name != "checkpoints":
        return
    # A run that may be read but not written to has been measured all the same.
    with suppress(OSError):
        write_json(at.parent.parent / KEPT, {"checkpoint": at.name, "suites": {**kept(at), **scores}})


def kept(at: Path) -> Scores:
    """What evaluation.json holds of the checkpoint `at`; nothing where it is of another one or cannot be read."""
    held = _read(at.parent.parent / KEPT)
    suites = held.get("suites") if held.get("checkpoint") == at.name else None
    return suites if isinstance(suites, dict) else {}


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


# ------------------------------------------------------------------------------------------------------ side by side
@frozen(kw_only=True)
class Compared:
    """One measure of every run, None where a run has none, and its difference from the first run's."""

    suite: str
    measure: str
    values: tuple[float | None, ...]
    differences: tuple[Difference | None, ...]


@frozen(kw_only=True)
class Agreement:
    """PW-MCC of two runs' dictionaries, and what random directions would reach."""

    first: int
    second: int
    pw_mcc: float
    floor: float


@frozen(kw_only=True)
class Comparison:
    """Runs by name, what was measured of them, and how far pairs of them found the same features."""

    names: tuple[str, ...]
    rows: tuple[Compared, ...]
    agreements: tuple[Agreement, ...]


@frozen(kw_only=True, eq=False)
class _Look:
    """What is kept of one run once it has been measured."""

    plan: Plan
    scores: dict[str, Measured]
    rows_FD: Raw


def compare(
    paths: Sequence[str | Path], *, suites: Sequence[str] = (), sets: Sequence[str] = (), device: str = "auto"
) -> Comparison:
    """Runs side by side, each difference from the first with its 95 % interval.

    All are measured on the same held-out documents, by the evaluators of the first run's recipe, or by `suites`. Where
    two have met the same documents these are resampled together, so that only what one run does better counts; see
    `Difference.paired`. The interval knows the noise of the documents and not what another seed would have trained.
    Raises RecipeError for fewer than two runs, CheckpointError for one that cannot be read.
    """
    if len(paths) < 2:
        raise RecipeError([Problem("RUN", "one run has nothing to be compared with", "name two or more")])
    looks = list(_looks(paths, suites, sets, launch.device_of(device)))
    rows = [row for suite in looks[0].scores for row in _compared(suite, [look.scores.get(suite) for look in looks])]
    return Comparison(names=_names(paths), rows=tuple(rows), agreements=tuple(_agreements(looks)))


def _looks(
    paths: Sequence[str | Path], suites: Sequence[str], sets: Sequence[str], device: torch.device
) -> Iterator[_Look]:
    """Each run measured in turn. Equal sources share a stream, and all are opened with the first run's seed."""
    _, registry = plugins.load()
    plans = []
    for path in paths:
        _, plan, _ = launch.plan_at(path, None, sets)
        more = _undeclared(plan, registry, suites) if suites else []
        plans.append(launch.plan_at(path, None, [*sets, *(f"evaluator.{name}={{}}" for name in more)])[:2])
    provided = frozenset.intersection(*(plan.facts.provides for _, plan in plans))
    first = plans[0][1]
    shared = {name: one for name, one in first.recipe.evaluator.items() if one.needs <= provided}
    streams: list[tuple[Any, Stream]] = []
    for at, plan in plans:
        source = plan.recipe.source
        stream = next((held for other, held in streams if other == source), None)
        if stream is None:
            stream = source.open(first.recipe.seed, device)
            streams.append((source, stream))
        plan = evolve(plan, recipe=evolve(plan.recipe, evaluator=shared))
        state = build(plan, device, stream)
        checkpoint.load(at, plan, state)
        yield _Look(plan=plan, scores=_scores(plan, state, suites), rows_FD=_decoder(state))


def _scores(plan: Plan, state: TrainingState, suites: Sequence[str]) -> dict[str, Measured]:
    scores = measuring.evaluate(plan, state, suites)
    return {name: one if isinstance(one, Measured) else Measured(one) for name, one in scores.items()}


@torch.no_grad()
def _decoder(state: TrainingState) -> Raw:
    return Raw(state.metric.raw_direction(White(state.sae.W_dec_FD)).cpu())


def _compared(suite: str, scores: Sequence[Measured | None]) -> Iterator[Compared]:
    """The measures of one suite, in the order of the first run's."""
    held = [one if one is not None else Measured({}) for one in scores]
    first = held[0].samples
    apart = [differences(first, one.samples) if first and one.samples else {} for one in held[1:]]
    for measure in dict.fromkeys(key for one in held for key in one):
        if not measure.endswith((LOW, HIGH)):
            yield Compared(
                suite=suite,
                measure=measure,
                values=tuple(one.get(measure) for one in held),
                differences=(None, *(found.get(measure) for found in apart)),
            )


def _agreements(looks: Sequence[_Look]) -> Iterator[Agreement]:
    """Pairs of dictionaries on the same place of the same model."""
    for (i, a), (j, b) in combinations(enumerate(looks), 2):
        same = [(look.plan.facts.model, look.plan.facts.hook, look.plan.facts.d_model) for look in (a, b)]
        if same[0] == same[1]:
            found = matching.matched(a.rows_FD, b.rows_FD)
            yield Agreement(first=i, second=j, pw_mcc=found.mean, floor=matching.floor(a.rows_FD, len(b.rows_FD)))


def _names(paths: Sequence[str | Path]) -> tuple[str, ...]:
    """Directory names, or whole paths where two are alike."""
    short = [Path(path).resolve().name for path in paths]
    return tuple(short if len(set(short)) == len(short) else map(str, paths))


__all__ = ["Agreement", "Compared", "Comparison", "compare", "evaluate", "kept"]
