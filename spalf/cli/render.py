"""Records as tables. Pure: nothing is measured, nothing is written; text is taken as it is, brackets included."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from spalf.cli.numbers import MISSING, clock, number, scaled, share, signed

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spalf.core.recipe import Derived, Plan
    from spalf.engine.examples import Context, FeatureExample


def plain_table(
    heads: Sequence[str], rows: Iterable[Sequence[Any]], title: str = "", right: Sequence[int] = ()
) -> Table:
    """A table without frames; columns in `right` are aligned right. Cells are text, never markup."""
    table = Table(title=Text(title, style="bold") if title else None, title_justify="left", box=None, pad_edge=False)
    for i, head in enumerate(heads):
        last = i == len(heads) - 1
        table.add_column(
            Text(head, style="dim"),
            justify="right" if i in right else "left",
            overflow="fold",
            no_wrap=not last and i == 0,
        )
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return table


# ------------------------------------------------------------------------------------------------------ compile
def plan_parts(plan: Plan) -> list[RenderableType]:
    """Every derived number in groups, what each slot is filled with, and what is declared but idle."""
    recipe = plan.recipe
    parts: list[RenderableType] = [
        Text(f"{recipe.name}: {plan.facts.model or 'no model'}, d_model {plan.facts.d_model}, seed {recipe.seed}\n")
    ]
    rows = [
        (Text(d.path, style="bold"), value_text(d), d.formula, d.origin)
        for _, group in groupby(plan.derived, key=lambda d: d.path.partition(".")[0])
        for d in group
    ]
    parts.append(plain_table(["derived", "value", "formula", "from"], rows, right=(1,)))
    parts.append(Text())
    parts.append(plain_table(["component", "from"], sorted(plan.origins.items())))
    idle = idle_tables(plan)
    if idle:
        parts.append(Text(f"\nidle (declared, used by no phase): {', '.join(idle)}"))
    return parts


def value_text(d: Derived) -> str:
    """Bytes and FLOPs with a unit, whole numbers in full; a number that the run settles is "calibrated"."""
    if d.value is None:
        return "calibrated"
    if d.path.endswith("bytes"):
        return scaled(d.value, "B", 1024)
    if d.path.startswith("flops."):
        return scaled(d.value, "FLOP")
    return number(d.value, 6)


def idle_tables(plan: Plan) -> list[str]:
    """Named tables that no list mentions."""
    recipe = plan.recipe
    used: dict[str, Iterable[str]] = {
        "stratum": recipe.strata,
        "phase": recipe.phases,
        "term": plan.terms,
        "constraint": plan.constraints,
    }
    return [
        f"{slot}.{name}" for slot, names in used.items() for name in getattr(recipe, slot) if name not in set(names)
    ]


# ------------------------------------------------------------------------------------------------------ summary
def summary_parts(summary: Mapping[str, Any]) -> list[RenderableType]:
    """The closing tables: results against targets, constraints, wall time by part, notes."""
    parts: list[RenderableType] = [Text(), plain_table(["result", "value", "target"], results(summary), right=(1, 2))]
    constraints = summary.get("constraints") or {}
    if constraints:
        rows = [
            (
                Text(name, style="bold"),
                signed(one.get("violation")),
                number(one.get("multiplier")),
                _verdict(one.get("feasible")),
            )
            for name, one in constraints.items()
        ]
        parts += [Text(), plain_table(["constraint", "violation", "multiplier", "feasible"], rows, right=(1, 2))]
    parts += [Text(), plain_table(["wall time", ""], wall_rows(summary.get("wall_seconds")), right=(1,))]
    parts += [Text(f"\nnote: {note}") for note in summary.get("notes") or ()]
    return parts


def results(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of name, value, target; the target of R2 stands in the space that faithfulness is measured in."""
    r2 = number(summary["r2_target"]) if "r2_target" in summary else ""
    white = summary.get("r2_space") == "white"
    return [
        ("L0", number(summary.get("l0")), number(summary.get("l0_target"))),
        ("R2, raw", number(summary.get("r2_raw")), "" if white else r2),
        ("R2, whitened", number(summary.get("r2_whitened")), r2 if white else ""),
        ("cross-entropy, clean", number(summary.get("ce_clean")), ""),
        ("cross-entropy, patched", number(summary.get("ce_patched")), ""),
        ("cross-entropy, mean-ablated", number(summary.get("ce_mean_ablated")), ""),
        ("loss recovered", share(summary.get("loss_recovered")), ""),
        ("KL(clean, patched)", number(summary.get("kl")), ""),
        ("dead features", share(summary.get("dead_fraction")), ""),
    ]


