"""What every dictionary of a suite is measured by, ours and imported ones alike, on the same held-out documents."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from spalf import plugins
from spalf.assembly import compile as compiler
from spalf.core.protocols import Stream
from spalf.core.recipe import Plan, Recipe
from spalf.core.state import TrainingState
from spalf.core.values import White
from spalf.engine import evaluate as measuring
from spalf.engine import matching
from spalf.engine.build import build
from spalf.engine.step import dead_window
from spalf.exchange import adopt, formats

SAME = 0.7
"""Cosine above which a matched pair is called one feature."""
KEPT = (
    *("l0", "l0.p10", "l0.p90", "ce_gap", "ce_gap.ci_low", "ce_gap.ci_high", "ce_clean", "loss_recovered", "kl"),
    *("dense_fraction", "mcc", "mcc_floor", "f1", "precision", "recall", "uniqueness"),
)
"""Measures that a line keeps under their own names, beside `fvu` (raw) and `dead`."""


def measure(plan: Plan, state: TrainingState, shared: Recipe, decoder: Path | None) -> dict[str, float]:
    """Measures of a state by the evaluators of the recipe `shared`, on the held-out documents of the state's stream.

    `fvu` is 1 - R2 of raw activations; `dead` the share of features that fire on none of 65,536 held-out activations,
    whatever training knew of them. `decoder` is written with the unit rows [F, D] in model space, float16.
    """
    plan = evolve(plan, recipe=evolve(plan.recipe, evaluator=shared.evaluator))
    # As an imported dictionary has it: what has not fired on these documents is dead.
    state.silent_F.fill_(dead_window(plan) + 1)
    scores = measuring.evaluate(plan, state)
    if decoder is not None:
        with torch.no_grad():
            write_rows(decoder, state.metric.raw_direction(White(state.sae.W_dec_FD)))
    return flat(scores)


def adopted(
    saved: Path, format: str, base: Path, stream: Stream, device: torch.device, tokens: int
) -> tuple[Plan, TrainingState]:
    """What a peer has saved, as a state on `stream`; its mean and scale are measured on `tokens` activations of it.

    Raises ExchangeError where the folder cannot be read.
    """
    dictionary = formats.read(saved, format)
    _, registry = plugins.load()
    # None of the preset's own evaluators: what measures is the suite's.
    sets = [f"evaluator.{name}=false" for name in ("downstream_loss", "sparsity_frontier")]
    plan = compiler.compile(adopt.table_of(dictionary, "peer", str(base), sets), registry)
    state = build(plan, device, stream)
    adopt.fit(plan, state, tokens)
    adopt.pour(dictionary, plan, state)
    return plan, state


def flat(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The measures of a line, of whichever evaluator."""
    every = {name: float(value) for one in scores.values() for name, value in one.items()}
    own = scores["dictionary"]
    out = {"fvu": 1.0 - own["r2_raw"], "dead": own["dead_fraction"]}
    for end, other in (("ci_low", "ci_high"), ("ci_high", "ci_low")):
        if f"r2_raw.{other}" in own:
            out[f"fvu.{end}"] = 1.0 - own[f"r2_raw.{other}"]
    return out | {name: every[name] for name in KEPT if name in every}


def write_rows(path: Path, rows_FD: Tensor) -> None:
    """Unit rows, float16, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({"rows": normalize(rows_FD.float(), dim=1).half().contiguous().cpu()}, temporary)
    temporary.replace(path)


def agreement(paths: tuple[Path, Path], rows: int) -> dict[str, Any]:
    """PW-MCC (2505.20254) of two dictionaries: `rows` of the first matched one to one to rows of the second.

    The mean cosine under the best assignment, `shared` the share of pairs above 0.7, and what random rows reach.
    """
    a_FD, b_FD = (load_file(path)["rows"].float() for path in paths)
    if len(a_FD) > rows:
        a_FD = a_FD[torch.randperm(len(a_FD), generator=torch.Generator().manual_seed(0))[:rows]]
    found = matching.matched(a_FD, b_FD)
    shared = float((found.cosine_P > SAME).double().mean())
    return {"pw_mcc": found.mean, "shared": shared, "pw_mcc_floor": matching.floor(a_FD, len(b_FD))}
