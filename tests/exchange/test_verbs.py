"""Exports of a run: what they hold of it, and what is refused before anything is written."""

import json
from pathlib import Path
from typing import Any

import pytest

from spalf.errors import ExchangeError
from spalf.exchange import formats
from spalf.exchange.verbs import export


@pytest.mark.parametrize("to", ["safetensors", *formats.WRITERS])
def test_every_format_is_written(to: str, run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "out", to=to)
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]
    held = formats.read(out, to)
    assert (held.activation, held.width, held.about.hook) == ("jumprelu", 32, "planted")


def told(run: Path, out: Path) -> dict[str, Any]:
    """What an export in SAELens' form says of its run."""
    config = json.loads((export(run, out, to="saelens") / "cfg.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = config["metadata"]["spalf"]
    return found


def test_the_run_is_told_of(run: Path, tmp_path: Path) -> None:
    found = told(run, tmp_path / "out")
    assert (found["recipe"], found["phase"], found["step"]) == ("run", "fit", 5)
    assert found["knobs"]["L0_target"] == 4
    assert found["measured"] == {}


def test_a_summary_counts_for_its_own_step_alone(run: Path, tmp_path: Path) -> None:
    summary = run / "summary.json"
    before = summary.read_text(encoding="utf-8")
    try:
        for i, (text, wanted) in enumerate(
            [('{"step": 5, "l0": 3.5}', {"l0": 3.5}), ('{"step": 6, "l0": 3.5}', {}), ("nothing", {})]
        ):
            summary.write_text(text, encoding="utf-8")
            assert told(run, tmp_path / str(i))["measured"] == wanted
    finally:
        summary.write_text(before, encoding="utf-8")


@pytest.mark.parametrize(("to", "dtype"), [("npz", "float32"), ("saelens", "int8")])
def test_what_does_not_exist_is_refused_first(to: str, dtype: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ExchangeError, match="export: there is no"):
        export(run, tmp_path / "out", to=to, dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_a_newer_export_replaces_an_older_one(run: Path, tmp_path: Path) -> None:
    for _ in range(2):
        export(run, tmp_path / "out", to="dictionary_learning")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["ae.pt", "config.json"]
