"""A state as a directory: safetensors for tensors, JSON for the rest, no pickle; a final name is always whole."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from attrs import asdict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.state import Anchor, TrainingState
from spalf.core.tree import Leaf, flatten, restore, to
from spalf.core.values import Facts, Raw
from spalf.errors import CheckpointError, DivergedError

FORMAT = 1
FILES: tuple[tuple[str, str], ...] = (
    ("learner.model.", "model"),
    ("learner.optimizer.", "optimizer"),
    ("learner.moments", "metadata"),
    ("metric.", "tensors"),
    ("anchors.", "tensors"),
    ("control.", "control"),
    ("phase.", "control"),
    ("silent_F", "control"),
    ("stream.", "control"),
    ("clock.", "metadata"),
    ("rng.", "metadata"),
    ("measured.", "metadata"),
)
"""Which file a leaf goes to, by the beginning of its path. Scalars go to metadata.json, whatever their prefix."""

REQUIRED: Mapping[str, type] = {"format": int, "phase": str, "step": int, "components": dict, "scalars": dict}
"""Keys without which a metadata.json of this format is no use, with their types."""


def _file_of(path: str) -> str:
    for prefix, name in FILES:
        if path.startswith(prefix):
            return name
    raise CheckpointError(f"no file is assigned to {path} (add its prefix to FILES in engine/checkpoint.py)")


def name_of(state: TrainingState) -> str:
    """spalf_<phase>_step<N>, N training steps in all: a later save without one in between takes the name over."""
    return f"spalf_{state.clock.phase}_step{state.clock.step}"


def save(plan: Plan, state: TrainingState, parent: Path, recipe_text: str, extra: Mapping[str, Any]) -> Path:
    """Write a checkpoint under `parent` and return its directory.

    Everything is written beside the target, flushed to disk, then renamed; a kill at any moment leaves the older
    checkpoints as they were. Raises DivergedError where a number is not finite: the last good one stays.
    """
    flat = flatten(state)
    bad = _not_finite(flat)
    if bad:
        raise diverged(parent, state.clock.step, state.clock.phase, bad)
    target = parent / name_of(state)
    draft = parent / f".{target.name}.{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    tensors: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "tensors": {}, "control": {}}
    scalars: dict[str, Leaf] = {}
    for path, leaf in flat.items():
        file = _file_of(path)
        if isinstance(leaf, Tensor):
            # Clone: safetensors refuses tensors that share memory.
            tensors[file][path] = leaf.detach().to("cpu", copy=True).contiguous()
        else:
            scalars[path] = leaf
    for file, content in tensors.items():
        save_file(content, draft / f"{file}.safetensors")
    _write(draft / "recipe.toml", recipe_text)
    _write(draft / "metadata.json", json.dumps(_metadata(plan, state, scalars, extra), indent=1, allow_nan=False))
    _swap(draft, target)
    return target


def _not_finite(flat: Mapping[str, Leaf]) -> list[str]:
    bad = [k for k, v in flat.items() if isinstance(v, Tensor) and v.is_floating_point() and not v.isfinite().all()]
    return bad + [k for k, v in flat.items() if isinstance(v, float) and not math.isfinite(v)]


def diverged(directory: Path, step: int, phase: str, bad: Sequence[str]) -> DivergedError:
    """The error for numbers that are not finite; names the checkpoint below `directory` that is still good."""
    last = all_in(directory)
    kept = f"the last good checkpoint is {last[-1]}" if last else "no checkpoint had been written yet"
    return DivergedError(
        f"step {step} of phase {phase}: not finite: {', '.join(bad)}; {kept} "
        "(lower knobs.lr, or look at the multipliers in metrics.jsonl)"
    )


def _metadata(
    plan: Plan, state: TrainingState, scalars: Mapping[str, Leaf], extra: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": plan.recipe.name,
        "phase": state.clock.phase,
        "step": state.clock.step,
        "d_model": plan.facts.d_model,
        "F": plan.knobs.F,
        "hook": plan.facts.hook,
        "model": plan.facts.model,
        "facts": {**asdict(plan.facts), "provides": sorted(plan.facts.provides)},
        "backend": state.sae.machine.ops.name,
        "device": str(state.device),
        "components": dict(plan.origins),
        "constraints": list(plan.constraints),
        "versions": versions(),
        "scalars": dict(scalars),
        **extra,
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    out = {"python": platform.python_version()}
    for name in ("spalf", "torch", "transformers", "safetensors", "triton"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Flush a file, or a directory's names, to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _swap(draft: Path, target: Path) -> None:
    """Give `draft` its final name; a whole directory stands under some name at every moment."""
    for file in draft.iterdir():
        sync(file)
    sync(draft)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    draft.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def all_in(directory: Path) -> list[Path]:
    """Whole checkpoints below `directory`, oldest first. Puts back one whose replacement was cut short.

    One whose metadata cannot be read is left out, so that it does not stand in the way of the others.
    """
    if not directory.is_dir():
        return []
    for old in directory.glob(".*.old"):
        target = directory / old.name.removeprefix(".").removesuffix(".old")
        if not target.exists() and (old / "metadata.json").exists():
            old.rename(target)
    found: list[tuple[int, float, Path]] = []
    for path in directory.iterdir():
        if not path.name.startswith(".") and (path / "metadata.json").is_file():
            try:
                found.append((serial(path), path.stat().st_mtime, path))
            except CheckpointError:
                continue
    return [path for *_, path in sorted(found)]


def serial(path: Path) -> int:
    """The place of a checkpoint in its run's order of writing; 0 for one of another format that has none."""
    number = metadata(path).get("serial", 0)
    return number if isinstance(number, int) else 0


