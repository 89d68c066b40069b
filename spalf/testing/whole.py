"""Checks of what works on a whole state: phases and evaluators; and the small plans that they run on."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from spalf import plugins
from spalf.assembly import compile as compiler
from spalf.assembly import toml
from spalf.core.recipe import Plan
from spalf.core.slots import label
from spalf.core.state import TrainingState
from spalf.core.tree import Leaf, flatten, to
from spalf.engine import checkpoint
from spalf.engine.build import build
from spalf.parts.gate import Exhausted
from spalf.parts.phase import Calibrate

Check = Callable[[], None]
CPU = torch.device("cpu")

EXAMPLES: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("phase", "calibrate"): {"samples": 2048},
    ("phase", "constrained"): {"constraints": ("faithfulness", "orthogonality"), "gate": Exhausted()},
    ("phase", "resampling"): {"constraints": ("faithfulness",), "gate": Exhausted(), "every": 4, "window": 256},
    ("evaluator", "downstream_loss"): {"sequences": 4},
    ("evaluator", "sparsity_frontier"): {"rows": 1024, "sequences": 4},
    ("evaluator", "ground_truth"): {"rows": 2048},
}

TOY = """
name = "toy"
seed = 1
phases = ["calibrate", "fit"]
strata = ["free"]
activation = { refine = false }
knobs = { F = 64, L0_target = 6, R2_target = 0.8, lr = 3e-3 }
budget = { tokens = 12_800, batch = 128 }
record = { log_every = 10, save_every = 1000, keep = 1 }
source = { use = "synthetic", d_model = 16, features = 32 }
phase.calibrate = { samples = 2048 }
phase.fit = { constraints = ["faithfulness", "orthogonality"], gate = { use = "exhausted" } }
constraint.orthogonality = { sample = 16 }
evaluator = { downstream_loss = false, sparsity_frontier = false, drift_fidelity = false }
"""

LANGUAGE = {
    "source": '{ use = "huggingface", model = "embedded", text = "stdlib", layer = 1, context = 32, sequences = 64, '
    'shuffle = 2048, dtype = "float32" }',
    "strata": '["anchored", "free"]',
    "knobs__F": "256",
    "knobs__R2_target": "0.5",
    "phase__fit__constraints": '["faithfulness", "drift", "orthogonality"]',
}


def toy_plan(**sets: str) -> Plan:
    """A plan that trains in about a second on one CPU core: 100 steps on planted features.

    `sets` are settings as on the command line, with __ for the dot: toy_plan(budget__batch="64").
    """
    _, registry = plugins.load()
    table = toml.merge(toml.read("spalf"), toml.parse(TOY, "toy"))
    for key, value in sets.items():
        table = toml.merge(table, toml.setting(f"{key.replace('__', '.')}={value}"))
    return compiler.compile(table, registry)


def language_plan(**sets: str) -> Plan:
    """`toy_plan` on the embedded language model, for components that need logits, tokens or anchors."""
    return toy_plan(**{**LANGUAGE, **sets})


def started(plan: Plan, steps: int = 12) -> TrainingState:
    """A state whose first phase is over, `steps` steps into its second."""
    state = build(plan, CPU)
    first, second = plan.recipe.phases[:2]
    through(plan, state, first)
    enter(plan, state, second)
    advance(plan, state, steps)
    return state


def enter(plan: Plan, state: TrainingState, name: str) -> None:
    """Begin a phase as a run does."""
    if state.clock.phase != name:
        state.clock = state.clock.next_phase(name)
        state.phase = to(plan.recipe.phase[name].init(plan), state.device)
    plan.recipe.phase[name].enter(plan, state)


def advance(plan: Plan, state: TrainingState, steps: int) -> None:
    """At most `steps` steps of the current phase."""
    phase = plan.recipe.phase[state.clock.phase]
    for _ in range(steps):
        if phase.done(plan, state):
            return
        phase.step(plan, state)


def through(plan: Plan, state: TrainingState, name: str, limit: int = 1000) -> None:
    """A whole phase. Raises AssertionError where it does not end."""
    enter(plan, state, name)
    advance(plan, state, limit)
    assert plan.recipe.phase[name].done(plan, state), f"the phase was not done after {limit} steps"


def snapshot(state: TrainingState) -> dict[str, Leaf]:
    """A copy of every leaf."""
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in flatten(state).items()}


def moved(a: Mapping[str, Leaf], b: Mapping[str, Leaf]) -> list[str]:
    """Names of leaves that differ in any bit, or that only one side has."""

    def same(x: Leaf, y: Leaf) -> bool:
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return x.dtype == y.dtype and torch.equal(x, y)
        return type(x) is type(y) and bool(x == y)

    return sorted(k for k in a.keys() | b.keys() if k not in a or k not in b or not same(a[k], b[k]))


def checks(cls: type, component: Any) -> list[Check]:
    """The checks of the slots `phase` and `evaluator`."""
    return _phase(component) if label(cls).slot == "phase" else _evaluator(component)


# ---------------------------------------------------------------------------------------------------- phases
def _with_phase(component: Any) -> Plan:
    """The toy plan with `component` as its second phase; `calibrate`, which must come first, as its only one.

    A phase that needs another recipe around it says so in its module's PLANS: by (slot, use), settings of `toy_plan`.
    """
    ref = label(type(component))
    around = getattr(sys.modules.get(type(component).__module__), "PLANS", {}).get((ref.slot, ref.use), {})
    plan = toy_plan(**around)
    name = "calibrate" if isinstance(component, Calibrate) else "fit"
    settled = component.settle(plan) if hasattr(component, "settle") else component
    phases = {**plan.recipe.phase, name: settled}
    order = plan.recipe.phases[: plan.recipe.phases.index(name) + 1]
    return evolve(plan, recipe=evolve(plan.recipe, phase=phases, phases=order))


def _ready(plan: Plan) -> TrainingState:
    """A state in which the plan's last phase has just been entered."""
    state = build(plan, CPU)
    *before, last = plan.recipe.phases
    for name in before:
        through(plan, state, name)
    enter(plan, state, last)
    return state


