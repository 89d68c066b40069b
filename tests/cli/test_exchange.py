"""`spalf export` and `spalf import` at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from spalf.cli import app
from spalf.exchange import saelens
from spalf.exchange.dictionary import Dictionary

SETS = ("--set", "source={use='synthetic', d_model=3, features=4}", "--set", "evaluator.downstream_loss=false")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A ReLU dictionary in SAELens' form."""
    draw = torch.Generator().manual_seed(0)
    W_FD = torch.randn(12, 3, generator=draw, dtype=torch.float64)
    made = Dictionary(
        activation="relu",
        W_enc_FD=W_FD,
        W_dec_FD=W_FD,
        b_enc_F=torch.zeros(12).double(),
        b_dec_D=torch.zeros(3).double(),
    )
    return saelens.write(made, tmp_path / "sae", torch.float32)


def spalf(*words: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(w) for w in words], prog_name="spalf")
    return done.exit_code, done.stdout, done.stderr


def test_in_and_out_again(folder: Path, tmp_path: Path) -> None:
    code, out, err = spalf("import", folder, "--from", "saelens", "--out", tmp_path / "run", *SETS)
    assert (code, out) == (0, "")
    assert f"wrote {tmp_path / 'run'}" in err.replace("\n", "")
    code, out, _ = spalf("export", tmp_path / "run", tmp_path / "dl", "--to", "dictionary_learning", "--json")
    assert code == 0
    assert json.loads(out) == {"directory": str(tmp_path / "dl"), "format": "dictionary_learning"}
    assert sorted(p.name for p in (tmp_path / "dl").iterdir()) == ["ae.pt", "config.json"]


def test_for_machines(folder: Path, tmp_path: Path) -> None:
    code, out, err = spalf("import", folder, "--from", "saelens", "--out", tmp_path / "run", "--json", *SETS)
    assert (code, err) == (0, "")
    assert json.loads(out) == {"directory": str(tmp_path / "run"), "format": "saelens"}


def test_quiet(folder: Path, tmp_path: Path) -> None:
    assert spalf("import", folder, "--from", "saelens", "--out", tmp_path / "run", "--quiet", *SETS) == (0, "", "")


def test_a_mistake_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    code, out, err = spalf("import", folder, "--from", "sparsify", "--out", tmp_path / "run", *SETS)
    assert (code, out) == (2, "")
    assert err.startswith("spalf: ")
    assert "sae.safetensors: no such file" in err.replace("\n", " ")
    assert not (tmp_path / "run").exists()
