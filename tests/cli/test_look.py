"""The commands that show what came of a run: what they hand over, what they print, how they fail."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console
from typer.testing import Result

from spalf import reporting
from spalf.cli.features import bars, context_line, feature_parts, feature_table, shade
from spalf.cli.look import Sort
from spalf.engine.atlas import Anchored, Atlas, Feature, Place
from spalf.errors import CheckpointError
from spalf.report import SORTS, words

Spalf = Callable[..., Result]

TEXT = {0: "\n", 1: " import", 2: " [red]os", 3: "self", 4: "."}
PLACE = Place(sequence=0, position=2, rank=0.0, activations=((1, 1.5), (2, 6.0)))
FIRST = Feature(
    id=3,
    stratum="anchored",
    fired=10,
    peak=6.0,
    mean=3.0,
    histogram=(5, 3, 0, 2),
    tokens=((2, 0.75), (1, 0.25)),
    promoted=((4, 1.5),),
    suppressed=((0, -2.0),),
    neighbours=((5, 0.5),),
    partners=((5, 0.25),),
    anchored=Anchored(token=4, drift=0.0625, cosine=0.99),
    absorption=0.5,
    places=(PLACE,),
)
SECOND = Feature(id=5, stratum="free", fired=40, peak=2.0, mean=1.0, histogram=(40,), tokens=((3, 1.0),))
ATLAS = Atlas(
    width=6,
    rows=100,
    rows_of={"anchored": 4, "free": 2},
    silent=4,
    density=((1,), (1,)),
    features=(FIRST, SECOND, Feature(id=1, stratum="anchored", fired=0)),
    sequences=((0, 1, 2, 3, 4),),
    text=TEXT,
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What the command line asked of `reporting`, which gives an atlas without looking."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def features(path: Path, **options: Any) -> Atlas:
        calls.append((path, options))
        return ATLAS

    def write_report(path: Path, out: Path | None, **options: Any) -> Path:
        calls.append(((path, out), options))
        target = path / "report.html" if out is None else out
        target.write_bytes(b"x" * 2048)
        return target

    monkeypatch.setattr(reporting, "features", features)
    monkeypatch.setattr(reporting, "write_report", write_report)
    return calls


def test_report_hands_over_every_option(spalf: Spalf, asked: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = spalf("report", "runs/x", "--out", str(out), "--features", "0", "--tokens", "64", "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    assert asked == [((Path("runs/x"), out), {"features": 0, "tokens": 64, "device": "cpu"})]
    assert f"wrote {out} (2 KiB)" in done.stderr
    assert done.stdout == ""


def test_defaults_are_the_functions(spalf: Spalf, asked: list[Any], tmp_path: Path) -> None:
    assert spalf("--quiet", "report", str(tmp_path)).stderr == ""
    [(_, options)] = asked
    assert options == {"features": reporting.FEATURES, "tokens": reporting.TOKENS, "device": "auto"}
    spalf("features", "runs/x")
    assert asked[1] == (Path("runs/x"), {"tokens": reporting.TOKENS, "device": "auto"})


def test_features_are_listed_densest_first(spalf: Spalf, asked: list[Any]) -> None:
    done = spalf("features", "runs/x")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["id", "5", "3", "1"]
    assert lines[2][1:5] == ["anchored", "10", "%", "6"]
    assert "[red]os" in done.stdout, "no markup in a token"
    assert "3 of 3 features, of 6 in all; 4 fired on no token" in done.stderr


def test_search_stratum_sort_and_limit(spalf: Spalf, asked: list[Any]) -> None:
    def ids(*words: str) -> list[int]:
        return [one["id"] for one in json.loads(spalf("features", "runs/x", "--json", *words).stdout)]

    assert ids("--search", "IMPORT") == [3]
    assert ids("--stratum", "free") == [5]
    assert ids("--sort", "id") == [1, 3, 5]
    assert ids("--sort", "peak", "--limit", "1") == [3]
    assert spalf("features", "runs/x", "--stratum", "fre").exit_code == 2


@pytest.mark.parametrize(
    ("sort", "shown"), [("drift", "0.0625"), ("absorption", "50 %"), ("focus", "75 %"), ("likeness", "0.5")]
)
def test_what_is_sorted_by_is_shown(spalf: Spalf, asked: list[Any], sort: str, shown: str) -> None:
    head, *rows = spalf("features", "runs/x", "--sort", sort).stdout.splitlines()
    assert sort in head
    assert shown in next(row for row in rows if row.split()[0] == "3")


def test_every_sort_is_offered() -> None:
    assert get_args(Sort) == tuple(SORTS)


def test_one_feature_in_full(spalf: Spalf, asked: list[Any]) -> None:
    shown = " ".join(spalf("features", "runs/x", "3").stdout.split())
    for wanted in (
        "feature 3 anchored",
        "density 10 %: 10 of 100 tokens",
        "peak 6, mean 3",
        "anchored to [.] drift 0.0625, cosine 0.99",
        "absorption 50 %",
        r"6 \n import[ [red]os]self.",
        "+1.5",
        "-2",
        "nearest decoder rows cosine 5 0.5",
        "fires with share 5 25 %",
    ):
        assert wanted in shown, wanted


def test_json_is_the_same_and_strict(spalf: Spalf, asked: list[Any]) -> None:
    done = spalf("features", "runs/x", "3", "--json")
    assert json.loads(done.stdout) == json.loads(json.dumps(words(ATLAS, FIRST)))
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("number", "said"), [("6", "there is no feature 6"), ("2", "feature 2 is not among the 3 of 6")]
)
def test_a_feature_that_is_not_there(spalf: Spalf, asked: list[Any], number: str, said: str) -> None:
    done = spalf("features", "runs/x", number)
    assert done.exit_code == 2
    assert said in done.stderr


@pytest.mark.parametrize("command", ["report", "features"])
def test_a_wrong_directory_is_one_message(spalf: Spalf, command: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for path in (tmp_path / "none", tmp_path):
        done = spalf(command, str(path))
        assert done.exit_code == 2
        assert "give a run directory or a checkpoint directory" in done.stderr
        assert "Traceback" not in done.stderr
        assert isinstance(done.exception, SystemExit)
    assert isinstance(CheckpointError("x"), Exception)


def rendered(*parts: Any) -> str:
    console = Console(
        width=100, record=True, markup=False, highlight=False, emoji=False, force_terminal=False, file=None
    )
    with console.capture() as held:
        for part in parts:
            console.print(part)
    return held.get()


def test_a_feature_that_never_fired() -> None:
    shown = rendered(*feature_parts(words(ATLAS, ATLAS.features[2]), ATLAS))
    assert "0 of 100 tokens" in re.sub(" +", " ", shown)
    assert "contexts" not in shown
    assert "1" in rendered(feature_table([words(ATLAS, ATLAS.features[2])], "focus"))


def test_shading_follows_the_activation() -> None:
    line = context_line(words(ATLAS, FIRST)["contexts"][0], FIRST.peak)
    styled = {line.plain[span.start : span.end]: str(span.style) for span in line.spans}
    assert styled == {" import": shade(0.25), "[ [red]os]": shade(1.0)}
    assert shade(0.0) != shade(0.5) != shade(1.0) == shade(7.0)


def test_bars() -> None:
    assert bars([]) == ""
    assert bars([0, 1, 100]) == " \u2582\u2588"
    assert bars([5, 5]) == "\u2588\u2588"
