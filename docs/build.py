"""Write the generated pages: docs/parts/<slot>.md and docs/hooks.md, from the code's own docstrings.

`make docs` writes them; `python docs/build.py --check` writes nothing and exits with 1 where a page is stale.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import attrs

from spalf import hooks
from spalf.assembly.registry import Registry
from spalf.cli.describe import describe
from spalf.core.slots import SLOTS, ComponentRef, Slot
from spalf.plugins import registry

DOCS = Path(__file__).resolve().parent
MARK = "<!-- Written by docs/build.py from the docstrings: change those, then run `make docs`. -->"
FORMS = {
    "one": 'One per recipe: `{0} = "name"`, or a table `[{0}]` with `use = "name"` and options.',
    "named": "Named tables: `[{0}.any_name]` with `use`, which may be left out where it equals the table's name.",
    "inner": 'Inside another component\'s table: `{0} = "name"` or `{0} = {{ use = "name", ... }}`.',
}


def prose(doc: str | None) -> str:
    """A docstring as Markdown: indented lines become a block, characters with a meaning are escaped."""
    out: list[str] = []
    for is_block, lines in groupby(inspect.cleandoc(doc or "").splitlines(), lambda line: line.startswith(" ")):
        if is_block:
            out += ["```text", textwrap.dedent("\n".join(lines)), "```"]
        else:
            out += [escaped(line) for line in lines]
    return "\n".join(out)


def escaped(line: str) -> str:
    """Markdown's special characters escaped, except between backticks."""
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(p if p.startswith("`") else re.sub(r"([*\[])", r"\\\1", p).replace("<", "&lt;") for p in parts)


def default(option: dict[str, Any]) -> str:
    """An option's default as a recipe would write it, or where it comes from."""
    origin: str | None = option.get("from")
    if origin is None:
        return f"`{literal(option['default'])}`"
    return f"`{origin}`" if origin.startswith("knobs.") else origin


def literal(value: Any) -> str:
    """A default value in TOML's spelling."""
    if isinstance(value, bool | str):
        return json.dumps(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(literal(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {literal(v)}" for k, v in value.items()) + "}"
    if attrs.has(type(value)):
        return json.dumps(type(value).__spalf__.use)
    return f"{value:_}" if isinstance(value, int) and value >= 10_000 else repr(value)


def cell(text: str) -> str:
    """Text that stays inside its cell of a table."""
    return text.replace("|", "\\|")


def signature(ref: ComponentRef, cls: type) -> str:
    """A component's name and its options, as they stand below its heading."""
    return f"{ref.use}({', '.join(a.name for a in attrs.fields(cls))})"


def component(ref: ComponentRef, known: Registry) -> Iterator[str]:
    """A component's heading, contract, origin and options."""
    cls = known.resolve(ref.slot, ref.use)
    told = describe(known, ref)
    yield f"## {ref.use}\n"
    yield f"`{signature(ref, cls)}`\n"
    yield prose(told["doc"]) + "\n"
    notes = [f"Origin: `{ref.slot}.{ref.use}` of {told['origin'].split()[0]}, class `{told['class']}`."]
    if told["needs"]:
        notes.append(f"Needs of its source: {', '.join(told['needs'])}.")
    notes += [f"Marked `{m}`." for m in ("known_to_diverge", "partial", "dense") if getattr(cls, m, False) is True]
    yield " ".join(notes) + "\n"
    if not told["options"]:
        yield "No options.\n"
        return
    yield "| option | type | default | bounds | |\n| --- | --- | --- | --- | --- |"
    for o in told["options"]:
        cells = (f"`{o['name']}`", o["type"], default(o), o["bounds"], o["doc"])
        yield "| " + " | ".join(cell(c) for c in cells) + " |"
    yield ""


def shipped() -> Registry:
    """What spalf itself offers: the same page wherever plugins are installed."""
    known = registry()
    refs = [ref for ref in known if known.origin(ref).split()[0] == "spalf"]
    return Registry([(known.resolve(ref.slot, ref.use), known.origin(ref)) for ref in refs])


def slot_page(slot: Slot, known: Registry) -> str:
    refs = [ref for ref in known if ref.slot == slot.name]
    links = [f"[`{ref.use}`](#{ref.use})" for ref in refs]
    lines = [
        f"# {slot.name}\n",
        MARK + "\n",
        prose(slot.protocol.__doc__) + "\n",
        FORMS[slot.form].format(slot.name) + "\n",
        "Shipped: " + ", ".join(links) + ".\n",
        "```python",
        inspect.getsource(slot.protocol).rstrip(),
        "```\n",
    ]
    for ref in refs:
        lines += component(ref, known)
    return "\n".join(lines).rstrip() + "\n"


def specifications() -> dict[str, Any]:
    """The hooks by name, in the file's order."""
    return {n: f for n, f in vars(hooks).items() if n.startswith("spalf_") and inspect.isfunction(f)}


def hook_signature(name: str, function: Any) -> str:
    return f"{name}({', '.join(inspect.signature(function).parameters)})"


def stub(name: str, function: Any) -> str:
    """The first line of a hook's definition; postponed annotations lose their quotes."""
    return f"def {name}{inspect.signature(function)}: ...".replace("'", "")


def hooks_page() -> str:
    lines = ["# Hooks\n", MARK + "\n", prose(hooks.__doc__) + "\n"]
    lines.append(
        "An implementation may leave out parameters that it does not need. [plugins.md](plugins.md) has examples.\n"
    )
    for name, function in specifications().items():
        lines += [
            f"## {hook_signature(name, function)}\n",
            f"```python\n{stub(name, function)}\n```\n",
            prose(function.__doc__) + "\n",
        ]
    return "\n".join(lines).rstrip() + "\n"


def pages() -> dict[Path, str]:
    """Every generated page by its path."""
    known = shipped()
    made = {DOCS / "parts" / f"{slot.name}.md": slot_page(slot, known) for slot in SLOTS.values()}
    return made | {DOCS / "hooks.md": hooks_page()}


def stale(made: dict[Path, str]) -> list[Path]:
    """Pages that are missing, differ from the code, or document a slot that no longer exists."""
    spare = [p for p in (DOCS / "parts").glob("*.md") if p not in made]
    return [p for p, text in made.items() if not p.exists() or p.read_text(encoding="utf-8") != text] + spare


def main(arguments: list[str]) -> int:
    made = pages()
    behind = stale(made)
    if "--check" in arguments:
        for path in behind:
            print(f"{path.relative_to(DOCS.parent)}: stale (run make docs)", file=sys.stderr)
        return int(bool(behind))
    for path in behind:
        if path in made:
            path.parent.mkdir(exist_ok=True)
            path.write_text(made[path], encoding="utf-8")
        else:
            path.unlink()
        print(f"wrote {path.relative_to(DOCS.parent)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
