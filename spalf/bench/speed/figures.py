"""What a document says: ratios, floors beside steps, and which targets are met. Pure: nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from attrs import frozen

Document = dict[str, Any]


def ok(row: Document) -> bool:
    """Whether a row was measured."""
    return bool(row["status"] == "ok")


def is_ours(row: Document) -> bool:
    return bool(row["library"] == "spalf")


def cost(row: Document) -> float:
    """Milliseconds that a row is judged by.

    On CUDA the slower of median and streaming time for ours, whose ticks a median leaves out, and the faster for a
    peer; on a CPU the median, as a machine that is shared has no streaming time worth the name.
    """
    if row["clock"] != "events":
        return float(row["ms"])
    both = (float(row["ms"]), float(row["ms_streaming"]))
    return max(both) if is_ours(row) else min(both)


def best(rows: Sequence[Document], ours: bool) -> Document | None:
    """The fastest row of ours, or of the others."""
    found = [row for row in rows if ok(row) and is_ours(row) == ours]
    return min(found, key=cost, default=None)


def ratio(row: Document, rows: Sequence[Document]) -> float | None:
    """How many times as long a row takes as our fastest; below 1 it is faster."""
    own = best(rows, ours=True)
    return cost(row) / cost(own) if own is not None and ok(row) else None


def named(rows: Sequence[Document], name: str) -> Document | None:
    """The measured row of this name."""
    return next((row for row in rows if row["name"] == name and ok(row)), None)


def limits(table: Document) -> str:
    """What stands between our fastest step and nothing, in a sentence; "" where it was not measured."""
    own = best(table["rows"], ours=True)
    known = {row["name"]: row["ms"] for row in table.get("ceilings", ()) if row["ms"]}
    encode = known.get("encode product, float32 result", known.get("encode product [B,d] x [d,F]"))
    if own is None or encode is None or not table.get("floors"):
        return ""
    least = min(table["floors"], key=lambda row: float(row["ms"]))
    return (
        f"Of the {cost(own):.2f} ms of {own['name']}, the encode product alone takes {encode:.2f} "
        f"({100 * encode / cost(own):.0f} %), and {least['ms']:.2f} are the least floor ({least['design']}, "
        f"{least['rates']}): what is left for the rest is {cost(own) - least['ms']:.2f} ms."
    )


@frozen(kw_only=True)
class Target:
    """What was set, what was measured, and whether it is met (None: not measured)."""

    what: str
    wanted: str
    measured: str
    met: bool | None


def targets(document: Document) -> list[Target]:
    """Those that this machine can answer: a GPU's, or a CPU's."""
    if document["machine"]["kind"] == "cuda":
        return [*_gpu_steps(document), *_constraints(document), *_scaling(document)]
    return [*_cpu_steps(document), *_start(document)]


GPU_STEPS = {64: (6.0, 4.4), 164: (7.5, 5.4)}
"""L0 -> milliseconds at d 2048, F 65,536, batch 4096: at most, and reach for."""
GPU_PEAK_MIB = 6.5 * 1000**3 / 2**20


def _table(document: Document, l0: int) -> Document | None:
    wanted = {"d": 2048, "F": 65_536, "l0": l0, "batch": 4096}
    return next((t for t in document["shapes"] if t["shape"] == wanted), None)


def _gpu_steps(document: Document) -> Iterator[Target]:
    for l0, (most, reach) in GPU_STEPS.items():
        table = _table(document, l0)
        own = best(table["rows"], ours=True) if table else None
        if table is None or own is None:
            continue
        ms = cost(own)
        yield Target(
            what=f"a step at L0 {l0} ({own['name']})",
            wanted=f"<= {most} ms, reach for {reach}",
            measured=f"{ms:.2f} ms",
            met=ms <= most,
        )
        yield Target(
            what=f"peak memory at L0 {l0}",
            wanted="<= 6.5 GB",
            measured=f"{own['peak_mib'] * 2**20 / 1e9:.2f} GB",
            met=own["peak_mib"] <= GPU_PEAK_MIB,
        )
        if l0 == 64:
            yield from _faster(table["rows"], own, {"SAELens JumpReLU": 7.0})
            peer = best(table["rows"], ours=False)
            if peer is not None and sum(ok(row) and not is_ours(row) for row in table["rows"]) > 1:
                yield _times(f"against the best peer ({peer['name']})", cost(peer) / ms, 4.0)


def _times(what: str, measured: float, wanted: float) -> Target:
    return Target(what=what, wanted=f">= {wanted:g}x", measured=f"{measured:.2f}x", met=measured >= wanted)


def _faster(rows: Sequence[Document], own: Document, wanted: dict[str, float]) -> Iterator[Target]:
    for name, times in wanted.items():
        peer = named(rows, name)
        if peer is not None:
            yield _times(f"against {name}", cost(peer) / cost(own), times)


OF_ONE = ("share", "waits", "profile")
"""What is measured of one recipe's step alone; other recipes of a shape have their own."""


def apart(table: Document) -> list[Document]:
    """{recipe, and of OF_ONE what was measured} of each recipe of a shape, from a table as measured or as joined."""
    of_one = {name: table[name] for name in OF_ONE if name in table}
    return table.get("apart") or ([{"recipe": table.get("recipe", ""), **of_one}] if of_one else [])


def _constraints(document: Document) -> Iterator[Target]:
    for table in document["shapes"]:
        parts = apart(table)
        for part in parts:
            said = f" ({part['recipe']})" if len(parts) > 1 else ""
            yield from _of_one(part, f"at L0 {table['shape']['l0']}{said}")


def _of_one(part: Document, where: str) -> Iterator[Target]:
    alone = next((r for r in part.get("share", {}).get("rows", ()) if r["name"] == "objective alone"), None)
    if alone is not None and ok(alone):
        yield Target(
            what=f"constraints, filters and controllers {where}",
            wanted="<= 12 % of a step",
            measured=f"{100 * alone['share']:.1f} %",
            met=alone["share"] <= 0.12,
        )
    places = part.get("waits", {}).get("places")
    if places is not None:
        yield Target(
            what=f"waits for the device {where}",
            wanted="none in a step",
            measured=f"{sum(places.values())} in {part['waits']['steps']} steps",
            met=not places,
        )


def _scaling(document: Document) -> Iterator[Target]:
    slower, points = [], 0
    for point in document["scaling"]:
        rows = [row for row in point["rows"] if ok(row)]
        dense = [row for row in rows if " torch" in row["name"]]  # on CUDA the torch backend's codes are dense
        own = [row for row in rows if row not in dense]
        if not dense or not own:
            continue
        points += 1
        if min(map(cost, own)) > min(map(cost, dense)):
            slower.append(point)
    if points:
        yield Target(
            what="points of the scaling grid where the dense path is faster",
            wanted="none",
            measured=f"{len(slower)} of {points}",
            met=not slower,
        )


def _cpu_steps(document: Document) -> Iterator[Target]:
    for table in document["shapes"]:
        own = best(table["rows"], ours=True)
        if own is not None:
            wanted = {"SAELens JumpReLU": 2.0, "sparsify TopK + Adam": 2.0, "sparsify TopK": 2.0}
            yield from _faster(table["rows"], own, wanted)


def _start(document: Document) -> Iterator[Target]:
    found = document.get("start")
    if not found:
        return
    for what, key, most in (("spalf --help", "help_s", 0.4), ("spalf run to its first step", "first_step_s", 10.0)):
        if key in found:
            seconds = found[key]
            yield Target(what=what, wanted=f"< {most:g} s", measured=f"{seconds:.2f} s", met=seconds < most)
