"""A run directory is read with care: whole, half-written, or damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spalf.errors import CheckpointError
from spalf.report import read

GOOD = '{"step": 10, "phase": "fit", "l0": 3.5}\n'


def test_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(GOOD + GOOD.replace("10", "20"))
    (tmp_path / "summary.json").write_text('{"outcome": "done"}')
    (tmp_path / "recipe.toml").write_text("seed = 1\n")
    found = read(tmp_path)
    assert [one["step"] for one in found.metrics] == [10, 20]
    assert found.summary == {"outcome": "done"}
    assert found.recipe == "seed = 1\n"


def test_a_run_that_goes_on_has_no_summary_and_an_unfinished_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(GOOD + '{"step": 20, "pha')
    found = read(tmp_path)
    assert len(found.metrics) == 1
    assert found.summary == {}
    assert read(tmp_path / "none").metrics == ()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.jsonl", GOOD + "{broken\n" + GOOD, "metrics.jsonl, line 2: is no JSON"),
        ("metrics.jsonl", GOOD + "[]\n", "metrics.jsonl, line 2: has no step and phase"),
        ("metrics.jsonl", '{"step": "ten", "phase": "fit"}\n', "line 1: has no step and phase"),
        ("metrics.jsonl", b"\xff\xfe", "metrics.jsonl: cannot be read"),
        ("summary.json", '{"outcome": ', "summary.json: is no JSON"),
        ("summary.json", "[1]", "summary.json: holds a list"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=said) as caught:
        read(tmp_path)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_numbers_of_any_kind_are_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "phase": "fit", "kl": None, "x": 1e300}) + "\n")
    assert read(tmp_path).metrics[0]["kl"] is None
