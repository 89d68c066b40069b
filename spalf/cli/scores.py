"""Measured numbers as tables. Pure: text in, tables out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from spalf.cli.numbers import MISSING, number, share
from spalf.cli.render import plain_table

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from spalf.evaluation import Compared, Comparison

LOW, HIGH = ".ci_low", ".ci_high"
MARK = "*"


def score_table(scores: Mapping[str, Mapping[str, float]]) -> Table:
    """Every suite's numbers, each with its interval where it has one."""
    rows = []
    for suite, values in scores.items():
        shown = [key for key in values if not key.endswith((LOW, HIGH))]
        for i, key in enumerate(shown):
            ends = [values.get(key + end) for end in (LOW, HIGH)]
            rows.append((Text(suite if i == 0 else "", style="bold"), key, number(values[key]), interval(*ends)))
    return plain_table(["suite", "measure", "value", "95 % interval"], rows, right=(2,))


def interval(low: float | None, high: float | None) -> str:
    """[low, high]; "" where there is none."""
    return "" if low is None or high is None else f"[{number(low)}, {number(high)}]"


def comparison_parts(compared: Comparison) -> list[RenderableType]:
    """A row per measure, a column per run and per difference from the first; then how far dictionaries agree."""
    first, *others = compared.names
    heads = ["suite", "measure", first]
    for name in others:
        heads += [name, f"vs {first}"]
    rows = list(_compared_rows(compared.rows))
    parts: list[RenderableType] = [plain_table(heads, rows, right=range(2, len(heads)))]
    paired = [d.paired for row in compared.rows for d in row.differences if d is not None]
    if paired:
        how = "the same documents, resampled together" if all(paired) else "other documents, resampled apart"
        noise = "noise of the documents, not of the seed"
        parts.append(Text(f"\n{MARK} exceeds the noise: 95 % of resamples leave 0 out ({how}; {noise})", style="dim"))
    if compared.agreements:
        names = compared.names
        cells = [
            (f"{names[a.first]}, {names[a.second]}", number(a.pw_mcc), number(a.floor)) for a in compared.agreements
        ]
        parts += [Text(), plain_table(["same features?", "PW-MCC", "random"], cells, right=(1, 2))]
    return parts


def _compared_rows(rows: Sequence[Compared]) -> Iterator[list[Any]]:
    before = None
    for row in rows:
        cells: list[Any] = [Text("" if row.suite == before else row.suite, style="bold"), row.measure]
        before = row.suite
        cells.append(number(row.values[0]))
        for value, apart in zip(row.values[1:], row.differences[1:], strict=True):
            cells.append(number(value))
            cells.append(_difference(row.values[0], value, apart))
        yield cells


def _difference(first: float | None, value: float | None, apart: Any) -> Text:
    """The signed difference, with a mark where it exceeds noise; dim where nobody knows the noise."""
    if first is None or value is None:
        return Text(MISSING)
    change = value - first
    text = f"{'+' if change > 0 else ''}{number(change, 3)}"
    if apart is None:
        return Text(f"{text}  ", style="dim")
    return Text(f"{text} {MARK}", style="bold") if apart.exceeds_noise else Text(f"{text}  ")


def sweep_parts(rows: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """A row per point: what it was set to, what it came to, and why it failed where it did."""
    has_loss = any(row.get("ce_gap") is not None for row in rows)
    heads = ["point", "L0", "R2, raw", *(["CE gap", "loss recovered"] if has_loss else []), "dead", "feasible"]
    cells = []
    for row in rows:
        loss = [number(row.get("ce_gap")), share(row.get("loss_recovered"))] if has_loss else []
        ended = "-" if row.get("feasible") is None else number(row["feasible"])
        verdict = ended if row["outcome"] == "done" else row["outcome"]
        dead = share(row.get("dead_fraction"))
        cells.append([row["point"], number(row.get("l0")), number(row.get("r2_raw")), *loss, dead, verdict])
    parts: list[RenderableType] = [plain_table(heads, cells, right=range(1, len(heads) - 1))]
    notes = [(row["point"], note) for row in rows for note in row.get("notes") or ()]
    return parts + [Text(f"\n{point}: {note}") for point, note in notes]
