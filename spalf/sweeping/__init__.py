"""A frontier in one go: a recipe trained at every point of a grid, each in a directory of its own, and compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from spalf import launch
from spalf.engine import checkpoint
from spalf.errors import Problem, RecipeError, RunError
from spalf.record import plain, write_whole
from spalf.sweeping.grid import Point, points
from spalf.sweeping.plot import panels, svg

RESULTS, PLOT = "results.jsonl", "frontier.svg"
SUMMARY = (
    "l0",
    "l0_target",
    "r2_target",
    "r2_raw",
    "r2_whitened",
    "ce_clean",
    "ce_patched",
    "loss_recovered",
    "kl",
    "dead_fraction",
)
"""What a point's line takes from its summary."""
ENDS = ("l0", "r2_raw", "ce_gap", "loss_recovered", "kl")
"""Measures of which the line has the interval, too."""


@frozen(kw_only=True)
class Sweep:
    """What came of a sweep: its directory, a row for every point that has ended, and whether it was stopped."""

    directory: Path
    rows: tuple[Mapping[str, Any], ...] = field(hash=False)
    outcome: str


def sweep(
    recipe: str | Path,
    *,
    over: Sequence[str],
    sets: Sequence[str] = (),
    out: str | Path | None = None,
    device: str = "auto",
    observers: Sequence[object] = (),
    begin: Callable[[Point, int, int, str], None] | None = None,
) -> Sweep:
    """Train `recipe` at every point of `over`, each "key=value,value,...", and write results.jsonl and frontier.svg.

    A point is a run in `out`/<point>; `out` is sweeps/<recipe's name> unless said. Called again, finished points are
    not trained again and an interrupted one goes on. A run that fails is a row with its reason, and the next point is
    trained. `begin` is told each point, its number of how many, and "train", "resume" or "done". Raises RecipeError
    with the problems of all points before anything is trained, also where a directory holds a run of another recipe.
    """
    grid = points(over)
    texts = _texts(recipe, sets, grid)
    name = launch.compile_recipe(recipe, sets).recipe.name
    directory = Path(out) if out is not None else Path("sweeps") / name
    _refuse_others(directory, texts)
    rows: list[Mapping[str, Any]] = []
    outcome = "done"
    for number, point in enumerate(grid, 1):
        how = _how(directory / point.name)
        if begin is not None:
            begin(point, number, len(grid), how)
        if how != "done":
            outcome = _train(recipe, point, sets, directory, how, device, observers)
        if outcome == "stopped":
            break
        rows.append(row_of(directory / point.name, point))
        _write(directory, name, rows)
    return Sweep(directory=directory, rows=tuple(rows), outcome=outcome)


def _texts(recipe: str | Path, sets: Sequence[str], grid: Sequence[Point]) -> dict[str, str]:
    """The filled recipe of every point by name. Raises RecipeError with the problems of all of them."""
    texts, problems = {}, []
    for point in grid:
        try:
            texts[point.name] = launch.filled_text(recipe, [*sets, *point.sets])
        except RecipeError as e:
            problems += [Problem(f"{point.name}: {p.path}", p.message, p.hint) for p in e.problems]
    if problems:
        raise RecipeError(problems)
    return texts


def _refuse_others(directory: Path, texts: Mapping[str, str]) -> None:
    """Raises RecipeError where a point's directory holds what this sweep would not have made."""
    problems = []
    for name, text in texts.items():
        file = directory / name / "recipe.toml"
        if file.is_file() and file.read_text(encoding="utf-8") != text:
            problems.append(Problem(str(file), "is another recipe than this point's", "give another --out"))
    if directory.exists() and not directory.is_dir():
        problems.append(Problem(str(directory), "is a file", "give another --out"))
    if problems:
        raise RecipeError(problems)


def _how(directory: Path) -> str:
    """Whether a point is "done", goes on ("resume"), or is to be trained ("train")."""
    if _summary(directory).get("outcome") in ("done", "diverged", "failed"):
        return "done"
    return "resume" if checkpoint.all_in(directory / "checkpoints") else "train"


def _train(
    recipe: str | Path,
    point: Point,
    sets: Sequence[str],
    directory: Path,
    how: str,
    device: str,
    observers: Sequence[object],
) -> str:
    """ "stopped" where the run was asked to; "done" otherwise, a failure included: its summary says why."""
    try:
        if how == "resume":
            return launch.resume(directory / point.name, device=device, observers=observers).outcome
        result = launch.run(
            recipe, sets=[*sets, *point.sets], out=directory, device=device, force=True, observers=observers
        )
        return result.outcome
    except RunError:
        return "done"


def _summary(directory: Path) -> dict[str, Any]:
    """summary.json of a run; nothing where there is none that can be read."""
    try:
        value = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def row_of(directory: Path, point: Point) -> dict[str, Any]:
    """One line of results.jsonl: the point's settings, how it ended, and its numbers with their intervals."""
    summary = _summary(directory)
    row: dict[str, Any] = {
        "point": point.name,
        "label": point.label,
        "settings": dict(point.settings),
        "outcome": summary.get("outcome", "failed"),
        "feasible": summary.get("feasible"),
        **{key: summary.get(key) for key in SUMMARY},
    }
    if row["ce_clean"] is not None and row["ce_patched"] is not None:
        row["ce_gap"] = row["ce_patched"] - row["ce_clean"]
    measured: dict[str, Any] = {}
    for scores in (summary.get("evaluators") or {}).values():
        measured.update(scores)
    for key in ENDS:
        row.update({k: measured[k] for k in (f"{key}.ci_low", f"{key}.ci_high") if k in measured})
    if row["outcome"] != "done":
        row["notes"] = summary.get("notes") or []
    row["seconds"] = sum((summary.get("wall_seconds") or {}).values())
    return row


def _write(directory: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Both files, whole."""
    lines = "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows)
    write_whole(directory / RESULTS, lines)
    write_whole(directory / PLOT, svg(panels([row for row in rows if row["outcome"] == "done"]), f"{name}: frontier"))


__all__ = ["Point", "Sweep", "points", "sweep"]
