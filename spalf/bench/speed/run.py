"""The whole benchmark as one document: machine, tables by shape, scaling, shares, profiles, start-up."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from spalf.bench.peer_steps.measure import Task
from spalf.bench.speed import figures, floors, machine, ours, peers, scaling, start
from spalf.bench.speed.breakdown import breakdown
from spalf.bench.speed.ceilings import ceilings, rates
from spalf.bench.speed.ours import Variant
from spalf.bench.speed.scaling import Shape
from spalf.bench.speed.shares import shares, waits

Document = dict[str, Any]
Tell = Callable[[str], None]
Keep = Callable[[Document], None]


@frozen(kw_only=True)
class Options:
    """What is measured, and how long."""

    shapes: tuple[Shape, ...]
    kernels: tuple[str, ...]
    device: str
    precision: str
    steps: int
    rounds: int = 1
    threads: int = 0
    recipe: str = "spalf"
    sets: tuple[str, ...] = ()
    only: str = "*"
    python: Path | None = None
    peers: bool = True
    ceilings: bool = False
    profile: bool = False
    share: bool = False
    start: bool = False
    axes: tuple[str, ...] = ()
    command: str = ""
    commit: str = ""


def task_of(shape: Shape, options: Options, steps: int = 0) -> Task:
    """A shape, timed as the options say."""
    return shape.task(
        device=options.device,
        precision=options.precision,
        steps=steps or options.steps,
        # Kernels are compiled, capacities settle and graphs are recorded within these.
        warmup=30 if options.device.startswith("cuda") else 3,
        threads=options.threads,
    )


def speed(options: Options, tell: Tell, keep: Keep) -> Document:
    """Measure; `keep` is given the document after every part of it, so that what was measured survives an end."""
    before = torch.get_num_threads()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        document: Document = {
            "machine": machine.described(options.device, options.commit),
            "command": options.command,
            "method": {"steps": options.steps, "rounds": options.rounds, "precision": options.precision},
            "shapes": [],
            "scaling": [],
        }
        if options.start:
            recipe = options.recipe if options.recipe != "spalf" else start.QUICKSTART
            tell(f"start-up: {recipe}")
            document["start"] = start.start(recipe)
            keep(document)
        for shape in options.shapes:
            _shape(shape, options, document, tell, keep)
        if options.axes:
            _scaling(options, document, tell, keep)
        document["load"] = os.getloadavg()[1] if hasattr(os, "getloadavg") else None
        keep(document)
        return document
    finally:
        torch.set_num_threads(before)


def _shape(shape: Shape, options: Options, document: Document, tell: Tell, keep: Keep) -> None:
    """Everything about one shape."""
    task = task_of(shape, options)
    table: Document = {"shape": shape.record(), "recipe": options.recipe, "rows": []}
    document["shapes"].append(table)
    _rows(task, options, table, tell, lambda: keep(document))
    if options.ceilings:
        tell(f"{shape}: ceilings")
        table["ceilings"] = ceilings(task)
        found = dict(rates(table["ceilings"]))
        table["floors"] = floors.table(task, document["machine"]["device"], found)
        keep(document)
    first = _variants(options)[:1]
    for variant in first if options.share else ():
        tell(f"{shape}: what constraints cost")
        # More steps: a difference of two times is noisier than either.
        longer = replace(task, steps=2 * task.steps)
        table["share"] = {"kernel": variant.kernel, "rows": shares(longer, variant, options.rounds)}
        table["waits"] = waits(task, variant)
        keep(document)
    for variant in first if options.profile else ():
        tell(f"{shape}: profile")
        table["profile"] = breakdown(task, variant)
        keep(document)


def _variants(options: Options) -> list[Variant]:
    return [Variant(kernel=kernel, recipe=options.recipe, sets=options.sets) for kernel in options.kernels]


def _rows(task: Task, options: Options, table: Document, tell: Tell, keep: Callable[[], None]) -> None:
    """Ours and the peers', in turn, `rounds` times; a row is the median of its rounds."""
    subjects: list[tuple[str, Callable[[], Document]]] = []
    for variant in _variants(options):
        subjects.append((variant.name, partial(ours.row, task, variant)))
    for name in peers.NAMES if options.peers else ():
        subjects.append((name, partial(peers.row, name, task, options.python)))
    subjects = [(name, act) for name, act in subjects if wanted(name, options.only)]
    found: dict[str, list[Document]] = {name: [] for name, _ in subjects}
    for i in range(options.rounds):
        for name, act in subjects:
            tell(f"{task.width} features, L0 {task.l0}, batch {task.batch}: {name}" + (f", round {i + 1}" if i else ""))
            found[name].append(act())
            table["rows"] = [combined(rows) for rows in found.values() if rows]
            keep()


