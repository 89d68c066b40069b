"""Checkpoints: every leaf has a file, a final name is whole, and what does not fit is listed."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve, frozen
from safetensors.torch import load_file, save_file
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.core.tree import flatten
from spalf.engine import checkpoint
from spalf.engine.build import build
from spalf.errors import CheckpointError, DivergedError
from spalf.testing import toy_plan
from spalf.testing.whole import CPU, advance, moved, snapshot, started


@pytest.fixture
def mid() -> tuple[Plan, TrainingState]:
    """A state in the middle of `fit`."""
    plan = toy_plan()
    return plan, started(plan)


def save(plan: Plan, state: TrainingState, parent: Path, serial: int = 1) -> Path:
    return checkpoint.save(plan, state, parent, 'name = "toy"\n', {"serial": serial})


# ------------------------------------------------------------------------------------------------------------- content
def test_a_checkpoint_is_these_files(mid: tuple[Plan, TrainingState], tmp_path: Path) -> None:
    plan, state = mid
    at = save(plan, state, tmp_path)
    assert at == tmp_path / "spalf_fit_step12"
    assert sorted(p.name for p in at.iterdir()) == [
        "control.safetensors",
        "metadata.json",
        "model.safetensors",
        "optimizer.safetensors",
        "recipe.toml",
        "tensors.safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == [at.name], "nothing beside it"
    assert (at / "recipe.toml").read_text() == 'name = "toy"\n'
    meta = json.loads((at / "metadata.json").read_text())
    assert (meta["format"], meta["phase"], meta["step"], meta["serial"]) == (1, "fit", 12, 1)
    assert (meta["d_model"], meta["F"], meta["device"]) == (16, 64, "cpu")
    assert meta["constraints"] == ["faithfulness", "orthogonality"]
    assert meta["components"]["phase.constrained"].startswith("spalf ")
    assert {"python", "spalf", "torch", "safetensors"} <= meta["versions"].keys()


def test_every_leaf_is_in_exactly_one_file(mid: tuple[Plan, TrainingState], tmp_path: Path) -> None:
    plan, state = mid
    at = save(plan, state, tmp_path)
    files = {p.stem: load_file(p) for p in at.glob("*.safetensors")}
    held = [k for content in files.values() for k in content]
    scalars = checkpoint.metadata(at)["scalars"]
    assert sorted([*held, *scalars]) == sorted(flatten(state))
    assert {k.split(".")[0] for k in files["control"]} == {"control", "silent_F"}
    assert all(k.startswith("learner.model.") for k in files["model"])
    assert "learner.optimizer.W_dec_FD.exp_avg" in files["optimizer"]
    assert all(k.startswith("metric.") for k in files["tensors"])
    assert {k.split(".")[0] for k in scalars} == {"clock", "learner", "measured", "rng", "stream"}


def test_calibration_s_moments_keep_their_precision(tmp_path: Path) -> None:
    plan = toy_plan()
    state = build(plan, CPU)
    advance(plan, state, 3)
    at = save(plan, state, tmp_path)
    scatter = load_file(at / "control.safetensors")["phase.convergence.moments.scatter_DD"]
    assert scatter.dtype == torch.float64
    assert torch.equal(scatter, state.phase.convergence.moments.scatter_DD)


def test_a_leaf_without_a_prefix_is_an_error(mid: tuple[Plan, TrainingState], tmp_path: Path) -> None:
    plan, state = mid
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "FILES", tuple(f for f in checkpoint.FILES if f[0] != "silent_F"))
        with pytest.raises(CheckpointError, match=r"no file is assigned to silent_F \(add its prefix to FILES"):
            save(plan, state, tmp_path)
    assert checkpoint.all_in(tmp_path) == []


def test_saving_takes_a_copy_and_leaves_the_state(mid: tuple[Plan, TrainingState], tmp_path: Path) -> None:
    """Tensors that share memory, and views that are not contiguous, are saved all the same."""
    plan, state = mid
    budget_M = torch.arange(4.0)[::2]
    state.control = evolve(state.control, budget_M=budget_M, filter=evolve(state.control.filter, fast_M=budget_M))
    before = snapshot(state)
    at = save(plan, state, tmp_path)
    assert moved(before, snapshot(state)) == []
    assert load_file(at / "control.safetensors")["control.budget_M"].tolist() == [0.0, 2.0]


def test_pouring_gives_every_bit_back(mid: tuple[Plan, TrainingState], tmp_path: Path) -> None:
    plan, state = mid
    fresh = build(plan, CPU)
    assert len(moved(snapshot(state), snapshot(fresh))) > 20
    meta = checkpoint.load(save(plan, state, tmp_path), plan, fresh)
    assert meta["serial"] == 1
    assert moved(snapshot(state), snapshot(fresh)) == []
    assert torch.equal(state.stream.next(64).x_BD, fresh.stream.next(64).x_BD)


# ------------------------------------------------------------------------------------------------------------- refusal
def edit(at: Path, file: str, change: Any) -> None:
    content = load_file(at / f"{file}.safetensors")
    change(content)
    save_file(content, at / f"{file}.safetensors")


def test_all_misfits_are_listed(mid: tuple[Plan, TrainingState], tmp_path: Path) -> None:
    plan, state = mid
    at = save(plan, state, tmp_path)
    edit(at, "control", lambda c: (c.pop("silent_F"), c.update({"control.extra": torch.zeros(2)})))
    edit(at, "control", lambda c: c.update({"control.budget_M": torch.zeros(3)}))
    edit(at, "model", lambda c: c.update({"learner.model.W_dec_FD": torch.zeros(64, 17)}))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(at, plan, build(plan, CPU))
    told = str(caught.value)
    for line in (
        "the checkpoint does not fit this recipe:",
        "silent_F: missing",
        "control.extra: not part of this recipe's state",
        "control.budget_M: has shape (3,), this recipe's is (2,)",
        "W_dec_FD",
    ):
        assert line in told
    assert "[64, 17]" in told


def test_another_width_does_not_fit(mid: tuple[Plan, TrainingState], tmp_path: Path) -> None:
    plan, state = mid
    at = save(plan, state, tmp_path)
    wider = toy_plan(knobs__F="128")
    with pytest.raises(CheckpointError, match=r"silent_F: has shape \(64,\), this recipe's is \(128,\)"):
        checkpoint.load(at, wider, build(wider, CPU))


def test_another_recipe_s_phase_does_not_fit(mid: tuple[Plan, TrainingState], tmp_path: Path) -> None:
    plan, state = mid
    state.clock = evolve(state.clock, phase="anneal")
    at = save(plan, state, tmp_path)
    with pytest.raises(CheckpointError, match="taken in phase 'anneal', which this recipe does not have"):
        checkpoint.load(at, plan, build(plan, CPU))


@pytest.mark.parametrize("format", [0, 2, None])
def test_another_format_is_named(mid: tuple[Plan, TrainingState], tmp_path: Path, format: int | None) -> None:
    plan, state = mid
    at = save(plan, state, tmp_path)
    meta = json.loads((at / "metadata.json").read_text())
    (at / "metadata.json").write_text(json.dumps({**meta, "format": format}))
    with pytest.raises(CheckpointError, match=f"has format {format}, this version reads format 1"):
        checkpoint.load(at, plan, build(plan, CPU))


@pytest.mark.parametrize("file", ["model", "control", "optimizer", "tensors"])
@pytest.mark.parametrize("damage", ["gone", "torn", "empty"])
def test_a_damaged_file_is_named(mid: tuple[Plan, TrainingState], tmp_path: Path, file: str, damage: str) -> None:
    plan, state = mid
    path = save(plan, state, tmp_path) / f"{file}.safetensors"
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[: struct.unpack("<Q", whole[:8])[0] // 2] if damage == "torn" else b"")
    with pytest.raises(CheckpointError, match=f"{file}.safetensors: cannot be read"):
        checkpoint.load(path.parent, plan, build(plan, CPU))


def test_metadata_that_is_no_json_is_named(mid: tuple[Plan, TrainingState], tmp_path: Path) -> None:
    plan, state = mid
    at = save(plan, state, tmp_path)
    (at / "metadata.json").write_text('{"format": 1,')
    with pytest.raises(CheckpointError, match=r"metadata\.json: cannot be read"):
        checkpoint.load(at, plan, build(plan, CPU))


@pytest.mark.parametrize("where", ["learner.model.W_enc_FD", "control.dual.lam_M", "measured.gain"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_saved(
    mid: tuple[Plan, TrainingState], tmp_path: Path, where: str, value: float
) -> None:
    plan, state = mid
    good = save(plan, state, tmp_path)
    state.clock = state.clock.next()
    if where == "measured.gain":
        state.measured["gain"] = value
    elif where == "control.dual.lam_M":
        state.control = evolve(state.control, dual=evolve(state.control.dual, lam_M=torch.tensor([0.0, value])))
    else:
        state.sae.W_enc_FD.data[0, 0] = value
    with pytest.raises(DivergedError) as caught:
        save(plan, state, tmp_path)
    assert str(caught.value).startswith(
        f"step 13 of phase fit: not finite: {where}; the last good checkpoint is {good}"
    )
    assert [p.name for p in tmp_path.iterdir()] == [good.name]


def test_nothing_is_pickled(mid: tuple[Plan, TrainingState], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    plan, state = mid
    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("a checkpoint was pickled"))
    checkpoint.load(save(plan, state, tmp_path), plan, build(plan, CPU))


# ----------------------------------------------------------------------------------------------------------- directory
def several(plan: Plan, state: TrainingState, parent: Path, names: list[str]) -> None:
    """Checkpoints phase:step in this order of writing."""
    for serial, name in enumerate(names, 1):
        phase, number = name.split(":")
        state.clock = evolve(state.clock, phase=phase, step=int(number))
        save(plan, state, parent, serial)


def test_pruning_keeps_the_newest_of_each_phase(mid: tuple[Plan, TrainingState], tmp_path: Path) -> None:
    several(*mid, tmp_path, ["calibrate:0", "fit:10", "fit:20", "fit:30", "calibrate:5", "fit:15"])
    checkpoint.prune(tmp_path, 2)
    assert [p.name for p in checkpoint.all_in(tmp_path)] == [
        "spalf_calibrate_step0",
        "spalf_fit_step30",
        "spalf_calibrate_step5",
        "spalf_fit_step15",
    ], "the newest by the order of writing, not by the number of steps"
    checkpoint.prune(tmp_path, 1)
    assert [p.name for p in checkpoint.all_in(tmp_path)] == ["spalf_calibrate_step5", "spalf_fit_step15"]


def test_pruning_takes_the_drafts_of_a_killed_run(mid: tuple[Plan, TrainingState], tmp_path: Path) -> None:
    several(*mid, tmp_path, ["fit:10", "fit:20"])
    draft = tmp_path / ".spalf_fit_step30.4711"
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"half")
    (tmp_path / "notes").mkdir()
    (tmp_path / "spalf_fit_step20").rename(tmp_path / ".spalf_fit_step20.old")
    checkpoint.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "spalf_fit_step10", "spalf_fit_step20"]


def test_a_directory_without_metadata_is_no_checkpoint(mid: tuple[Plan, TrainingState], tmp_path: Path) -> None:
    several(*mid, tmp_path, ["fit:10"])
    (tmp_path / "spalf_fit_step99").mkdir()
    (tmp_path / "a file").touch()
    assert [p.name for p in checkpoint.all_in(tmp_path)] == ["spalf_fit_step10"]
    assert checkpoint.all_in(tmp_path / "nowhere") == []


def test_find(mid: tuple[Plan, TrainingState], tmp_path: Path) -> None:
    several(*mid, tmp_path / "checkpoints", ["fit:20", "fit:10"])
    newest = tmp_path / "checkpoints" / "spalf_fit_step10"
    assert checkpoint.find(tmp_path) == checkpoint.find(newest) == newest
    assert checkpoint.find(tmp_path, "spalf_fit_step20").name == "spalf_fit_step20"
    with pytest.raises(
        CheckpointError, match=r"has no checkpoint 'x' \(there are: spalf_fit_step20, spalf_fit_step10\)"
    ):
        checkpoint.find(tmp_path, "x")
    with pytest.raises(CheckpointError, match=r"has no checkpoint 'x' \(there are: none\)"):
        checkpoint.find(tmp_path / "nowhere", "x")


def test_replacing_is_whole_at_every_moment(mid: tuple[Plan, TrainingState], tmp_path: Path) -> None:
    plan, state = mid
    at = save(plan, state, tmp_path)
    seen: list[list[int]] = []
    real = Path.rename

    def watched(self: Path, target: Any) -> Path:
        out = real(self, target)
        copies = [p for p in tmp_path.iterdir() if (p / "metadata.json").exists()]
        seen.append(sorted(json.loads((p / "metadata.json").read_text())["serial"] for p in copies))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", watched)
        assert save(plan, state, tmp_path, serial=2) == at
    assert seen == [[1, 2], [1, 2]]
    assert [p.name for p in tmp_path.iterdir()] == [at.name]
    assert checkpoint.metadata(at)["serial"] == 2


def test_everything_is_flushed_before_the_name_is_given(
    mid: tuple[Plan, TrainingState], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, state = mid
    events: list[str] = []
    sync, rename = os.fsync, Path.rename

    def synced(fd: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        sync(fd)

    def renamed(self: Path, target: Any) -> Path:
        events.append("rename")
        return rename(self, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc/self/fd here to name an open file by")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    at = save(plan, state, tmp_path)
    named = events.index("rename")
    assert {p.name for p in at.iterdir()} <= set(events[:named])
    assert events[named + 1 :] == [tmp_path.name], "and the directory that holds the name, after"


@frozen(kw_only=True)
class Strange:
    """A state that no checkpoint can hold."""

    what: object


def test_a_state_that_cannot_be_saved_is_named(mid: tuple[Plan, TrainingState], tmp_path: Path) -> None:
    plan, state = mid
    state.phase = Strange(what=object())
    with pytest.raises(TypeError, match=r"state at phase\.what is a object, which cannot be saved"):
        save(plan, state, tmp_path)
    assert checkpoint.all_in(tmp_path) == []


def test_tensors_are_tensors(mid: tuple[Plan, TrainingState]) -> None:
    assert all(isinstance(v, Tensor | bool | int | float | str) for v in flatten(mid[1]).values())
