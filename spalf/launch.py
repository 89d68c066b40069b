"""What the command line does, as functions: compile, run, resume, load, export, harvest."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from spalf import plugins
from spalf.assembly import compile as compiler
from spalf.assembly import toml
from spalf.assembly.convert import Converter
from spalf.assembly.registry import Registry
from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.engine import checkpoint
from spalf.engine.build import build, unopened
from spalf.engine.run import Run
from spalf.errors import CheckpointError, Problem, RecipeError
from spalf.loaded import SEQUENCES, Loaded
from spalf.track import Tracking
from spalf.training import Result, train

OVERRIDABLE = ("record", "budget.tokens", "kernel", "evaluator")
"""What may differ between a checkpoint's recipe and the run that goes on from it."""

TEXTS = 64
"""Paired texts per pass of the model."""

WRITTEN = (
    *("checkpoints", "recipe.toml", "plan.json", "metrics.jsonl", "metrics.csv", "summary.json", "features.json"),
    *("report.html", "atlas.json", "evaluation.json", "trackers"),
)
"""What a run leaves in its directory."""


def compile_recipe(recipe: str | Path, sets: Sequence[str] = ()) -> Plan:
    """The plan of a recipe file or preset. Raises RecipeError with all of its problems."""
    manager, registry = plugins.load()
    plan = compiler.compile(toml.read(recipe, sets), registry)
    plugins.trackers(manager, plan.recipe.record.track)
    return plan


def filled_text(recipe: str | Path, sets: Sequence[str] = ()) -> str:
    """The recipe with every default written back, as a run directory holds it."""
    _, registry = plugins.load()
    return _text(compiler.compile(toml.read(recipe, sets), registry), registry)


def run(
    recipe: str | Path,
    *,
    sets: Sequence[str] = (),
    out: str | Path = "runs",
    device: str = "auto",
    stop_at: int | None = None,
    force: bool = False,
    observers: Sequence[object] = (),
) -> Result:
    """Train a recipe into `out`/<name>, then measure it.

    Raises RecipeError or SourceError before anything is written, RunError where training cannot go on. An existing run
    directory is refused without `force`, which replaces it.
    """
    manager, registry = plugins.load()
    plan = compiler.compile(toml.read(recipe, sets), registry)
    directory = Path(out) / plan.recipe.name
    where = device_of(device)
    _refuse_existing(directory, force)
    text = _text(plan, registry)
    watching = [*_tracking(manager, plan, directory), *observers]
    started = Run.start(plan, directory, device=where, hooks=manager.hook, recipe_text=text)
    if directory.exists():
        _remove_run(directory)
    return train(started, manager, watching, stop_at)


def resume(
    path: str | Path,
    *,
    checkpoint: str | None = None,
    sets: Sequence[str] = (),
    device: str = "auto",
    stop_at: int | None = None,
    observers: Sequence[object] = (),
) -> Result:
    """Go on from the newest (or the named) checkpoint of a run. Only record, budget.tokens, kernel and evaluator may be
    overridden.

    Raises CheckpointError where there is nothing to go on from, RecipeError where the budget is below what is done.
    """
    manager, _ = plugins.load()
    at, plan, text = plan_at(path, checkpoint, sets)
    where = device_of(device)
    watching = [*_tracking(manager, plan, at.absolute().parent.parent), *observers]
    resumed = Run.resume(plan, at, device=where, hooks=manager.hook, recipe_text=text)
    return train(resumed, manager, watching, stop_at)


def load(path: str | Path, *, device: str = "auto", sequences: int = SEQUENCES) -> Loaded:
    """A run's newest checkpoint, or a checkpoint directory, beside its language model.

    What is measured of single features is measured on `sequences` held-out contexts. Raises CheckpointError where there
    is nothing to load, SourceError where its model or text cannot be read.
    """
    at, plan, _ = plan_at(path, None, ())
    state = build(plan, device_of(device))
    checkpoint.load(at, plan, state)
    return Loaded(plan=plan, state=state, sequences=sequences)


def export(path: str | Path, out: str | Path, *, dtype: str = "float32") -> Path:
    """Write the dictionary with the whitening folded in: it takes and gives raw activations.

    Needs the checkpoint alone: neither the source's model nor its text.
    """
    from spalf.engine import export as exporting

    _, plan, state = closed(path)
    return exporting.export(plan, state, Path(out), dtype)


def closed(path: str | Path) -> tuple[Path, Plan, TrainingState]:
    """The checkpoint that `path` means, its plan and its state on the CPU, without its source: no model, no text."""
    at, plan, _ = plan_at(path, None, (), closed=True)
    state = build(plan, torch.device("cpu"), unopened(plan.facts))
    checkpoint.load(at, plan, state)
    return at, plan, state


