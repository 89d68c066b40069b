"""Features looked up and told in words: token ids become text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from spalf.engine.atlas import Atlas, Feature, Pairs, Place
from spalf.errors import Problem, RecipeError

BEFORE, AFTER = 12, 6
"""Tokens shown on either side of a peak."""

SORTS: dict[str, Callable[[Atlas, Feature], Any]] = {
    "density": lambda _, f: -f.fired,
    "id": lambda _, f: f.id,
    "stratum": lambda a, f: list(a.rows_of).index(f.stratum),
    "token": lambda a, f: (a.text[f.tokens[0][0]].strip().lower() if f.tokens else "") or "\uffff",
    "focus": lambda _, f: -f.tokens[0][1] if f.tokens else 1.0,
    "peak": lambda _, f: -f.peak,
    "likeness": lambda _, f: -f.neighbours[0][1] if f.neighbours else 2.0,
    "drift": lambda _, f: -f.anchored.drift if f.anchored is not None else 1.0,
    "absorption": lambda _, f: -f.absorption if f.absorption is not None else 1.0,
}
"""What features can be sorted by, most remarkable first; ties by id."""


def find(atlas: Atlas, number: int) -> Feature:
    """The feature of that id. Raises RecipeError where there is none, or it is not in the atlas."""
    for f in atlas.features:
        if f.id == number:
            return f
    if number < atlas.width:
        message = f"feature {number} is not among the {len(atlas.features)} of {atlas.width} that were looked at"
        raise RecipeError([Problem("ID", message, "look at more of them")])
    raise RecipeError([Problem("ID", f"there is no feature {number}", f"ids are 0 to {atlas.width - 1}")])


def search(atlas: Atlas, text: str = "", stratum: str = "", sort: str = "density") -> list[Feature]:
    """Features of a stratum ("" for all) that fire on, promote, or show `text` in a context, sorted.

    Upper and lower case are one. Raises RecipeError for a stratum that the dictionary does not have.
    """
    if stratum and stratum not in atlas.rows_of:
        has = f"has {', '.join(atlas.rows_of)}"
        raise RecipeError([Problem("--stratum", f"{stratum!r} is no stratum of this dictionary", has)])
    needle = text.lower()
    kept = [f for f in atlas.features if stratum in ("", f.stratum) and (not needle or _mentions(atlas, f, needle))]
    return sorted(kept, key=lambda f: (SORTS[sort](atlas, f), f.id))


def _mentions(atlas: Atlas, f: Feature, needle: str) -> bool:
    tied = () if f.anchored is None else (f.anchored.token,)
    tokens = (*(v for v, _ in (*f.tokens, *f.promoted)), *tied)
    if any(needle in atlas.text[v].lower() for v in tokens):
        return True
    return any(needle in "".join(excerpt(atlas, p)["tokens"]).lower() for p in f.places)


def excerpt(atlas: Atlas, place: Place) -> dict[str, Any]:
    """The tokens around a peak, the activation at each, the index of the peak, and its rank among all firings."""
    sequence, values = atlas.sequences[place.sequence], dict(place.activations)
    begin, end = max(0, place.position - BEFORE), min(len(sequence), place.position + AFTER + 1)
    return {
        "tokens": [atlas.text[v] for v in sequence[begin:end]],
        "values": [values.get(t, 0.0) for t in range(begin, end)],
        "peak": place.position - begin,
        "rank": place.rank,
    }


def words(atlas: Atlas, f: Feature) -> dict[str, Any]:
    """One feature as plain values, for JSON and for tables."""
    told: dict[str, Any] = {
        "id": f.id,
        "stratum": f.stratum,
        "density": atlas.share(f),
        "fired": f.fired,
        "peak": f.peak,
        "mean": f.mean,
        "histogram": list(f.histogram),
        "tokens": _tokens(atlas, f.tokens, "share"),
        "promoted": _tokens(atlas, f.promoted, "logit"),
        "suppressed": _tokens(atlas, f.suppressed, "logit"),
        "neighbours": _features(f.neighbours, "cosine"),
        "partners": _features(f.partners, "share"),
        "contexts": [excerpt(atlas, p) for p in f.places],
    }
    if f.anchored is not None:
        one = f.anchored
        told["anchored"] = {"token": atlas.text[one.token], "drift": one.drift, "cosine": one.cosine}
    if f.absorption is not None:
        told["absorption"] = f.absorption
    for planted, cosine in f.planted:
        told["planted"] = {"direction": planted, "cosine": cosine}
    return told


def _tokens(atlas: Atlas, pairs: Pairs, name: str) -> list[dict[str, Any]]:
    return [{"token": atlas.text[v], name: x} for v, x in pairs]


def _features(pairs: Iterable[tuple[int, float]], name: str) -> list[dict[str, Any]]:
    return [{"feature": i, name: x} for i, x in pairs]
