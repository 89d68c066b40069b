"""An atlas as compact JSON and back: columns, token ids numbered anew, numbers of three digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spalf.engine.atlas import Anchored, Atlas, Feature, Pairs, Place
from spalf.report.numbers import short

FORMAT = 1
OF_TOKENS = ("tokens", "promoted", "suppressed")
OF_FEATURES = ("neighbours", "partners", "planted")


def pack(atlas: Atlas) -> dict[str, Any]:
    """The atlas as JSON holds it; the page reads it as it stands.

    Pairs lie flat: id, number, id, number. A token is its index in `text`; a place is [sequence, position, rank,
    [position, percent of the feature's peak, ...]].
    """
    ids = list(atlas.text)
    index = {v: i for i, v in enumerate(ids)}
    features = atlas.features
    return {
        "format": FORMAT,
        "width": atlas.width,
        "rows": atlas.rows,
        "strata": dict(atlas.rows_of),
        "silent": atlas.silent,
        "density": [list(counts) for counts in atlas.density],
        "ids": ids,
        "text": [atlas.text[v] for v in ids],
        "sequences": [[index[v] for v in s] for s in atlas.sequences],
        "id": [f.id for f in features],
        "stratum": [list(atlas.rows_of).index(f.stratum) for f in features],
        "fired": [f.fired for f in features],
        "peak": [short(f.peak, 4) for f in features],
        "mean": [short(f.mean, 4) for f in features],
        "histogram": [list(f.histogram) for f in features],
        **{k: [_flat(getattr(f, k), index) for f in features] for k in OF_TOKENS},
        **{k: [_flat(getattr(f, k)) for f in features] for k in OF_FEATURES},
        "anchored": [_anchored(f.anchored, index) for f in features],
        "absorption": [short(f.absorption, 3) for f in features],
        "places": [[_place(p, f.peak) for p in f.places] for f in features],
    }


def unpack(packed: Mapping[str, Any]) -> Atlas:
    """The atlas that was packed, but for the digits. Raises ValueError, KeyError, TypeError or IndexError at else."""
    if packed["format"] != FORMAT:
        raise ValueError(f"has format {packed['format']!r}, this version reads format {FORMAT}")
    ids, strata = packed["ids"], list(packed["strata"])
    features = tuple(
        Feature(
            id=packed["id"][i],
            stratum=strata[packed["stratum"][i]],
            fired=packed["fired"][i],
            peak=packed["peak"][i],
            mean=packed["mean"][i],
            histogram=tuple(packed["histogram"][i]),
            anchored=_tied(packed["anchored"][i], ids),
            absorption=packed["absorption"][i],
            places=tuple(_placed(p, packed["peak"][i]) for p in packed["places"][i]),
            **{k: _pairs(packed[k][i], ids) for k in OF_TOKENS},
            **{k: _pairs(packed[k][i]) for k in OF_FEATURES},
        )
        for i in range(len(packed["id"]))
    )
    return Atlas(
        width=packed["width"],
        rows=packed["rows"],
        rows_of=packed["strata"],
        silent=packed["silent"],
        density=tuple(map(tuple, packed["density"])),
        features=features,
        sequences=tuple(tuple(ids[v] for v in s) for s in packed["sequences"]),
        text=dict(zip(ids, packed["text"], strict=True)),
    )


def _flat(pairs: Pairs, index: Mapping[int, int] | None = None) -> list[float | None]:
    return [x for i, value in pairs for x in (i if index is None else index[i], short(value, 3))]


def _pairs(flat: Sequence[Any], ids: Sequence[int] | None = None) -> Pairs:
    each = zip(flat[::2], flat[1::2], strict=True)
    return tuple((i if ids is None else ids[i], value) for i, value in each)


def _anchored(one: Anchored | None, index: Mapping[int, int]) -> list[float | None] | None:
    return None if one is None else [index[one.token], short(one.drift, 3), short(one.cosine, 4)]


def _tied(flat: Sequence[Any] | None, ids: Sequence[int]) -> Anchored | None:
    return None if flat is None else Anchored(token=ids[flat[0]], drift=flat[1], cosine=flat[2])


def _place(place: Place, peak: float) -> list[Any]:
    percent = [x for t, z in place.activations for x in (t, max(1, round(100 * z / max(peak, 1e-30))))]
    return [place.sequence, place.position, short(place.rank, 3), percent]


def _placed(flat: Sequence[Any], peak: float) -> Place:
    sequence, position, rank, percent = flat
    activations = tuple((t, peak * p / 100) for t, p in zip(percent[::2], percent[1::2], strict=True))
    return Place(sequence=sequence, position=position, rank=rank, activations=activations)
