"""A dictionary of another library as a run of spalf: a recipe, a plan, and a checkpoint at step 0 of its last phase."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from attrs import asdict
from torch import Tensor

from spalf import plugins
from spalf.assembly import compile as compiler
from spalf.assembly import toml
from spalf.assembly.convert import Converter
from spalf.assembly.toml import Table
from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.engine import checkpoint
from spalf.engine.build import build, unopened
from spalf.engine.step import dead_window
from spalf.errors import ExchangeError
from spalf.exchange.dictionary import Activation, Dictionary
from spalf.record import Recorder

PRESETS: Mapping[Activation, str] = {"relu": "relu_l1", "jumprelu": "jumprelu", "topk": "topk", "gated": "gated"}
UNIT = 1e-3
"""How far decoder rows may be from unit norm to count as rows that were kept there."""
RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_post")


def adopt(dictionary: Dictionary, out: Path, *, format: str, recipe: str, sets: Sequence[str]) -> Path:
    """Write the run directory `out`, whole, and return it. Raises ExchangeError where it exists or does not fit."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExchangeError(f"{out}: exists already (give another --out)")
    _, registry = plugins.load()
    plan = compiler.compile(table_of(dictionary, out.name, recipe, sets), registry)
    if plan.facts.d_model != dictionary.d_model:
        raise ExchangeError(
            f"the dictionary reads activations of {dictionary.d_model} dimensions, and the source gives "
            f"{plan.facts.d_model} (name the model and the hook that it was trained on)"
        )
    state = build(plan, torch.device("cpu"), unopened(plan.facts))
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
        "activation": {"pre_bias": dictionary.centred},
        "stratum": {"free": {"unit_norm": _has_unit_rows(dictionary)}},
    }
    table = toml.merge(toml.read(PRESETS[dictionary.activation]), own)
    told = toml.read(recipe).get("source") if recipe else _source_of(dictionary)
    if told is not None:
        table["source"] = told
    for text in sets:
        table = toml.merge(table, toml.setting(text))
    return table


def _has_unit_rows(dictionary: Dictionary) -> bool:
    return bool(((dictionary.W_dec_FD.norm(dim=1) - 1).abs() < UNIT).all())


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
def pour(dictionary: Dictionary, plan: Plan, state: TrainingState) -> None:
    """Give a freshly built state the dictionary's numbers and the last phase; its metric stays the identity.

    Every feature counts as silent so far: one that fires on no held-out activation is then dead.
    """
    values: dict[str, Tensor] = {
        "W_enc_FD": dictionary.W_enc_FD,
        "W_dec_FD": dictionary.W_dec_FD,
        "b_dec_D": dictionary.b_dec_D,
    }
    if dictionary.activation == "gated":
        values["_activator.b_gate_F"], values["_activator.r_mag_F"] = dictionary.gate()
        values["_activator.b_mag_F"] = dictionary.b_enc_F
    else:
        values["b_enc_F"] = dictionary.b_enc_F
    if dictionary.threshold_F is not None:
        # Codes are rectified there: a threshold of 0 or less is one of 0, and its logarithm the least there is.
        least = torch.finfo(torch.float32).tiny
        values["_activator.log_threshold_F"] = dictionary.threshold_F.clamp(min=least).log()
    for name, value in values.items():
        state.learner.assign(name, value)
    last = plan.recipe.phases[-1]
    state.clock = state.clock.next_phase(last)
    state.phase = plan.recipe.phase[last].init(plan)
    state.silent_F.fill_(dead_window(plan) + 1)
