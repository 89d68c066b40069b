"""What a message says about a word that is not among the known ones."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def near(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` most likely stands for."""
    candidates = sorted(known)
    folded = {k.lower(): k for k in reversed(candidates)}
    found = get_close_matches(word.lower(), list(folded), n=1)
    if not found and len(word) > 1:
        found = [k for k in folded if k.startswith(word.lower())]
    return folded[found[0]] if found else None


def suggest(word: str, known: Iterable[str], noun: str = "known") -> str:
    """A hint: the nearest known word, or else all of them."""
    words = sorted(known)
    match = near(word, words)
    if match is not None:
        return f'did you mean "{match}"?'
    return f"{noun}: {', '.join(words)}" if words else f"{noun}: none"


def shown(value: object, limit: int = 60) -> str:
    """A value as a recipe's author knows it, with its TOML type in front."""
    if isinstance(value, dict):
        return f"a table with {', '.join(map(str, value)) or 'no keys'}"[:limit]
    if isinstance(value, list | tuple):
        return "an array " + _cut(repr(list(value)), limit)
    if isinstance(value, bool):
        return f"bool {str(value).lower()}"
    if isinstance(value, str):
        return "str " + _cut(quoted(value), limit)
    return f"{type(value).__name__} {_cut(_text(value), limit)}"


def plain(value: object, limit: int = 60) -> str:
    """A value without its type."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _cut(quoted(value), limit)
    return _cut(_text(value), limit)


def quoted(text: str) -> str:
    """Text in double quotes, as TOML has it, on one line."""
    return '"' + text.encode("unicode_escape").decode("ascii") + '"'


def _text(value: object) -> str:
    try:
        return repr(value) if not hasattr(value, "isoformat") else str(value)
    except ValueError:  # an integer of more digits than Python prints
        return "with thousands of digits"


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
