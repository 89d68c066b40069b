"""How fast activations are harvested and trained on: each half alone, and both as they run.

An activation is one row of a batch. With position 0 left out, 128 tokens of text are 127 activations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import asdict, frozen
from torch import Tensor

import spalf
from spalf import launch, plugins
from spalf.assembly import compile as compiler
from spalf.assembly import toml
from spalf.core.protocols import Stream
from spalf.core.recipe import Plan
from spalf.core.slots import label
from spalf.core.state import TrainingState
from spalf.core.tree import to
from spalf.core.values import Batch, Raw
from spalf.engine.build import build
from spalf.errors import Problem, RecipeError
from spalf.kernels.reference import tensor_cores

HELD = ("name=bench", "budget.tokens=1_000_000_000_000", "knobs.lr=1e-6")
"""Nothing is written, so any name does. The work of a step depends on L0; the rate is so low that L0 stays where
calibration puts it, at the target."""
RESIDENT = 16
"""Batches that stay on the device for the steps that are measured without a harvest."""
WARMUP = 10
"""Calls before the clock is read: kernels are chosen, blocks are compiled."""
KINDS = ("harvest", "steps", "both")


@frozen(kw_only=True)
class Timing:
    """`rows` activations in `seconds`, `host_seconds` of which the host spent asking for the work."""

    kind: str
    rows: int
    seconds: float
    host_seconds: float
    peak_bytes: int

    @property
    def per_second(self) -> float:
        return self.rows / self.seconds


class Resident:
    """The first batches of a stream, over and over; all else is the stream's own."""

    def __init__(self, stream: Stream, batch: int) -> None:
        self._stream, self._at = stream, 0
        self._x_BD: list[Tensor] = [stream.next(batch).x_BD for _ in range(RESIDENT)]

    def next(self, n: int) -> Batch:
        if n != len(self._x_BD[0]):
            return self._stream.next(n)
        self._at = (self._at + 1) % RESIDENT
        return Batch(x_BD=Raw(self._x_BD[self._at]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def planned(recipe: str, sets: Sequence[str]) -> Plan:
    """The plan whose steps are measured; `sets` win over what is held still. Raises RecipeError."""
    registry = plugins.load()[1]
    plan = compiler.compile(toml.read(recipe, (*HELD, *sets)), registry)
    if hasattr(plan.recipe.activation, "start"):
        plan = compiler.compile(toml.read(recipe, (*HELD, "activation.start=1.0", *sets)), registry)
    if "tokens" not in plan.facts.provides:
        use = label(type(plan.recipe.source)).use
        raise RecipeError([Problem("source", f'"{use}" harvests from no language model', "use huggingface")])
    return plan


def entered(plan: Plan, device: torch.device, phase: str = "") -> TrainingState:
    """A state in the phase that is measured: `phase`, or the first that trains. Those before it are run, or skipped.

    Calibration is run to its end; other phases are entered, and left at once.
    """
    phases = list(plan.recipe.phases)
    wanted = phase or next((n for n in phases if n != "calibrate"), phases[0])
    if wanted not in phases:
        raise RecipeError([Problem("--phase", f'the recipe has no phase "{wanted}"', f"take one of {phases}")])
    state = build(plan, device)
    for name in phases[: phases.index(wanted) + 1]:
        part = plan.recipe.phase[name]
        if state.clock.phase != name:
            state.clock = state.clock.next_phase(name)
        state.phase = to(part.init(plan), device)
        part.enter(plan, state)
        while name == "calibrate" and not part.done(plan, state):
            part.step(plan, state)
    return state


def timed(
    kind: str, act: Callable[[], object], steps: int, batch: int, device: torch.device, warmup: int = WARMUP
) -> Timing:
    """`steps` calls after a warm-up, from a device at rest to a device at rest."""
    cuda = device.type == "cuda"
    for _ in range(warmup):
        act()
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    for _ in range(steps):
        act()
    host = time.perf_counter() - begin
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated(device) if cuda else 0
    return Timing(kind=kind, rows=steps * batch, seconds=seconds, host_seconds=host, peak_bytes=peak)


def whole_blocks(steps: int, batch: int, block: int) -> int:
    """`steps` rounded up until they use whole blocks: then each block that is used is one that was harvested."""
    return math.ceil(math.ceil(steps * batch / block) * block / batch)


def measure(plan: Plan, state: TrainingState, steps: int) -> list[Timing]:
    """The three timings. The steps between them are the state's own, on its own stream."""
    device, batch, stream = state.device, plan.recipe.budget.batch, state.stream
    phase = plan.recipe.phase[state.clock.phase]

    def step() -> None:
        phase.step(plan, state)

    with tensor_cores(str(getattr(state.sae.machine.ops, "compute", "float32"))):
        harvest = timed("harvest", lambda: stream.next(batch), steps, batch, device)
        state.stream = Resident(stream, batch)
        # As many before: lists grow in the first of them, and steps of each kind are recorded, the logged ones last.
        alone = timed("steps", step, steps, batch, device, warmup=max(WARMUP, steps))
        state.stream = stream
        both = timed("both", step, steps, batch, device)
    return [harvest, alone, both]


@frozen(kw_only=True, eq=False)
class Report:
    """What was measured, and of what."""

    plan: Plan
    state: TrainingState
    timings: tuple[Timing, ...]
    tokens_per_row: float

    def rate(self, kind: str) -> float:
        """Activations a second."""
        return next(t.per_second for t in self.timings if t.kind == kind)

    @property
    def ratio(self) -> float:
        """Both, to the slower half alone."""
        return self.rate("both") / min(self.rate("harvest"), self.rate("steps"))

    def table(self) -> dict[str, Any]:
        """Plain numbers."""
        plan, device = self.plan, self.state.device
        source: Any = plan.recipe.source
        shape = {
            "model": plan.facts.model,
            "hook": plan.facts.hook,
            "d_model": plan.facts.d_model,
            "F": plan.knobs.F,
            "L0_target": plan.knobs.L0_target,
            "batch": plan.recipe.budget.batch,
            "block": plan.facts.shuffle,
            "context": plan.facts.context,
            "phase": self.state.clock.phase,
            "kernel": self.state.sae.machine.ops.name,
            **{name: getattr(source, name, None) for name in ("sequences", "dtype", "overlap")},
        }
        cuda = device.type == "cuda"
        machine = {
            "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} thread(s)",
            "torch": torch.__version__,
            "spalf": spalf.__version__,
        }
        rows = [
            {**asdict(t), "activations_per_s": t.per_second, "tokens_per_s": t.per_second * self.tokens_per_row}
            for t in self.timings
        ]
        return {**machine, **shape, "rows": rows, "both_to_slower_half": self.ratio}


def report(recipe: str, sets: Sequence[str], *, device: str = "auto", steps: int = 200, phase: str = "") -> Report:
    """Measure a recipe. Raises RecipeError, SourceError as a run of it would."""
    plan = planned(recipe, sets)
    where = launch.device_of(device)
    state = entered(plan, where, phase)
    block = max(1, plan.facts.shuffle)
    count = whole_blocks(steps, plan.recipe.budget.batch, block)
    timings = measure(plan, state, count)
    source: Any = plan.recipe.source
    per_context = plan.facts.context - int(getattr(source, "skip_first", False))
    return Report(plan=plan, state=state, timings=tuple(timings), tokens_per_row=plan.facts.context / per_context)
