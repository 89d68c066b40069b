"""metadata.json that is not what it should be: named where it was asked for, passed over where it was not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from attrs import evolve

from spalf.engine import checkpoint
from spalf.engine.build import build
from spalf.errors import CheckpointError
from spalf.testing import toy_plan
from spalf.testing.whole import CPU

BAD = {
    "no json": b'{"format": 1,',
    "no utf-8": b"\xff\xfe{}",
    "a list": b"[1, 2]",
    "a number": b"3",
    "no keys": b"{}",
    "a wrong type": b'{"format": 1, "phase": "fit", "step": "12", "components": {}, "scalars": {}}',
}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    plan = toy_plan()
    return checkpoint.save(plan, build(plan, CPU), tmp_path / "checkpoints", "", {"serial": 1})


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_bad_metadata_is_named_and_passed_over(good: Path, content: bytes) -> None:
    bad = good.with_name("spalf_fit_step9")
    bad.mkdir()
    (bad / "metadata.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"spalf_fit_step9.metadata\.json: "):
        checkpoint.metadata(bad)
    assert checkpoint.all_in(good.parent) == [good]
    assert checkpoint.find(good.parent.parent) == good
    assert checkpoint.find(bad) == bad
    checkpoint.prune(good.parent, 1)
    assert bad.is_dir(), "what cannot be read is not deleted"


@pytest.mark.parametrize("key", list(checkpoint.REQUIRED))
def test_a_key_that_is_not_there_is_named(good: Path, key: str) -> None:
    meta = checkpoint.metadata(good)
    del meta[key]
    (good / "metadata.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=f"lacks {key}, or has another type there"):
        checkpoint.metadata(good)


def test_the_newest_is_of_another_format(good: Path) -> None:
    """It is told, not passed over: an older one of this run would be silently trained again."""
    newer = good.with_name("spalf_fit_step9")
    newer.mkdir()
    (newer / "metadata.json").write_text(json.dumps({"format": 2, "serial": 9}))
    assert checkpoint.find(good.parent.parent) == newer
    plan = toy_plan()
    with pytest.raises(CheckpointError, match="has format 2, this version reads format 1"):
        checkpoint.load(newer, plan, build(plan, CPU))


def test_facts_come_back(good: Path) -> None:
    assert checkpoint.facts(good) == toy_plan().facts
    meta = checkpoint.metadata(good)
    for broken in (None, {}, {"provides": [], "colour": 3}):
        (good / "metadata.json").write_text(json.dumps({**meta, "facts": broken}))
        with pytest.raises(CheckpointError, match="facts: "):
            checkpoint.facts(good)


def test_half_an_anchor_is_listed(good: Path) -> None:
    plan = toy_plan()
    state = build(plan, CPU)
    meta = checkpoint.metadata(good)
    meta["scalars"]["anchors.lost.ids_A"] = 3
    (good / "metadata.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=r"anchors\.lost\.ids_A: not part of this recipe's state"):
        checkpoint.load(good, plan, evolve(state))
