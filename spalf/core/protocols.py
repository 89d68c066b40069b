"""One protocol per slot, and one for each thing that a slot's components build.

A component is a frozen record of options; what it builds holds the tensors. `S` is a component's own state: a frozen
attrs record of tensors, opaque to everybody else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from spalf.core.recipe import Plan
from spalf.core.state import Anchor, ControlState, Learner, TrainingState
from spalf.core.values import (
    Batch,
    Clock,
    Code,
    Facts,
    Machine,
    Raw,
    Reading,
    Sequences,
    Signal,
    View,
    Violations,
    White,
)

S = TypeVar("S")


# ---------------------------------------------------------------------------------------------- what slots build
class Stream(Protocol):
    """An open source: activations in shuffled blocks, and the model behind them where there is one.

    Everything it gives is a function of (options, seed, cursor); `state_dict` is the cursor.
    """

    facts: Facts

    def next(self, n: int) -> Batch:
        """The next `n` activations of the current shuffled block, float32 on the stream's device."""
        ...

    def sequences(self, n: int) -> Sequences:
        """The next `n` whole contexts, by a cursor of their own."""
        ...

    def activations(self, sequences: Sequences) -> Raw:
        """Activations [S, T, D] of whole contexts at the hook."""
        ...

    def logits(self, sequences: Sequences, patch: Callable[[Raw], Raw] | None = None) -> Tensor:
        """Logits [S, T, V], the hooked activation [S, T, D] replaced by `patch` of it; gradients flow through it."""
        ...

    def unembedding(self) -> Raw:
        """Rows of the unembedding [V, D]."""
        ...

    def token_counts(self) -> Tensor:
        """How often each token occurs in a sample of the training text, int64 [V]."""
        ...

    def text(self, tokens: Tensor) -> list[str]:
        """Each token id of a 1-d tensor as readable text."""
        ...

    def truth(self) -> Raw:
        """The planted directions [N, D] of a synthetic source, unit rows."""
        ...

    def held_out(self) -> Stream:
        """A fresh stream over documents that training never sees; it shares the model and starts at cursor 0."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Metric(Protocol):
    """The border between model space and whitened space: W and its exact inverse, both symmetric."""

    def white(self, x: Raw) -> White:
        """Points [..., D]: (x - mu) W."""
        ...

    def raw(self, x: White) -> Raw:
        """Points back: x W^-1 + mu."""
        ...

    def white_direction(self, v: Raw) -> White:
        """Dictionary rows or differences [..., D], without the mean: v W."""
        ...

    def raw_direction(self, v: White) -> Raw:
        """Rows or differences back: v W^-1."""
        ...

    def variance(self, space: str) -> Tensor:
        """Total variance, a scalar: tr S for "raw", d_eff = sum l_i / (l_i + alpha) for "white"."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> Any: ...


class Activator(Protocol):
    """A module with the activation's own parameters (thresholds)."""

    def __call__(self, pre_BK: Tensor, index_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(z_BK, gate_BK); `index_BK` names the feature of each entry, None means all features in order."""
        ...

    def calibrate_(self, pre_BC: Tensor, density: float, rows: slice) -> None:
        """Set thresholds and bandwidths of features `rows` so that a share `density` of the entries is active."""
        ...

    def reach_F(self) -> Tensor | None:
        """The pre-activation at or below which an entry has neither value nor gradient; None: dense only."""
        ...

    def threshold_F(self) -> Tensor:
        """Inference thresholds: an entry is active where its pre-activation exceeds this."""
        ...


class Autoencoder(Protocol):
    """Encoder and decoder, both in whitened coordinates, rows grouped into named strata."""

    W_enc_FD: nn.Parameter
    W_dec_FD: nn.Parameter
    b_enc_F: nn.Parameter
    b_dec_D: nn.Parameter
    log_gain: nn.Parameter
    width: int
    machine: Machine

    @property
    def rows(self) -> Mapping[str, slice]:
        """Row range of each stratum, in order."""
        ...

    @property
    def activator(self) -> Activator: ...

    def encode(self, white_BD: White, dense: bool = False) -> Code:
        """A code; `dense` asks for every entry, for terms that look beyond the surrogate's window."""
        ...

    def decode(self, code: Code) -> White: ...

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Any: ...


class Ops(Protocol):
    """A backend's surface; kernels/reference.py is the oracle of each."""

    name: str

    def encode(self, white_BD: White, sae: Autoencoder, dense: bool) -> Code: ...

    def decode(self, code: Code, sae: Autoencoder) -> White:
        """z @ W_dec without gain and bias: this shard's part of the sum, [B, D]."""
        ...

    def coactivation(
        self, code: Code, sae: Autoencoder, sample_R: Tensor, rows: slice, direction: Callable[[White], Tensor]
    ) -> Tensor:
        """Mean over the sampled rows of the mean squared cosine between co-active features of `rows`; never F x F."""
        ...

    def update(self, learner: Learner) -> bool:
        """Fused gradient and optimizer rule; False where this backend leaves it to the optimizer."""
        ...


# ---------------------------------------------------------------------------------------------------- the slots
class Source(Protocol):
    """Where activations come from."""

    def facts(self) -> Facts:
        """Reads a config, never a weight. Raises SourceError with a remedy."""
        ...

    def open(self, seed: int, device: torch.device) -> Stream: ...


class Whitener(Protocol):
    """How model space becomes whitened space."""

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


class Optimizer(Protocol):
    """The primal rule."""

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
