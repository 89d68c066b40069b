"""What a plan will cost: memory and operations, each with its formula. Estimates, not measurements.

F features, d d_model, B batch, L0 L0_target, N budget.tokens.
"""

from __future__ import annotations

from spalf.assembly.checks import logits_bytes
from spalf.core.recipe import Derived, Plan

FLOAT = 4
"""Bytes of a float32: parameters, moments, codes."""
LISTED = 3 * FLOAT + 8
"""Bytes of one entry of a compact code: pre, gate, z and an int64 index."""


def rows(plan: Plan) -> list[Derived]:
    """Parameters, bytes and FLOPs. Thresholds are left out: their number is the activation's own affair."""
    F, d = plan.knobs.F, plan.facts.d_model
    parameters = 2 * F * d + F + d + 1
    count = Derived(path="parameters", value=parameters, formula="2 F d_model + F + d_model + 1", origin="autoencoder")
    return [count, *_memory(plan, parameters), *_flops(plan)]


def _memory(plan: Plan, parameters: int) -> list[Derived]:
    facts, B, F, L0 = plan.facts, plan.recipe.budget.batch, plan.knobs.F, plan.knobs.L0_target
    start = float(getattr(plan.recipe.activation, "start", 1.0))
    block = facts.shuffle * facts.bytes_per_activation
    overlap = int(bool(getattr(plan.recipe.source, "overlap", False)))
    per_number = facts.bytes_per_activation // max(1, facts.d_model)
    logits = {n: logits_bytes(getattr(plan.recipe.constraint[n], "sequences", 0), facts) for n in plan.constraints}
    causal = max((logits[n] for n in logits if "logits" in plan.recipe.constraint[n].needs), default=0)
    entries = [
        ("parameters", FLOAT * parameters, "4 bytes * parameters"),
        ("gradients", FLOAT * parameters, "4 bytes * parameters, where the kernel does not fuse the update"),
        ("moments", 2 * FLOAT * parameters, "2 * 4 bytes * parameters, as Adam keeps them"),
        ("code_dense", 3 * FLOAT * B * F, "3 * 4 bytes * batch * F: pre, gate, z of a dense code"),
        ("code_compact", int(LISTED * B * start * L0), f"{LISTED} bytes * batch * {start:g} L0_target, at the start"),
        ("shuffle", block, "shuffle * bytes per activation"),
        ("shuffle_ahead", overlap * block, "the block that is harvested ahead on a GPU, with source.overlap"),
        ("model", facts.n_parameters * per_number, "model parameters * bytes per number"),
        ("logits", causal, "4 * 4 bytes * sequences * context * n_vocab, in the phases that patch the model"),
    ]
    found = [
        Derived(path=f"memory.{name}.bytes", value=float(value), formula=formula, origin="estimate")
        for name, value, formula in entries
        if value
    ]
    total = sum(value for name, value, _ in entries if name != "code_compact")
    formula = "the sum of the above with a dense code"
    return [*found, Derived(path="memory.total.bytes", value=float(total), formula=formula, origin="estimate")]


def _flops(plan: Plan) -> list[Derived]:
    facts, F, d, L0 = plan.facts, plan.knobs.F, plan.facts.d_model, plan.knobs.L0_target
    N = float(plan.total_steps * plan.recipe.budget.batch)
    # Encoder: forward and the weights' gradient, its input takes none; decoder: forward and both gradients.
    dense, compact = 10.0 * F * d, (2.0 * F + 8.0 * L0) * d
    entries = [
        ("sae_dense", N * dense, "N * 10 F d_model: (2 + 2) encoding, (2 + 4) decoding"),
        ("sae_compact", N * compact, "N * (2 F + 8 L0_target) d_model: all but the encoding on active entries"),
        ("whiten", N * 2.0 * d * d, "N * 2 d_model^2"),
        ("harvest", N * facts.flops_to_hook, "N * FLOPs per token up to the hook"),
    ]
    found = [
        Derived(path=f"flops.{name}", value=value, formula=formula, origin="estimate")
        for name, value, formula in entries
        if value
    ]
    for name in plan.constraints:
        constraint = plan.recipe.constraint[name]
        sequences = getattr(constraint, "sequences", 0)
        if "logits" in constraint.needs and sequences and facts.flops_full:
            # clean and patched forward passes; the backward pass runs from the logits down to the hook
            value = float(sequences * facts.context) * (4.0 * facts.flops_full - 2.0 * facts.flops_to_hook)
            formula = "sequences * context * (2 forward + backward above the hook), each step"
            found.append(Derived(path=f"flops.{name}_per_step", value=value, formula=formula, origin="estimate"))
    return found