def wall_rows(wall: Any) -> list[tuple[str, str]]:
    """Seconds by part, longest first, and their sum; one number is the whole."""
    if not isinstance(wall, Mapping):
        return [("total", clock(wall))]
    parts = {name: s for name, s in wall.items() if name != "total" and isinstance(s, int | float)}
    rows = [(name, clock(s)) for name, s in sorted(parts.items(), key=lambda item: -item[1])]
    return [*rows, ("total", clock(wall.get("total", sum(parts.values()))))]


def _verdict(feasible: Any) -> Text:
    if feasible is None:
        return Text(MISSING)
    return Text("yes", style="green") if feasible else Text("NO", style="bold red")


# ----------------------------------------------------------------------------------------------------- features
def example_lines(examples: Sequence[FeatureExample]) -> list[Text]:
    """Each feature with its strongest contexts; the token that fires it most stands in [brackets]."""
    if not examples:
        return []
    lines = [Text("\nfeatures in context (the peak in brackets)", style="bold")]
    for one in examples:
        lines.append(Text(f"{one.feature} ({one.stratum}), fires on {share(one.density)} of tokens", style="dim"))
        lines += [context_line(context) for context in one.contexts]
    return lines


def context_line(context: Context) -> Text:
    """The peak's activation, then the text; line breaks and tabs are escaped, other active tokens are underlined."""
    line = Text(f"  {context.values[context.peak]:7.3g}  ", no_wrap=True, overflow="ellipsis")
    for i, (token, value) in enumerate(zip(context.tokens, context.values, strict=True)):
        text = visible(token)
        if i == context.peak:
            line.append(f"[{text}]", style="bold reverse")
        else:
            line.append(text, style="underline" if value > 0 else "")
    return line


def visible(token: str) -> str:
    r"""A token on one line: control characters as escapes (\n, \t, \x1b), all else as it is."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in token)


# --------------------------------------------------------------------------------------------------- components
def component_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Slot (said once), name, origin, first line of the docstring."""
    cells = []
    for slot, group in groupby(rows, key=lambda row: row["slot"]):
        for i, row in enumerate(group):
            cells.append((Text(slot if i == 0 else "", style="bold"), row["name"], row["origin"], row["doc"]))
    return plain_table(["slot", "name", "from", "what it is"], cells)


def component_parts(described: Mapping[str, Any]) -> list[RenderableType]:
    """A component's heading, contract and options."""
    options = described["options"]
    parts: list[RenderableType] = [
        Text.assemble((f'{described["slot"]} "{described["name"]}"', "bold"), f"  {described['origin']}"),
        Text(described["class"], style="dim"),
        Text(f"\n{described['doc']}\n"),
    ]
    if described["needs"]:
        parts.append(Text(f"needs of its source: {', '.join(described['needs'])}\n"))
    if not options:
        return [*parts, Text("no options")]
    heads = ["option", "type", "default", "bounds"]
    rows = [[Text(o["name"], style="bold"), o["type"], default_text(o), o["bounds"]] for o in options]
    if any(o["doc"] for o in options):
        heads.append("meaning")
        rows = [[*row, o["doc"]] for row, o in zip(rows, options, strict=True)]
    return [*parts, plain_table(heads, rows)]


def default_text(option: Mapping[str, Any]) -> str:
    """The default as TOML writes it, or where the value comes from."""
    return toml_text(option["default"]) if "default" in option else str(option["from"])


def toml_text(value: Any) -> str:
    """A scalar, a list or a table as TOML writes it; a component by its name."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple | list):
        return "[" + ", ".join(toml_text(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k} = {toml_text(v)}" for k, v in value.items()) + "}"
    ref = getattr(type(value), "__spalf__", None)
    return toml_text(ref.use) if ref is not None else str(value)