def harvest(
    recipe: str | Path,
    out: str | Path,
    *,
    sets: Sequence[str] = (),
    tokens: int | None = None,
    format: str = "safetensors",
    pairs: str | Path | None = None,
    position: str = "last",
    device: str = "auto",
) -> Path:
    """Write a recipe's activations to shards with a manifest, which the `activations` source reads.

    With `pairs`, a file of paired texts, the activations of those instead, for the `difference` source: of each text's
    "last" token, or the "mean" over its tokens. Raises SourceError or RecipeError.
    """
    plan = compile_recipe(recipe, sets)
    if pairs is not None:
        if tokens is not None or format != "safetensors":
            message = "has no part in harvesting pairs, which are all read, into one safetensors file"
            raise RecipeError([Problem("--tokens" if tokens is not None else "--format", message, "leave it out")])
        return _harvest_pairs(plan, Path(out), Path(pairs), position, device)
    from spalf.parts.source.shards import write_shards

    stream = plan.recipe.source.open(plan.recipe.seed, device_of(device))
    return write_shards(stream, Path(out), tokens or plan.recipe.budget.tokens, format=format)


def _harvest_pairs(plan: Plan, out: Path, pairs: Path, position: str, device: str) -> Path:
    from spalf.parts.source.pairs import write_pairs
    from spalf.parts.source.texts import harvest_pairs, read_text_pairs

    if position not in ("last", "mean"):
        raise RecipeError([Problem("--position", f"{position!r} is no place in a text", "use last or mean")])
    texts = read_text_pairs(pairs)
    if out.exists():
        raise RecipeError([Problem(str(out), "exists already", "name another directory, or remove it")])
    stream = plan.recipe.source.open(plan.recipe.seed, device_of(device))
    return write_pairs(out, harvest_pairs(stream, texts, position=position, sequences=TEXTS))


# ---------------------------------------------------------------------------------------------------- inside
def _text(plan: Plan, registry: Registry) -> str:
    return toml.write(Converter(registry).unstructure(plan.recipe))


def _tracking(manager: Any, plan: Plan, directory: Path) -> list[Tracking]:
    """The trackers of `record.track` for a run in `directory`; nothing is written yet. Raises RecipeError."""
    chosen = plugins.trackers(manager, plan.recipe.record.track)
    return [Tracking(name, make(plan, directory)) for name, make in chosen.items()]


def device_of(name: str) -> torch.device:
    """Raises RecipeError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", name):
        raise RecipeError([Problem("--device", f"{name!r} is not a device", "use auto, cpu, cuda or cuda:<number>")])
    count = torch.cuda.device_count() if kind == "cuda" and torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= count:
        has = f"there are {count} CUDA devices" if count else "use auto or cpu"
        raise RecipeError([Problem("--device", f"{name!r} is not available here", has)])
    return torch.device(name)


def plan_at(path: str | Path, name: str | None, sets: Sequence[str], closed: bool = False) -> tuple[Path, Plan, str]:
    """The checkpoint that `path` means, its plan with `sets` applied, and that plan's recipe as text.

    With `closed` the facts are the checkpoint's own, and the source is not asked for them.
    """
    _, registry = plugins.load()
    at = checkpoint.find(Path(path), name)
    _refuse_missing(at, registry)
    refused = [
        Problem(s.split("=")[0], "cannot be changed on resume", "start a new run") for s in sets if not _allowed(s)
    ]
    if refused:
        raise RecipeError(refused)
    facts = checkpoint.facts(at) if closed else None
    plan = compiler.compile(toml.read(at / "recipe.toml", sets), registry, facts)
    return at, plan, _text(plan, registry)


def _allowed(assignment: str) -> bool:
    key = assignment.split("=")[0].strip()
    return any(key == k or key.startswith(f"{k}.") for k in OVERRIDABLE)


def _refuse_missing(at: Path, registry: Any) -> None:
    """Raises CheckpointError that names the distribution of every component that is not installed."""
    here = {f"{ref.slot}.{ref.use}" for ref in registry}
    components = checkpoint.metadata(at).get("components", {})
    missing = [f"{ref} from {origin}" for ref, origin in sorted(components.items()) if ref not in here]
    if missing:
        raise CheckpointError(f"{at}: needs {', '.join(missing)} (install what is missing)")


def _refuse_existing(directory: Path, force: bool) -> None:
    """Raises RecipeError where a run would overwrite what it was not told to."""
    if directory.exists() and not directory.is_dir():
        raise RecipeError([Problem(str(directory), "is a file", "give another --out or name")])
    if directory.exists() and any(directory.iterdir()) and not force:
        hint = "resume it, give another --out or name, or --force to replace it"
        raise RecipeError([Problem(str(directory), "exists already", hint)])


def _remove_run(directory: Path) -> None:
    """Delete what a run writes, and nothing else that may lie beside it."""
    for name in WRITTEN:
        target = directory / name
        if target.is_dir():
            shutil.rmtree(target)
        elif target.exists():
            target.unlink()


__all__ = ["Loaded", "Result", "compile_recipe", "export", "harvest", "load", "resume", "run"]