def _poured(plan: Plan, state: TrainingState) -> TrainingState:
    """A fresh state, filled from a checkpoint of `state`."""
    with TemporaryDirectory() as folder:
        at = checkpoint.save(plan, state, Path(folder), "", {"serial": 1})
        fresh = build(plan, CPU)
        checkpoint.load(at, plan, fresh)
    return fresh


def _phase(component: Any) -> list[Check]:
    def finishes_with_finite_numbers() -> None:
        plan = _with_phase(component)
        state = build(plan, CPU)
        for name in plan.recipe.phases:
            through(plan, state, name)
        bad = [k for k, v in flatten(state).items() if isinstance(v, Tensor) and not bool(v.isfinite().all())]
        assert not bad, f"not finite at the end of the phase: {bad}"

    def changes_something() -> None:
        plan = _with_phase(component)
        state = _ready(plan)
        before = snapshot(state)
        advance(plan, state, 1000)
        assert any(k.startswith("learner.") for k in moved(before, snapshot(state))), "the dictionary has not changed"

    def resumes_bit_identically() -> None:
        plan = _with_phase(component)
        first = int(torch.randint(1, 9, (), generator=torch.Generator().manual_seed(0)))
        whole, cut = _ready(plan), _ready(plan)
        advance(plan, whole, first + 5)
        advance(plan, cut, first)
        resumed = _poured(plan, cut)
        assert not moved(snapshot(cut), snapshot(resumed)), "saving and pouring changed the state"
        advance(plan, resumed, 5)
        apart = moved(snapshot(whole), snapshot(resumed))
        assert not apart, f"resumed after {first} steps it differs from an uncut one in {apart}"

    return [finishes_with_finite_numbers, changes_something, resumes_bit_identically]


# ------------------------------------------------------------------------------------------------ evaluators
@cache
def _stage(name: str) -> tuple[Plan, TrainingState]:
    """A plan and its started state, by the name of the plan; checks leave it as it is, or it is dropped."""
    plan = {"language": language_plan, "toy": toy_plan}[name]()
    return plan, started(plan)


def stage_for(needs: frozenset[str]) -> tuple[Plan, TrainingState]:
    """The plan, and its state some steps into training, whose source gives what an evaluator needs.

    Raises AssertionError where neither does.
    """
    for name in ("language", "toy"):
        plan = language_plan() if name == "language" else toy_plan()
        if needs <= plan.facts.provides:
            return _stage(name)
    raise AssertionError(f"the kit has no source that provides {', '.join(sorted(needs))}")


def _called(component: Any) -> dict[str, float]:
    """The scalars, from a call that left every leaf of the state as it was."""
    plan, state = stage_for(component.needs)
    before, stream = snapshot(state), state.stream
    try:
        out: dict[str, float] = component(plan, state)
        apart = moved(before, snapshot(state))
        assert not apart, f"the evaluator changed {apart}"
        assert state.stream is stream, "the evaluator left another stream behind"
    except BaseException:
        _stage.cache_clear()
        raise
    return out


def _evaluator(component: Any) -> list[Check]:
    def gives_finite_named_scalars() -> None:
        out = _called(component)
        assert out, "the evaluator gives nothing"
        bad = {k: v for k, v in out.items() if not (type(k) is str and type(v) is float and math.isfinite(v))}
        assert not bad, f"not a finite float by name: {bad}"

    def is_deterministic() -> None:
        assert _called(component) == _called(component), "two calls on one state differ"

    return [gives_finite_named_scalars, is_deterministic]
