"""The tracker: one run of Weights & Biases for one run directory, over every resume."""

from __future__ import annotations

import json
import logging
import os
import secrets
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import wandb

from spalf import Plan, hookimpl

logger = logging.getLogger("spalf")

INIT_TIMEOUT = 30.0
"""Seconds that a run's start waits for the server before it goes offline."""
FINISH_TIMEOUT = 120.0
"""Seconds that a run's end waits for the last upload; what is missing then is still on disk."""


class Wandb:
    """`wandb`: every line of metrics.jsonl, the filled recipe as the run's config, summary.json as its summary.

    A line's index in metrics.jsonl is the step that the server orders by, so that steps taken again after a resume are
    told once; charts are drawn over spalf's own `step`. The run's id is kept in trackers/wandb/run.json. Where the
    server cannot be reached, or nobody is logged in, the run is kept offline beside it, for `wandb sync`.
    """

    def __init__(self, plan: Plan, directory: Path) -> None:
        self._name = plan.recipe.name
        self._rows, self._total = dict(plan.rows), plan.total_steps
        self._home = directory / "trackers" / "wandb"
        self._run: Any = None
        self._defined: set[str] = set()

    @hookimpl
    def spalf_phase_entered(self, run: Any) -> None:
        self._begun(run)

    @hookimpl
    def spalf_logged(self, run: Any, line: Mapping[str, Any], index: int) -> None:
        ours = self._begun(run)
        if index < ours.step:  # told before the run was resumed
            return
        row = dict(_flat("", line))
        if run.state.clock.step > run.state.clock.entered:  # in a phase that takes no step, lines are counted instead
            for key in row.keys() - self._defined - {"step"}:
                ours.define_metric(key, step_metric="step")
                self._defined.add(key)
        ours.log(row, step=index, commit=True)

    @hookimpl
    def spalf_ended(self, run: Any, summary: Mapping[str, Any]) -> None:
        ours = self._begun(run)
        ours.summary.update(dict(summary))
        ours.finish(exit_code=0 if summary["outcome"] in {"done", "stopped"} else 1)

    # ------------------------------------------------------------------------------------------------- inside
    def _begun(self, run: Any) -> Any:
        """The client's run: the one of this directory, begun or gone on with at the first call."""
        if self._run is None:
            self._run = self._begin(tomllib.loads(run.recipe_text))
        return self._run

    def _begin(self, recipe: dict[str, Any]) -> Any:
        known = self._known()
        given: dict[str, Any] = {
            "id": known.get("id") or secrets.token_hex(4),
            "project": known.get("project") or os.environ.get("WANDB_PROJECT") or "spalf",
            "entity": known.get("entity"),
            "name": self._name,
            "resume": "allow",
            "config": {**recipe, "rows": self._rows, "total_steps": self._total},
            "allow_val_change": True,
            "reinit": "create_new",  # beside whatever run of its own a notebook has open
            "dir": str(self._home),
            "settings": _settings(),
        }
        self._home.mkdir(parents=True, exist_ok=True)
        begun = _online_or_not(given)
        self._remember({"id": given["id"], "project": given["project"], "entity": begun.entity or given["entity"]})
        return begun

    def _known(self) -> dict[str, str]:
        try:
            found = json.loads((self._home / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _remember(self, told: Mapping[str, Any]) -> None:
        draft = self._home / ".run.json"
        draft.write_text(json.dumps({k: v for k, v in told.items() if v}) + "\n", encoding="utf-8")
        draft.replace(self._home / "run.json")


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Numbers by their place: constraints/drift/g. The client makes a section of charts of what is before the slash."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            name = str(key).replace(".", "/")
            yield from _flat(f"{prefix}/{name}" if prefix else name, inner)
    elif value is not None:
        yield prefix, value


def _settings() -> wandb.Settings:
    """Nothing is written to the terminal, which is spalf's, and no wait is without an end.

    A timeout that the environment names stands.
    """
    settings = wandb.Settings(console="off", silent=True)
    if "WANDB_INIT_TIMEOUT" not in os.environ:
        settings.init_timeout = INIT_TIMEOUT
    if "WANDB_FINISH_TIMEOUT" not in os.environ:
        settings.finish_timeout = FINISH_TIMEOUT
    return settings


def _online_or_not(given: dict[str, Any]) -> Any:
    """Begin as the environment says; offline where the server or a login is missing."""
    if wandb.setup().settings.mode != "online":
        return wandb.init(**given)
    try:
        # Asked first, and without a prompt: a run that waits for a password at night does not train, and an id whose
        # beginning has failed cannot be begun again in this process.
        if wandb.login(prompt=False, verify=True):
            return wandb.init(**given)
        why = "nobody is logged in (wandb login)"
    except wandb.errors.AuthenticationError as e:
        why = " ".join(str(e).split())
    except wandb.errors.Error as e:
        why = " ".join(str(e).split())
        given["id"] = secrets.token_hex(4)
    logger.warning("wandb: %s; the run is kept offline in %s, for wandb sync", why, given["dir"])
    return wandb.init(**{**given, "mode": "offline"})
