"""What a run's features are, and a page about all of it: read from its directory and its newest checkpoint."""

from __future__ import annotations

import json
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from spalf import launch, report
from spalf.engine import checkpoint
from spalf.engine.atlas import Atlas, atlas
from spalf.errors import CheckpointError, Problem, RecipeError
from spalf.evaluation import kept as kept_scores
from spalf.record import write_whole

FEATURES = 4096
TOKENS = 65_536
"""Held-out tokens that features are looked at on, unless said otherwise."""
KEPT = "atlas.json"
"""The file of a run directory that keeps its atlas, so that it is looked at once."""


def features(path: str | Path, *, features: int = FEATURES, tokens: int = TOKENS, device: str = "auto") -> Atlas:
    """What is known of at most `features` features of a run's newest checkpoint, or of a checkpoint.

    Looked at on `tokens` held-out tokens, and kept in the run directory: asked again, it is read from there. Raises
    CheckpointError where there is nothing to look at, SourceError where its model or text cannot be read.
    """
    if features < 1 or tokens < 1:
        raise RecipeError([Problem("features", f"{features} features on {tokens} tokens", "give at least one")])
    return _looked_at(checkpoint.find(Path(path)), features, tokens, device)


def _looked_at(at: Path, features: int, tokens: int, device: str) -> Atlas:
    key = {"format": report.FORMAT, "checkpoint": _digest(at), "features": features, "tokens": tokens}
    kept = at.parent.parent / KEPT if at.parent.name == "checkpoints" else None
    found = None if kept is None else _read(kept, key)
    if found is not None:
        return found
    loaded = launch.load(at, device=device)
    context = loaded.plan.facts.context or 1
    packed = report.pack(atlas(loaded.plan, loaded.state, features=features, sequences=max(1, tokens // context)))
    if kept is not None:
        # A run that may be read but not written to is looked at again next time.
        with suppress(OSError):
            write_whole(kept, json.dumps({"made": key, "atlas": packed}, separators=(",", ":"), allow_nan=False))
    # With the digits that were kept, so that the first answer and the second are one.
    return report.unpack(packed)


def write_report(
    path: str | Path,
    out: str | Path | None = None,
    *,
    features: int = FEATURES,
    tokens: int = TOKENS,
    device: str = "auto",
) -> Path:
    """Write one page about a run, which needs no other file and no network: <run>/report.html, or `out`.

    With `features` 0 it is about the run alone, and neither the model nor its text is opened. Raises CheckpointError
    where the run directory is damaged, or `path` is a checkpoint that lies in none.
    """
    at = checkpoint.find(Path(path))
    if at.parent.name != "checkpoints":
        raise CheckpointError(f"{at}: lies in no run directory, whose course a report tells (give a run)")
    record = report.read(at.parent.parent)
    target = record.directory / "report.html" if out is None else Path(out)
    if target.is_dir():
        raise RecipeError([Problem("--out", f"{target} is a directory", "name a file")])
    plan = launch.compile_recipe(at / "recipe.toml")
    seen = _looked_at(at, features, tokens, device) if features else None
    data = {
        "run": report.headline(plan, record),
        "story": report.story(plan, record),
        "parameters": report.parameters(plan, _measured(at)),
        "evaluation": report.evaluation(record, kept_scores(at)),
        "recipe": record.recipe,
    }
    text = report.page(plan.recipe.name, data, None if seen is None else report.pack(seen))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, text)
    return target


def _digest(at: Path) -> str:
    """What tells one checkpoint from another: its metadata holds step, wall time and random state."""
    try:
        return blake2b((at / "metadata.json").read_bytes(), digest_size=16).hexdigest()
    except OSError as e:
        raise CheckpointError(f"{at / 'metadata.json'}: cannot be read: {e}") from e


def _read(kept: Path, key: dict[str, Any]) -> Atlas | None:
    """The atlas that was kept under this key; None where another was, or none that can be read."""
    try:
        held = json.loads(kept.read_text(encoding="utf-8"))
        return report.unpack(held["atlas"]) if held["made"] == key else None
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def _measured(at: Path) -> dict[str, float]:
    """What the run has calibrated, by name."""
    start = "measured."
    scalars: dict[str, Any] = checkpoint.metadata(at)["scalars"]
    return {k.removeprefix(start): float(v) for k, v in scalars.items() if k.startswith(start)}