def find(path: Path, name: str | None = None) -> Path:
    """The checkpoint that `path` means: itself, or the newest (or the named) one of a run directory.

    Raises CheckpointError with what is there instead.
    """
    if (path / "metadata.json").is_file():
        return path
    held = all_in(path / "checkpoints")
    if name is not None:
        for candidate in held:
            if candidate.name == name:
                return candidate
        known = ", ".join(p.name for p in held) or "none"
        raise CheckpointError(f"{path}: has no checkpoint {name!r} (there are: {known})")
    if not held:
        what = "holds no whole checkpoint" if path.is_dir() else "no such directory"
        raise CheckpointError(f"{path}: {what} (give a run directory or a checkpoint directory)")
    return held[-1]


def metadata(path: Path) -> dict[str, Any]:
    """metadata.json of a checkpoint. Raises CheckpointError where it cannot be read or is not one of this format."""
    file = path / "metadata.json"
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:  # ValueError: no JSON, or no UTF-8
        raise CheckpointError(f"{file}: cannot be read: {e}") from e
    if not isinstance(meta, dict):
        raise CheckpointError(f"{file}: holds a {type(meta).__name__}, not a table")
    if meta.get("format", FORMAT) == FORMAT:  # another format's keys are not known here; `load` refuses it
        bad = [key for key, kind in REQUIRED.items() if not isinstance(meta.get(key), kind)]
        if bad:
            raise CheckpointError(f"{file}: lacks {', '.join(bad)}, or has another type there")
    return meta


def facts(path: Path) -> Facts:
    """What the source of a checkpoint's run knew. Raises CheckpointError where it does not say."""
    held = metadata(path).get("facts")
    try:
        return Facts(**{**held, "provides": frozenset(held["provides"])})  # type: ignore[index,dict-item]
    except (TypeError, KeyError) as e:
        raise CheckpointError(f"{path / 'metadata.json'}: facts: {e}") from e


def load(path: Path, plan: Plan, state: TrainingState) -> dict[str, Any]:
    """Pour the checkpoint at `path` into a freshly built `state`; returns its metadata.

    Raises CheckpointError that lists every missing, spare or misshapen leaf.
    """
    meta = metadata(path)
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{path}: has format {meta.get('format')!r}, this version reads format {FORMAT}")
    flat: dict[str, Leaf] = dict(meta["scalars"])
    for file in ("model", "optimizer", "tensors", "control"):
        try:
            flat.update(load_file(path / f"{file}.safetensors"))
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"{path / file}.safetensors: cannot be read: {e}") from e
    if "imported" in meta:
        # Where its source was never opened there is no cursor: the stream stays at its start.
        flat = {**{k: v for k, v in flatten(state).items() if k.startswith("stream.")}, **flat}
    _shape_like(plan, state, flat)
    poured = restore(state, flat)
    assert poured is state
    return meta


def _shape_like(plan: Plan, state: TrainingState, flat: Mapping[str, Leaf]) -> None:
    """Give `state` the branches that appear only during a run: the phase's own state, anchors, measured numbers."""
    phase = flat.get("clock.phase")
    if phase not in plan.recipe.phase:
        raise CheckpointError(f"the checkpoint was taken in phase {phase!r}, which this recipe does not have")
    state.phase = to(plan.recipe.phase[cast(str, phase)].init(plan), state.device)
    whole = ("directions_AD", "ids_A")
    names = {k.split(".")[1] for k in flat if k.startswith("anchors.")}
    names = {n for n in names if all(isinstance(flat.get(f"anchors.{n}.{part}"), Tensor) for part in whole)}
    empty = torch.zeros(0, device=state.device)
    state.anchors = {
        n: Anchor(
            directions_AD=Raw(torch.empty_like(cast(Tensor, flat[f"anchors.{n}.directions_AD"]), device=empty.device)),
            ids_A=torch.empty_like(cast(Tensor, flat[f"anchors.{n}.ids_A"]), device=empty.device),
        )
        for n in names
    }
    state.measured = {k.removeprefix("measured."): 0.0 for k in flat if k.startswith("measured.")}


def prune(directory: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints of each phase, and the drafts that a killed run has left."""
    by_phase: dict[str, list[Path]] = {}
    for path in all_in(directory):
        by_phase.setdefault(str(metadata(path)["phase"]), []).append(path)
    for paths in by_phase.values():
        for path in paths[:-keep]:
            shutil.rmtree(path)
    for draft in directory.glob(".spalf_*"):
        shutil.rmtree(draft)
