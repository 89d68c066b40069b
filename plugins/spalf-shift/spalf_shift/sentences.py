"""Labelled sentences: snippets of Python that differ in known binary concepts, made by a seed.

Shapes: C concepts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from attrs import evolve, frozen

from spalf import SourceError


@frozen(kw_only=True)
class Concept:
    """A binary property of a snippet: its name, and what it looks like off and on."""

    name: str
    off: str
    on: str


CONCEPTS: tuple[Concept, ...] = (
    Concept(name="async", off="def f(): ...", on="async def f(): ..."),
    Concept(name="method", off="def f(x): ...", on="def f(self, x): ..."),
    Concept(name="private", off="def load(): ...", on="def _load(): ..."),
    Concept(name="camel_case", off="def load_file(): ...", on="def loadFile(): ..."),
    Concept(name="annotated", off="def f(): ...", on="def f() -> int: ..."),
    Concept(name="string_default", off="def f(x=3): ...", on='def f(x="name"): ...'),
    Concept(name="decorated", off="def f(): ...", on="@cached\ndef f(): ..."),
    Concept(name="documented", off="no docstring", on='"""A docstring."""'),
    Concept(name="commented", off="no comment", on="# a comment"),
    Concept(name="plural", off="log.info('reads the file')", on="log.info('reads the files')"),
    Concept(name="past", off="log.info('reads the file')", on="log.info('removed the file')"),
    Concept(name="double_quotes", off="log.info('...')", on='log.info("...")'),
    Concept(name="while_loop", off="for item in items:", on="while items:"),
    Concept(name="negated", off="if ready:", on="if not ready:"),
    Concept(name="yields", off="return item", on="yield item"),
    Concept(name="nested", off="top level", on="indented below a class"),
)
NAMES = tuple(c.name for c in CONCEPTS)

# (present, past): regular and irregular, so that the tense is no single suffix
VERBS = (
    ("opens", "opened"),
    ("closes", "closed"),
    ("reads", "has read"),
    ("writes", "wrote"),
    ("sends", "sent"),
    ("finds", "found"),
    ("removes", "removed"),
    ("creates", "created"),
    ("checks", "checked"),
    ("parses", "parsed"),
)
NOUNS = ("file", "value", "name", "line", "key", "header", "option", "module", "argument", "message", "node", "token")
ACTIONS = ("load", "read", "get", "set", "parse", "write", "check", "find", "make", "update", "open", "send")
TYPES = ("int", "str", "bool", "float", "bytes")
ITEMS = ("items", "lines", "values", "names", "entries", "args", "keys", "parts")
FLAGS = ("ready", "found", "closed", "valid", "done", "started", "empty", "running")
DECORATORS = ("property", "cached", "staticmethod", "contextmanager", "wraps(func)", "skip")
WORDS = ("name", "utf-8", "default", "r", "ascii", "strict", "text", "info")


@frozen(kw_only=True)
class Content:
    """What two snippets of a pair have in common: everything that no concept names."""

    verb: int
    noun: str
    action: str
    type: str
    items: str
    flag: str
    decorator: str
    word: str
    number: int
    remark: str


def _content(draw: random.Random) -> Content:
    return Content(
        verb=draw.randrange(len(VERBS)),
        noun=draw.choice(NOUNS),
        action=draw.choice(ACTIONS),
        type=draw.choice(TYPES),
        items=draw.choice(ITEMS),
        flag=draw.choice(FLAGS),
        decorator=draw.choice(DECORATORS),
        word=draw.choice(WORDS),
        number=draw.randrange(10),
        remark=draw.choice(NOUNS),
    )


def render(content: Content, bits: Mapping[str, bool]) -> str:
    """The snippet of a content with each concept of `bits` on or off."""
    c, on = content, bits
    name = f"{c.action}{c.noun.capitalize()}" if on["camel_case"] else f"{c.action}_{c.noun}"
    default = f'"{c.word}"' if on["string_default"] else str(c.number)
    arguments = f"{'self, ' if on['method'] else ''}{c.items}, {c.flag}={default}"
    head = f"{'async ' if on['async'] else ''}def {'_' if on['private'] else ''}{name}({arguments})"
    lines = [f"@{c.decorator}"] if on["decorated"] else []
    lines.append(f"{head}{f' -> {c.type}' if on['annotated'] else ''}:")
    if on["documented"]:
        lines.append(f'    """The {c.remark} of a {c.noun}."""')
    if on["commented"]:
        lines.append(f"    # See the {c.remark} first.")
    quote = '"' if on["double_quotes"] else "'"
    message = f"{VERBS[c.verb][on['past']]} the {c.noun}{'s' if on['plural'] else ''}"
    lines.append(f"    log.info({quote}{message}{quote})")
    lines.append(f"    while {c.items}:" if on["while_loop"] else f"    for item in {c.items}:")
    lines.append(f"        if {'not ' if on['negated'] else ''}{c.flag}:")
    lines.append(f"            {'yield' if on['yields'] else 'return'} {c.items}")
    body = [f"    {line}" for line in lines] if on["nested"] else lines
    return "\n".join(body) + "\n"


@frozen(kw_only=True)
class TextPair:
    """Two snippets and what changed from the first to the second: 1 a concept was switched on, -1 off."""

    a: str
    b: str
    changes: Mapping[str, int]

    def mirrored(self) -> TextPair:
        """The same pair, the other way round."""
        return evolve(self, a=self.b, b=self.a, changes={k: -v for k, v in self.changes.items()})


def text_pairs(groups: int, *, variants: int = 2, most: int = 3, seed: int = 0) -> list[TextPair]:
    """`groups` snippets, each paired with `variants` others that differ from it in 1 to `most` concepts, and mirrored.

    2 * groups * variants pairs, a function of the arguments alone. No text occurs in two groups. Every concept is
    changed about equally often, in both directions. Raises SourceError at numbers that cannot be met.
    """
    if groups < 1 or variants < 1 or not 1 <= most <= len(NAMES):
        raise SourceError(
            f"groups = {groups}, variants = {variants}, most = {most}: there is no such set of pairs "
            f"(groups and variants are at least 1, most is 1 to {len(NAMES)})"
        )
    draw = random.Random(f"spalf_shift {seed}")
    seen: set[str] = set()
    turns = _turns(draw)
    out: list[TextPair] = []
    for _ in range(groups):
        for pair in _group(draw, turns, seen, variants, most):
            out += [pair, pair.mirrored()]
    return out


def _turns(draw: random.Random) -> Iterator[str]:
    """Concept names without end: all of them in a drawn order, then all of them in another."""
    while True:
        yield from draw.sample(NAMES, len(NAMES))


def _group(
    draw: random.Random, turns: Iterator[str], seen: set[str], variants: int, most: int, attempts: int = 1000
) -> list[TextPair]:
    """One snippet's pairs; `seen` holds the texts of the groups before it, and takes this one's."""
    chosen = [_distinct(turns, draw.randint(1, most)) for _ in range(variants)]
    for _ in range(attempts):
        content = _content(draw)
        bits = {name: draw.random() < 0.5 for name in NAMES}
        base = render(content, bits)
        pairs = []
        for names in chosen:
            other = {name: value != (name in names) for name, value in bits.items()}
            changes = {name: 1 if other[name] else -1 for name in names}
            pairs.append(TextPair(a=base, b=render(content, other), changes=changes))
        texts = {base, *(pair.b for pair in pairs)}
        if not texts & seen:
            seen |= texts
            return pairs
    raise SourceError(f"no {attempts} draws gave a new snippet after {len(seen)} of them (ask for fewer groups)")


def _distinct(turns: Iterator[str], n: int) -> tuple[str, ...]:
    names: list[str] = []
    while len(names) < n:
        name = next(turns)
        if name not in names:
            names.append(name)
    return tuple(names)


def write_text(path: Path, pairs: Sequence[TextPair]) -> Path:
    """JSON lines {"a": text, "b": text, "labels": {concept: -1 or 1}}. Raises SourceError where the file exists."""
    if path.exists():
        raise SourceError(f"{path} exists (name another file, or remove it)")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"a": p.a, "b": p.b, "labels": dict(p.changes)}) for p in pairs)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
