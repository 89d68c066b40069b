"""Plan -> TrainingState: the only place where modules are made."""

from __future__ import annotations

import torch

from spalf.core.protocols import Metric
from spalf.core.recipe import Plan
from spalf.core.state import Learner, Rng, TrainingState
from spalf.core.tree import to
from spalf.core.values import Clock, Machine
from spalf.engine import control
from spalf.nn import StratifiedAutoencoder


def build(plan: Plan, device: torch.device) -> TrainingState:
    """A state of the right shapes at step 0 of the first phase; the phases fill in the numbers.

    Opens the source, hence raises SourceError where it cannot be read.
    """
    recipe = plan.recipe
    stream = recipe.source.open(recipe.seed, device)
    metric = recipe.whitener.build(plan.facts)
    sae = StratifiedAutoencoder(
        plan.facts.d_model,
        plan.rows,
        recipe.activation.build(plan.knobs.F),
        Machine(device=device, ops=recipe.kernel.ops(device)),
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
    return Rng(cpu=torch.Generator().manual_seed(seed), device=torch.Generator(device).manual_seed(seed + 1))


def _on(metric: Metric, device: torch.device) -> Metric:
    """A metric that is a module moves; one that is not has no tensors to move."""
    return metric.to(device) if isinstance(metric, torch.nn.Module) else metric
