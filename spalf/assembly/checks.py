"""What no single table can know: names against each other, components against the source, numbers against numbers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Sequence

from spalf.assembly import walk
from spalf.assembly.hints import quoted, suggest
from spalf.core.recipe import Knobs, Recipe
from spalf.core.slots import SLOTS, ComponentRef, label
from spalf.core.values import Facts
from spalf.errors import Problem, RecipeError, SpalfError

LARGEST_F = 2**31 - 1
"""Feature numbers are 32-bit in the kernels."""
LOGITS_LIMIT = 64 * 2**30
"""Bytes of logits above which no device holds one step of a constraint on the patched model."""
HELD = ("dual", "penalty")
LAST_GATE = ComponentRef("gate", "exhausted")
"""Opens only when no step is left, so no phase can follow it."""

ANCHORED_ONLY = ComponentRef("constraint", "drift")
"""Measures a distance from anchors, hence its stratum must have some."""


def located(path: str, error: Exception) -> list[Problem]:
    """A component's complaint as problems whose paths begin with the component's own, unless they are whole already."""
    if not isinstance(error, RecipeError):
        return [Problem(path, " ".join(str(error).split()))]
    tops = {*SLOTS, "knobs", "budget", "record"}
    return [
        p if "." in p.path and p.path.split(".")[0] in tops else Problem(_join(path, p.path), p.message, p.hint)
        for p in error.problems
    ]


def names(recipe: Recipe) -> list[Problem]:
    """Lists against declarations: phases, strata, and what each phase refers to."""
    problems = [*_list("phases", recipe.phases, recipe.phase), *_list("strata", recipe.strata, recipe.stratum)]
    problems += [Problem(key, "is empty", f"name at least one {of}") for key, of in _empty(recipe)]
    if not re.fullmatch(r"\w[\w.+-]*", recipe.name, re.ASCII):
        hint = "letters, digits, _ . + and -: a run's directory is called so"
        problems.append(Problem("name", f"{quoted(recipe.name)} is no name for a run", hint))
    on: set[str] = set()
    for i, name in enumerate(dict.fromkeys(recipe.phases)):
        if name in recipe.phase:
            problems += _phase(recipe, name, on, first=i == 0)
            on = set(getattr(recipe.phase[name], "constraints", ()))
    problems += _strata_meant(recipe)
    return problems


def numbers(recipe: Recipe, facts: Facts, knobs: Knobs) -> list[Problem]:
    """Sizes against each other and against what the source provides."""
    return [*_knobs(facts, knobs), *_budget(recipe, facts), *_needs(recipe, facts), *_logits(recipe, facts)]


def rows(recipe: Recipe, facts: Facts, F: int, problems: list[Problem]) -> dict[str, int]:
    """Rows per stratum in the order of `strata`; `problems` takes strata that get none or too many."""
    out: dict[str, int] = {}
    if F > LARGEST_F:
        return out
    for name in dict.fromkeys(recipe.strata):
        if name not in recipe.stratum:
            return out
        path, remaining = f"stratum.{name}", F - sum(out.values())
        try:
            n = recipe.stratum[name].rows(facts, remaining, F)
        except (SpalfError, ValueError) as e:
            problems += located(path, e)
            return out
        if n <= 0:
            problems.append(Problem(path, f"gets {n} of {F} rows", "raise knobs.F or cap the strata before it"))
        elif n > remaining:
            hint = "raise knobs.F, or cap it or the strata before it"
            problems.append(Problem(path, f"takes {n} rows where {remaining} of {F} remain", hint))
        out[name] = n
    left = F - sum(out.values())
    if recipe.strata and left > 0:
        hint = 'end the list with a stratum that takes what remains, such as "free"'
        problems.append(Problem("strata", f"leaves {left} of {F} rows to no stratum", hint))
    return out


def _list(path: str, entries: Sequence[str], declared: Collection[str]) -> Iterator[Problem]:
    """Entries that are repeated or not declared."""
    for name in dict.fromkeys(entries):
        if name not in declared:
            yield Problem(path, f"{quoted(name)} is not declared", suggest(name, declared, "declared"))
        if entries.count(name) > 1:
            yield Problem(path, f"{quoted(name)} is named {entries.count(name)} times", "name it once")


def _empty(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if not recipe.phases:
        yield "phases", "phase"
    if not recipe.strata:
        yield "strata", "stratum"


def _phase(recipe: Recipe, name: str, before: set[str], *, first: bool) -> Iterator[Problem]:
    """`before`: the constraints of the phase before this one."""
    phase, path = recipe.phase[name], f"phase.{name}"
    terms, constraints = getattr(phase, "terms", None), getattr(phase, "constraints", ())
    if terms is not None:
        yield from _list(f"{path}.terms", terms, recipe.term)
        if not terms and not getattr(phase, "objective", ""):  # a phase may minimise something besides its terms
            yield Problem(f"{path}.terms", "is empty: nothing would be minimised", 'name a term, such as "l0"')
        if first:
            hint = 'begin phases with one that calibrates, such as "calibrate"'
            yield Problem("phases", f"{quoted(name)} trains before whitener, rows and thresholds are set", hint)
    yield from _list(f"{path}.constraints", constraints, recipe.constraint)
    hold = getattr(phase, "hold", ())
    yield from _list(f"{path}.hold", hold, HELD)
    for ends, begins in getattr(phase, "handover", {}).items():
        place = f"{path}.handover.{ends}"
        if ends not in before:
            yield Problem(place, "is no constraint of the phase before", suggest(ends, before, "that phase has"))
        if ends in constraints:
            yield Problem(place, "goes on in this phase, so it has nothing to hand over", "take it out of one of them")
        if begins not in constraints:
            yield Problem(place, f"{quoted(begins)} is no constraint of this phase", suggest(begins, constraints))
    gate = getattr(phase, "gate", None)
    if walk.is_component(gate) and label(type(gate)) == LAST_GATE and name != recipe.phases[-1]:
        after = ", ".join(map(quoted, recipe.phases[recipe.phases.index(name) + 1 :]))
        yield Problem(f"{path}.gate", f'"exhausted" leaves no step to {after}', 'use a gate such as "feasible"')


def _strata_meant(recipe: Recipe) -> Iterator[Problem]:
    """An option called `stratum` names one that the dictionary has."""
    skipped = walk.idle(recipe)
    for path, component in walk.components(recipe):
        name = getattr(component, "stratum", None)
        if path in skipped or not isinstance(name, str) or not name:
            continue
        if name in recipe.strata:
            if (
                label(type(component)) == ANCHORED_ONLY
                and name in recipe.stratum
                and not _has_anchor(recipe.stratum[name])
            ):
                tied = [n for n in recipe.strata if n in recipe.stratum and _has_anchor(recipe.stratum[n])]
                hint = f"name one of {', '.join(tied)}" if tied else f"add an anchored stratum, or drop {path}"
                yield Problem(f"{path}.stratum", f"{quoted(name)} is tied to no anchors to drift from", hint)
        elif name in recipe.stratum:
            yield Problem(f"{path}.stratum", f"{quoted(name)} is not in strata", "add it there, or name another one")
        else:
            hint = suggest(name, recipe.stratum, "declared")
            yield Problem(f"{path}.stratum", f"{quoted(name)} is not declared", hint)


def _has_anchor(stratum: object) -> bool:
    """A stratum that is never tied to anything declares `anchor() -> None`."""
    return inspect.signature(type(stratum).anchor).return_annotation not in (None, "None")  # type: ignore[attr-defined]


def _knobs(facts: Facts, knobs: Knobs) -> Iterator[Problem]:
    F, L0 = knobs.F, knobs.L0_target
    if F > LARGEST_F:
        yield Problem("knobs.F", f"{F} features are more than {LARGEST_F}", "lower it")
    if L0 >= F:
        yield Problem("knobs.L0_target", f"{L0} active features of {F} are all of them", "lower it or raise knobs.F")
    elif facts.d_model < L0:
        message = f"{L0} active features exceed the {facts.d_model} dimensions they have to explain"
        yield Problem("knobs.L0_target", message, "lower it: such a code is no sparser than the activation")


def _budget(recipe: Recipe, facts: Facts) -> Iterator[Problem]:
    tokens, batch = recipe.budget.tokens, recipe.budget.batch
    if tokens < batch:
        yield Problem(
            "budget.tokens", f"{tokens} are less than one batch of {batch}", "raise it, or lower budget.batch"
        )
    if 0 < facts.shuffle < batch:
        hint = "raise source.shuffle to several batches, or lower budget.batch"
        yield Problem("source.shuffle", f"a block of {facts.shuffle} is smaller than a batch of {batch}", hint)
    every, steps = int(getattr(recipe.filter, "every", 1)), tokens // batch
    if tokens >= batch and every > steps:
        hint = f"lower it to a tenth of the steps or less: {max(1, steps // 10)}"
        yield Problem("filter.every", f"the dual side would never move: {every} exceeds the run's {steps} steps", hint)
    if not 0 <= recipe.seed < 2**63 - 1:
        yield Problem("seed", f"must be from 0 to {2**63 - 2}, got {recipe.seed}")


def _needs(recipe: Recipe, facts: Facts) -> Iterator[Problem]:
    """Components in use that ask the source for what it does not have."""
    skipped = walk.idle(recipe)
    for path, component in walk.components(recipe):
        missing = sorted(frozenset(getattr(component, "needs", ())) - facts.provides)
        if not missing or any(path == p or path.startswith(f"{p}.") for p in skipped):
            continue
        slot = path.split(".")[0]
        way_out = f"set {path} = false" if slot == "evaluator" else f"take it out of the phases, or set {path} = false"
        provided = ", ".join(sorted(facts.provides))
        hint = f"{walk.called(recipe.source)} provides {provided}; {way_out}, or use another source"
        yield Problem(path, f"needs {', '.join(missing)}", hint)


def _logits(recipe: Recipe, facts: Facts) -> Iterator[Problem]:
    """Constraints on the patched model keep clean and patched logits, probabilities and a gradient, all float32."""
    skipped = walk.idle(recipe)
    for name, constraint in recipe.constraint.items():
        sequences = getattr(constraint, "sequences", 0)
        if f"constraint.{name}" in skipped or "logits" not in constraint.needs:
            continue
        size = logits_bytes(sequences, facts)
        if size > LOGITS_LIMIT:
            fits = max(1, sequences * LOGITS_LIMIT // size)
            message = (
                f"{sequences} contexts of {facts.context} tokens need {size / 2**30:.0f} GiB of logits "
                f"over {facts.n_vocab} words"
            )
            yield Problem(f"constraint.{name}.sequences", message, f"lower it to {fits} or less, or source.context")


def logits_bytes(sequences: int, facts: Facts) -> int:
    """4 float32 arrays of [sequences, context, n_vocab]."""
    return 4 * 4 * sequences * facts.context * facts.n_vocab


def _join(path: str, inner: str) -> str:
    return f"{path}.{inner}" if inner and not inner.startswith("[") else path + inner
