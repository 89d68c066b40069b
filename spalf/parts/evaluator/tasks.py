"""Labelled text: what a character is part of, read off the text itself, and files of labelled texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from spalf.errors import SourceError

STRING = re.compile(r"'''|\"\"\"|'|\"")
COMMENT = re.compile(r"(?:^|\s)#.*")
DEFINITION = re.compile(r"\s*(?:async\s+def|def|class)\b")
IMPORT = re.compile(r"\s*(?:import|from)\b")


def _lines(is_inside: Callable[[str], bool]) -> Callable[[str], list[bool]]:
    """A task that is true of all of a line or of none of it."""

    def marks(text: str) -> list[bool]:
        return [inside for line in text.splitlines(keepends=True) for inside in [is_inside(line)] * len(line)]

    return marks


def quoted(text: str) -> list[bool]:
    """Characters between quotation marks; a single one closes with its line, where it may have been an apostrophe."""
    out, opened = [False] * len(text), ""
    begin = at = 0
    while at < len(text):
        if opened and len(opened) == 1 and text[at] == "\n":
            opened = ""
        found = STRING.match(text, at)
        mark = found[0] if found else ""
        if not opened and mark:
            opened, begin = mark, at + len(mark)
            at = begin
        elif opened and text.startswith(opened, at):
            out[begin:at] = [True] * (at - begin)
            at += len(opened)
            opened = ""
        else:
            at += 2 if opened and text[at] == "\\" else 1
    return out


def comment(text: str) -> list[bool]:
    """Characters from a # that stands alone to the end of its line, outside quotation marks."""
    out, inside = [False] * len(text), quoted(text)
    start = 0
    for line in text.splitlines(keepends=True):
        for found in COMMENT.finditer(line):
            begin = start + found.start() + found[0].index("#")
            if not inside[begin]:
                out[begin : start + found.end()] = [True] * (start + found.end() - begin)
                break
        start += len(line)
    return out


def capitalised(text: str) -> list[bool]:
    """Characters of a word that begins with a capital."""
    out = [False] * len(text)
    for word in re.finditer(r"[A-Za-z]+", text):
        out[word.start() : word.end()] = [word[0][0].isupper()] * len(word[0])
    return out


TASKS: dict[str, Callable[[str], list[bool]]] = {
    "comment": comment,
    "quoted": quoted,
    "definition": _lines(lambda line: bool(DEFINITION.match(line))),
    "import": _lines(lambda line: bool(IMPORT.match(line))),
    "capitalised": capitalised,
    "number": lambda text: [c.isdigit() for c in text],
}
"""Whether each character of a text is part of such a thing, by name."""


def token_labels(pieces: list[str], task: str) -> list[bool]:
    """The label of each token of a text: that of its first character that is no space, else of its first."""
    marks, out, start = TASKS[task]("".join(pieces)), [], 0
    for piece in pieces:
        blank = len(piece) - len(piece.lstrip())
        at = start + (blank if blank < len(piece) else 0)
        out.append(marks[at] if at < len(marks) else False)
        start += len(piece)
    return out


def read_labelled(path: Path) -> Iterator[tuple[str, str]]:
    """(text, label) of each line of a JSON-lines file. Raises SourceError with the line that is not of that form."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise SourceError(f"{path}: cannot be read: {e} (evaluator.sparse_probing.data names a file)") from e
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            held = json.loads(line)
            text, label = held["text"], held["label"]
        except (json.JSONDecodeError, KeyError, TypeError) as e:
            raise SourceError(f'{path}, line {number}: is not {{"text": ..., "label": ...}} ({e})') from e
        if not isinstance(text, str) or isinstance(label, list | dict):
            raise SourceError(f"{path}, line {number}: text has to be a string and label a string or a number")
        yield text, str(label)
