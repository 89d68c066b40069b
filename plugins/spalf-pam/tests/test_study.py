"""The study: its data, its fits, its tables, and the command that prints them."""

from __future__ import annotations

import gzip
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve
from spalf_pam.commands import pam
from spalf_pam.study import load
from spalf_pam.study.data import Rows, mnist, read_idx
from spalf_pam.study.fit import AT_EQUAL_ERROR, METHODS, PAM, PUBLISHED, SGD, Score, Settings, fit
from spalf_pam.study.tables import Cell, frontier_table, ratios, sweep_table
from typer.testing import CliRunner

from spalf import RecipeError, RunError, SourceError


# ---------------------------------------------------------------------------------------------------------- data
def idx(array: np.ndarray, kind: int = 8) -> bytes:
    """An IDX file: two zero bytes, the type, the axes, their lengths, the numbers."""
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A directory as MNIST's: 30 training images of 4 x 3, gzipped, and 7 test images, not."""
    draw = np.random.default_rng(0)
    train, test = (draw.integers(0, 256, size=(n, 4, 3), dtype=np.uint8) for n in (30, 7))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(train)))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(test))
    np.save(tmp_path / "train.npy", train)
    return tmp_path


def test_a_directory_of_images(images: Path) -> None:
    rows = mnist(images, rows=20)
    assert rows.train_ND.shape == (20, 12)
    assert rows.test_ND.shape == (7, 12)
    written = {tuple(image.ravel().tolist()) for image in np.load(images / "train.npy")}
    assert {tuple(row) for row in (rows.train_ND * 255).round().int().tolist()} <= written
    assert torch.equal(rows.train_ND, load("mnist", 20, images).train_ND)


