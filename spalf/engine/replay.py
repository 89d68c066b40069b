"""Steps as CUDA graphs: the host records a step's launches once, and later steps of its kind replay them.

A training step launches hundreds of small kernels, and launching them takes longer than running them. A step can be
recorded when every part that it uses says that it is `capturable`; one with a tick of the controllers is another graph
than one without, and so is one whose numbers are logged. All other steps run as they always do, on the same tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor

from spalf.core import tree
from spalf.core.recipe import Plan
from spalf.core.state import ControlState, TrainingState
from spalf.core.values import Batch, Raw, Signal


@frozen(kw_only=True, eq=False)
class Outcome:
    """What a step leaves behind besides the parameters, all of it on the device."""

    control: ControlState
    silent_F: Tensor
    signal: Signal
    lam_M: Tensor
    numbers: Mapping[str, Tensor]
    """Scalars."""


Body = Callable[[Batch], Outcome]


def is_capturable(plan: Plan, terms: Sequence[str], constraints: Collection[str], ticks: bool = False) -> bool:
    """Whether every part that a step calls, one in which the controllers tick too, says that its work is the same
    launches in every step."""
    recipe = plan.recipe
    parts = [recipe.activation, recipe.filter, recipe.lagrangian, recipe.optimizer]
    parts += [recipe.dual, recipe.penalty] if ticks else []
    parts += [recipe.term[t] for t in terms]
    parts += [recipe.constraint[c] for c in constraints]
    # Of strata that say what their rows are, a fused update calls nothing.
    fused = all(hasattr(recipe.stratum[s], "sphere") for s in recipe.strata)
    return fused and all(bool(getattr(part, "capturable", False)) for part in parts)


@frozen(kw_only=True, eq=False)
class _Recorded:
    """A graph, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    x_BD: Tensor
    control: ControlState
    silent_F: Tensor
    signal: Signal
    names: tuple[str, ...]
    scalars_N: Tensor
    rows_NM: Tensor

    def __call__(self, state: TrainingState, batch: Batch) -> Outcome:
        """Replay on a batch. The numbers are copies; the control state and the counts are the recorded tensors."""
        self.x_BD.copy_(batch.x_BD)
        if state.control is not self.control:
            _pour(state.control, self.control)
        if state.silent_F is not self.silent_F:
            self.silent_F.copy_(state.silent_F)
        self.graph.replay()
        scalars_N, rows_NM = self.scalars_N.clone(), self.rows_NM.clone()
        rows = dict(zip((*_SIGNAL, "lam_M"), rows_NM.unbind(), strict=True))
        return Outcome(
            control=self.control,
            silent_F=self.silent_F,
            lam_M=rows.pop("lam_M"),
            signal=evolve(self.signal, **rows),
            numbers=dict(zip(self.names, scalars_N.unbind(), strict=True)),
        )


_SIGNAL = ("g_M", "fast_M", "slow_M", "previous_M", "rho_M")


def _pour(source: Any, target: Any) -> None:
    """Copy every leaf; all are read before one is written, as leaves of `source` may be those of `target`."""
    held = {name: leaf.clone() for name, leaf in tree.flatten(source).items() if isinstance(leaf, Tensor)}
    for name, leaf in tree.flatten(target).items():
        if isinstance(leaf, Tensor):
            leaf.copy_(held[name])


@frozen(kw_only=True, eq=False)
class _Inputs:
    """What the graphs of one kind read, and all but the batch write."""

    x_BD: Tensor
    control: ControlState
    silent_F: Tensor


@define(eq=False)
class Replay:
    """The recorded steps of one autoencoder. A graph is recorded at the second step of its kind.

    A step's kind is its phase, its batch's shape and what the kernels' lists depend on; where that changes, steps
    are recorded anew. The first one of a kind runs as it is: it compiles what has to be compiled. Within a kind there
    is a graph per `variant`, such as steps with a tick and steps that are logged; they share their memory.
    """

    _kind: Hashable = None
    _seen: set[Hashable] = field(factory=set)
    _recorded: dict[Hashable, _Recorded] = field(factory=dict)
    _inputs: _Inputs | None = None
    _pool: Any = None
    _refused: bool = False

    def forget(self) -> None:
        """Drop the graphs, and the memory that they hold."""
        self._kind, self._inputs, self._pool = None, None, None
        self._seen.clear()
        self._recorded.clear()

    def step(self, kind: Hashable, variant: Hashable, state: TrainingState, batch: Batch, body: Body) -> Outcome:
        """`body(batch)`, replayed where its kind and variant have been recorded. Same numbers either way."""
        if kind != self._kind:
            self.forget()
            self._kind = kind
        if variant in self._recorded:
            return self._recorded[variant](state, batch)
        if variant not in self._seen or self._refused:
            self._seen.add(variant)
            return body(batch)
        draws = state.rng.device.get_state()
        try:
            self._recorded[variant] = self._record(state, batch, body)
        except RuntimeError as e:
            self._refused = True
            # Another variant's graph draws from the old generator.
            self._recorded.clear()
            # The old generator still waits for the end of the recording.
            state.rng.device = torch.Generator(state.device)
            state.rng.device.set_state(draws)
            said = f"a training step could not be recorded as a CUDA graph and runs slower without ({e})"
            warnings.warn(said, RuntimeWarning, stacklevel=2)
            return body(batch)
        return self._recorded[variant](state, batch)

    def _shared(self, state: TrainingState, batch: Batch) -> _Inputs:
        """The tensors of all graphs of this kind, which the state then goes on with."""
        if self._inputs is None:
            self._pool = torch.cuda.graph_pool_handle()
            # Copies, for a record may hold one tensor under two names, and each is written here.
            control = tree.apply(torch.clone, state.control)
            self._inputs = _Inputs(x_BD=batch.x_BD.clone(), control=control, silent_F=state.silent_F.clone())
        held = self._inputs
        if state.control is not held.control:
            _pour(state.control, held.control)
        if state.silent_F is not held.silent_F:
            held.silent_F.copy_(state.silent_F)
        state.control, state.silent_F = held.control, held.silent_F
        return held

    def _record(self, state: TrainingState, batch: Batch, body: Body) -> _Recorded:
        """Nothing runs here but copies: what is recorded takes effect when it is replayed."""
        held = self._shared(state, batch)
        # Gradients that an earlier step left would be recorded as tensors to add to.
        state.learner.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(state.rng.device)
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = body(Batch(x_BD=Raw(held.x_BD)))
            scalars_N = torch.stack([v.detach().float() for v in out.numbers.values()])
            rows_NM = torch.stack([*(getattr(out.signal, name) for name in _SIGNAL), out.lam_M])
            _pour(out.control, held.control)
            held.silent_F.copy_(out.silent_F)
        return _Recorded(
            graph=graph,
            x_BD=held.x_BD,
            control=held.control,
            silent_F=held.silent_F,
            signal=out.signal,
            names=tuple(out.numbers),
            scalars_N=scalars_N,
            rows_NM=rows_NM,
        )
