"""One primal-dual step: look, measure, descend, control. Knows protocols, never a part."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from attrs import frozen
from torch import Tensor

from spalf.core import tree
from spalf.core.built import Autoencoder
from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.core.values import Batch, Forward, Raw, Reading, Signal, View, Violations
from spalf.engine import control
from spalf.engine.logged import logged
from spalf.engine.replay import Outcome, is_capturable
from spalf.errors import DeadConstraintError

DEAD_AFTER = 10_000_000


def dead_window(plan: Plan) -> int:
    """Activations without firing after which a feature counts as dead: 1e7, or a fifth of a shorter run."""
    return min(DEAD_AFTER, plan.recipe.budget.tokens // 5)


@frozen(kw_only=True, eq=False)
class Measures:
    """The objective's terms by name, and every active constraint's violation, with their graph."""

    terms: Mapping[str, Tensor]
    violations: Violations

    def objective(self) -> Tensor:
        """Sum of the terms, in name order."""
        return torch.stack([self.terms[name] for name in sorted(self.terms)]).sum()


@frozen(kw_only=True, eq=False)
class Assessment:
    """A batch, what the dictionary made of it, and the measures of that."""

    batch: Batch
    forward: Forward
    measures: Measures


def look(state: TrainingState, x_BD: Raw, dense: bool = False) -> Forward:
    """One pass in whitened coordinates; nothing raw goes further."""
    white_BD = state.metric.white(x_BD)
    code = state.sae.encode(white_BD, dense)
    return Forward(white_BD=white_BD, code=code, white_hat_BD=state.sae.decode(code))


@contextmanager
def mode(sae: Autoencoder, training: bool) -> Iterator[None]:
    """The autoencoder in training or evaluation mode for the block, then as it was."""
    before = sae.training
    sae.train(training)
    try:
        yield
    finally:
        sae.train(before)


def reconstructor(state: TrainingState) -> Callable[[Raw], Raw]:
    """A function from raw activations [..., D] to their reconstruction as at inference, with graph."""

    def reconstruct(x: Raw) -> Raw:
        flat_BD = Raw(x.reshape(-1, x.shape[-1]).float())
        white_BD = state.metric.white(flat_BD)
        with mode(state.sae, training=False):
            hat_BD = state.metric.raw(state.sae.decode(state.sae.encode(white_BD)))
        return Raw(hat_BD.reshape(x.shape).to(x.dtype))

    return reconstruct


def view_of(state: TrainingState, batch: Batch, forward: Forward) -> View:
    """What terms and constraints may look at."""
    return View(
        batch=batch,
        forward=forward,
        sae=state.sae,
        metric=state.metric,
        anchors=state.anchors,
        stream=state.stream,
        clock=state.clock,
        draw=state.rng.device,
        reconstruct=reconstructor(state),
        silent_F=state.silent_F,
    )


def needs_dense(plan: Plan, terms: Collection[str], constraints: Collection[str]) -> bool:
    """Whether any active part reads entries that a compact code leaves out."""
    recipe = plan.recipe
    return any(recipe.term[t].dense for t in terms) or any(recipe.constraint[c].dense for c in constraints)


def values(plan: Plan, view: View, constraints: Collection[str]) -> dict[str, Tensor]:
    """Each named constraint's value, summed over feature shards where it is partial."""
    out = {}
    for name in constraints:
        part = plan.recipe.constraint[name]
        value = part.value(view)
        out[name] = view.sae.machine.mesh.sum(value) if part.partial else value
    return out


def measure(plan: Plan, state: TrainingState, view: View, terms: Sequence[str], constraints: Sequence[str]) -> Measures:
    """Terms, and g = value / budget - 1 for each active constraint (0 where off), float32."""
    mesh = view.sae.machine.mesh
    measured = {}
    for name in terms:
        value = plan.recipe.term[name].value(view)
        measured[name] = mesh.sum(value) if plan.recipe.term[name].partial else value
    value_of = values(plan, view, constraints)
    zero = torch.zeros((), device=state.device)
    g = [
        value_of[name].float() / state.control.budget_M[i] - 1.0 if name in value_of else zero
        for i, name in enumerate(plan.constraints)
    ]
    g_M = torch.stack(g) if g else zero.expand(0)
    return Measures(terms=measured, violations=Violations(names=plan.constraints, g_M=g_M))


def refuse_dead(measures: Measures, constraints: Collection[str]) -> None:
    """Raises DeadConstraintError for a term's sum or a constraint that depends on no parameter."""
    dead = [f'term "{n}"' for n, v in measures.terms.items() if not v.requires_grad]
    g_M, names = measures.violations.g_M, measures.violations.names
    dead += [f'constraint "{n}"' for i, n in enumerate(names) if n in constraints and not _live(g_M, i)]
    if dead:
        raise DeadConstraintError(
            f"{', '.join(dead)}: the value depends on no parameter, so no step can change it "
            "(compute it from view.forward or view.reconstruct, without detach or no_grad)"
        )


def _live(g_M: Tensor, i: int) -> bool:
    """Whether entry `i` of a stack carries a graph: a stack hides which of its parts do."""
    return g_M.grad_fn is not None and g_M.grad_fn.next_functions[i][0] is not None


def assess(
    plan: Plan, state: TrainingState, batch: Batch, terms: Sequence[str], constraints: Sequence[str]
) -> Assessment:
    """One pass in training mode: the code and reconstruction of a batch, its terms and violations, with graph.

    Raises DeadConstraintError at the first step of a phase.
    """
    with mode(state.sae, training=True):
        forward = look(state, batch.x_BD, needs_dense(plan, terms, constraints))
        measures = measure(plan, state, view_of(state, batch, forward), terms, constraints)
    if state.clock.step == state.clock.entered:
        refuse_dead(measures, constraints)
    return Assessment(batch=batch, forward=forward, measures=measures)


