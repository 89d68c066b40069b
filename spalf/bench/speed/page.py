"""The page of a benchmark, from its documents alone: the same documents give the same text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from spalf.bench.speed import figures, tables
from spalf.bench.speed.figures import Document
from spalf.bench.speed.floors import DESIGNS

HEAD = """# Whole training steps, beside other libraries' and the chip's limits

Made by `spalf bench speed --from FILE --render PAGE` from what the commands below measured; no figure is typed in.

- **Ours** is the first phase of training of the preset, or of the recipe that is named: batch, whitening, code,
  objective, constraints, multipliers and filters, projection, Adam, counts. **Theirs** is what a library's own trainer
  does per batch: forward, loss, backward, clipping, optimizer, schedule, norms, statistics and its waits for the
  device, and no language model.
- All are given the same synthetic activations (64 strong directions on noise), ten batches in rotation, at a rate of
  1e-6: L0 stays where it was set. Precision bf16 is each library's own autocast.
- On a GPU a time is the median between CUDA events over steps that are waited for one by one, with p10 and p90;
  *streaming* is the mean of steps that nobody waits for. Ratios and targets take the slower of the two for ours and the
  faster for a peer. On a CPU a time is CPU time of the process for one thread, and wall time for more.
- Memory is what lies above the batches: *state* between steps, *peak* within them.
- A floor is calculated: what a design has to multiply and to move, at rates that are named. It is not a promise.
"""


def page(documents: Sequence[Document], remarks: str = "") -> str:
    """The whole page in Markdown, `remarks` behind its head; lines end in no space, the text in one newline."""
    parts = [HEAD, *([remarks.strip() + "\n"] if remarks.strip() else [])]
    for document in documents:
        parts.extend(_machine(document))
    text = "\n".join(parts)
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip("\n") + "\n"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; bars in cells are escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines) + "\n"


def _machine(document: Document) -> Iterator[str]:
    m = document["machine"]
    yield f"## {m['device']}, {m['date']}\n"
    triton = f", triton {m['triton']}" if m["kind"] == "cuda" else f", {m['threads']} thread(s)"
    yield f"Python {m['python']}, torch {m['torch']}{triton}, spalf {m['spalf']}, commit {m['commit']}.\n"
    if m["kind"] == "cpu" and document.get("load") is not None:
        yield f"Load of the machine at the end, over five minutes: {document['load']:.1f}.\n"
    commands = document.get("commands", [document["command"]])
    yield "```\n" + "\n".join(commands) + "\n```\n"
    goals = figures.targets(document)
    if goals:
        yield "### Targets\n"
        verdict = {True: "met", False: "missed", None: "not measured"}
        yield markdown(
            ("target", "wanted", "measured", ""), ((g.what, g.wanted, g.measured, verdict[g.met]) for g in goals)
        )
    for table in document["shapes"]:
        yield from _shape(table)
    if document["scaling"]:
        yield "### Scaling\n"
        yield "Milliseconds a step by backend, with the floors beside.\n"
        yield markdown(*tables.scaling(document["scaling"]))
    if "start" in document:
        yield "### Start-up\n"
        yield markdown(*tables.start(document["start"]))


def _shape(table: Document) -> Iterator[str]:
    s = table["shape"]
    yield f"### d {s['d']}, F {s['F']:,}, L0 {s['l0']}, batch {s['batch']:,}: `{table['recipe']}`\n"
    yield markdown(*tables.steps(table["rows"]))
    notes = tables.notes(table["rows"])
    if notes:
        yield "\n".join(f"- {note}" for note in notes) + "\n"
    if "floors" in table:
        yield "Floors, calculated, in ms by stage:\n"
        yield markdown(*tables.floors(table["floors"], figures.best(table["rows"], ours=True)))
        yield "\n".join(f"- *{name}*: {text}." for name, text in DESIGNS.items()) + "\n"
        limits = figures.limits(table)
        if limits:
            yield limits + "\n"
    if "ceilings" in table:
        yield "Ceilings, measured in the same run:\n"
        yield markdown(*tables.ceilings(table["ceilings"]))
    parts = figures.apart(table)
    for part in parts:
        yield from _of_one(part, f"`{part['recipe']}`, " if len(parts) > 1 else "")


def _of_one(part: Document, recipe: str) -> Iterator[str]:
    """What is measured of one recipe's step alone."""
    if "share" in part:
        yield f"What the constraints cost ({recipe}`{part['share']['kernel']}`):\n"
        yield markdown(*tables.shares(part["share"]["rows"]))
    if "waits" in part:
        yield _waits(part["waits"])
    if "profile" in part:
        yield from _profile(part["profile"])


def _waits(waits: dict[str, Any]) -> str:
    if waits["places"] is None:
        return f"Waits for the device: not measured ({waits['reason']}).\n"
    found = ", ".join(f"{place} ({n})" for place, n in waits["places"].items())
    return f"Waits for the device that torch reports in {waits['steps']} steps: {found or 'none'}.\n"


def _profile(profile: dict[str, Any]) -> Iterator[str]:
    if profile["status"] != "ok":
        yield f"No profile: {profile['reason']}\n"
        return
    yield f"Where the time goes ({profile['name']}, {profile['busy_ms']:.2f} ms busy a step):\n"
    yield markdown(*tables.profile(profile["rows"]))
