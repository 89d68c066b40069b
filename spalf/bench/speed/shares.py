"""What the constraints, filters and controllers of a step cost, and whether a step waits for the device."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from attrs import evolve

from spalf.bench.peer_steps.measure import Clock, Task
from spalf.bench.speed import ours
from spalf.bench.speed.ours import Ours, Variant

ALL = "all"
ALONE = "objective alone"
"""The same error and the same count in one objective: no constraint, no multiplier, no filter."""

VARIANTS = {
    ALL: (),
    "without orthogonality": ('phase.fit.constraints=["faithfulness", "drift"]',),
    "faithfulness alone": ('phase.fit.constraints=["faithfulness"]',),
    ALONE: (
        'phases=["calibrate", "fit"]',
        "phase.fit.constraints=[]",
        'term.error={ use = "relative_mse" }',
        'phase.fit.terms=["l0", "error"]',
    ),
}
UNLOGGED = "record.log_every=1_000_000"
"""A logged step reads more numbers, and the first one of a process loads what it needs: neither is a constraint's."""

WAITS = 40
"""Steps that are watched: several ticks of the controllers."""


def shares(task: Task, variant: Variant, rounds: int = 1) -> list[dict[str, Any]]:
    """A row per variant, whose `share` is what all cost beyond it; measured in turn, `rounds` times.

    On CUDA by the time of steps that nobody waits for, on a CPU by the mean of process time: both hold the ticks of
    the controllers, which a median would leave out.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name, sets in VARIANTS.items():
            found[name].append(ours.row(task, evolve(variant, sets=(*variant.sets, UNLOGGED, *sets), label=name)))
    best = {name: _least(rows) for name, rows in found.items()}
    return [_share(name, best[name], best[ALL]) for name in VARIANTS]


def _cost(row: dict[str, Any]) -> float:
    return float(row["ms_streaming"] if row["clock"] == "events" else row["ms_mean"])


def _least(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The least disturbed of the rounds; the first where one failed."""
    return min(rows, key=_cost) if all(r["status"] == "ok" for r in rows) else rows[0]


def _share(name: str, row: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    if row["status"] != "ok" or whole["status"] != "ok":
        return {"name": name, "status": row["status"], "reason": row.get("reason", "nothing to compare with")}
    ms, all_ms = _cost(row), _cost(whole)
    return {"name": name, "status": "ok", "ms": ms, "share": 1 - ms / all_ms, "l0": row["l0"]}


def waits(task: Task, variant: Variant) -> dict[str, Any]:
    """Places in WAITS steps where torch sees the host wait for the device, each with its count; None on a CPU.

    None of them is logged. What torch does not report is an event that is long past: the lists' lengths are read so,
    two steps late.
    """
    if torch.device(task.device).type != "cuda":
        return {"steps": 0, "places": None, "reason": "a CPU has no device to wait for"}
    sets = (*variant.sets, UNLOGGED)
    subject = Ours(task, evolve(variant, sets=sets), ours.pool(task))
    for _ in range(task.warmup + WAITS):
        subject.step()
    Clock(cuda=True).wait()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(WAITS):
                subject.step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    places = Counter(_place(w.filename, w.lineno) for w in seen if "synchroniz" in str(w.message))
    return {"steps": WAITS, "places": dict(sorted(places.items()))}


def _place(filename: str, line: int) -> str:
    """The file as its package names it, and the line."""
    parts = Path(filename).parts
    known = [i for i, part in enumerate(parts) if part in ("spalf", "torch")]
    return f"{'/'.join(parts[known[-1] :]) if known else Path(filename).name}:{line}"