def outcome(plan: Plan, state: TrainingState, seen: Assessment, loss: Tensor, hold: Collection[str]) -> Outcome:
    """Running statistics, the dual side but for `hold`, and counts, as they are after a step of the parameters."""
    recipe, code = plan.recipe, seen.forward.code
    state.sae.activator.observe_(code)
    g_M = seen.measures.violations.g_M.detach()
    moved, signal = control.step(recipe.filter, recipe.dual, recipe.penalty, state.control, g_M, state.clock, hold)
    if state.sae.machine.ops.bounded:
        # A list that was cut measured nothing: the dual side stays where it was, as the weights do.
        moved = tree.choose(code.overflow, state.control, moved)
    silent_F = torch.where(code.fired_F() > 0, 0, state.silent_F + seen.batch.x_BD.shape[0])
    numbers = {"loss": loss.detach(), "l0": code.l0_B().detach().mean()}
    numbers.update({f"term.{k}": v.detach() for k, v in seen.measures.terms.items()})
    if state.clock.due(recipe.record.log_every):
        numbers.update(logged(state, seen.forward, silent_F, dead_window(plan)))
    return Outcome(control=moved, silent_F=silent_F, signal=signal, lam_M=moved.lam_M, numbers=numbers)


def _enter(plan: Plan, state: TrainingState, out: Outcome) -> tuple[Reading, Signal]:
    """The state as an outcome has it, the clock at the next step, and what to tell of it."""
    state.control, state.silent_F = out.control, out.silent_F
    state.sae.machine.ops.settle()
    per = {"g": out.signal.g_M, "fast": out.signal.fast_M, "lam": out.lam_M, "rho": out.signal.rho_M}
    per["on"] = out.control.on_M
    clock = state.clock
    state.clock = clock.next()
    names = plan.constraints
    reading = Reading(step=clock.step + 1, phase=clock.phase, names=names, values=out.numbers, per_constraint=per)
    return reading, out.signal


def conclude(
    plan: Plan, state: TrainingState, seen: Assessment, loss: Tensor, hold: Collection[str] = ()
) -> tuple[Reading, Signal]:
    """What follows a step of the parameters: running statistics, the dual side but for `hold`, counts, the clock."""
    return _enter(plan, state, outcome(plan, state, seen, loss, hold))


def primal_dual_step(
    plan: Plan,
    state: TrainingState,
    terms: Sequence[str],
    constraints: Sequence[str],
    hold: Collection[str] = (),
    rate: float = 1.0,
) -> tuple[Reading, Signal]:
    """Take one batch, one optimizer step (at `rate` of its schedule) and one control step; advances the clock.

    Raises DeadConstraintError at the first step of a phase. The engine itself makes no host copy; a part may
    (`orthogonality` sizes its Gram matrices on the host).
    """

    def body(batch: Batch) -> Outcome:
        seen = assess(plan, state, batch, terms, constraints)
        loss = plan.recipe.lagrangian(seen.measures.objective(), seen.measures.violations, state.control)
        state.learner.step(loss)
        return outcome(plan, state, seen, loss, hold)

    batch = state.stream.next(plan.recipe.budget.batch)
    state.learner.set_rates(state.clock, rate)
    kind = _kind(plan, state, batch, terms, constraints, hold)
    replay = state.sae.machine.replay
    variant = state.clock.due(plan.recipe.filter.every), state.clock.due(plan.recipe.record.log_every)
    return _enter(plan, state, body(batch) if kind is None else replay.step(kind, variant, state, batch, body))


def _kind(
    plan: Plan,
    state: TrainingState,
    batch: Batch,
    terms: Sequence[str],
    constraints: Sequence[str],
    hold: Collection[str],
) -> Hashable:
    """What the launches of this step depend on; None where they cannot be recorded."""
    lists, clock = state.sae.machine.ops.kind(state.sae), state.clock
    if lists is None or batch.truth_BN is not None:
        return None
    if not is_capturable(plan, terms, constraints, clock.due(plan.recipe.filter.every)):
        return None
    return clock.phase, tuple(terms), tuple(constraints), tuple(hold), tuple(batch.x_BD.shape), lists


def switch_on(plan: Plan, state: TrainingState, entering: Collection[str]) -> None:
    """Switch constraints on: their budgets and first violations, measured on one batch of their own."""
    names = plan.constraints
    entering_M = torch.tensor([n in entering for n in names], dtype=torch.bool, device=state.device)
    budget_M, g_M = _first_look(plan, state, entering)
    state.control = control.enter(plan.recipe.filter, plan.recipe.penalty, state.control, entering_M, budget_M, g_M)
    for i, name in enumerate(names):
        if name in entering:
            state.measured[f"{name}.budget"] = float(budget_M[i])
            state.measured[f"{name}.entered_at"] = float(g_M[i])


@torch.no_grad()
def _first_look(plan: Plan, state: TrainingState, entering: Collection[str]) -> tuple[Tensor, Tensor]:
    """Budgets of the entering constraints and their violations on one batch."""
    batch = state.stream.next(plan.recipe.budget.batch)
    forward = look(state, Raw(batch.x_BD), needs_dense(plan, (), entering))
    view = view_of(state, batch, forward)
    budget_M = state.control.budget_M.clone()
    g_M = torch.zeros_like(budget_M)
    measured = values(plan, view, entering)
    for i, name in enumerate(plan.constraints):
        if name in measured:
            budget_M[i] = plan.recipe.constraint[name].budget(view).detach()
            g_M[i] = measured[name] / budget_M[i] - 1.0
    return budget_M, g_M
