"""The commands that train and measure: what they hand to launch, what they write where, and how they end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from spalf.cli.startup import Settled
from spalf.errors import DivergedError, Problem, RecipeError

Spalf = Callable[..., Result]
Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


def test_run_hands_over_every_option(spalf: Spalf, calls: Calls) -> None:
    words = "run r.toml --set a.b=1 --set c=x --out there --device cpu --stop-at 7 --force"
    assert spalf(*words.split()).exit_code == 0
    [(name, args, options)] = calls
    assert (name, args) == ("run", ("r.toml",))
    assert all(hasattr(observer, "spalf_stepped") for observer in options.pop("observers"))
    assert options == {
        "sets": ["a.b=1", "c=x"],
        "out": Path("there"),
        "device": "cpu",
        "stop_at": 7,
        "force": True,
    }


def test_resume_hands_over_every_option(spalf: Spalf, calls: Calls) -> None:
    words = "resume runs/small --checkpoint spalf_fit_step8 --set budget.tokens=9 --device cpu --stop-at 7"
    assert spalf(*words.split()).exit_code == 0
    [(name, args, options)] = calls
    assert (name, args) == ("resume", (Path("runs/small"),))
    del options["observers"]
    assert options == {
        "checkpoint": "spalf_fit_step8",
        "sets": ["budget.tokens=9"],
        "device": "cpu",
        "stop_at": 7,
    }


def test_the_closing_tables_hold_the_whole_contract(spalf: Spalf, calls: Calls) -> None:
    shown = spalf("run", "r.toml").stdout
    for words in (
        "L0 31.96 32",
        "R2, raw 0.9312 0.97",
        "R2, whitened 0.9001",
        "cross-entropy, clean 2.5",
        "cross-entropy, patched 2.625",
        "cross-entropy, mean-ablated 6.5",
        "loss recovered 96.9 %",
        "KL(clean, patched) 0.0625",
        "dead features 1.5 %",
        "faithfulness +0.031 2.5 NO",
        "drift -0.400 0 yes",
        "fit 3:07",
        "harvest 12.5 s",
        "total 3:20",
        "not met [by 3.1 %]",
        "7 (free), fires on 1.25 % of tokens",
        "3.25 Once[ upon]\\n a[x]",
    ):
        assert words in " ".join(shown.split()), words


def test_progress_and_the_end_are_told_on_stderr(spalf: Spalf, calls: Calls) -> None:
    told = spalf("run", "r.toml", "--out", "o")
    assert "done at step 1200: o/small" in told.stderr
    assert "done at step" not in told.stdout


def test_json_is_all_of_stdout(spalf: Spalf, calls: Calls, summary: dict[str, Any]) -> None:
    assert json.loads(spalf("run", "r.toml", "--json").stdout) == summary
    assert json.loads(spalf("resume", "runs/small", "--json").stdout) == summary


def test_quiet_says_nothing_and_shows_no_progress(spalf: Spalf, calls: Calls) -> None:
    told = spalf("run", "r.toml", "--quiet")
    assert (told.exit_code, told.output) == (0, "")
    [observer] = calls[0][2]["observers"]
    assert isinstance(observer, Settled)


def test_a_stopped_run_ends_well_and_says_how_to_go_on(spalf: Spalf, launch: Any, ended: Any) -> None:
    stopped = {"name": "small", "outcome": "stopped", "step": 40, "phase": "fit"}
    launch.run = lambda *_, **__: ended(Path("runs/my run"), outcome="stopped", summary=stopped, examples=[])
    told = spalf("run", "r.toml")
    assert told.exit_code == 0
    assert "stopped at step 40: runs/my run" in told.stderr
    assert "spalf resume 'runs/my run'" in told.stderr
    assert told.stdout == ""


def test_a_diverged_run_is_a_failure(spalf: Spalf, launch: Any, ended: Any) -> None:
    def diverge(*_: Any, **__: Any) -> Any:
        raise DivergedError("step 3 of phase fit: not finite: loss (lower knobs.lr)")

    launch.run = diverge
    told = spalf("run", "r.toml")
    assert told.exit_code == 1
    assert "spalf: step 3 of phase fit: not finite: loss (lower knobs.lr)" in told.stderr
    launch.run = lambda *_, **__: ended(Path("runs/small"), outcome="diverged")
    assert spalf("run", "r.toml").exit_code == 1


def test_harvest_says_what_it_wrote(spalf: Spalf, calls: Calls) -> None:
    words = "harvest r.toml shards --tokens 64 --format npy --device cpu --set a=1 --pairs p.jsonl --position mean"
    assert "wrote shards" in spalf(*words.split()).stderr
    assert calls == [
        (
            "harvest",
            ("r.toml", Path("shards")),
            {
                "sets": ["a=1"],
                "tokens": 64,
                "format": "npy",
                "pairs": Path("p.jsonl"),
                "position": "mean",
                "device": "cpu",
            },
        ),
    ]


def test_compile_as_toml_is_the_filled_recipe_and_nothing_else(spalf: Spalf, calls: Calls) -> None:
    told = spalf("compile", "r.toml", "--format", "toml", "--set", "a=1")
    assert told.stdout == 'name = "small"\n'
    assert calls == [("filled_text", ("r.toml", ["a=1"]), {})]


def test_all_problems_of_a_recipe_are_told_at_once(spalf: Spalf, launch: Any) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RecipeError(
            [
                Problem("budget.batch", "expected int, got float 3.5"),
                Problem("dual", 'no dual is called "adcr"', 'did you mean "adrc"?'),
            ]
        )

    launch.compile_recipe = launch.filled_text = refuse
    told = spalf("compile", "r.toml")
    assert told.exit_code == 2
    assert told.stderr.splitlines() == [
        "spalf: 2 problems",
        "  budget.batch: expected int, got float 3.5",
        '  dual: no dual is called "adcr" (did you mean "adrc"?)',
    ]


@pytest.mark.parametrize(
    "words",
    [
        "run",
        "run r.toml --stop-at 0",
        "run r.toml --stop-at soon",
        "run r.toml --knobs.F 3",
        "export runs/small there --dtype float16",
        "harvest r.toml there --format csv",
        "compile r.toml --format yaml",
        "rnu r.toml",
        "components lst",
    ],
)
def test_a_wrong_command_line_is_the_user_s_to_mend(spalf: Spalf, calls: Calls, words: str) -> None:
    told = spalf(*words.split())
    assert told.exit_code == 2
    assert "Error: " in told.stderr
    assert "Traceback" not in told.output
    assert calls == []
