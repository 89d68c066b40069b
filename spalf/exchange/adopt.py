"""A dictionary of another library as a run of spalf: a recipe, a plan, and a checkpoint at step 0 of its last phase."""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import asdict
from torch import Tensor, nn

from spalf import plugins
from spalf.assembly import compile as compiler
from spalf.assembly import toml
from spalf.assembly.convert import Converter
from spalf.assembly.toml import Table
from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.core.values import Raw, White
from spalf.engine import checkpoint, moments
from spalf.engine.build import build, unopened
from spalf.engine.export import form_scale
from spalf.engine.step import dead_window
from spalf.errors import ExchangeError
from spalf.exchange.dictionary import Activation, Dictionary
from spalf.record import Recorder

PRESETS: Mapping[Activation, str] = {"relu": "relu_l1", "jumprelu": "jumprelu", "topk": "topk", "gated": "gated"}
UNIT = 1e-3
"""How far the lengths of decoder rows may be apart to count as rows that were kept at one."""
CONTEXTS = 16
"""Contexts that the language model reads at once where mean and scale are measured."""
RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_post")


def adopt(
    dictionary: Dictionary,
    out: Path,
    *,
    format: str,
    recipe: str,
    sets: Sequence[str],
    tokens: int,
    device: torch.device,
) -> Path:
    """Write the run directory `out`, whole, and return it.

    Mean and scale are measured on `tokens` activations; with 0 no source is opened. Raises ExchangeError where `out`
    exists or the dictionary does not fit its source.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExchangeError(f"{out}: exists already (give another --out)")
    _, registry = plugins.load()
    plan = compiler.compile(table_of(dictionary, out.name, recipe, sets), registry)
    if plan.facts.d_model != dictionary.d_model:
        raise ExchangeError(
            f"the dictionary reads activations of {dictionary.d_model} dimensions, and the source gives "
            f"{plan.facts.d_model} (name the model and the hook that it was trained on)"
        )
    state = build(plan, device, None if tokens else unopened(plan.facts))
    if tokens:
        fit(plan, state, tokens)
    pour(dictionary, plan, state)
    text = toml.write(Converter(registry).unstructure(plan.recipe))
    about = {"format": format, **asdict(dictionary.about)}
    draft = out.parent / f".{out.name}.{os.getpid()}"
    try:
        Recorder(draft, plan, text)
        extra = {"serial": 1, "readings": 0, "wall": {}, "imported": about}
        checkpoint.save(plan, state, draft / "checkpoints", text, extra)
        if out.exists():
            out.rmdir()
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out


def table_of(dictionary: Dictionary, name: str, recipe: str, sets: Sequence[str]) -> Table:
    """The recipe of an imported run: the preset of its family, without whitening, with the source it is told."""
    own: Table = {
        "name": name,
        "knobs": {"F": dictionary.width, **({"L0_target": dictionary.k} if dictionary.k else {})},
        "whitener": "identity",
        "activation": {"pre_bias": dictionary.centred, **({} if dictionary.step_F is None else {"refine": True})},
        "stratum": {"free": {"unit_norm": _has_unit_rows(dictionary)}},
    }
    table = toml.merge(toml.read(PRESETS[dictionary.activation]), own)
    told = toml.read(recipe).get("source") if recipe else _source_of(dictionary)
    if told is not None:
        table["source"] = told
    for text in sets:
        table = toml.merge(table, toml.setting(text))
    source = table.get("source")
    if not recipe and isinstance(source, dict) and source.get("text"):
        source.pop("dataset", None)  # the file's own, which a text that is asked for replaces
    return table


def _has_unit_rows(dictionary: Dictionary) -> bool:
    length_F = dictionary.W_dec_FD.norm(dim=1)
    return bool((length_F / length_F.mean() - 1).abs().max() < UNIT)


def _source_of(dictionary: Dictionary) -> Table | None:
    """What the file says of model and hook, as a table; None where it says nothing."""
    about = dictionary.about
    if not about.model:
        return None
    told: dict[str, Any] = {"model": about.model, "bos": about.bos}
    told.update({key: value for key, value in (("dataset", about.dataset), ("context", about.context)) if value})
    block = RESIDUAL.fullmatch(about.hook)
    if block:
        return {"use": "huggingface", "layer": int(block[1]), **told}
    return {"use": "transformer_lens", "hook": about.hook, **told}


@torch.no_grad()
def fit(plan: Plan, state: TrainingState, tokens: int) -> None:
    """Fit the metric on the first `tokens` activations, as a calibration does; position 0 of a context is left out."""
    found = moments.empty(plan.facts.d_model)
    batch = plan.recipe.budget.batch
    while float(found.n) < tokens:
        if "tokens" in plan.facts.provides:
            sequences = state.stream.sequences(CONTEXTS)
            rows_BD = state.stream.activations(sequences)[:, 1:][sequences.real_ST[:, 1:]]
        else:
            rows_BD = state.stream.next(batch).x_BD
        found = moments.add(found, rows_BD)
    plan.recipe.whitener.fit_(state.metric, found.mean_D, moments.covariance(found))
    report: Mapping[str, float] = getattr(state.metric, "report", dict)()
    state.measured.update({f"whitener.{k}": float(v) for k, v in report.items()})
    state.measured["calibrate.tokens"] = float(found.n)


@torch.no_grad()
def pour(dictionary: Dictionary, plan: Plan, state: TrainingState) -> None:
    """Give a freshly built state the dictionary's numbers, in the coordinates of its metric, and the last phase.

    Every feature counts as silent so far: one that fires on no held-out activation is then dead. Raises ExchangeError
    where the recipe's activation is not the dictionary's.
    """
    metric = copy.deepcopy(state.metric).double().cpu() if isinstance(state.metric, nn.Module) else state.metric
    zero_D = White(torch.zeros_like(dictionary.b_dec_D))
    # p = x W' + b with x = y W^-1 + mean, and x_hat = z D + b_dec with y_hat = (x_hat - mean) W
    W_dec_FD = metric.white_direction(Raw(dictionary.W_dec_FD))
    gain = float(W_dec_FD.norm(dim=1).mean())
    b_enc_F = dictionary.b_enc_F
    mean_F = dictionary.W_enc_FD @ metric.raw(zero_D)
    values: dict[str, Tensor] = {
        "W_enc_FD": metric.raw_direction(White(dictionary.W_enc_FD)),
        "W_dec_FD": W_dec_FD / gain,
        "b_dec_D": metric.white(Raw(dictionary.b_dec_D)),
        "log_gain": torch.tensor(gain).log(),
    }
    if dictionary.activation == "gated":
        b_gate_F, r_mag_F = dictionary.gate()
        if not dictionary.centred:
            b_enc_F, b_gate_F = b_enc_F + r_mag_F.exp() * mean_F, b_gate_F + mean_F
        own = {"b_gate_F": b_gate_F, "r_mag_F": r_mag_F, "b_mag_F": b_enc_F}
        values.update({f"_activator.{name}": value for name, value in own.items()})
    else:
        values["b_enc_F"] = b_enc_F if dictionary.centred else b_enc_F + mean_F
    if dictionary.threshold_F is not None:
        # Codes are rectified there: a threshold of 0 or less is one of 0, and its logarithm the least there is.
        least = torch.finfo(torch.float32).tiny
        values["_activator.log_threshold_F"] = dictionary.threshold_F.clamp(min=least).log()
    if dictionary.step_F is not None:
        # z moves by step <x - x_hat, d>, and here by s <e W^-2, w> / (gain scale), with d = gain w W^-1
        values["_activator.step_F"] = dictionary.step_F * gain**2 * form_scale(metric)
    state.sae.measure_by(state.metric)
    lost = values.keys() - {name for name, _ in state.sae.named_parameters()}
    if lost:
        names = ", ".join(sorted(name.removeprefix("_activator.") for name in lost))
        raise ExchangeError(f"the recipe's activation has no {names}, which the dictionary needs (leave it as it is)")
    for name, value in values.items():
        state.learner.assign(name, value)
    last = plan.recipe.phases[-1]
    state.clock = state.clock.next_phase(last)
    state.phase = plan.recipe.phase[last].init(plan)
    state.silent_F.fill_(dead_window(plan) + 1)
