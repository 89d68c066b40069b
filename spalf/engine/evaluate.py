"""Measuring a finished state on documents that training never saw."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.core.values import White
from spalf.engine.step import dead_window, look, mode, needs_dense, values, view_of

ROWS = 65_536
"""Held-out activations that the dictionary's own numbers are measured on."""
STRICT = 0.05
"""How far a strict violation on held-out documents may exceed a budget that training has met."""


@contextmanager
def untouched(state: TrainingState) -> Iterator[TrainingState]:
    """The state with a held-out stream and a draw of its own, put back afterwards; no gradients, evaluation mode."""
    stream, draws = state.stream, state.rng.state_dict()
    state.stream = stream.held_out()
    try:
        with torch.no_grad(), mode(state.sae, training=False):
            yield state
    finally:
        state.stream = stream
        state.rng.load_state_dict(draws)


def evaluate(plan: Plan, state: TrainingState, only: Collection[str] = ()) -> dict[str, dict[str, float]]:
    """Scalars by evaluator name, the dictionary's own first. Leaves `state` as it was."""
    out = {"dictionary": dictionary(plan, state)} if not only or "dictionary" in only else {}
    for name in sorted(plan.recipe.evaluator):
        if not only or name in only:
            with untouched(state):
                out[name] = plan.recipe.evaluator[name](plan, state)
    return out


def dictionary(plan: Plan, state: TrainingState) -> dict[str, float]:
    """L0, explained variance (raw and whitened) and dead features on held-out activations.

    R2 = 1 - sum |x - x_hat|^2 / sum |x - mean x|^2, both sums over the whole set in float64, then the ratio.
    """
    batch = min(plan.recipe.budget.batch, ROWS)
    sums = {"raw": Moment2(), "white": Moment2()}
    l0 = torch.zeros((), dtype=torch.float64, device=state.device)
    fired_F = torch.zeros_like(state.silent_F)
    rows = 0
    with untouched(state):
        for _ in range(max(1, ROWS // batch)):
            x_BD = state.stream.next(batch).x_BD
            forward = look(state, x_BD)
            error_BD = White(forward.white_BD - forward.white_hat_BD)
            sums["raw"].add(x_BD, state.metric.raw_direction(error_BD))
            sums["white"].add(forward.white_BD, error_BD)
            l0 += forward.code.l0_B().double().sum()
            fired_F += forward.code.fired_F()
            rows += batch
    dead_F = (state.silent_F > dead_window(plan)) & (fired_F == 0)
    out = {
        "l0": float(l0) / rows,
        "r2_raw": sums["raw"].r2(),
        "r2_whitened": sums["white"].r2(),
        "dead_fraction": float(dead_F.double().mean()),
        "dead_window": float(dead_window(plan)),
        "rows": float(rows),
    }
    for name, span in state.sae.rows.items():
        out[f"share_of_l0.{name}"] = float(fired_F[span].sum()) / max(1.0, float(fired_F.sum()))
        out[f"dead_fraction.{name}"] = float(dead_F[span].double().mean())
    return out


class Moment2:
    """Sums for an explained variance, float64."""

    def __init__(self) -> None:
        self.n, self.square, self.error = 0, 0.0, 0.0
        self.total_D: Tensor | None = None

    def add(self, x_BD: Tensor, error_BD: Tensor) -> None:
        x, e = x_BD.double(), error_BD.double()
        self.n += x.shape[0]
        self.square += float(x.square().sum())
        self.error += float(e.square().sum())
        self.total_D = x.sum(0) if self.total_D is None else self.total_D + x.sum(0)

    def r2(self) -> float:
        """1 - error / (sum |x|^2 - n |mean|^2)."""
        assert self.total_D is not None
        return 1.0 - self.error / max(self.square - float(self.total_D.square().sum()) / self.n, 1e-30)


def constraints(plan: Plan, state: TrainingState, batches: int = 8) -> dict[str, dict[str, Any]]:
    """Each active constraint on held-out data with its multiplier.

    `violation` is value / budget - 1, mean over held-out batches; `filtered` is what training saw last. Feasible means
    filtered <= 0 and violation <= 5 %.
    """
    control = state.control
    active = [n for i, n in enumerate(plan.constraints) if bool(control.on_M[i])]
    total = dict.fromkeys(active, 0.0)
    with untouched(state):
        for _ in range(batches):
            batch = state.stream.next(plan.recipe.budget.batch)
            forward = look(state, batch.x_BD, needs_dense(plan, (), active))
            for name, value in values(plan, view_of(state, batch, forward), active).items():
                total[name] += float(value) / batches
    signal = plan.recipe.filter.signal(control.filter, torch.zeros_like(control.budget_M), control.on_M)
    out = {}
    for i, name in enumerate(plan.constraints):
        if name in total:
            strict = total[name] / float(control.budget_M[i]) - 1.0
            filtered = float(signal.fast_M[i])
            out[name] = {
                "violation": strict,
                "filtered": filtered,
                "multiplier": float(control.lam_M[i]),
                "penalty": float(control.rho_M[i]),
                "budget": float(control.budget_M[i]),
                "feasible": filtered <= 0.0 and strict <= STRICT,
            }
    return out
