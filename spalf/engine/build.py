"""Plan -> TrainingState: the only place where modules are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from attrs import frozen

from spalf.core.protocols import Metric, Stream
from spalf.core.recipe import Plan
from spalf.core.state import Learner, Rng, TrainingState
from spalf.core.tree import to
from spalf.core.values import Clock, Facts, Machine
from spalf.engine import control
from spalf.engine.replay import Replay
from spalf.errors import SourceError
from spalf.nn import StratifiedAutoencoder


@frozen(kw_only=True)
class Unopened:
    """The stream of a state that is only looked at: it knows the facts, and a cursor poured into it is dropped.

    Anything else that is asked of it raises SourceError.
    """

    facts: Facts

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes any cursor: there is nothing to place."""

    def __getattr__(self, name: str) -> Any:
        raise SourceError(f"stream.{name}: this state was built without its source (build it without `stream`)")


def unopened(facts: Facts) -> Stream:
    """A stream for `build` that needs neither model nor data."""
    return cast(Stream, Unopened(facts=facts))


def build(plan: Plan, device: torch.device, stream: Stream | None = None) -> TrainingState:
    """A state of the right shapes at step 0 of the first phase; the phases fill in the numbers.

    Opens the source where no `stream` is given, hence raises SourceError where it cannot be read.
    """
    recipe = plan.recipe
    if stream is None:
        stream = recipe.source.open(recipe.seed, device)
    metric = recipe.whitener.build(plan.facts)
    sae = StratifiedAutoencoder(
        plan.facts.d_model,
        plan.rows,
        recipe.activation.build(plan.knobs.F),
        Machine(device=device, ops=recipe.kernel.ops(device), replay=Replay()),
    )
    optimizer = recipe.optimizer.build(sae.named_parameters())
    learner = Learner(
        sae=sae,
        optimizer=optimizer,
        rule=recipe.optimizer,
        strata={name: recipe.stratum[name] for name in recipe.strata},
        rates=tuple(group["lr"] for group in optimizer.param_groups),
    )
    first = recipe.phases[0]
    state = TrainingState(
        clock=Clock(total=plan.total_steps, phase=first),
        metric=_on(metric, device),
        anchors={},
        learner=learner,
        control=to(control.init(recipe.filter, recipe.dual, recipe.penalty, len(plan.constraints)), device),
        phase=to(recipe.phase[first].init(plan), device),
        stream=stream,
        rng=_rng(recipe.seed, device),
        silent_F=torch.zeros(plan.knobs.F, dtype=torch.int64, device=device),
        measured={},
    )
    return state


def _rng(seed: int, device: torch.device) -> Rng:
    # Not the recipe's seed itself: the source draws from that.
    return Rng(device=torch.Generator(device).manual_seed(seed + 1))


def _on(metric: Metric, device: torch.device) -> Metric:
    """A metric that is a module moves; one that is not has no tensors to move."""
    return metric.to(device) if isinstance(metric, torch.nn.Module) else metric
