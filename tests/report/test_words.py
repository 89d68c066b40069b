"""Features are found by what they fire on, promote or show, and told in words."""

from __future__ import annotations

import pytest

from spalf.engine.atlas import Atlas
from spalf.errors import RecipeError
from spalf.report import SORTS, find, search, words

from .conftest import HOSTILE


def test_search_finds_tokens_and_contexts(seen: Atlas) -> None:
    first = max(seen.features, key=lambda f: f.fired)
    assert seen.text[first.tokens[0][0]] == HOSTILE[0]
    found = search(seen, HOSTILE[0].upper())
    assert first in found
    assert 0 < len(found) < len(seen.features)
    assert search(seen, "no such text anywhere") == []
    place = next(f for f in seen.features if f.places).places[0]
    text = "".join(seen.text[v] for v in seen.sequences[place.sequence][place.position - 3 : place.position + 1])
    owner = next(f for f in seen.features if place in f.places)
    assert owner in search(seen, text)


def test_strata(seen: Atlas) -> None:
    assert {f.stratum for f in search(seen, stratum="anchored")} == {"anchored"}
    with pytest.raises(RecipeError, match="'none' is no stratum of this dictionary \\(has anchored, free\\)"):
        search(seen, stratum="none")


@pytest.mark.parametrize("sort", SORTS)
def test_sorts(seen: Atlas, sort: str) -> None:
    found = search(seen, sort=sort)
    assert sorted(f.id for f in found) == [f.id for f in seen.features]
    values = {
        "density": [-f.fired for f in found],
        "id": [f.id for f in found],
        "stratum": [f.stratum for f in found],
        "token": [seen.text[f.tokens[0][0]].strip().lower() or "\uffff" for f in found if f.tokens],
        "focus": [-f.tokens[0][1] for f in found if f.tokens],
        "peak": [-f.peak for f in found],
        "likeness": [-f.neighbours[0][1] for f in found],
        "drift": [-f.anchored.drift for f in found if f.anchored],
        "absorption": [0],
    }[sort]
    assert values == sorted(values)
    assert len(values) > 40 or sort == "absorption"


def test_words(seen: Atlas) -> None:
    f = max(seen.features, key=lambda f: f.fired)
    told = words(seen, f)
    assert told["density"] == f.fired / seen.rows
    assert told["tokens"][0] == {"token": HOSTILE[0], "share": f.tokens[0][1]}
    assert told["neighbours"][0] == {"feature": f.neighbours[0][0], "cosine": f.neighbours[0][1]}
    context = told["contexts"][0]
    assert len(context["tokens"]) == len(context["values"])
    assert context["values"][context["peak"]] == max(context["values"]) == pytest.approx(f.peak)
    tied = words(seen, find(seen, 3))
    assert set(tied["anchored"]) == {"token", "drift", "cosine"}
    assert "anchored" not in words(seen, find(seen, 100))


def test_a_feature_that_is_not_there(seen: Atlas) -> None:
    assert find(seen, 7).id == 7
    with pytest.raises(RecipeError, match="there is no feature 256 \\(ids are 0 to 255\\)"):
        find(seen, 256)
