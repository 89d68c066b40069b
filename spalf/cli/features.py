"""Features as tables and shaded text. Pure: nothing is measured; text is taken as it is, brackets included."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from spalf.cli.numbers import number, share
from spalf.cli.render import plain_table, visible

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spalf.engine.atlas import Atlas

BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
PALE, STRONG = (255, 240, 214), (240, 150, 30)
"""What an activation is shaded with, from its least to its peak; black text is readable on all of it."""


def feature_table(told: Sequence[Mapping[str, Any]], sort: str) -> Table:
    """A line per feature: what it fires on, what it promotes; the number it is sorted by where that has no column."""
    heads, right = ["id", "stratum", "density", "peak", "activations"], [0, 2, 3]
    extra = {"drift": _drift, "absorption": _absorption, "focus": _focus, "likeness": _likeness}.get(sort)
    if extra is not None:
        heads, right = [*heads, sort], [*right, len(heads)]
    rows = []
    for one in told:
        row = [Text(str(one["id"]), style="bold"), one["stratum"], share(one["density"]), number(one["peak"], 3)]
        row += [bars(one["histogram"]), *([extra(one)] if extra is not None else [])]
        rows.append([*row, _names(one["tokens"]), _names(one["promoted"])])
    return plain_table([*heads, "fires on", "promotes"], rows, right=right)


def _drift(one: Mapping[str, Any]) -> str:
    return number(one.get("anchored", {}).get("drift"), 3)


def _absorption(one: Mapping[str, Any]) -> str:
    return share(one.get("absorption"))


def _focus(one: Mapping[str, Any]) -> str:
    return share(one["tokens"][0]["share"]) if one["tokens"] else share(None)


def _likeness(one: Mapping[str, Any]) -> str:
    return number(one["neighbours"][0]["cosine"] if one["neighbours"] else None, 3)


def _names(entries: Sequence[Mapping[str, Any]], most: int = 4) -> Text:
    """Tokens one behind the other, each on a ground of its own so that blanks are seen."""
    line = Text(no_wrap=True, overflow="ellipsis")
    for one in entries[:most]:
        line.append(visible(one["token"]), style="reverse")
        line.append(" ")
    return line


def bars(counts: Sequence[int]) -> str:
    """A histogram on one line, on a logarithmic scale; an empty bar is blank."""
    most = math.log1p(max(counts, default=0)) or 1.0
    return "".join(" " if n == 0 else BARS[min(7, int(8 * math.log1p(n) / most))] for n in counts)


def feature_parts(told: Mapping[str, Any], atlas: Atlas) -> list[RenderableType]:
    """One feature: its numbers, its contexts, and tables of what it does and what lies near it."""
    seen = "tokens" if atlas.sequences else "activations"
    head = Text.assemble((f"feature {told['id']}", "bold"), f"  {told['stratum']}")
    parts: list[RenderableType] = [head, Text()]
    facts = [("density", f"{share(told['density'])}: {number(told['fired'])} of {number(atlas.rows)} {seen}")]
    facts += [("peak", f"{number(told['peak'])}, mean {number(told['mean'], 3)}")]
    facts += [("activations", f"|{bars(told['histogram'])}| 0 to peak, log counts")] if told["histogram"] else []
    if "anchored" in told:
        one = told["anchored"]
        at = f"drift {number(one['drift'], 3)}, cosine {number(one['cosine'], 4)}"
        facts.append(("anchored to", f"[{visible(one['token'])}]  {at}"))
    facts += [("absorption", share(told["absorption"]))] if "absorption" in told else []
    if "planted" in told:
        one = told["planted"]
        facts.append(("planted", f"direction {one['direction']}, cosine {number(one['cosine'], 4)}"))
    parts.append(plain_table(["", ""], facts))
    if told["contexts"]:
        parts.append(Text("\ncontexts (the peak in brackets)", style="bold"))
        parts += [context_line(one, told["peak"]) for one in told["contexts"]]
    return [*parts, *_columns(told)]


def context_line(context: Mapping[str, Any], peak: float) -> Text:
    """The activation at the peak, then the text, every token shaded by its activation."""
    line = Text(f"  {number(context['values'][context['peak']], 3):>6}  ", no_wrap=True, overflow="ellipsis")
    for i, (token, value) in enumerate(zip(context["tokens"], context["values"], strict=True)):
        text = visible(token)
        shown = f"[{text}]" if i == context["peak"] else text
        line.append(shown, style=shade(value / peak) if value > 0 and peak > 0 else "")
    return line


def shade(level: float) -> str:
    """A rich style for an activation that is `level` of its feature's peak."""
    level = min(1.0, max(0.0, level))
    red, green, blue = (round(a + level * (b - a)) for a, b in zip(PALE, STRONG, strict=True))
    return f"black on rgb({red},{green},{blue})"


def _columns(told: Mapping[str, Any]) -> list[RenderableType]:
    """Promoted and suppressed tokens side by side, then neighbours and partners, where there are any."""
    out: list[RenderableType] = []
    if told["promoted"]:
        rows = [
            (_names([up], 1), f"+{number(up['logit'], 3)}", _names([down], 1), number(down["logit"], 3))
            for up, down in zip(told["promoted"], told["suppressed"], strict=True)
        ]
        out += [Text(), plain_table(["promotes", "logit", "suppresses", "logit"], rows, right=(1, 3))]
    if told["tokens"]:
        shares = [(_names([one], 1), share(one["share"])) for one in told["tokens"]]
        out += [Text(), plain_table(["fires on", "share of its activation"], shares, right=(1,))]
    for title, key, unit in (("nearest decoder rows", "neighbours", "cosine"), ("fires with", "partners", "share")):
        if told[key]:
            shown = [(str(o["feature"]), share(o[unit]) if unit == "share" else number(o[unit], 3)) for o in told[key]]
            out += [Text(), plain_table([title, unit], shown, right=(1,))]
    return out
