"""`spalf steer` and `spalf ablate`: what they ask a loaded run for, and what they show."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen
from typer.testing import Result

from spalf.engine.intervene import Ablation, Effect
from spalf.errors import CheckpointError, Problem, RecipeError
from spalf.loaded import Steered

Spalf = Callable[..., Result]
STEER = ("steer", "runs/small", "--feature", "82", "--prompt", "def f(")

STEERED = Steered(
    prompt="def f(",
    feature=82,
    strength=4.0,
    unit=12.25,
    kl=0.15625,
    baseline="x):\n\treturn [x]\x1b[31m",
    steered="'a', 'b')",
)
ABLATION = Ablation(
    feature=82,
    looked_at=64,
    contexts=30,
    fires=Effect(positions=128, loss=1.72, change=0.0783, error=0.018, kl=0.0534),
    elsewhere=Effect(positions=3682, loss=2.5, change=-0.000542, error=0.000343, kl=0.000208),
    later=Effect(positions=0, loss=math.nan, change=math.nan, error=math.nan, kl=math.nan),
)


@frozen
class Asked:
    """A loaded run that records what it is asked."""

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]]

    def steer(self, *args: Any, **options: Any) -> Steered:
        self.calls.append(("steer", args, options))
        return STEERED

    def ablate(self, *args: Any, **options: Any) -> Ablation:
        self.calls.append(("ablate", args, options))
        return ABLATION


@pytest.fixture
def asked(launch: Any) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    run = Asked([])

    def load(*args: Any, **options: Any) -> Asked:
        run.calls.append(("load", args, options))
        return run

    launch.load = load
    return run.calls


def test_steer_asks_for_all_of_it(spalf: Spalf, asked: list[Any]) -> None:
    words = "--strength -2.5 --tokens 7 --temperature 0.5 --seed 3 --sequences 9 --device cpu --without-error"
    assert spalf(*STEER, *words.split()).exit_code == 0
    assert asked == [
        ("load", (Path("runs/small"),), {"device": "cpu", "sequences": 9}),
        (
            "steer",
            ("def f(",),
            {"feature": 82, "strength": -2.5, "tokens": 7, "temperature": 0.5, "seed": 3, "error": False},
        ),
    ]


def test_what_is_left_out_is_kept_and_greedy(spalf: Spalf, asked: list[Any]) -> None:
    spalf(*STEER)
    assert asked[0][2] == {"device": "auto", "sequences": 256}
    assert asked[1][2] == {"feature": 82, "strength": 2.0, "tokens": 40, "temperature": 0.0, "seed": 0, "error": True}


def test_both_continuations_stand_side_by_side(spalf: Spalf, asked: list[Any]) -> None:
    shown = spalf(*STEER).stdout
    lines = [line.split() for line in shown.splitlines()]
    assert "feature 82, strength 4: 49 added, of which 12.25 is usual where it fires" in shown
    assert "0.1562 nats" in shown
    at = lines.index(["baseline", "steered"])
    assert lines[at + 1] == ["def", "f(x):", "def", "f('a',", "'b')"]
    assert lines[at + 2] == ["return", "[x]\\x1b[31m"], "line breaks are kept, brackets are text, no control character"


def test_ablate_shows_where_it_was_measured(spalf: Spalf, asked: list[Any]) -> None:
    shown = spalf("ablate", "runs/small", "--feature", "82", "--sequences", "64", "--without-error").stdout
    assert asked == [
        ("load", (Path("runs/small"),), {"device": "auto", "sequences": 64}),
        ("ablate", (82,), {"error": False}),
    ]
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert "feature 82 fires in 30 of 64 held-out contexts; set to 0:" in rows
    assert "where it fires 128 1.72 +0.0783 0.018 0.0534" in rows
    assert "elsewhere 3 682 2.5 -0.000542 0.000343 0.000208" in rows
    assert "of that: after a firing 0 - - - -" in rows


def test_json_is_all_of_stdout(spalf: Spalf, asked: list[Any]) -> None:
    assert json.loads(spalf(*STEER, "--json").stdout)["steered"] == "'a', 'b')"
    told = json.loads(spalf("ablate", "runs/small", "--feature", "82", "--json").stdout)
    assert told["fires"] == {"positions": 128, "loss": 1.72, "change": 0.0783, "error": 0.018, "kl": 0.0534}
    assert told["later"] == {"positions": 0, "loss": None, "change": None, "error": None, "kl": None}


def test_loading_is_told_on_stderr_unless_quiet(spalf: Spalf, asked: list[Any]) -> None:
    assert "loading runs/small" in spalf(*STEER).stderr
    assert "measuring runs/small" in spalf("ablate", "runs/small", "--feature", "1").stderr
    assert spalf(*STEER, "--quiet").stderr == ""
    assert spalf(*STEER, "--json").stderr == ""


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("runs/small: no such directory (give a run directory or a checkpoint directory)"),
        RecipeError([Problem("feature", "there is no 82", "0 to 63")]),
    ],
)
def test_what_cannot_be_is_one_sentence(spalf: Spalf, launch: Any, error: Exception) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    launch.load = load
    for words in (STEER, ("ablate", "runs/small", "--feature", "82")):
        told = spalf(*words)
        assert (told.exit_code, told.stdout) == (2, "")
        assert told.stderr.splitlines()[-1] == f"spalf: {error}"


@pytest.mark.parametrize("words", [["--feature", "-1"], ["--feature", "x"], ["--tokens", "0"], ["--temperature", "-1"]])
def test_options_out_of_range_are_refused_at_once(spalf: Spalf, asked: list[Any], words: list[str]) -> None:
    assert spalf(*STEER, *words).exit_code == 2
    assert asked == []
