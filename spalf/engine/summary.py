"""The end of a run in numbers and sentences: what summary.json holds."""

from __future__ import annotations

from typing import Any

from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.engine import checkpoint
from spalf.engine.evaluate import STRICT, constraints, evaluate, untouched
from spalf.engine.frontier import r2_at_l0

L0_SLACK = 1.1
"""L0 above this multiple of its target is said to miss it."""


def summarize(plan: Plan, state: TrainingState, outcome: str, wall: dict[str, float]) -> dict[str, Any]:
    """Everything about a state on held-out documents, the contract's keys at the top level.

    Keys: l0, l0_target, r2_raw, r2_whitened, ce_clean, ce_patched, ce_mean_ablated, loss_recovered, kl, dead_fraction,
    constraints.<name>.{violation, multiplier, feasible}, wall_seconds; None where the source has no logits.
    """
    scalars = evaluate(plan, state)
    own, loss = scalars["dictionary"], _downstream(scalars)
    held = constraints(plan, state)
    out: dict[str, Any] = {
        "name": plan.recipe.name,
        "outcome": outcome,
        "seed": plan.recipe.seed,
        "step": state.clock.step,
        "l0": own["l0"],
        "l0_target": plan.knobs.L0_target,
        "l0_share_of_d_model": own["l0"] / plan.facts.d_model,
        "r2_raw": own["r2_raw"],
        "r2_whitened": own["r2_whitened"],
        "r2_target": plan.knobs.R2_target,
        "r2_space": _space(plan),
    }
    for key in ("ce_clean", "ce_patched", "ce_mean_ablated", "loss_recovered", "kl"):
        out[key] = loss.get(key)
    out["dead_fraction"] = own["dead_fraction"]
    out["dead_window"] = own["dead_window"]
    out["constraints"] = held
    # Without constraints there is nothing to be feasible.
    out["feasible"] = bool(held) and all(c["feasible"] for c in held.values()) if plan.constraints else None
    out["notes"] = notes(plan, state, own, held)
    out["evaluators"] = scalars
    out["wall_seconds"] = {k: round(v, 3) for k, v in wall.items()}
    out["backend"] = state.sae.machine.ops.name
    out["device"] = str(state.device)
    out["versions"] = checkpoint.versions()
    return out


def _downstream(scalars: dict[str, dict[str, float]]) -> dict[str, float]:
    """The evaluator that measured the language model's loss, whatever the recipe calls it."""
    return next((s for s in scalars.values() if "ce_patched" in s), {})


def _space(plan: Plan) -> str | None:
    """The space of the faithfulness constraint, or None without one."""
    return getattr(plan.recipe.constraint.get("faithfulness"), "space", None)


def _attained(plan: Plan, name: str, budget: float, by: float) -> str:
    """What a constraint that exceeds its budget by the share `by` came to, in the unit of its knob where it has one."""
    r2 = getattr(plan.recipe.constraint[name], "r2", None)
    if r2 is not None:
        return f"R2 {1.0 - (1.0 - r2) * (1.0 + by):.3f} against {r2:g}"
    return f"{budget * (1.0 + by):.4g} against a budget of {budget:.4g}"


def notes(plan: Plan, state: TrainingState, own: dict[str, float], held: dict[str, dict[str, Any]]) -> list[str]:
    """Plain sentences on every target that was not met: which, by how much, and what is attainable."""
    out = []
    for name, c in held.items():
        if not c["feasible"]:
            is_strict = c["violation"] > STRICT
            what = "on held-out documents" if is_strict else "on the training stream"
            by = c["violation"] if is_strict else c["filtered"]
            limit = getattr(plan.recipe.dual, "limit", float("inf"))
            out.append(
                f"constraint {name} is not met {what}: its value exceeds the budget by {by:.1%} "
                f"(multiplier {c['multiplier']:.3g}{', at its limit' if c['multiplier'] >= limit else ''}); "
                f"attainable with this recipe: {_attained(plan, name, c['budget'], by)}"
            )
    space = _space(plan)
    if own["l0"] > L0_SLACK * plan.knobs.L0_target and space is not None:
        with untouched(state):
            x_BD = state.stream.next(min(8192, plan.recipe.budget.batch * 4)).x_BD
            attainable = r2_at_l0(state, x_BD, float(plan.knobs.L0_target), space)
        out.append(
            f"L0 {own['l0']:.1f} is above L0_target {plan.knobs.L0_target}: R2_target {plan.knobs.R2_target:g} costs "
            f"more features than that. At L0 {plan.knobs.L0_target} this dictionary has R2 {attainable:.3f} ({space}); "
            "lower knobs.R2_target towards it, raise knobs.L0_target, or train longer"
        )
    return out
