"""The commands that measure: what they hand over, and what they show."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from spalf import evaluation
from spalf.cli.scores import interval
from spalf.engine.bootstrap import Difference
from spalf.errors import CheckpointError
from spalf.evaluation import Agreement, Compared, Comparison

Spalf = Callable[..., Result]
SCORES = {
    "dictionary": {"l0": 31.96, "l0.ci_low": 31.5, "l0.ci_high": 32.25, "rows": 65536.0},
    "downstream_loss": {"kl": 0.5},
}
COMPARISON = Comparison(
    names=("a", "b"),
    rows=(
        Compared(
            suite="dictionary",
            measure="l0",
            values=(20.0, 18.5),
            differences=(None, Difference(value=-1.5, low=-2.0, high=-1.0, paired=True)),
        ),
        Compared(
            suite="dictionary",
            measure="r2_raw",
            values=(0.75, 0.76),
            differences=(None, Difference(value=0.01, low=-0.02, high=0.04, paired=True)),
        ),
        Compared(suite="geometry", measure="coherence", values=(0.5, None), differences=(None, None)),
    ),
    agreements=(Agreement(first=0, second=1, pw_mcc=0.625, floor=0.25),),
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Both verbs recorded; a call that the real one would not take is a TypeError."""
    made: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    for name, answer in (("evaluate", SCORES), ("compare", COMPARISON)):
        real = inspect.signature(getattr(evaluation, name))

        def call(*args: Any, _name: str = name, _real: Any = real, _answer: Any = answer, **options: Any) -> Any:
            _real.bind(*args, **options)
            made.append((_name, args, options))
            return _answer

        monkeypatch.setattr(evaluation, name, call)
    return made


def test_eval_hands_over_every_option(spalf: Spalf, calls: list[Any]) -> None:
    words = "eval runs/small --suite a --suite b --set kernel=torch --device cpu"
    assert spalf(*words.split()).exit_code == 0
    options = {"suites": ["a", "b"], "sets": ["kernel=torch"], "device": "cpu", "keep": True}
    assert calls == [("evaluate", (Path("runs/small"),), options)]


def test_eval_shows_each_number_with_its_interval(spalf: Spalf, calls: list[Any]) -> None:
    rows = [line.split() for line in spalf("eval", "runs/small").stdout.splitlines()]
    assert ["dictionary", "l0", "31.96", "[31.5,", "32.25]"] in rows
    assert ["rows", "65", "536"] in rows
    assert ["downstream_loss", "kl", "0.5"] in rows
    assert len(rows) == 4, "an interval's ends have no rows of their own"


def test_json_is_all_of_stdout(spalf: Spalf, calls: list[Any]) -> None:
    told = spalf("eval", "runs/small", "--json")
    assert json.loads(told.stdout) == SCORES
    assert told.stderr == ""
    compared = json.loads(spalf("compare", "a", "b", "--json").stdout)
    assert compared["names"] == ["a", "b"]
    first = compared["rows"][0]["differences"]
    assert first == [None, {"value": -1.5, "low": -2.0, "high": -1.0, "paired": True, "exceeds_noise": True}]
    assert compared["agreements"] == [{"first": 0, "second": 1, "pw_mcc": 0.625, "floor": 0.25}]


def test_compare_hands_over_every_option(spalf: Spalf, calls: list[Any]) -> None:
    assert spalf(*["compare", "x", "y", "z", "--suite", "a", "--set", "kernel=torch", "--device", "cpu"]).exit_code == 0
    options = {"suites": ["a"], "sets": ["kernel=torch"], "device": "cpu"}
    assert calls == [("compare", ([Path("x"), Path("y"), Path("z")],), options)]


def test_compare_marks_what_exceeds_noise(spalf: Spalf, calls: list[Any]) -> None:
    shown = spalf("compare", "a", "b").stdout
    rows = [line.split() for line in shown.splitlines()]
    assert ["dictionary", "l0", "20", "18.5", "-1.5", "*"] in rows
    assert ["r2_raw", "0.75", "0.76", "+0.01"] in rows
    assert ["geometry", "coherence", "0.5", "-", "-"] in rows
    assert ["a,", "b", "0.625", "0.25"] in rows
    assert "the same documents, resampled together; noise of the documents, not of the seed" in " ".join(shown.split())


def test_a_directory_that_is_no_run_is_one_message(spalf: Spalf, tmp_path: Path) -> None:
    for command in (["eval", str(tmp_path)], ["compare", str(tmp_path), str(tmp_path)]):
        told = spalf(*command)
        assert told.exit_code == CheckpointError.exit_code == 2
        assert "holds no whole checkpoint (give a run directory or a checkpoint directory)" in told.stderr
        assert "Traceback" not in told.stderr


def test_one_run_has_nothing_to_be_compared_with(spalf: Spalf, tmp_path: Path) -> None:
    told = spalf("compare", str(tmp_path))
    assert told.exit_code == 2
    assert "one run has nothing to be compared with (name two or more)" in told.stderr


def test_an_interval_needs_both_ends() -> None:
    assert interval(0.25, 0.5) == "[0.25, 0.5]"
    assert interval(None, 0.5) == ""
