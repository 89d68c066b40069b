"""Phase `pam`: the encoder by proximal gradient steps, the decoder in closed form, in turns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from attrs import evolve, field, frozen
from attrs.validators import ge, gt, in_, le
from torch import Tensor

from spalf import (
    Autoencoder,
    Clock,
    Derived,
    Forward,
    Plan,
    Problem,
    Reading,
    RecipeError,
    RunError,
    TrainingState,
    look,
    phase,
    view_of,
)
from spalf_pam import objective
from spalf_pam.solver import DENSE_LIMIT, Penalties, majorant, solve
from spalf_pam.sums import Sums, empty
from spalf_pam.write import can_fold, write_

EXAMPLES = {("phase", "pam"): {"encoder_steps": 3, "rows": 256, "terms": ("l0",), "weight": 0.1}}
"""Options for the conformance kit: a solve every five of its steps."""

DECODER = ("W_dec_FD", "b_dec_D", "log_gain")
ROWS_PER_FEATURE = 10


@frozen(kw_only=True, eq=False)
class PamState:
    """Sums for the next solve, the encoder that the proximal term holds on to, and the number of solves so far."""

    sums: Sums
    W_enc_FD: Tensor
    b_enc_F: Tensor
    solves: int = 0
    stale: bool = True
    """Whether the encoder has moved since the first row that `sums` hold."""


@frozen(kw_only=True)
class Turn:
    """What one step does, besides taking a batch."""

    encode: bool
    collect: bool
    solve: bool


@phase("pam")
class Pam:
    """PAM-SGD (arXiv 2505.11836): `encoder_steps` gradient steps of the encoder, then the best decoder for its codes.

    Minimises  E + l1 * L + weight * (sum of `terms`),  E = mean ||x - x_hat||^2 / V,  V the total variance,
    L = mean sum_i z_i ||w_i|| / sqrt(V);  lengths are measured in `space`. The encoder (rows, biases, thresholds)
    follows the optimizer on this plus  proximity * mean over features of ||e - e_t||^2 + (b - b_t)^2,  e_t, b_t those
    after the last solve. The decoder (rows and bias together) is the minimiser of E, of a square above l1 * L
    that touches it at the last decoder, and of relative penalties: `ridge`, `damping` (towards the last decoder), and
    the same for its bias; see `spalf_pam.solver`. `terms` move the encoder alone. The last step is a solve.

    `accumulate`: "window" freezes the encoder for `rows` rows and forgets them at its next step; "decay" collects from
    every encoder step and forgets at a rate that holds the effective count at `rows`. `rows`: 0 for 10 F; fewer than
    5 F per solve is where the error on new data peaks. `solver`: "cholesky", "cg", or "auto", the first up to 32,768
    features. `share`: where in the budget the phase ends.

    Features that did not fire keep their row. Row lengths are folded into encoder, bias and threshold where that is
    exact; under an activation that compares features (TopK) they stay in the rows, and strata must leave them there.
    The published convergence theorem asks for exact encoder steps and does not cover this method.
    """

    objective: ClassVar[str] = "the squared error"
    """What is minimised besides `terms`, which may hence be empty."""

    l1: float = field(default=0.0, validator=ge(0.0))
    terms: tuple[str, ...] = ()
    weight: float = field(default=1.0, validator=ge(0.0))
    space: str = field(default="raw", validator=in_(("raw", "white")))
    encoder_steps: int = field(default=20, validator=gt(0))
    rate: float = field(default=1.0, validator=gt(0.0))
    proximity: float = field(default=0.0, validator=ge(0.0))
    accumulate: str = field(default="window", validator=in_(("window", "decay")))
    rows: int = field(default=0, validator=ge(0))
    ridge: float = field(default=0.1, validator=ge(0.0))
    damping: float = field(default=0.0, validator=ge(0.0))
    bias_ridge: float = field(default=0.0, validator=ge(0.0))
    bias_damping: float = field(default=0.0, validator=ge(0.0))
    solver: str = field(default="auto", validator=in_(("auto", "cholesky", "cg")))
    share: float = field(default=1.0, validator=[gt(0.0), le(1.0)])

    # ------------------------------------------------------------------------------------------- before a run
    def settle(self, plan: Plan) -> Pam:
        """With `rows` filled in. Raises RecipeError where it could not solve, or a stratum would undo a solve."""
        settled: Pam = evolve(cast(Any, self), rows=self._rows(plan))
        problems = [*settled._too_short(plan), *settled._undone(plan)]
        if problems:
            raise RecipeError(problems)
        return settled

    def derive(self, plan: Plan) -> list[Derived]:
        """Rows for `spalf compile`."""
        is_derived = self._rows(plan) == ROWS_PER_FEATURE * plan.knobs.F
        every = self.encoder_steps + self._window(plan)
        how = ("cholesky" if plan.knobs.F <= DENSE_LIMIT else "cg") if self.solver == "auto" else self.solver
        table = (
            ("rows", self._rows(plan), f"{ROWS_PER_FEATURE} F" if is_derived else "as given", "rows"),
            ("steps_per_solve", every, "encoder_steps + ceil(rows / budget.batch)", "encoder_steps"),
            ("sums.GiB", 8 * plan.knobs.F**2 / 2**30, f"8 F^2 bytes; solver {how}", "solver"),
        )
        return [Derived(path=path, value=float(x), formula=f, origin=f"phase.pam.{key}") for path, x, f, key in table]

    def _too_short(self, plan: Plan) -> Iterator[Problem]:
        needed, steps = self.encoder_steps + self._window(plan), math.ceil(self.share * plan.total_steps)
        if steps < needed:
            message = f"a solve takes {needed} steps (encoder_steps, and rows / budget.batch), the phase has {steps}"
            yield Problem("", message, "raise budget.tokens, or lower rows or encoder_steps")

    def _undone(self, plan: Plan) -> Iterator[Problem]:
        activator = plan.recipe.activation.build(1)
        if self.l1 and activator.signed:
            yield Problem("l1", "is the sum of codes, which this activation lets be negative", "set it to 0")
        if activator.pre_bias and activator.owns_bias:
            message = "cannot move b_dec under an activation that subtracts it and owns its biases"
            yield Problem("", message, "set activation.pre_bias = false")
        if not can_fold(activator):
            for name in plan.recipe.strata:
                if getattr(plan.recipe.stratum[name], "unit_norm", False):
                    message = "would undo the decoder's lengths, which this activation cannot take into the encoder"
                    yield Problem(f"stratum.{name}.unit_norm", message, "set it to false")

    # --------------------------------------------------------------------------------------------- in a run
    def init(self, plan: Plan) -> PamState:
        width, d_model = plan.knobs.F, plan.facts.d_model
        return PamState(sums=empty(width, d_model), W_enc_FD=torch.zeros(width, d_model), b_enc_F=torch.zeros(width))

    def enter(self, plan: Plan, state: TrainingState) -> None:
        """The proximal term holds on to the encoder as it is now."""
        own: PamState = state.phase
        state.phase = _anchored(own, state.sae, 0)

    def step(self, plan: Plan, state: TrainingState) -> Reading:
        """One batch: an encoder step, or rows for the next solve, or both; and the solve where it is due.

        Raises RunError where the decoder's system cannot be solved, or a term does not depend on the encoder.
        """
        turn = self.turn(plan, state.clock)
        batch = state.stream.next(plan.recipe.budget.batch)
        if turn.encode:
            numbers, forward = self._encode(plan, state, batch)
        else:
            with torch.no_grad():
                forward = look(state, batch.x_BD)
                numbers = {"loss": objective.error(state, forward, self.space)}
        if turn.collect:
            self._collect(plan, state, forward)
        numbers |= self._numbers(state, forward)
        fired_F = forward.code.fired_F()
        state.silent_F = torch.where(fired_F > 0, 0, state.silent_F + batch.x_BD.shape[0])
        if turn.solve:
            numbers |= self._solve(plan, state)
        state.clock = state.clock.next()
        return Reading(step=state.clock.step, phase=state.clock.phase, values=numbers)

    def done(self, plan: Plan, state: TrainingState) -> bool:
        return state.clock.step >= self._end(state.clock)

    def turn(self, plan: Plan, clock: Clock) -> Turn:
        """The plan of turns, counted from the phase's last step, which is a solve; beyond it rows are collected."""
        left = self._end(clock) - 1 - clock.step
        if self.accumulate == "decay":
            return Turn(encode=left >= 0, collect=True, solve=left >= 0 and left % self.encoder_steps == 0)
        window = self._window(plan)
        cycle = self.encoder_steps + window
        cycles = max(1, (self._end(clock) - clock.entered) // cycle)
        collect = left < 0 or (left < cycles * cycle and left % cycle < window)
        return Turn(encode=not collect, collect=collect, solve=left >= 0 and collect and left % cycle == 0)

    # ----------------------------------------------------------------------------------------------- inside
    def _rows(self, plan: Plan) -> int:
        return self.rows or ROWS_PER_FEATURE * plan.knobs.F

    def _window(self, plan: Plan) -> int:
        """Steps in which rows are collected and nothing else is done."""
        return 0 if self.accumulate == "decay" else math.ceil(self._rows(plan) / plan.recipe.budget.batch)

    def _end(self, clock: Clock) -> int:
        return math.ceil(self.share * clock.total)

    def _encode(self, plan: Plan, state: TrainingState, batch: Any) -> tuple[dict[str, Tensor], Forward]:
        own: PamState = state.phase
        sae, recipe = state.sae, plan.recipe
        with _encoder_alone(sae):
            forward = look(state, batch.x_BD, any(recipe.term[name].dense for name in self.terms))
            view = view_of(state, batch, forward)
            total = objective.error(state, forward, self.space)
            numbers = {}
            if self.l1:
                numbers["l1"] = objective.l1(state, forward.code, self.space)
                total = total + self.l1 * numbers["l1"]
            for name in self.terms:
                value = recipe.term[name].value(view)
                if not value.requires_grad:
                    raise RunError(f'phase.pam.terms: "{name}" depends on no parameter of the encoder (take it out)')
                numbers[f"term.{name}"] = sae.machine.mesh.sum(value) if recipe.term[name].partial else value
                total = total + self.weight * numbers[f"term.{name}"]
            if self.proximity:
                total = total + self.proximity * objective.distance(sae, own.W_enc_FD, own.b_enc_F)
            # Not `descend`: a backend that fuses gradient and step would move both matrices.
            state.learner.optimizer.zero_grad(set_to_none=True)
            total.backward()  # type: ignore[no-untyped-call]
            state.learner.advance(state.clock, self.rate)
        sae.activator.observe_(forward.code)
        state.phase = evolve(own, stale=True)
        return {"loss": total.detach(), **{k: v.detach() for k, v in numbers.items()}}, forward

    def _collect(self, plan: Plan, state: TrainingState, forward: Forward) -> None:
        own: PamState = state.phase
        decay = 1.0
        if self.accumulate == "decay":
            # Effective count B / (1 - decay) = rows.
            decay = max(0.0, 1.0 - forward.white_BD.shape[0] / self._rows(plan))
        elif own.stale:
            own.sums.zero_()
        own.sums.add_(forward.code.dense(), forward.white_BD, decay)
        state.phase = evolve(own, stale=False)

    def _solve(self, plan: Plan, state: TrainingState) -> dict[str, Tensor]:
        """Solve and write; relative error of the collected rows before and after, in whitened space."""
        own: PamState = state.phase
        sae, sums = state.sae, own.sums
        is_last = state.clock.step + 1 >= self._end(state.clock)
        if self.accumulate == "decay" and not is_last and float(sums.count) < self._rows(plan) / 2:
            return {}
        gain = sae.log_gain.detach().double().exp()
        before_FD, before_D = gain * sae.W_dec_FD.detach().double(), sae.b_dec_D.detach().double()
        penalties = Penalties(
            ridge=self.ridge,
            damping=self.damping,
            bias_ridge=self.bias_ridge,
            bias_damping=self.bias_damping,
        )
        ridge_F = majorant(
            sums, objective.lengths(state, self.space), self.l1 * float(objective.spread(state, self.space))
        )
        found = solve(sums, before_FD, before_D, penalties, self.solver, ridge_F)
        whole = sums.count * state.metric.variance("white").double()
        numbers = {
            "solve.error_before": sums.error(before_FD, before_D) / whole,
            "solve.error_after": sums.error(found.w_FD, found.b_D) / whole,
            "solve.live": found.live_F.double().mean(),
            "solve.rows_per_feature": sums.count / sae.width,
        }
        sums.rescale_(write_(state.learner, found))
        state.phase = _anchored(own, sae, own.solves + 1)
        return numbers

    @torch.no_grad()
    def _numbers(self, state: TrainingState, forward: Forward) -> dict[str, Tensor]:
        return {f"r2_{self.space}": 1.0 - objective.error(state, forward, self.space), "l0": forward.code.l0_B().mean()}


def _anchored(own: PamState, sae: Autoencoder, solves: int) -> PamState:
    """The proximal term holds on to the encoder as it is now."""
    W_enc_FD, b_enc_F = sae.W_enc_FD.detach().clone(), sae.b_enc_F.detach().clone()
    return evolve(own, W_enc_FD=W_enc_FD, b_enc_F=b_enc_F, solves=solves)


@contextmanager
def _encoder_alone(sae: Autoencoder) -> Iterator[None]:
    """Training mode with the decoder frozen: a parameter without a gradient is one that no optimizer moves."""
    named = dict(sae.named_parameters())
    before = {name: named[name].requires_grad for name in DECODER}
    training = sae.training
    for name in DECODER:
        named[name].requires_grad_(False)
    sae.train()
    try:
        yield
    finally:
        sae.train(training)
        for name, was in before.items():
            named[name].requires_grad_(was)
