"""An atlas survives its packing, but for digits that nobody reads."""

from __future__ import annotations

import json

import pytest
from attrs import evolve

from spalf.engine.atlas import Atlas, atlas
from spalf.report import pack, unpack
from spalf.testing.whole import stage_for


@pytest.mark.slow
def test_there_and_back(seen: Atlas) -> None:
    packed = json.loads(json.dumps(pack(seen), allow_nan=False))
    back = unpack(packed)
    assert pack(back) == packed
    assert (back.width, back.rows, back.silent, back.text, back.sequences, back.density) == (
        *(seen.width, seen.rows, seen.silent, seen.text, seen.sequences, seen.density),
    )
    for old, new in zip(seen.features, back.features, strict=True):
        assert (new.id, new.stratum, new.fired, new.histogram) == (old.id, old.stratum, old.fired, old.histogram)
        assert new.peak == pytest.approx(old.peak, rel=1e-3)
        for name in ("tokens", "promoted", "suppressed", "neighbours", "partners"):
            assert [i for i, _ in getattr(new, name)] == [i for i, _ in getattr(old, name)]
            assert [x for _, x in getattr(new, name)] == pytest.approx([x for _, x in getattr(old, name)], rel=1e-2)
        for here, there in zip(old.places, new.places, strict=True):
            assert (there.sequence, there.position) == (here.sequence, here.position)
            assert dict(there.activations) == pytest.approx(dict(here.activations), abs=0.011 * old.peak)


def test_optional_fields(seen: Atlas) -> None:
    first = evolve(seen.features[0], absorption=0.25, planted=((3, 0.5),))
    back = unpack(pack(evolve(seen, features=(first, *seen.features[1:])))).features
    assert back[0].absorption == 0.25
    assert back[0].planted == ((3, 0.5),)
    assert [f.absorption for f in back if f.anchored is None] == [None] * 192
    assert {f.anchored is None for f in back} == {True, False}
    assert [f.anchored.token for f in back if f.anchored] == [f.anchored.token for f in seen.features if f.anchored]


def test_without_tokens() -> None:
    bare = atlas(*stage_for(frozenset({"truth"})), sequences=4)
    assert unpack(pack(bare)).sequences == ()
    assert unpack(pack(bare)).features[0].planted[0][0] == bare.features[0].planted[0][0]


def test_another_format_is_refused(seen: Atlas) -> None:
    with pytest.raises(ValueError, match="has format 9, this version reads format 1"):
        unpack({**pack(seen), "format": 9})
