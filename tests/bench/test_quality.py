"""The queue from end to end: subprocesses, a kill, a second visit, a failing job, a page; ours alone and with peers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spalf.bench import queue, results
from spalf.bench.quality import interpreter, quality
from spalf.bench.suite import read
from spalf.errors import RecipeError

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv" / "peers" / "bin" / "python"
SUITE = f"""
base = "{ROOT}/recipes/toy.toml"
about = "Planted features, a few steps."
l0 = [4]
with = {{ budget = {{ tokens = 20_480 }}, knobs = {{ F = 64 }}, phase.calibrate.samples = 4096 }}
evaluator.ground_truth = {{ rows = 2048 }}
agreement = {{ at = [4], rows = 32 }}
silent = 1024
[peers]
normalise = 4
[method.topk]
recipe = "topk"
seeds = [0, 1]
[method.bad]
recipe = "topk"
with.term.mse.weight = 3e38
"""
THEIRS = """
[method.jumprelu]
peer = "dictionary_learning.jumprelu"
lr = 1e-2
options = { warmup_steps = 5, sparsity_warmup_steps = 10, bandwidth = 0.1 }
[method.matryoshka]
peer = "saelens.matryoshka"
lr = 1e-2
options = { matryoshka_widths = [16, 64] }
[method.wrong]
peer = "dictionary_learning.topk"
options = { warm_up = 5 }
"""


def written(directory: Path, text: str) -> Path:
    file = directory / "suite.toml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.slow
def test_a_killed_queue_goes_on_where_it_was(tmp_path: Path) -> None:
    suite, out = written(tmp_path, SUITE), tmp_path / "out"
    command = [sys.executable, "-m", "spalf", "bench", "quality", str(suite), "--out", str(out), "--device", "cpu"]
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    # Killed when one job is a line and the next has begun.
    for _ in range(6000):
        if started.poll() is not None or (results.read(out) and list((out / "work").glob("*/train.json"))):
            break
        time.sleep(0.1)
    assert started.poll() is None, started.communicate()[1]
    os.kill(started.pid, signal.SIGKILL)
    told_before = started.communicate()[1]
    assert list((out / "work").glob("*/train.json")), told_before
    first = (out / results.NAME).read_text(encoding="utf-8")
    told: list[str] = []
    outcome, _ = quality(suite, out=out, device="cpu", page=tmp_path / "page.md", jobs=2, tell=told.append)
    assert set(outcome.done) == {"topk/l0-4/seed-0", "topk/l0-4/seed-1", "topk/l0-4/agreement-0-1"}
    assert list(outcome.failed) == ["bad/l0-4/seed-0"]
    text = (out / results.NAME).read_text(encoding="utf-8")
    assert text.startswith(first)
    assert not any("start: topk/l0-4/seed-0" in line for line in told)
    assert not (out / "work").exists()
    lines = [json.loads(line) for line in text.splitlines()]
    by_name = {line["job"]["name"]: line for line in lines}
    measures = by_name["topk/l0-4/seed-0"]["measures"]
    assert measures["l0"] == pytest.approx(4.0, abs=1e-3)
    assert {"fvu", "dead", "silent", "mcc", "f1", "uniqueness"} <= set(measures)
    assert 0 < by_name["topk/l0-4/agreement-0-1"]["measures"]["pw_mcc"] < 1
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "### Failed" in page
    assert "silent: on none of 1,024 of the training documents" in page
    again, _ = quality(suite, out=out, device="cpu", minutes=0)
    assert set(again.done) == set(outcome.done)


def test_jobs_of_an_earlier_pattern_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    monkeypatch.setattr(queue.Queue, "_own", lambda *_: None)
    monkeypatch.setattr(queue.Queue, "_begin", lambda self, job, *_: begun.append(job.name))
    visit = queue.Visit(out=tmp_path / "out", only="bad/*, topk/*/seed-1,*/seed-*", device="cpu")
    queue.Queue(read(written(tmp_path, SUITE)), (), visit, begun.append)._start()
    assert begun == ["bad/l0-4/seed-0", "topk/l0-4/seed-1", "topk/l0-4/seed-0"]


def test_no_device_takes_more_peers_than_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[list[str]] = []
    monkeypatch.setattr(queue.Queue, "_start_peers", lambda self, jobs, place: begun.append([j.name for j in jobs]))
    visit = queue.Visit(out=tmp_path / "out", only="[jmw]*", jobs=2, peers=("python",), device="cpu")
    queue.Queue(read(written(tmp_path, SUITE + THEIRS)), (), visit, lambda _: None)._start()
    assert [len(jobs) for jobs in begun] == [2, 1]


@pytest.mark.slow
def test_peers_are_trained_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One dictionary of each: to import a library costs more than all that is done here with it."""
    monkeypatch.setattr(queue, "ATTEMPTS", 1)
    if not PEERS.exists():
        pytest.skip("run make peers")
    suite, out = written(tmp_path, SUITE + THEIRS), tmp_path / "out"
    # As where the peers lie in a folder: a command, with an environment of its own.
    outcome, _ = quality(suite, out=out, device="cpu", jobs=4, peers=f"env SOMETHING=1 {PEERS}", only="[jmw]*")
    failed = {name: error for name, error in outcome.failed.items() if not name.startswith("wrong")}
    assert failed == {}
    assert 'has no option "warm_up"' in outcome.failed["wrong/l0-4/seed-0"]
    lines = {line["job"]["name"]: line for line in results.read(out) if line["status"] == "done"}
    assert {name.partition("/")[0] for name in lines} == {"jumprelu", "matryoshka"}
    for name, line in lines.items():
        assert 0 < line["measures"]["l0"] <= 64, name
        assert line["measures"]["fvu"] < 1.5, name  # forty steps; a wrong import is far off
    assert lines["jumprelu/l0-4/seed-0"]["versions"]["dictionary_learning"] == "0.1.0"


def test_an_interpreter_is_any_command(tmp_path: Path) -> None:
    suite = read(written(tmp_path, SUITE + THEIRS))
    words = interpreter(suite, f"env A=1 {sys.executable}")
    assert words[1:] == ("A=1", sys.executable)
    assert Path(words[0]).is_absolute()
    with pytest.raises(RecipeError, match="cannot be run"):
        interpreter(suite, "no-such-python -x")
    assert interpreter(read(written(tmp_path, SUITE)), "no-such-python") == ()
