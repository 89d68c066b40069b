"""Suite files: what is read, what is refused, which jobs follow and what their keys depend on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from spalf.bench import suite as suites
from spalf.bench import tables
from spalf.bench.jobs import Job, expand
from spalf.errors import RecipeError

ROOT = Path(__file__).resolve().parents[2]
SUITE = """
base = "BASE/toy.toml"
seeds = [0, 1]
l0 = [4, 8]
agreement = { at = [8] }
[peers]
versions = { saelens = "6.54.12" }
[method.ours]
title = "Ours"
recipe = "topk"
[method.more]
from = "ours"
with = { knobs = { lr = 3e-3 } }
[method.theirs]
peer = "saelens.topk"
lr = [1e-3, 2e-3]
sweep = { l0 = 8, seed = 1, share = 0.5 }
[method.gated]
peer = "dictionary_learning.gated"
lr = [1e-3, 2e-3]
over = { key = "l1_penalty", values = [0.1, 0.2] }
sweep = { at = [0.1, 0.2], l0 = 8 }
[[vary]]
method = "more"
keys = ["knobs.lr"]
at = [8]
seeds = [0]
"""


def written(tmp_path: Path, text: str = SUITE) -> Path:
    file = tmp_path / "suite.toml"
    file.write_text(text.replace("BASE", str(ROOT / "recipes")), encoding="utf-8")
    return file


def jobs(path: Path, done: Mapping[str, Any] = {}, sets: tuple[str, ...] = ()) -> dict[str, Job]:
    suite = suites.read(path)
    return {job.name: job for job in expand(suite, tables.base_of(suite, sets), done).jobs}


def test_jobs_and_what_waits(tmp_path: Path) -> None:
    suite = suites.read(written(tmp_path))
    due = expand(suite, tables.base_of(suite, ()), {})
    assert due.waiting == ("theirs", "gated")
    names = [job.name for job in due.jobs]
    assert names[:2] == ["theirs/sweep/lr-0.001/l0-8/seed-1", "theirs/sweep/lr-0.002/l0-8/seed-1"]
    assert names[2:6] == [
        f"gated/sweep/lr-{lr}/l1_penalty-{at}/seed-0" for lr in ("0.001", "0.002") for at in ("0.1", "0.2")
    ]
    assert {"ours/l0-4/seed-0", "more/l0-8/seed-1", "more.knobs.lr.x0.5/l0-8/seed-0"} <= set(names)
    assert [name for name in names if "agreement" in name] == [
        f"{method}/l0-8/agreement-0-1" for method in ("ours", "more")
    ]
    by_name = {job.name: job for job in due.jobs}
    assert by_name["more.knobs.lr.x2/l0-8/seed-0"].work["knobs"]["lr"] == 6e-3
    assert by_name["theirs/sweep/lr-0.001/l0-8/seed-1"].about["tokens"] == 204_800
    assert len({job.key for job in due.jobs}) == len(due.jobs)


def done(job: Job, l0: float, fvu: float) -> dict[str, Any]:
    return {"key": job.key, "status": "done", "job": dict(job.about), "measures": {"l0": l0, "fvu": fvu}}


def test_a_rate_is_chosen_once_its_sweep_is_done(tmp_path: Path) -> None:
    path = written(tmp_path)
    sweep = [job for name, job in jobs(path).items() if name.startswith("theirs/sweep")]
    first = done(sweep[0], 8, 0.3)
    assert not any(name.startswith("theirs/l0") for name in jobs(path, {first["key"]: first}))
    second = done(sweep[1], 8, 0.2)
    found = jobs(path, {line["key"]: line for line in (first, second)})
    assert found["theirs/l0-4/seed-0"].work["lr"] == 2e-3
    failed = {"key": sweep[1].key, "status": "error", "error": "out of memory", "job": dict(sweep[1].about)}
    found = jobs(path, {line["key"]: line for line in (first, failed)})
    assert found["theirs/l0-4/seed-0"].work["lr"] == 1e-3


def test_a_coefficient_is_judged_at_equal_l0(tmp_path: Path) -> None:
    """The second rate has the smaller errors only because it has the larger L0."""
    path = written(tmp_path)
    sweep = [job for name, job in jobs(path).items() if name.startswith("gated/sweep")]
    points = [(16, 0.20), (6, 0.35), (64, 0.15), (32, 0.22)]
    lines = [done(job, *point) for job, point in zip(sweep, points, strict=True)]
    found = jobs(path, {line["key"]: line for line in lines})
    assert found["gated/l1_penalty-0.1/seed-1"].work["lr"] == 1e-3
    assert "gated/l1_penalty-0.1/seed-0" not in found  # it is the sweep's own job


ONE = """
base = "BASE/toy.toml"
l0 = [4]
[method.ours]
recipe = "topk"
[method.theirs]
peer = "saelens.topk"
"""


def keys(path: Path, *sets: str) -> set[str]:
    return {job.key for job in jobs(path, sets=sets).values()}


def test_a_key_takes_in_what_determines_numbers_and_no_places(tmp_path: Path) -> None:
    path = written(tmp_path, ONE)
    before = keys(path)
    assert len(before) == 2
    for changed in ("budget.tokens=204800", "source.condition=4.0", "evaluator.ground_truth.rows=2048"):
        assert not before & keys(path, changed), changed
    assert keys(path, "name=other", "record.log_every=7") == before
    model = written(tmp_path, ONE.replace("BASE/toy.toml", "BASE/quickstart.toml"))
    assert keys(model, "source.text='a/*.py'") == keys(model, "source.text='b/*.py'")


def test_all_problems_at_once(tmp_path: Path) -> None:
    text = """
