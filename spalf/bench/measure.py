"""What every dictionary of a suite is measured by, ours and imported ones alike, on the same held-out documents."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from safetensors import safe_open
from safetensors.torch import save_file
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
from spalf.engine.step import dead_window, look, mode
from spalf.exchange import adopt, formats

SAME = 0.7
"""Cosine above which a matched pair is called one feature."""
KEPT = (
    *("l0", "l0.p10", "l0.p90", "ce_gap", "ce_gap.ci_low", "ce_gap.ci_high", "ce_clean", "loss_recovered", "kl"),
    *("dense_fraction", "mcc", "mcc_floor", "f1", "precision", "recall", "uniqueness"),
    *("absorption_full", "absorption_fraction", "letters", "probe_f1", "single", "detected"),
)
"""Measures that a line keeps under their own names, beside `fvu` (raw) and `dead`."""
OF_STRATUM = (
    *("cosine_mean", "own_token", "promotes_own", "promotes_own_top", "own_peak", "own_next", "own_f1", "fires"),
    *("share_of_l0", "dead_fraction", "absorption_full", "single"),
)
"""Measures that a line keeps of each stratum where there are several, the stratum's name before or behind them."""


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
            write_rows(decoder, state.metric.raw_direction(White(state.sae.W_dec_FD)), state.sae.rows)
    return flat(scores, state.sae.rows)


def in_training(plan: Plan, state: TrainingState, activations: int) -> dict[str, float]:
    """Of about so many activations [B, D] of the stream's training documents: `silent`, the share of features that fire
    on none of them, and `l0.training`, their mean L0.

    Held-out text is short as a rule, and a feature that fires once in a million activations is alive. Thresholds were
    set on the training documents; on others a dictionary fires less.
    """
    fired_F, batches = torch.zeros_like(state.silent_F), max(1, activations // plan.recipe.budget.batch)
    with torch.no_grad(), mode(state.sae, training=False):
        for _ in range(batches):
            fired_F += look(state, state.stream.next(plan.recipe.budget.batch).x_BD).code.fired_F()
    rows = batches * plan.recipe.budget.batch
    return {"silent": float((fired_F == 0).double().mean()), "l0.training": float(fired_F.sum()) / rows}


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


def flat(scores: Mapping[str, Mapping[str, float]], strata: Collection[str] = ()) -> dict[str, float]:
    """The measures of a line, of whichever evaluator."""
    every = {name: float(value) for one in scores.values() for name, value in one.items()}
    own = scores["dictionary"]
    out = {"fvu": 1.0 - own["r2_raw"], "dead": own["dead_fraction"]}
    for end, other in (("ci_low", "ci_high"), ("ci_high", "ci_low")):
        if f"r2_raw.{other}" in own:
            out[f"fvu.{end}"] = 1.0 - own[f"r2_raw.{other}"]
    kept = list(KEPT)
    if len(strata) > 1:
        kept += [name for one in strata for measure in OF_STRATUM for name in (f"{one}.{measure}", f"{measure}.{one}")]
    return out | {name: every[name] for name in kept if name in every}


def write_rows(path: Path, rows_FD: Tensor, strata: Mapping[str, slice] = {}) -> None:
    """Unit rows, float16, and which of them are of which stratum; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    spans = {name: f"{span.start}:{span.stop}" for name, span in strata.items()}
    save_file({"rows": normalize(rows_FD.float(), dim=1).half().contiguous().cpu()}, temporary, spans)
    temporary.replace(path)


def read_rows(path: Path) -> tuple[Tensor, dict[str, slice]]:
    """What `write_rows` has written."""
    with safe_open(path, framework="pt") as file:
        strata = file.metadata() or {}
        return file.get_tensor("rows").float(), {name: slice(*map(int, s.split(":"))) for name, s in strata.items()}


def agreement(paths: tuple[Path, Path], rows: int) -> dict[str, Any]:
    """PW-MCC (2505.20254) of two dictionaries: `rows` of the first matched one to one to rows of the second.

    The mean cosine under the best assignment, `shared` the share of pairs above 0.7, and what random rows reach. Where
    the first has several strata, `pw_mcc.<stratum>` and `shared.<stratum>` are of the pairs with a row of that stratum.
    """
    (a_FD, strata), (b_FD, _) = (read_rows(path) for path in paths)
    row_N = torch.arange(len(a_FD))
    if len(a_FD) > rows:
        row_N = torch.randperm(len(a_FD), generator=torch.Generator().manual_seed(0))[:rows]
    found = matching.matched(a_FD[row_N], b_FD)
    row_P = row_N[found.first_P]
    parts = {"": torch.ones_like(row_P, dtype=torch.bool)}
    if len(strata) > 1:
        parts |= {f".{name}": (row_P >= span.start) & (row_P < span.stop) for name, span in strata.items()}
    out: dict[str, Any] = {"pw_mcc_floor": matching.floor(a_FD[row_N], len(b_FD))}
    for name, is_in_P in parts.items():
        if bool(is_in_P.any()):
            out[f"pw_mcc{name}"] = float(found.cosine_P[is_in_P].mean())
            out[f"shared{name}"] = float((found.cosine_P[is_in_P] > SAME).double().mean())
    return out
