"""Results, curves and pages: what a line of results counts for, and what is said of it."""

import json
import math
import os
import threading
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spalf.bench import results
from spalf.bench import suite as suites
from spalf.bench.choice import best, read_at
from spalf.bench.measure import agreement, flat, in_training, write_rows
from spalf.bench.render import render, replaced
from spalf.bench.summary import against, current, rows
from spalf.bench.trainers import ring
from spalf.errors import RecipeError
from spalf.testing import started, toy_plan

SUITE = """
base = "toy.toml"
about = "Two and one."
seeds = [0, 1]
l0 = [16, 64]
agreement = { at = [16] }
[method.ours]
title = "Ours | here"
recipe = "topk"
[method.good]
peer = "saelens.topk"
[method.bad]
peer = "dictionary_learning.topk"
lr = [1e-3, 2e-3]
sweep = { l0 = 16, seed = 0, share = 0.5 }
"""


def line(method: str, setting: float, l0: float, fvu: float, **job: Any) -> dict[str, Any]:
    about = {"method": method, "title": method, "axis": "k", "setting": setting, "lr": None, "seed": 0, "share": 1.0}
    about |= {"tokens": 1000, "name": f"{method}/l0-{setting}", **job}
    return {
        "key": f"{about}",
        "suite": "suite",
        "kind": "peer",
        "job": about,
        "status": "done",
        "time": "2026-11-22T00:00:00+00:00",
        "machine": "a chip",
        "commit": "abc",
        "versions": {"torch": "2.11"},
        "seconds": {"total": 36.0},
        "measures": {"l0": l0, "fvu": fvu, "ce_gap": fvu / 2, "dead": 0.01},
    }


LINES = [
    *(line("ours", 16, 16.0, 0.18 + 0.01 * s, seed=s) for s in (0, 1)),
    line("ours", 64, 69.0, 0.08),
    *(line("good", n, float(n), 1.0 / math.sqrt(n)) for n in (16, 64)),
    *(line("bad", 16, 16.0, 0.5, lr=lr, share=0.5) for lr in (1e-3, 2e-3)),
    *(line("bad", n, float(n), 0.9, lr=1e-3) for n in (16, 64)),
]


@pytest.fixture
def suite(tmp_path: Path) -> suites.Suite:
    file = tmp_path / "suite.toml"
    file.write_text(SUITE, encoding="utf-8")
    return suites.read(file)


@given(st.floats(-2.0, -0.1), st.floats(0.1, 10.0), st.floats(14.6, 70.3))
def test_a_power_law_is_read_off_exactly(slope: float, scale: float, l0: float) -> None:
    curve = [(x, scale * x**slope) for x in (16.0, 32.0, 64.0)]
    found = read_at(curve, l0)
    assert found is not None
    assert found.value == pytest.approx(scale * l0**slope, rel=1e-9)
    assert found.is_extrapolated == (not 16 <= l0 <= 64)


def test_a_curve_ends_ten_percent_beyond_its_points() -> None:
    curve = [(16.0, 0.2), (64.0, 0.1)]
    assert read_at(curve, 64 * 1.11) is None
    assert read_at(curve, 16 / 1.11) is None
    assert read_at(curve[:1], 17) is None
    assert read_at([], 16) is None
    averaged = read_at([(16.0, 0.1), (16.0, 0.3)], 16)
    assert averaged is not None
    assert averaged.value == pytest.approx(0.2)


def test_ours_against_the_best_peer(suite: suites.Suite) -> None:
    every = rows(suite, current(suite, LINES))
    assert [(row.method.name, row.setting, row.lr) for row in every][-2:] == [("bad", 16, 1e-3), ("bad", 64, 1e-3)]
    first = against(every[0], every, "fvu")
    assert first is not None
    assert (first.ratio, first.peer) == (pytest.approx(0.185 * 4), "good")
    beyond = against(every[1], every, "ce_gap")
    assert beyond is not None
    assert beyond.is_extrapolated
    assert beyond.ratio == pytest.approx(0.08 * math.sqrt(69))
    assert every[0].spread("fvu") == pytest.approx(0.01 / math.sqrt(2))
    assert every[1].spread("fvu") is None


