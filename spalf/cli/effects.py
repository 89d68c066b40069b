"""What steering and ablating show."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from spalf.cli.numbers import MISSING, number
from spalf.cli.render import plain_table, visible

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spalf.engine.intervene import Ablation
    from spalf.loaded import Steered


def nats(x: float) -> str:
    """Three significant digits; "-" where there was no position to measure at."""
    return f"{x:.3g}" if math.isfinite(x) else MISSING


def change(x: float) -> str:
    """The same with its sign."""
    return f"{x:+.3g}" if math.isfinite(x) else MISSING


def steered_parts(told: Steered) -> list[RenderableType]:
    """What was added, then both continuations beside each other."""
    head = Text.assemble(
        (f"feature {told.feature}", "bold"),
        f", strength {number(told.strength)}: {number(told.strength * told.unit)} added, of which "
        f"{number(told.unit)} is usual where it fires\n",
        f"KL(baseline, steered) of the next token: {number(told.kl)} nats\n",
    )
    both = Table(box=None, pad_edge=False, padding=(0, 4, 0, 0), expand=True)
    for name in ("baseline", "steered"):
        both.add_column(Text(name, style="dim"), ratio=1, overflow="fold")
    both.add_row(*(_continued(told.prompt, text) for text in (told.baseline, told.steered)))
    return [head, both]


def _continued(prompt: str, text: str) -> Text:
    """The prompt dimmed, then what follows; line breaks are kept, other control characters are escaped."""
    parts = ["\n".join(visible(line) for line in part.expandtabs(4).split("\n")) for part in (prompt, text)]
    return Text.assemble((parts[0], "dim"), parts[1])


def ablation_parts(told: Ablation) -> list[RenderableType]:
    """The effects by where they were measured, in nats per token."""
    head = Text.assemble(
        (f"feature {told.feature}", "bold"),
        f" fires in {told.contexts} of {told.looked_at} held-out contexts; set to 0:",
    )
    rows = [
        (name, number(one.positions), nats(one.loss), change(one.change), nats(one.error), nats(one.kl))
        for name, one in (
            ("where it fires", told.fires),
            ("elsewhere", told.elsewhere),
            ("  of that: after a firing", told.later),
        )
    ]
    heads = ["in those contexts", "tokens", "loss", "change", "+- s.e.", "KL"]
    notes = Text("Nats per predicted token. Before its first firing, and in all other contexts, nothing changes.")
    return [head, Text(""), plain_table(heads, rows, right=(1, 2, 3, 4, 5)), Text(""), notes]