def test_numbers_of_other_types(tmp_path: Path) -> None:
    values = np.array([[1.5, -2.0], [0.25, 8.0]], dtype=">f4")
    (tmp_path / "x").write_bytes(idx(values, 13))
    assert read_idx(tmp_path / "x").tolist() == values.tolist()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no IDX file"),
        (b"PK\3\4....", "is no IDX file (its first bytes are 504b0304)"),
        (idx(np.zeros((2, 3, 3), np.uint8))[:-4], "holds 14 bytes where its header asks for 18"),
        (idx(np.zeros((5,), np.uint8)), "holds an array of 1 axes, not images"),
    ],
)
def test_a_damaged_file_is_told(images: Path, content: bytes, said: str) -> None:
    (images / "t10k-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(SourceError) as caught:
        mnist(images, rows=20)
    assert said in str(caught.value)


def test_a_cut_gzip_is_told(images: Path) -> None:
    whole = (images / "train-images-idx3-ubyte.gz").read_bytes()
    (images / "train-images-idx3-ubyte.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match="cannot be read"):
        mnist(images, rows=20)


def test_missing_and_short_directories_are_told(images: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has 30 training images where 31 are asked for"):
        mnist(images, rows=31)
    with pytest.raises(SourceError, match="has none of train-images-idx3-ubyte"):
        mnist(tmp_path / "nowhere")


def test_digits() -> None:
    rows = load("digits", 1000)
    assert rows.train_ND.shape == (1000, 64)
    assert rows.test_ND.shape == (797, 64)
    assert float(rows.train_ND.max()) == 1.0
    with pytest.raises(RunError, match="leave none of the 1797 digits to test on"):
        load("digits", 1797)


def test_digits_need_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(RunError, match=r"needs scikit-learn .*spalf-pam\[study\]"):
        load("digits", 100)


def test_unknown_data_is_told() -> None:
    with pytest.raises(RecipeError, match='there is no "mnits" to study'):
        load("mnits", 100)
    with pytest.raises(RecipeError, match="--mnist: is missing"):
        load("mnist", 100)


# ---------------------------------------------------------------------------------------------------------- fits
def planted(n: int, seed: int) -> torch.Tensor:
    """Rows of 16 dimensions: 3 of 32 directions, and noise."""
    draw = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(32, 16, generator=torch.Generator().manual_seed(99)), dim=1)
    on = torch.rand(n, 32, generator=draw) < 0.1
    size = torch.rand(n, 32, generator=draw) + 0.5
    return (on * size) @ directions + 0.05 * torch.randn(n, 16, generator=draw) + 1.0


SETTINGS = Settings(features=48, steps=60, every=10, lr=1e-2)
DATA = Rows(name="planted", train_ND=planted(256, 0), test_ND=planted(256, 1))


@pytest.mark.parametrize("method", METHODS, ids=[m.name for m in METHODS])
@pytest.mark.parametrize("kind", [evolve(SETTINGS, weight=0.3), evolve(SETTINGS, k=4)], ids=["relu", "topk"])
def test_a_fit_is_a_function_of_its_seed(method: object, kind: Settings) -> None:
    one, again, other = (fit(method, DATA.train_ND, DATA.test_ND, kind, seed) for seed in (0, 0, 1))  # type: ignore[arg-type]
    assert one == again
    assert one != other


def test_fits_learn() -> None:
    longer = evolve(SETTINGS, k=4, steps=300)
    for method in (SGD, PAM):
        score = fit(method, DATA.train_ND, DATA.test_ND, longer, 0)
        assert score.train < score.test < 0.5
        assert 3.0 < score.l0 <= 4.0


def test_the_collapse_and_its_cure() -> None:
    """As many rows as features, under TopK: without a ridge the error on new rows is above that of the mean."""
    few_ND, kind = DATA.train_ND[:48], evolve(SETTINGS, k=4)
    published, ours = (fit(m, few_ND, DATA.test_ND, kind, 0).test for m in (PUBLISHED, PAM))
    assert published > 2.0
    assert ours < 1.0


# -------------------------------------------------------------------------------------------------------- tables
def cell(method: str, weight: float, test: float, l0: float, seed: int = 0) -> Cell:
    score = Score(train=0.0, test=test, l0=l0)
    return Cell(data="d", code="ReLU", method=method, rows=9, features=4, weight=weight, seed=seed, score=score)


def test_l0_at_equal_error() -> None:
    """SGD: error 0.1 at L0 40, 0.4 at L0 10, hence 20 at error 0.2; outside of its errors nothing is said."""
    curve = [cell("SGD", 1.0, 0.1, 40.0), cell("SGD", 3.0, 0.4, 10.0)]
    near = [cell(PAM.name, 1.0, 0.2, 15.0), cell(PAM.name, 3.0, 0.4, 8.0)]
    far = [cell("PAM, ridge 0.01", 1.0, 0.9, 15.0), cell("PAM, ridge 0.01", 3.0, 0.09, 5.0)]
    assert ratios([*curve, *near, *far]) == pytest.approx([0.75, 0.8])
    assert frontier_table([*curve, *near, *far]).splitlines()[-2:] == [
        "d: PAM, ridge 0.01 and SGD do not overlap in error: nothing can be said of L0 at equal error.",
        "d: PAM, ridge 0.1 at the test error of SGD: 0.77 times its L0 (0.75 to 0.80, 2 comparisons).",
    ]


def test_a_table_of_shares() -> None:
    cells = [cell(m.name, 1.0, 0.25, 7.0, seed) for m in METHODS for seed in (0, 1)]
    cells[-1] = evolve(cells[-1], score=Score(train=0.0, test=0.35, l0=9.0))
    assert sweep_table(cells).splitlines()[-1] == (
        "| d | ReLU | 9 | 2.25 | 0.250 +- 0.000 (L0 7) | 0.250 +- 0.000 (L0 7) | 0.300 +- 0.071 (L0 8) |"
    )


def test_the_command() -> None:
    words = ["study", "--data", "digits", "--rows", "100", "--seeds", "1", "--steps", "2"]
    told = CliRunner().invoke(pam, words)
    assert told.exit_code == 0, told.output
    assert told.stdout.count("| digits |") == 2 * 7 + 3
    assert "s of processor time" in told.stderr
    held = json.loads(CliRunner().invoke(pam, [*words, "--json"]).stdout)
    assert {key: len(cells) for key, cells in held.items()} == {"sweep": 2 * 7 * 3, "frontier": 3 * len(AT_EQUAL_ERROR)}
    assert {c["features"] for c in held["sweep"]} == {45}