def test_a_page_is_a_function_of_its_lines(suite: suites.Suite, tmp_path: Path) -> None:
    failed = {**line("good", 32, 0, 0), "status": "error", "error": "out of memory"}
    pages = []
    for name, lines in (("a", [*LINES, failed]), ("b", [*LINES, failed])):
        page = tmp_path / name / "page.md"
        page.parent.mkdir()
        page.write_text("# Before\n", encoding="utf-8")
        render(suite, lines, page)
        render(suite, lines, page)
        pages.append(page.read_text(encoding="utf-8") + (page.parent / "page-suite.svg").read_text(encoding="utf-8"))
        xml.etree.ElementTree.parse(page.parent / "page-suite.svg")
    assert pages[0] == pages[1]
    text = pages[0]
    assert text.startswith("# Before\n")
    assert text.count("## Suite suite") == 1
    for said in ("0.740 (good)", "*", "out of memory", "a chip", "abc", "Ours \\| here", "taken", "0.185 +- 0.0071"):
        assert said in text, said


def test_agreement_is_told_by_stratum(tmp_path: Path) -> None:
    """Half of the rows are another dictionary's in another order, and half are random."""
    rows_FD = torch.eye(40)[:20]
    other_FD = torch.cat([rows_FD[:10].flip(0), torch.randn(10, 40, generator=torch.Generator().manual_seed(0))])
    strata = {"tied": slice(0, 10), "loose": slice(10, 20)}
    one, two, three = (tmp_path / f"{name}.safetensors" for name in ("one", "two", "three"))
    write_rows(one, rows_FD, strata)
    write_rows(two, other_FD, strata)
    write_rows(three, other_FD, {"loose": slice(0, 20)})
    for few in (20, 12):
        out = agreement((one, two), few)
        assert out["pw_mcc.tied"] == pytest.approx(1.0, abs=1e-3)
        assert out["shared.tied"] == 1.0
        assert out["shared.loose"] == 0.0
        assert out["pw_mcc.loose"] < 0.6
        assert out["pw_mcc.loose"] < out["pw_mcc"] < out["pw_mcc.tied"]
    assert set(agreement((three, two), 20)) == {"pw_mcc", "shared", "pw_mcc_floor"}


def test_a_line_keeps_what_is_told_of_strata() -> None:
    own = {"r2_raw": 0.75, "dead_fraction": 0.0, "share_of_l0.tied": 0.3, "share_of_l0.loose": 0.7, "rows": 9.0}
    scores = {"dictionary": own, "drift_fidelity": {"tied.cosine_mean": 0.9, "tied.cosine_min": 0.1}}
    scores["token_features"] = {"single": 0.5, "single.tied": 1.0, "tokens": 4.0}
    kept = {"fvu": 0.25, "dead": 0.0, "single": 0.5}
    assert flat(scores, ["loose"]) == kept
    told = {"share_of_l0.tied": 0.3, "share_of_l0.loose": 0.7, "tied.cosine_mean": 0.9, "single.tied": 1.0}
    assert flat(scores, ["tied", "loose"]) == kept | told