def wanted(name: str, pattern: str) -> bool:
    """Whether one of the patterns, by commas, names a row, in any case."""
    return any(fnmatchcase(name.lower(), one.strip().lower()) for one in pattern.split(","))


def combined(rows: list[Document]) -> Document:
    """The median of every figure over rounds, with each round's time kept; the first row that failed, if one did."""
    failed = [row for row in rows if row["status"] != "ok"]
    if failed or len(rows) == 1:
        return (failed or rows)[0]
    out = dict(rows[0])
    for key, value in rows[0].items():
        if isinstance(value, float):
            out[key] = statistics.median(row[key] for row in rows)
    return {**out, "rounds": [row["ms"] for row in rows]}


def _scaling(options: Options, document: Document, tell: Tell, keep: Keep) -> None:
    """A row per point, with our backends and the floors at the rates of the first shape's ceilings."""
    base = options.shapes[0]
    known = dict(rates(document["shapes"][0].get("ceilings", [])))
    for shape in scaling.grid(base, options.axes):
        task = task_of(shape, options)
        point: Document = {"shape": shape.record(), "rows": []}
        point["floors"] = floors.table(task, document["machine"]["device"], known)
        document["scaling"].append(point)
        for variant in _variants(options):
            tell(f"scaling: {shape}: {variant.name}")
            point["rows"].append(ours.row(task, variant))
            keep(document)


def merged(documents: Iterable[Document]) -> list[Document]:
    """Documents of several calls, those of one machine and commit as one: later tables of a shape replace earlier."""
    out: dict[tuple[str, str, str], Document] = {}
    for document in documents:
        m = document["machine"]
        key = (m["device"], m["torch"], m["commit"])
        if key not in out:
            out[key] = {**document, "commands": [document["command"]]}
            continue
        held = out[key]
        held["commands"] = [*held["commands"], document["command"]]
        for part in ("shapes", "scaling"):
            held[part] = _by_shape([*held[part], *document[part]])
        if "start" in document:
            held["start"] = document["start"]
    return list(out.values())


def _by_shape(tables: list[Document]) -> list[Document]:
    """One table per shape: what a later one has replaces what an earlier one had; rows by name, `apart` by recipe."""
    out: dict[tuple[Any, ...], Document] = {}
    for table in tables:
        key = tuple(table["shape"].values())
        held = out.setdefault(key, {})
        rows = {row["name"]: row for row in (*held.get("rows", ()), *table["rows"])}
        recipes = dict.fromkeys(name for t in (held, table) if "recipe" in t for name in t["recipe"].split(", "))
        apart: dict[str, Document] = {}
        for part in (*figures.apart(held), *figures.apart(table)):
            apart[part["recipe"]] = {**apart.get(part["recipe"], {}), **part}
        both = {"recipe": ", ".join(recipes), "rows": list(rows.values()), "apart": list(apart.values())}
        out[key] = {k: v for k, v in {**held, **table, **both}.items() if k not in figures.OF_ONE}
    return list(out.values())
