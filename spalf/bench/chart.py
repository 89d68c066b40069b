"""Error against L0, a line per method, both axes logarithmic: one small SVG that needs no other file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from attrs import frozen

from spalf.sweeping.plot import BOTTOM, HEIGHT, LEFT, RIGHT, STYLE, TOP, WIDTH

HUES = ("#0969da", "#cf222e", "#1a7f37", "#8250df", "#bf8700", "#0598bc", "#bc4c00", "#6e7781", "#bf3989", "#57606a")
LEGEND = 16
"""Height of a line of the legend."""


@frozen(kw_only=True)
class Series:
    """A method: its points (L0, error), and whether it is ours, which is drawn thick."""

    title: str
    points: tuple[tuple[float, float], ...]
    is_ours: bool


@frozen(kw_only=True)
class Plot:
    """One panel."""

    title: str
    y_label: str
    series: tuple[Series, ...]


def svg(plots: Sequence[Plot], heading: str) -> str:
    """The panels side by side above one legend. Panels without a point are left out; the colours follow the titles."""
    shown = [plot for plot in plots if any(one.points for one in plot.series)]
    titles = list(dict.fromkeys(one.title for plot in shown for one in plot.series))
    hue = {title: HUES[i % len(HUES)] for i, title in enumerate(titles)}
    width = max(1, len(shown)) * WIDTH
    height = HEIGHT + LEGEND * (math.ceil(len(titles) / max(1, len(shown))) + 1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(heading)}">',
        f"<title>{escape(heading)}</title><style>{STYLE}</style>",
        f'<rect class="back" width="{width}" height="{height}"/>',
    ]
    for i, plot in enumerate(shown):
        parts += [f'<g transform="translate({i * WIDTH} 0)">', *_panel(plot, hue), "</g>"]
    if not shown:
        parts.append(f'<text x="{LEFT}" y="{HEIGHT / 2}">{escape(heading)}: nothing has been measured yet</text>')
    columns = max(1, len(shown))
    for i, title in enumerate(titles):
        x, y = (i % columns) * WIDTH + LEFT, HEIGHT + LEGEND * (i // columns + 1)
        parts.append(f'<line x1="{x}" x2="{x + 22}" y1="{y - 4}" y2="{y - 4}" stroke="{hue[title]}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 30}" y="{y}">{escape(title)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(plot: Plot, hue: dict[str, str]) -> list[str]:
    points = [point for one in plot.series for point in one.points]
    x_at, x_ticks = _axis([x for x, _ in points], LEFT, WIDTH - RIGHT)
    y_at, y_ticks = _axis([y for _, y in points], HEIGHT - BOTTOM, TOP)
    out = [f'<text class="title" x="{LEFT}" y="20">{escape(plot.title)}</text>']
    for tick in x_ticks:
        x = x_at(tick)
        out.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        out.append(f'<text class="dim" x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in y_ticks:
        y = y_at(tick)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        out.append(f'<text class="dim" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    out.append(
        f'<text class="dim" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">'
        "L0, active features per activation</text>"
    )
    out.append(
        f'<text class="dim" text-anchor="middle" transform="translate(14 {middle}) rotate(-90)">'
        f"{escape(plot.y_label)}</text>"
    )
    # Ours last, above the others.
    for one in sorted(plot.series, key=lambda s: s.is_ours):
        width = 2.6 if one.is_ours else 1.2
        places = [(x_at(x), y_at(y)) for x, y in sorted(one.points)]
        path = " ".join(f"{x},{y}" for x, y in places)
        out.append(f'<polyline points="{path}" fill="none" stroke="{hue[one.title]}" stroke-width="{width}"/>')
        for (x, y), (l0, value) in zip(places, sorted(one.points), strict=True):
            told = escape(f"{one.title}: L0 {l0:.4g}, {value:.4g}")
            out.append(
                f'<circle cx="{x}" cy="{y}" r="{width + 1.4}" fill="{hue[one.title]}"><title>{told}</title></circle>'
            )
    return out


def _axis(values: Sequence[float], start: float, end: float) -> tuple[Callable[[float], float], list[float]]:
    """A logarithmic scale with a margin, and round numbers on it: 1, 2 or 5 times a power of ten."""
    low, high = math.log(min(values)), math.log(max(values))
    margin = 0.06 * (high - low) or 0.1
    low, high = low - margin, high + margin

    def at(value: float) -> float:
        return round(start + (math.log(value) - low) / (high - low) * (end - start), 2)

    powers = range(math.floor(low / math.log(10)), math.ceil(high / math.log(10)) + 1)
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), [1 + i / 10 for i in range(90)]):
        found = [round(m * 10.0**p, 12) for p in powers for m in steps if low <= math.log(m) + p * math.log(10) <= high]
        if len(found) >= 3:
            break
    return at, found[:: max(1, len(found) // 8)]
