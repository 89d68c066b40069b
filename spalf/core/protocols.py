"""One protocol per slot.

A component is a frozen record of options; what it builds (`core/built.py`) holds the tensors. `S` is a component's own
state: a frozen attrs record of tensors, opaque to everybody else.

An activation, filter, dual, penalty, lagrangian, optimizer, term or constraint may have `capturable` = True: on CUDA
its work is the same launches on the same tensors in every step, it waits for nothing, and no number that it takes from
Python (the clock) changes from step to step. A step of such parts alone is recorded once as a CUDA graph and replayed;
an optimizer reads its rate from a tensor then, as torch's own with `capturable` do. A logged step reads an activation's
thresholds and bandwidths too, and is recorded as the others are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from spalf.core.built import Activator, Autoencoder, Metric, Ops, Stream
from spalf.core.recipe import Plan
from spalf.core.state import Anchor, ControlState, TrainingState
from spalf.core.values import Clock, Facts, Reading, Signal, View, Violations, White

__all__ = [
    "Activation",
    "Activator",
    "Autoencoder",
    "Constraint",
    "Dual",
    "Evaluator",
    "Filter",
    "Gate",
    "Kernel",
    "Lagrangian",
    "Metric",
    "Ops",
    "Optimizer",
    "Penalty",
    "Phase",
    "Schedule",
    "Source",
    "Stratum",
    "Stream",
    "Term",
    "Whitener",
]

S = TypeVar("S")


class Source(Protocol):
    """Where activations come from."""

    def facts(self) -> Facts:
        """Reads a config, never a weight. Raises SourceError with a remedy."""
        ...

    def open(self, seed: int, device: torch.device) -> Stream: ...


class Whitener(Protocol):
    """How model space becomes whitened space. One that takes no mean off has a class attribute `centred` = False."""

    def build(self, facts: Facts) -> Metric: ...

    def fit_(self, metric: Metric, mean_D: Tensor, cov_DD: Tensor) -> None:
        """Pour a float64 mean and covariance into the metric."""
        ...


class Activation(Protocol):
    """The nonlinearity and its pseudo-gradient."""

    def build(self, width: int) -> Activator: ...


class Stratum(Protocol):
    """A named range of dictionary rows with a geometry of its own."""

    def rows(self, facts: Facts, remaining: int, width: int) -> int:
        """How many rows it takes of the `remaining` ones of a dictionary of `width`."""
        ...

    def anchor(self, stream: Stream, rows: int) -> Anchor | None:
        """Directions in model space that these rows are tied to, or None."""
        ...

    def start(self, rows: int, metric: Metric, anchor: Anchor | None, draw: torch.Generator) -> White:
        """First decoder rows [rows, D], unit norm; the encoder starts equal to them."""
        ...

    def project_gradient_(self, weight_FD: Tensor, grad_FD: Tensor) -> None:
        """Before the optimizer's step, in place on `grad_FD`."""
        ...

    def project_(self, weight_FD: Tensor) -> None:
        """After the optimizer's step, in place on `weight_FD`."""
        ...


class Term(Protocol):
    """A dimensionless summand of the objective."""

    partial: ClassVar[bool]
    """Whether it is a sum over features, hence partial on a shard."""
    dense: ClassVar[bool]
    """Whether it reads entries that a compact code leaves out."""

    def value(self, view: View) -> Tensor: ...


class Constraint(Protocol):
    """value <= budget, both in one unit; the engine alone forms g = value / budget - 1."""

    needs: ClassVar[frozenset[str]]
    """What its source has to provide, such as "logits"."""
    partial: ClassVar[bool]
    dense: ClassVar[bool]

    def budget(self, view: View) -> Tensor:
        """Measured once, without gradient, when the constraint is switched on."""
        ...

    def value(self, view: View) -> Tensor: ...


class Filter(Protocol[S]):
    """Turns noisy violations into the signal that controllers see."""

    every: int

    def init(self, m: int) -> S: ...

    def enter(self, state: S, g_M: Tensor, entering_M: Tensor) -> S:
        """Start the entering constraints at their first violation."""
        ...

    def step(self, state: S, g_M: Tensor, on_M: Tensor) -> S: ...

    def signal(self, state: S, g_M: Tensor, on_M: Tensor) -> Signal: ...

    def tick(self, state: S) -> S:
        """previous := fast."""
        ...


class Dual(Protocol[S]):
    """The multipliers' law; its state exposes `lam_M >= 0`. Stepped on ticks."""

    def init(self, m: int) -> S: ...

    def step(self, state: S, signal: Signal) -> S: ...


class Penalty(Protocol[S]):
    """The penalties' law; its state exposes `rho_M > 0`. Stepped on ticks."""

    def init(self, m: int) -> S: ...

    def enter(self, state: S, g_M: Tensor, entering_M: Tensor) -> S:
        """Calibrate the entering constraints on their first violation; touches no other."""
        ...

    def step(self, state: S, signal: Signal) -> S: ...


class Lagrangian(Protocol):
    """One scalar to descend from objective, violations, multipliers and penalties."""

    def __call__(self, objective: Tensor, violations: Violations, control: ControlState) -> Tensor: ...


class Gate(Protocol[S]):
    """When a phase may end. `step` counts in tensors and makes no host copy."""

    def init(self) -> S: ...

    def step(self, state: S, signal: Signal, clock: Clock) -> S: ...

    def open(self, state: S, clock: Clock) -> bool: ...


class Phase(Protocol):
    """A stretch of a run. Its state is saved, `enter` runs once and never on resume."""

    def init(self, plan: Plan) -> Any: ...

    def enter(self, plan: Plan, state: TrainingState) -> None: ...

    def step(self, plan: Plan, state: TrainingState) -> Reading: ...

    def done(self, plan: Plan, state: TrainingState) -> bool: ...


class Schedule(Protocol):
    """The learning rate's course over a run."""

    def scale(self, clock: Clock) -> float:
        """Factor on every learning rate at this time, in [0, 1], a pure function of the clock."""
        ...


class Optimizer(Protocol):
    """The primal rule. Where it has an option `max_norm` above 0, the Learner clips the gradient's norm to that."""

    rule: ClassVar[str]
    """Name of the update rule that a backend may fuse; "" where none can."""

    def build(self, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer: ...

    def scale(self, clock: Clock) -> float:
        """Factor on every learning rate at this time: warm-up and decay."""
        ...


class Kernel(Protocol):
    """A backend for the operations that cost time."""

    def ops(self, device: torch.device) -> Ops:
        """Raises RunError with a remedy where it cannot run."""
        ...


class Evaluator(Protocol):
    """Named finite numbers about a state, which it leaves untouched."""

    needs: ClassVar[frozenset[str]]

    def __call__(self, plan: Plan, state: TrainingState) -> dict[str, float]: ...
