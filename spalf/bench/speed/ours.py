"""Our own step: a recipe's first phase of training with all that it does, by kernel backend.

Shape letters as in spalf/core/values.py.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any, cast

import torch
from attrs import frozen
from torch import Tensor

import spalf
from spalf import plugins
from spalf.assembly import compile as compiler
from spalf.assembly import toml
from spalf.bench.peer_steps.measure import BATCHES, Task, activations, attempt
from spalf.core.protocols import Stream
from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.core.tree import to
from spalf.core.values import Batch, Facts, Raw
from spalf.engine.build import build
from spalf.errors import Problem, RecipeError
from spalf.kernels.reference import tensor_cores
from spalf.parts.source.bare import Bare

VOCABULARY = 50_304
SETTINGS = (
    "name=bench",
    # Without a model: the stream is handed in.
    'source={ use = "huggingface", model = "none", layer = 1, text = "none" }',
    "budget.tokens=1_000_000_000",
    "knobs.lr=1e-6",
)
"""Of every recipe here. The rate is low, so that L0, hence the work, stays where calibration puts it."""


@frozen(kw_only=True)
class Variant:
    """What of ours is measured: a recipe, a backend ("triton", or with options "torch:code=dense"), more settings."""

    kernel: str
    recipe: str = "spalf"
    sets: tuple[str, ...] = ()
    label: str = ""

    @property
    def name(self) -> str:
        preset = self.recipe if self.recipe.startswith("spalf") else "spalf"
        return self.label or f"{preset} {self.kernel}"


def kernel_sets(spec: str) -> tuple[str, ...]:
    """`use:key=value` as settings. Raises RecipeError for a part that is no assignment."""
    use, *options = spec.split(":")
    for option in options:
        if not all(option.partition("=")):
            message = f'"{option}" of "{spec}" is no assignment'
            raise RecipeError([Problem("--kernels", message, "write NAME or NAME:option=value")])
    return (f"kernel.use={use}", *(f"kernel.{option}" for option in options))


class Pool(Bare):
    """The batches that every subject of a run gets, over and over, and an unembedding of Gaussian rows."""

    source = "pool"

    def __init__(self, facts: Facts, task: Task) -> None:
        self.facts, self._task, self._at, self._draws = facts, task, 0, 0
        self._x_ND = torch.cat(activations(task))
        draw = torch.Generator(task.device).manual_seed(task.seed + 1)
        self._unembedding_VD = torch.randn(facts.n_vocab, task.d, generator=draw, device=task.device)

    def next(self, n: int) -> Batch:
        """The next rows; more than there are (a calibration's sample) are drawn anew and not kept."""
        if n > len(self._x_ND):
            self._draws += 1
            fresh = activations(self._task, -(-n // BATCHES), self._draws)
            return Batch(x_BD=Raw(torch.cat(fresh)[:n]))
        self._at = self._at if self._at + n <= len(self._x_ND) else 0
        self._at += n
        return Batch(x_BD=Raw(self._x_ND[self._at - n : self._at]))

    def unembedding(self) -> Raw:
        return Raw(self._unembedding_VD)

    def token_counts(self) -> Tensor:
        return torch.ones(self.facts.n_vocab, dtype=torch.int64)


def pool(task: Task) -> Pool:
    """The stream of a task: made before a step's memory is counted."""
    provides = frozenset({"activations", "tokens", "logits", "unembedding"})
    vocabulary = max(1, min(VOCABULARY, task.width // 4))
    facts = Facts(d_model=task.d, n_vocab=vocabulary, provides=provides, hook="x", model="x", context=128)
    return Pool(facts, task)


def planned(task: Task, variant: Variant, facts: Facts) -> Plan:
    """The plan of a variant at a task's shape. Raises RecipeError for a kernel or a setting that there is not."""
    shape = (
        f"knobs.F={task.width}",
        f"knobs.L0_target={task.l0}",
        f"budget.batch={task.batch}",
        f"phase.calibrate.samples={20 * task.d}",
    )
    sets = (*SETTINGS, *shape, *kernel_sets(variant.kernel), *variant.sets)
    registry = plugins.load()[1]
    plan = compiler.compile(toml.read(variant.recipe, sets), registry, facts)
    more = []
    if hasattr(plan.recipe.activation, "start"):
        more.append("activation.start=1.0")  # at the target from the first step on, not at the recipe's multiple of it
    for name, stratum in plan.recipe.stratum.items():
        if hasattr(stratum, "of"):
            more.append(f"stratum.{name}.of=unembedding")  # there is no text to average over, and a step costs the same
    return compiler.compile(toml.read(variant.recipe, (*sets, *more)), registry, facts) if more else plan


def entered(plan: Plan, stream: Pool, device: torch.device) -> TrainingState:
    """A state that has been calibrated and has entered the recipe's second phase."""
    state = build(plan, device, stream=cast(Stream, stream))
    calibrate, train = plan.recipe.phases[:2]
    for name in (calibrate, train):
        phase = plan.recipe.phase[name]
        if state.clock.phase != name:
            state.clock = state.clock.next_phase(name)
        state.phase = to(phase.init(plan), device)
        phase.enter(plan, state)
        while name == calibrate and not phase.done(plan, state):
            phase.step(plan, state)
    return state


class Ours:
    """One step: batch, whitening, code, terms and constraints, backward, projection, optimizer, control."""

    def __init__(self, task: Task, variant: Variant, stream: Pool) -> None:
        self.version = str(spalf.__version__)
        self.plan = planned(task, variant, stream.facts)
        self.state = entered(self.plan, stream, torch.device(task.device))
        self.phase: Any = self.plan.recipe.phase[self.state.clock.phase]
        self.ops = self.state.sae.machine.ops
        compute = str(getattr(self.ops, "compute", "float32"))
        names = ", ".join(getattr(self.phase, "constraints", ())) or "no constraint"
        self.note = f"{names}; {self.ops.name}, products of {compute}"
        self._l0 = torch.zeros(())

    def step(self, x_BD: Tensor | None = None) -> Tensor:
        """The batch comes from the state's own stream, which holds those that other subjects are given."""
        with tensor_cores(str(getattr(self.ops, "compute", "float32"))):
            reading = self.phase.step(self.plan, self.state)
        self._l0 = reading.values["l0"]
        loss: Tensor = reading.values["loss"]
        return loss

    def l0(self) -> float:
        return float(self._l0)

    def parameters(self) -> Iterable[Tensor]:
        return cast(torch.nn.Module, self.state.sae).parameters()


def row(task: Task, variant: Variant) -> dict[str, Any]:
    """The measured row of a variant, or the reason why there is none."""
    head = {"name": variant.name, "library": "spalf", "precision": task.precision}
    stream: list[Pool] = []

    def make() -> Ours:
        return Ours(task, variant, stream[0])

    try:
        stream.append(pool(task))
    except torch.OutOfMemoryError as e:
        return {**head, "status": "memory", "reason": "out of memory: " + str(e).splitlines()[0]}
    # The batches are the stream's: none are made for `measure` beside them.
    found = attempt(make, task, [torch.empty(0)])
    stream.clear()
    gc.collect()
    if torch.cuda.is_available():
        # The next row may be another process's.
        torch.cuda.empty_cache()
    return {**head, **found}
