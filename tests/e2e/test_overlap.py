"""A run whose source harvests ahead, killed and resumed, ends at the very tensors of one that never looked ahead."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from spalf import hookimpl, launch
from spalf.bench import harvest
from spalf.engine import checkpoint, evaluate
from spalf.parts.source import language
from spalf.testing.tiny_model import write_model, write_text

RECIPE = Path(__file__).parent / "survival.toml"
# Blocks of 255 rows against batches of 128: a kill meets every state of the block ahead.
KILLS = [("calibrate", 4), ("fit", 1), ("fit", 16), ("fit", 23), ("causal", 9)]

pytestmark = pytest.mark.slow


class Killed(BaseException):
    """What a kill is, in a test of the same process: nothing of ours catches it."""


class KillAt:
    """Ends the process, as it were, after the `nth` step of `phase`."""

    def __init__(self, phase: str, nth: int) -> None:
        self.phase, self.nth = phase, nth

    @hookimpl
    def spalf_stepped(self, run: Any, reading: Any) -> None:
        if (reading.phase, run.readings) == (self.phase, self.nth):
            raise Killed


class Done:
    """A mark that has been passed."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class InLine:
    """A lane without a device: the work is done where it is asked for."""

    passes = 0

    def follow(self) -> None:
        pass

    def work(self) -> AbstractContextManager[object]:
        InLine.passes += 1
        return nullcontext()

    def share(self, tensor: Tensor) -> None:
        pass

    def mark(self) -> Done:
        return Done()

    def join(self) -> None:
        pass


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("language")
    model, text = write_model(folder / "model"), write_text(folder / "text.jsonl", documents=200)
    small = ("source.shuffle=256", "source.sequences=4", "record.save_every=7")
    return [f'source.model="{model}"', f'source.text="{text}"', *small]


@pytest.fixture(scope="module", autouse=True)
def _few_rows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "ROWS", 1024)
        yield


def final(run: Path) -> dict[str, Any]:
    """Every leaf of the newest checkpoint, and what was logged."""
    at = checkpoint.find(run)
    out: dict[str, Any] = {"scalars": checkpoint.metadata(at)["scalars"], "log": (run / "metrics.jsonl").read_text()}
    for file in sorted(at.glob("*.safetensors")):
        out.update({k: v.view(torch.uint8).tolist() if v.ndim else v.item() for k, v in load_file(file).items()})
    return out


@pytest.fixture(scope="module")
def plain(sets: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("plain")
    return final(launch.run(RECIPE, sets=sets, out=out, device="cpu").directory)


@pytest.fixture
def overlapped(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Training streams look ahead, in line; gives the units of work that were asked for so far."""
    monkeypatch.setattr(language, "lane_of", lambda device, overlap: InLine() if overlap else None)
    InLine.passes = 0
    return lambda: InLine.passes


def test_an_overlapped_run_is_the_plain_one(
    plain: dict[str, Any], sets: list[str], overlapped: Callable[[], int], tmp_path: Path
) -> None:
    assert final(launch.run(RECIPE, sets=sets, out=tmp_path, device="cpu").directory) == plain
    assert overlapped() > 100


@pytest.mark.parametrize(("phase", "nth"), KILLS)
def test_a_killed_run_harvests_again_what_it_had_harvested_ahead(
    plain: dict[str, Any], sets: list[str], overlapped: Callable[[], int], tmp_path: Path, phase: str, nth: int
) -> None:
    with pytest.raises(Killed):
        launch.run(RECIPE, sets=sets, out=tmp_path, device="cpu", observers=[KillAt(phase, nth)])
    run = tmp_path / "survival"
    if checkpoint.all_in(run / "checkpoints"):
        launch.resume(run, device="cpu")
    else:
        assert (phase, nth) == ("calibrate", 4)
        launch.run(RECIPE, sets=sets, out=tmp_path, device="cpu", force=True)
    assert final(run) == plain
    assert overlapped() > 100


@pytest.mark.gpu
def test_no_step_waits_for_the_device_in_its_source(sets: list[str]) -> None:
    """Steps of a phase, over several blocks, while torch tells of every wait: none comes from harvesting."""
    plan = harvest.planned(str(RECIPE), (*sets, "record.log_every=1000000"))
    device = torch.device("cuda")
    state = harvest.entered(plan, device)
    phase = plan.recipe.phase[state.clock.phase]
    for _ in range(10):
        phase.step(plan, state)
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(20):
                phase.step(plan, state)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in told if "called a synchronizing CUDA operation" in str(w.message)]
    ours = [where for where in waits if "parts/source" in where or "transformers" in where]
    assert ours == [], json.dumps(waits, indent=1)
