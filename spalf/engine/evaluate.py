"""Measuring a finished state on documents that training never saw."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.core.values import Forward, Raw, White
from spalf.engine.bootstrap import Measured, Tally, Totals, measured
from spalf.engine.step import dead_window, look, mode, needs_dense, values, view_of

ROWS = 65_536
"""Held-out activations that the dictionary's own numbers are measured on."""
CHUNK = 64
"""Independent rows that count as one unit: resampling single ones costs memory and changes nothing."""
DENSE = 0.1
"""A feature that fires on a larger share of the activations than this is dense."""
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
    out: dict[str, dict[str, float]] = {}
    if not only or "dictionary" in only:
        out["dictionary"] = dictionary(plan, state)
    for name in sorted(plan.recipe.evaluator):
        if not only or name in only:
            with untouched(state):
                out[name] = plan.recipe.evaluator[name](plan, state)
    return out


def dictionary(plan: Plan, state: TrainingState) -> Measured:
    """L0, explained variance (raw and whitened), shrinkage and dead features on held-out activations.

    R2 = 1 - sum |x - x_hat|^2 / sum |x - mean x|^2, both sums over the whole set in float64, then the ratio. Shrinkage
    is mean |y_hat| / mean |y| in whitened coordinates. Intervals are over documents; a source of independent rows is
    resampled by rows, and one that knows neither gives none.
    """
    tally, fired_F = Tally(), torch.zeros_like(state.silent_F)
    l0: list[Tensor] = []
    with untouched(state):
        for unit_B, x_BD in held_out_rows(plan, state, tally):
            forward = look(state, x_BD)
            _add(tally, unit_B, state, x_BD, forward)
            l0.append(forward.code.l0_B().cpu())
            fired_F += forward.code.fired_F()
    l0_B = torch.cat(l0).double()
    dead_F = (state.silent_F > dead_window(plan)) & (fired_F == 0)
    extra = {f"l0.{name}": float(l0_B.quantile(q)) for name, q in (("p10", 0.1), ("median", 0.5), ("p90", 0.9))}
    extra["dead_fraction"] = float(dead_F.double().mean())
    extra["dead_window"] = float(dead_window(plan))
    extra["dense_fraction"] = float((fired_F > DENSE * len(l0_B)).double().mean())
    extra["rows"] = float(len(l0_B))
    for name, span in state.sae.rows.items():
        extra[f"share_of_l0.{name}"] = float(fired_F[span].sum()) / max(1.0, float(fired_F.sum()))
        extra[f"dead_fraction.{name}"] = float(dead_F[span].double().mean())
    return measured(tally.samples(_explained), extra, "documents" if "tokens" in plan.facts.provides else "")


def held_out_rows(plan: Plan, state: TrainingState, tally: Tally) -> Iterator[tuple[Tensor, Raw]]:
    """About `ROWS` activations [B, D] with the unit of each [B], some at a time, from the current stream.

    Whole contexts without their first position where there are tokens, for those know their documents.
    """
    batch = min(plan.recipe.budget.batch, ROWS)
    if "tokens" not in plan.facts.provides:
        each = CHUNK if "truth" in plan.facts.provides else ROWS + 1
        for first in range(0, max(1, ROWS // batch) * batch, batch):
            x_BD = state.stream.next(batch).x_BD
            yield torch.arange(first, first + len(x_BD), device=x_BD.device) // each, x_BD
        return
    positions = max(1, plan.facts.context - 1)
    left = max(1, ROWS // positions)
    while left > 0:
        part = state.stream.sequences(min(left, max(1, batch // positions)))
        left -= part.tokens_ST.shape[0]
        real_SP = part.real_ST[:, 1:]
        unit_ST = tally.units(part)
        yield unit_ST[:, 1:][real_SP], Raw(state.stream.activations(part)[:, 1:][real_SP].float())


def _add(tally: Tally, unit_B: Tensor, state: TrainingState, x_BD: Raw, forward: Forward) -> None:
    """One pass's sums: counts, L0, and per space the error, |x|^2 and x."""
    error_BD = White(forward.white_BD - forward.white_hat_BD)
    tally.add(
        unit_B,
        n=torch.ones_like(unit_B),
        l0=forward.code.l0_B(),
        norm=forward.white_BD.norm(dim=-1),
        norm_hat=forward.white_hat_BD.norm(dim=-1),
        **squares("raw", x_BD, state.metric.raw_direction(error_BD)),
        **squares("white", forward.white_BD, error_BD),
    )


def squares(space: str, x_BD: Tensor, error_BD: Tensor) -> dict[str, Tensor]:
    """What a tally needs for `r2`: per row |error|^2, |x|^2 and x, float64 from the start."""
    x, e = x_BD.double(), error_BD.double()
    return {f"{space}.error": e.square().sum(-1), f"{space}.square": x.square().sum(-1), f"{space}.sum": x}


def r2(space: str, totals: Totals) -> Tensor:
    """1 - error / (sum |x|^2 - |sum x|^2 / n), [R]."""
    spread_R = totals[f"{space}.square"] - totals[f"{space}.sum"].square().sum(-1) / totals["n"]
    return 1.0 - totals[f"{space}.error"] / spread_R.clamp(min=1e-30)


def _explained(totals: Totals) -> dict[str, Tensor]:
    return {
        "l0": totals["l0"] / totals["n"],
        "r2_raw": r2("raw", totals),
        "r2_whitened": r2("white", totals),
        "shrinkage": totals["norm_hat"] / totals["norm"],
    }


def constraints(plan: Plan, state: TrainingState, batches: int = 8) -> dict[str, dict[str, Any]]:
    """Each active constraint on held-out data with its multiplier.

    `violation` is value / budget - 1, mean over held-out batches; `filtered` is what training saw last. Feasible means
    met on held-out data, or met in training (filtered <= 0) and exceeded by at most 5 % on held-out data. The last
    filtered value alone would judge a constraint measured on a few contexts by which contexts came last.
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
                "feasible": strict <= 0.0 or (filtered <= 0.0 and strict <= STRICT),
            }
    return out
