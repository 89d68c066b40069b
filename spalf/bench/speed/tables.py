"""A document's parts as heads and rows of text, for the page and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spalf.bench.speed import figures
from spalf.bench.speed.figures import Document

Table = tuple[list[str], list[list[str]]]
SHOWN = 0.05
"""Milliseconds down to which a profile names kernels."""
MISSING = "-"


def ms(x: float | None, digits: int = 2) -> str:
    """Milliseconds; "-" where nothing was measured."""
    return MISSING if x is None else f"{x:.{digits}f}"


def whole(x: float | None) -> str:
    """A count with its thousands apart."""
    return MISSING if x is None else f"{round(x):,}"


def steps(rows: Sequence[Document]) -> Table:
    """A row per trainer, the fastest first, and those that were not measured with their reason."""
    heads = ["step", "ms", "p10-p90", "streaming", "x ours", "rows/s", "L0", "peak MiB", "state MiB", "loss"]
    done = sorted((r for r in rows if figures.ok(r)), key=figures.cost)
    out = [_step(row, rows) for row in done]
    memory = {heads.index("peak MiB"), heads.index("state MiB")}
    if all(row.get("peak_mib") is None for row in done):
        heads, out = _without(memory, heads), [_without(memory, cells) for cells in out]
    for row in rows:
        if not figures.ok(row):
            out.append([row["name"], f"{row['status']}: {row['reason']}", *[""] * (len(heads) - 2)])
    return heads, out


def _without(columns: set[int], cells: list[str]) -> list[str]:
    return [cell for i, cell in enumerate(cells) if i not in columns]


def _step(row: Document, rows: Sequence[Document]) -> list[str]:
    ratio = figures.ratio(row, rows)
    loss = f"{row['loss_first']:.4g} -> {row['loss_last']:.4g}" if row["loss_first"] is not None else MISSING
    name = f"**{row['name']}**" if figures.is_ours(row) else f"{row['name']} {row['version']}"
    flags = "" if row["moved"] else ", nothing moved"
    flags += "" if row["finite"] else ", not finite"
    return [
        name,
        ms(row["ms"]),
        f"{row['ms_p10']:.2f}-{row['ms_p90']:.2f}",
        ms(row["ms_streaming"]),
        f"{ratio:.2f}" if ratio is not None else MISSING,
        whole(row["per_second"] * row["ms"] / figures.cost(row)),
        f"{row['l0']:.1f}",
        whole(row.get("peak_mib")),
        whole(row.get("state_mib")),
        loss + flags,
    ]


def notes(rows: Sequence[Document]) -> list[str]:
    """What each measured trainer was."""
    return [f"{row['name']}: {row['note']}" for row in rows if figures.ok(row)]


def floors(rows: Sequence[dict[str, Any]], own: Document | None) -> Table:
    """A row per design and set of rates, with what our fastest row is above it."""
    stages = list(dict.fromkeys(stage for row in rows for stage in row["stages"]))
    out = []
    for row in rows:
        above = f"{100 * (figures.cost(own) / row['ms'] - 1):+.0f} %" if own is not None else MISSING
        cells = [ms(row["stages"].get(stage)) for stage in stages]
        out.append([row["design"], row["rates"], ms(row["ms"]), above, *cells])
    return ["design", "rates", "floor", "ours above it", *stages], out


def ceilings(rows: Sequence[dict[str, Any]]) -> Table:
    """A row per operation."""
    out = []
    for row in rows:
        rate = f"{row['rate']:.3g} {row['unit']}" if row["ms"] is not None else row["reason"]
        out.append([row["name"], ms(row["ms"], 3), rate])
    return ["operation", "ms", "rate"], out


def shares(rows: Sequence[dict[str, Any]]) -> Table:
    """A row per variant: its time, and the share of the whole step that it does without."""
    out = []
    for row in rows:
        if row["status"] == "ok":
            out.append([row["name"], ms(row["ms"]), f"{100 * row['share']:.1f} %", f"{row['l0']:.1f}"])
        else:
            out.append([row["name"], f"{row['status']}: {row['reason']}", "", ""])
    return ["step with", "ms", "the rest costs", "L0"], out


def profile(rows: Sequence[dict[str, Any]]) -> Table:
    """Kernels down to SHOWN ms a step, then the others together."""
    shown = [row for row in rows if row["us"] >= 1e3 * SHOWN]
    rest = [row for row in rows if row["us"] < 1e3 * SHOWN]
    out = [[f"`{row['name'][:110]}`", ms(row["us"] / 1e3, 3), f"{row['calls']:.1f}"] for row in shown]
    if rest:
        together = [ms(sum(row["us"] for row in rest) / 1e3, 3), f"{sum(row['calls'] for row in rest):.0f}"]
        out.append([f"{len(rest)} shorter ones", *together])
    return ["kernel", "ms a step", "calls"], out


def scaling(points: Sequence[Document]) -> Table:
    """A row per point: each backend's time and peak, the floors of the last set of rates, the best above the least."""
    names = list(dict.fromkeys(row["name"] for point in points for row in point["rows"]))
    designs = list(dict.fromkeys(row["design"] for point in points for row in point["floors"]))
    heads = ["F", "L0", "batch", *names, *(f"floor: {d}" for d in designs), "best / least floor", "L0 now", "peak MiB"]
    return heads, [_point(point, names, designs) for point in points]


def _point(point: Document, names: Sequence[str], designs: Sequence[str]) -> list[str]:
    s, rows = point["shape"], {row["name"]: row for row in point["rows"]}
    floor = {row["design"]: row["ms"] for row in point["floors"]}
    own = figures.best(point["rows"], ours=True)
    over = f"{figures.cost(own) / min(floor.values()):.2f}" if own is not None and floor else MISSING
    return [
        f"{s['F']:,}",
        str(s["l0"]),
        f"{s['batch']:,}",
        *(_cell(rows.get(name)) for name in names),
        *(ms(floor.get(design)) for design in designs),
        over,
        f"{own['l0']:.1f}" if own is not None else MISSING,
        whole(own.get("peak_mib")) if own is not None else MISSING,
    ]


def _cell(row: Document | None) -> str:
    if row is None:
        return MISSING
    return ms(figures.cost(row)) if figures.ok(row) else f"{row['status']}: {row['reason'][:60]}"


def start(found: dict[str, Any]) -> Table:
    """The two waits of a user, on the clock and of the processor."""
    rows = [["spalf --help", f"{found['help_s']:.2f}", f"{found['help_processor_s']:.2f}"]]
    name = f"spalf run {found['recipe']} --stop-at 1, its checkpoint included"
    if "first_step_s" in found:
        rows.append([name, f"{found['first_step_s']:.1f}", f"{found['first_step_processor_s']:.1f}"])
    else:
        rows.append([name, f"failed: {found['reason']}", MISSING])
    return ["command", "seconds", "of the processor"], rows
