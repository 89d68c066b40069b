"""A frontier as one small SVG that needs no other file: what is gained against what it costs in active features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from attrs import frozen

WIDTH, HEIGHT = 460, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 48
STYLE = """
svg { font: 12px system-ui, sans-serif }
svg { --ink: #1f2328; --dim: #6e7781; --grid: #d8dee4; --dot: #0969da; --back: #ffffff }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6edf3; --dim: #8d96a0; --grid: #30363d; --dot: #58a6ff; --back: #0d1117 }
}
.back { fill: var(--back) } text { fill: var(--ink) } .dim { fill: var(--dim) } .title { font-weight: 600 }
.grid { stroke: var(--grid) } .front { stroke: var(--dot); fill: none; stroke-width: 1.5 }
.dot { fill: var(--dot) } .one { fill: var(--dot); opacity: .35 } .bar { stroke: var(--dot); opacity: .6 }
"""


@frozen(kw_only=True)
class Mark:
    """A setting: its label, its mean place (x, y), the places of its repetitions, and y's interval where it has one."""

    label: str
    x: float
    y: float
    each: tuple[tuple[float, float], ...]
    interval: tuple[float, float] | None = None


@frozen(kw_only=True)
class Panel:
    """One plot; `rising` where more of y is better."""

    title: str
    y_label: str
    rising: bool
    marks: tuple[Mark, ...]


def pareto(marks: Sequence[Mark], rising: bool) -> list[Mark]:
    """The marks that no other one beats in both axes, by rising x."""
    sign = 1.0 if rising else -1.0
    front: list[Mark] = []
    for mark in sorted(marks, key=lambda m: (m.x, -sign * m.y)):
        if not front or sign * mark.y > sign * front[-1].y:
            front.append(mark)
    return front


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between two bounds: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not span > 0:
        return [low]
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def svg(panels: Sequence[Panel], heading: str) -> str:
    """The panels side by side. Panels without a mark are left out."""
    shown = [panel for panel in panels if panel.marks]
    width = max(1, len(shown)) * WIDTH
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(heading)}">',
        f"<title>{escape(heading)}</title><style>{STYLE}</style>",
        f'<rect class="back" width="{width}" height="{HEIGHT}"/>',
    ]
    if not shown:
        parts.append(f'<text x="{LEFT}" y="{HEIGHT / 2}">{escape(heading)}: no point has been measured yet</text>')
    for i, panel in enumerate(shown):
        parts += [f'<g transform="translate({i * WIDTH} 0)">', *_panel(panel), "</g>"]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel) -> list[str]:
    xs = [x for mark in panel.marks for x, _ in mark.each]
    ys = [y for mark in panel.marks for _, y in mark.each]
    ys += [end for mark in panel.marks for end in mark.interval or ()]
    (x_low, x_high), (y_low, y_high) = _range(xs), _range(ys)
    x_at = _scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    y_at = _scale(y_low, y_high, HEIGHT - BOTTOM, TOP)
    out = [f'<text class="title" x="{LEFT}" y="20">{escape(panel.title)}</text>']
    for tick in ticks(x_low, x_high):
        out.append(f'<line class="grid" x1="{x_at(tick)}" x2="{x_at(tick)}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        out.append(_label(x_at(tick), HEIGHT - BOTTOM + 18, f"{tick:g}", "middle"))
    for tick in ticks(y_low, y_high):
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at(tick)}" y2="{y_at(tick)}"/>')
        out.append(_label(LEFT - 8, y_at(tick) + 4, f"{tick:g}", "end"))
    out.append(_label((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "L0, active features per token", "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    out.append(
        f'<text class="dim" text-anchor="middle" transform="translate(14 {middle}) rotate(-90)">'
        f"{escape(panel.y_label)}</text>"
    )
    front = pareto(panel.marks, panel.rising)
    path = " ".join(f"{x_at(m.x)},{y_at(m.y)}" for m in front)
    out.append(f'<polyline class="front" points="{path}"/>')
    for mark in panel.marks:
        out += _mark(mark, x_at, y_at, on_front=mark in front, rising=panel.rising)
    return out


def _mark(
    mark: Mark, x_at: Callable[[float], float], y_at: Callable[[float], float], *, on_front: bool, rising: bool
) -> list[str]:
    """A setting's dot, those of its repetitions, its interval, and its label on the side that the front leaves free."""
    x, y = x_at(mark.x), y_at(mark.y)
    out = []
    if mark.interval is not None:
        low, high = (y_at(end) for end in mark.interval)
        out.append(f'<line class="bar" x1="{x}" x2="{x}" y1="{low}" y2="{high}"/>')
    if len(mark.each) > 1:
        out += [f'<circle class="one" cx="{x_at(a)}" cy="{y_at(b)}" r="3"/>' for a, b in mark.each]
    told = escape(f"{mark.label}: L0 {mark.x:.4g}, {mark.y:.4g}")
    out.append(f'<circle class="dot" cx="{x}" cy="{y}" r="{4.5 if on_front else 3.5}"><title>{told}</title></circle>')
    is_left = x > WIDTH * 0.7
    beside, anchor = (x - 9, "end") if is_left else (x + 9, "start")
    out.append(_label(beside, y + 16 if rising != is_left else y - 8, mark.label, anchor))
    return out


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="dim" x="{round(x, 2)}" y="{round(y, 2)}" text-anchor="{anchor}">{escape(text)}</text>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Bounds with a margin; a single value stands in the middle."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or max(0.05 * abs(high), 1e-3)
    return low - margin, high + margin


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 2)


def panels(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Explained variance, and what the language model loses, against L0; a row is one finished point."""
    return [
        Panel(
            title="What is explained",
            y_label="explained variance (raw)",
            rising=True,
            marks=_marks(rows, "r2_raw"),
        ),
        Panel(
            title="What the model loses",
            y_label="cross-entropy gap, nats per token",
            rising=False,
            marks=_marks(rows, "ce_gap"),
        ),
    ]


def _marks(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[Mark, ...]:
    """One mark per label; repetitions are averaged, and an interval is shown where there is one point alone."""
    by_label: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("l0") is not None and row.get(key) is not None:
            by_label.setdefault(str(row["label"]), []).append(row)
    found = []
    for label, held in by_label.items():
        each = tuple((float(row["l0"]), float(row[key])) for row in held)
        low, high = (held[0].get(f"{key}{end}") for end in (".ci_low", ".ci_high"))
        found.append(
            Mark(
                label=label,
                x=sum(x for x, _ in each) / len(each),
                y=sum(y for _, y in each) / len(each),
                each=each,
                interval=None if low is None or high is None or len(each) > 1 else (float(low), float(high)),
            )
        )
    return tuple(found)
