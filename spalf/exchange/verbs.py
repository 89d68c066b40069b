"""`spalf export` and `spalf import` as functions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import asdict

from spalf import launch
from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.engine.checkpoint import versions
from spalf.engine.export import DTYPES
from spalf.errors import ExchangeError
from spalf.exchange import adopt, hub
from spalf.exchange.dictionary import About, of_state
from spalf.exchange.formats import WRITERS, read

TOKENS = 16_384
"""Activations that an imported dictionary's mean and scale are measured on."""


def export(
    path: str | Path,
    out: str | Path,
    *,
    to: str = "safetensors",
    dtype: str = "float32",
    push: str = "",
    private: bool = False,
) -> Path:
    """Write a run's dictionary in the format `to` ("safetensors", "saelens", "dictionary_learning") and return `out`.

    The whitening is folded in: it takes and gives raw activations. Needs the checkpoint alone. With `push`
    ("user/name") it is uploaded too, with a model card. Raises ExchangeError at a format that is unknown or cannot hold
    it.
    """
    if to not in ("safetensors", *WRITERS):
        raise ExchangeError(f'export: there is no format "{to}" (use safetensors, {", ".join(WRITERS)})')
    if dtype not in DTYPES:
        raise ExchangeError(f'export: there is no dtype "{dtype}" (use {", ".join(DTYPES)})')
    at, plan, state = launch.closed(path)
    summary = _summary(at, state)
    about = about_run(at, plan, state, summary)
    if to == "safetensors":
        written = launch.export(path, out, dtype=dtype)
    else:
        written = WRITERS[to](of_state(plan, state, about), Path(out), DTYPES[dtype])
    if push:
        upload = hub.Upload(repo=push, folder=hub.folder_of(about))
        hub.push(written, upload, hub.card(plan, about, summary, _recipe(at), upload, to), private=private)
    return written


def import_dictionary(
    path: str | Path,
    out: str | Path,
    *,
    format: str,
    recipe: str | Path = "",
    sets: Sequence[str] = (),
    tokens: int = TOKENS,
    device: str = "auto",
) -> Path:
    """Make the run directory `out` of a dictionary in `format`, so that it can be measured and looked at.

    Where its activations come from is said by the table [source] of `recipe`, then by `sets`, else by the dictionary's
    own file. Its mean and scale are measured on `tokens` activations; with 0 the source is not opened, and what is
    measured against them later (loss under mean ablation, R2 along a frontier) is measured against 0 and 1. Raises
    ExchangeError where the file cannot be read or `out` exists, RecipeError or SourceError where the source is wrong.
    """
    return adopt.adopt(
        read(path, format),
        Path(out),
        format=format,
        recipe=str(recipe),
        sets=sets,
        tokens=tokens,
        device=launch.device_of(device),
    )


def about_run(at: Path, plan: Plan, state: TrainingState, summary: Mapping[str, Any]) -> About:
    """What a file says of the run that it came from: targets, multipliers, what was measured, and a recipe's hash."""
    source, control = plan.recipe.source, state.control
    constraints = {
        name: {"budget": float(control.budget_M[i]), "multiplier": float(control.lam_M[i])}
        | {k: v for k, v in (summary.get("constraints") or {}).get(name, {}).items() if k in ("violation", "feasible")}
        for i, name in enumerate(plan.constraints)
        if bool(control.on_M[i])
    }
    measured = {k: summary[k] for k in hub.MEASURED if isinstance(summary.get(k), int | float)}
    return About(
        model=plan.facts.model,
        hook=plan.facts.hook,
        context=plan.facts.context,
        bos=bool(getattr(source, "bos", False)),
        dataset=str(getattr(source, "dataset", "")),
        details={
            "version": versions()["spalf"],
            "recipe": plan.recipe.name,
            "recipe_sha256": hashlib.sha256(_recipe(at).encode()).hexdigest(),
            "phase": state.clock.phase,
            "step": state.clock.step,
            "knobs": asdict(plan.knobs),
            "constraints": constraints,
            "measured": measured,
        },
    )


def _recipe(at: Path) -> str:
    return (at / "recipe.toml").read_text(encoding="utf-8")


def _summary(at: Path, state: TrainingState) -> dict[str, Any]:
    """summary.json of the run that a checkpoint lies in, where it is about that step; else nothing."""
    try:
        held = json.loads((at.parent.parent / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) and held.get("step") == state.clock.step else {}
