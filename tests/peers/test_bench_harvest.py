"""The worker of `spalf bench harvest` runs SAELens' own runner, in each of its variants, on a model of ours."""

import json
from pathlib import Path

import numpy as np
import pytest

from spalf.bench import harvest_peers, harvest_worker
from spalf.testing.tiny_model import write_model

pytestmark = pytest.mark.slow
PYTHON = Path(__file__).resolve().parents[2] / ".venv" / "peers" / "bin" / "python"


def test_every_variant_trains_at_the_same_hook(tmp_path: Path) -> None:
    if not PYTHON.exists():
        pytest.skip("run make peers")
    np.save(tmp_path / "contexts.npy", np.random.default_rng(0).integers(1, 272, (64, 16)))
    shape = {"layer": 0, "d_model": 16, "width": 64, "batch": 32, "context": 16, "sequences": 4, "seed": 0}
    order = {"model": str(write_model(tmp_path / "model")), "tokens": str(tmp_path / "contexts.npy"), **shape}
    order |= {"warmup": 2, "steps": 5, "device": "cpu", "dtype": "float32", "autocast": False}
    (tmp_path / "order.json").write_text(json.dumps(order))
    answer = tmp_path / "answer.json"
    command = [str(PYTHON), "-P", str(harvest_peers.WORKER), str(tmp_path / "order.json"), str(answer)]
    said = harvest_peers._run(command, PYTHON)
    assert answer.exists(), said
    rows = json.loads(answer.read_text())["rows"]
    assert [row["variant"] for row in rows] == list(harvest_worker.VARIANTS)
    assert [row.get("hook") for row in rows] == ["gpt_neox.layers.0"] * 2 + ["blocks.0.hook_resid_post"], rows
    assert all(row["rows"] == 160 and row["seconds"] > 0 for row in rows)