base = 3
seeds = [0, 0.5]
colour = "red"
[peers]
normalise = 0
versions = { saelense = "1" }
[method.a]
peer = "saelens.top"
[method.b]
peer = "dictionary_learning.gated"
recipe = "topk"
[method.c]
peer = "saelens.topk"
l0 = [8, 8]
lr = [1e-3, 2e-3]
[method.d]
from = "e"
l0 = 4
options = { k = 3 }
[[vary]]
method = "c"
keys = ["dual.delay"]
"""
    with pytest.raises(RecipeError) as caught:
        suites.read(written(tmp_path, text))
    places = [problem.path for problem in caught.value.problems]
    assert places == [
        *("base", "seeds", "peers.versions.saelense", "peers.normalise", "method.a.peer", "method.a.l0"),
        *("method.b.recipe", "method.b.over", "method.b.l0", "method.c.l0", "method.c.l0", "method.c.sweep"),
        *("method.d.from", "method.d.options", "vary[0].method", "colour"),
    ]
    assert "did you mean" not in str(caught.value.problems[0])


def test_a_method_that_cannot_be_compiled_is_named(tmp_path: Path) -> None:
    wrong = SUITE.replace("knobs = { lr = 3e-3 }", "dual = { delay = -1.0 }")
    with pytest.raises(RecipeError, match=r"method\.more: .*dual\.delay"):
        jobs(written(tmp_path, wrong))
    derived = SUITE.replace('keys = ["knobs.lr"]', 'keys = ["activation.bandwidth", "name"]')
    with pytest.raises(RecipeError, match=r"more\.name\.x2: name: is no number"):
        jobs(written(tmp_path, derived))


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "bench").glob("*.toml")), ids=lambda file: file.stem)
def test_the_suites_that_ship_are_read(file: Path) -> None:
    suite = suites.read(file)
    assert suite.about
    for method in suite.methods:
        assert not method.recipe or "/" not in method.recipe or Path(method.recipe).is_file()
    assert Path(suite.base).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "bench").glob("*.toml")), ids=lambda file: file.stem)
def test_the_suites_that_ship_compile(file: Path) -> None:
    """Every method at every setting, without a model's weights."""
    suite = suites.read(file)
    due = expand(suite, tables.base_of(suite, ()), {})
    named = {job.about["method"] for job in due.jobs} | set(due.waiting)
    assert named == {method.name for method in suite.methods}