def test_a_page_tells_of_strata_where_there_are_some(suite: suites.Suite, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    render(suite, LINES, page)
    assert "tied to a token" not in page.read_text(encoding="utf-8")
    tied = line("ours", 16, 16.0, 0.2)
    tied["measures"] |= {"tied.cosine_mean": 0.912, "tied.own_peak": 0.987, "share_of_l0.tied": 0.3, "single": 0.413}
    agreed = line("ours", 16, 0.0, 0.0, seeds=[0, 1]) | {"kind": "agreement"}
    agreed["measures"] = {"pw_mcc": 0.7, "shared": 0.6, "pw_mcc_floor": 0.1, "pw_mcc.tied": 0.95, "shared.tied": 0.9}
    render(suite, [tied, agreed], page)
    text = page.read_text(encoding="utf-8")
    assert "| Ours \\| here | L0 16 | tied | 0.912 | - | - | 0.987 | - | - | - | 0.300 |" in text
    assert "| Ours \\| here | L0 16 | all | 1 | 0.700 | 0.600 | 0.100 |" in text
    assert "| Ours \\| here | L0 16 | tied | 1 | 0.950 | 0.900 | 0.100 |" in text
    assert "| of one token |" in text


def test_sections_are_replaced_where_they_are() -> None:
    text = replaced(replaced("# A\n", "one", "first\n"), "two", "second\n")
    again = replaced(text, "one", "third\n")
    assert again.index("third") < again.index("second")
    assert "first" not in again


def test_lines_are_whole_and_merge(tmp_path: Path) -> None:
    results.append(tmp_path, LINES[0])
    with (tmp_path / results.NAME).open("a", encoding="utf-8") as file:
        file.write('{"key": "half a li')
    results.append(tmp_path, LINES[1])
    (tmp_path / "results-2.jsonl").write_text(json.dumps({**LINES[2], "status": "error"}) + "\nnot JSON\n")
    found = results.read(tmp_path)
    assert [one["key"] for one in found] == [one["key"] for one in (LINES[2], *LINES[:2])] or len(found) == 3
    later = {**LINES[2], "time": "2027", "status": "done"}
    latest = results.latest([*found, later, {**later, "time": "2028", "status": "error"}])
    assert latest[LINES[2]["key"]]["status"] == "done"


def test_one_queue_in_a_directory(tmp_path: Path) -> None:
    with results.alone(tmp_path), pytest.raises(RecipeError, match="another queue"), results.alone(tmp_path):
        pass


def test_everybody_reads_the_same_stream(tmp_path: Path) -> None:
    """Two readers, one of which gives up; the ring is far smaller than the stream."""
    path = tmp_path / "ring"
    pipes = [(os.pipe(), os.pipe()) for _ in range(2)]
    writer = ring.Writer(ring.opened(path, 3, 4, 5), [(ready[1], freed[0]) for ready, freed in pipes])
    seen: list[list[float]] = [[], []]

    def read(i: int) -> None:
        (ready, _), (_, freed) = pipes[i]
        for x_BD in ring.batches(ring.opened(path, 3, 4, 5), ready, freed, torch.device("cpu")):
            seen[i].append(float(x_BD.mean()))
            if i == 1 and len(seen[1]) == 7:
                break
        os.close(ready)
        os.close(freed)

    readers = [threading.Thread(target=read, args=(i,)) for i in range(2)]
    for reader in readers:
        reader.start()
    for n in range(50):
        writer.put(torch.full((4, 5), float(n)))
    for ready, _ in pipes:
        os.close(ready[1])
    for reader in readers:
        reader.join()
    assert seen == [[float(n) for n in range(50)], [float(n) for n in range(7)]]
    assert writer.consumers == 1


def test_a_rate_does_not_win_by_missing_its_l0() -> None:
    def line(lr: float, l0: float, fvu: float) -> dict[str, Any]:
        return {"job": {"lr": lr}, "measures": {"l0": l0, "fvu": fvu}}

    sweep = suites.Sweep(at=(10.0,), l0=10.0, seed=0, share=1.0)
    assert best([line(1e-3, 17.1, 0.332), line(3e-3, 12.2, 0.340), line(3e-2, 10.3, 0.601)], sweep) == 3e-3
    assert best([line(1e-3, 10.0, 0.332), line(3e-3, 9.0, 0.340)], sweep) == 3e-3
    assert best([line(1e-3, 10.0, 0.332), line(3e-3, 9.9, 0.340)], sweep) == 1e-3


def test_where_features_are_planted_the_rate_that_finds_most_wins() -> None:
    def line(lr: float, fvu: float, mcc: float | None) -> dict[str, Any]:
        return {"job": {"lr": lr}, "measures": {"l0": 25.0, "fvu": fvu} | ({} if mcc is None else {"mcc": mcc})}

    sweep = suites.Sweep(at=(25.0,), l0=25.0, seed=0, share=0.5)
    assert best([line(3e-4, 0.438, 0.809), line(1e-3, 0.433, 0.784)], sweep) == 3e-4
    assert best([line(3e-4, 0.438, None), line(1e-3, 0.433, None)], sweep) == 1e-3
    assert best([line(1e-3, 0.4, 0.7), line(3e-4, 0.4, 0.7)], sweep) == 3e-4


def test_silent_features_are_those_that_never_fire_on_the_training_stream() -> None:
    plan = toy_plan()
    state = started(plan, 1)
    log_threshold_F = state.sae.activator.log_threshold_F
    assert isinstance(log_threshold_F, torch.Tensor)
    log_threshold_F.data[:16] = 20.0
    few, many = in_training(plan, state, 128), in_training(plan, state, 4096)
    assert 0.25 <= many["silent"] <= few["silent"] < 1.0
    assert 0.0 < many["l0.training"] < 0.75 * plan.knobs.F
    log_threshold_F.data[:] = 20.0
    assert in_training(plan, state, 1) == {"silent": 1.0, "l0.training": 0.0}
