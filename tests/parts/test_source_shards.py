"""Shards: what is written is what comes back, and a damaged directory is refused with the file's name."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve

from spalf.core.values import Batch, Raw
from spalf.errors import SourceError
from spalf.parts.source import Activations, Huggingface, Synthetic
from spalf.parts.source.activations import ActivationsStream
from spalf.parts.source.shards import read_manifest, write_shards
from spalf.testing.tiny_model import write_model, write_text

CPU = torch.device("cpu")
PLANTED = Synthetic(d_model=6, features=20, shuffle=64, most=0.9, least=0.5)  # no two rows are equal
SHARD = 100 * 6 * 4  # 100 rows of float32


def rows_of(x_BD: torch.Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in x_BD.tolist()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return write_shards(PLANTED.open(0, CPU), tmp_path / "shards", 450, held_out=120, shard_bytes=SHARD)


@pytest.mark.parametrize("format", ["safetensors", "npy"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_rows_come_back_once_an_epoch(tmp_path: Path, format: str, dtype: str) -> None:
    stream = PLANTED.open(0, CPU)
    itemsize = getattr(torch, dtype).itemsize
    out = write_shards(
        stream, tmp_path / "s", 450, held_out=120, format=format, dtype=dtype, shard_bytes=100 * 6 * itemsize
    )
    assert [len(read_manifest(out).shards[s]) for s in ("training", "held_out")] == [5, 2]
    wanted = PLANTED.open(0, CPU).next(450).x_BD.to(getattr(torch, dtype)).float()
    source = Activations(path=str(out), shuffle=64, repeat=False)
    served = source.open(0, CPU).next(450).x_BD
    assert served.dtype == torch.float32
    assert sorted(map(tuple, served.tolist())) == sorted(map(tuple, wanted.tolist()))
    assert not torch.equal(served, wanted), "rows come in the order they were written in"
    held = PLANTED.open(0, CPU).held_out().next(120).x_BD.to(getattr(torch, dtype)).float()
    assert rows_of(source.open(0, CPU).held_out().next(120).x_BD) == rows_of(held)
    assert source.facts().bytes_per_activation == 6 * itemsize


def test_epochs_and_seeds_take_the_shards_in_other_orders(out: Path) -> None:
    source = Activations(path=str(out), shuffle=450)
    one = source.open(0, CPU)
    first, second = one.next(450).x_BD, one.next(450).x_BD
    assert rows_of(first) == rows_of(second)
    assert not torch.equal(first, second)
    by_shard = Activations(path=str(out), shuffle=90)
    seeds = {frozenset(rows_of(by_shard.open(seed, CPU).next(90).x_BD)) for seed in range(4)}
    assert len(seeds) > 1, "every seed begins with the same shard"
    stream = by_shard.open(0, CPU)
    epochs = {frozenset(rows_of(stream.next(450).x_BD[:90])) for _ in range(4)}
    assert len(epochs) > 1, "every epoch begins with the same shard"


def test_without_held_out_shards_the_last_rows_are_held_out(tmp_path: Path) -> None:
    out = write_shards(PLANTED.open(0, CPU), tmp_path / "s", 450, held_out=0, shard_bytes=SHARD)
    source = Activations(path=str(out), shuffle=64, repeat=False, held_out=0.3)
    training = rows_of(source.open(0, CPU).next(315).x_BD)
    held = rows_of(source.open(0, CPU).held_out().next(135).x_BD)
    wanted = PLANTED.open(0, CPU).next(450).x_BD
    assert training == rows_of(wanted[:315])
    assert held == rows_of(wanted[315:])
    assert training & held == set()


def test_a_directory_without_training_rows_is_refused(tmp_path: Path) -> None:
    out = write_shards(PLANTED.open(0, CPU), tmp_path / "s", 1, held_out=0)
    with pytest.raises(SourceError, match="no training rows"):
        Activations(path=str(out)).open(0, CPU)


def test_a_language_model_leaves_its_unembedding_and_what_it_was(tmp_path: Path) -> None:
    model, text = write_model(tmp_path / "model"), write_text(tmp_path / "text.jsonl")
    live = Huggingface(model=str(model), text=str(text), layer=0, context=12, shuffle=50, dtype="float32").open(0, CPU)
    out = write_shards(live, tmp_path / "s", 100)
    source = Activations(path=str(out))
    facts = source.facts()
    assert facts.provides == {"activations", "unembedding"}
    same = ("d_model", "n_vocab", "hook", "model", "context", "n_parameters", "flops_to_hook", "flops_full")
    assert [getattr(facts, name) for name in same] == [getattr(live.facts, name) for name in same]
    stored = source.open(0, CPU)
    assert torch.equal(stored.unembedding(), live.unembedding())
    assert torch.equal(stored.token_counts(), live.token_counts())
    with pytest.raises(SourceError, match=r'source "activations" has no language model'):
        stored.activations(live.sequences(1))
    with pytest.raises(SourceError, match=r'source "activations" has no tokenizer \(use huggingface'):
        stored.tokens("text")
    assert len(json.loads((out / "manifest.json").read_text())["held_out"]) == 1
    assert source.open(0, CPU).held_out().next(5).x_BD.shape == (5, 16)


# ------------------------------------------------------------------------------------------------------------- damage
def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def scramble(path: Path) -> None:
    size = path.stat().st_size
    path.write_bytes(b"\x7f" * size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"training-00002.safetensors is missing"),
        (cut, r"training-00002.safetensors has \d+ bytes, its manifest says \d+"),
        (scramble, r"training-00002.safetensors is not a shard"),
    ],
)
def test_a_damaged_shard_is_named_before_training(out: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(out / "training-00002.safetensors")
    with pytest.raises(SourceError, match=message):
        Activations(path=str(out)).open(0, CPU)


def test_a_shard_of_another_shape_is_named(tmp_path: Path) -> None:
    out = write_shards(PLANTED.open(0, CPU), tmp_path / "s", 100, held_out=0, format="npy")
    np.save(out / "training-00000.npy", np.zeros((300, 2), dtype=np.float32))  # as many bytes as [100, 6]
    with pytest.raises(SourceError, match=r"holds \(300, 2\), its manifest says \(100, 6\)"):
        Activations(path=str(out)).open(0, CPU)


def test_rows_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    class Broken:
        facts = evolve(PLANTED.facts(), d_model=6)

        def next(self, n: int) -> Batch:
            return Batch(x_BD=Raw(torch.full((n, 6), float("nan"))))

    out = write_shards(Broken(), tmp_path / "s", 20, held_out=0)  # type: ignore[arg-type]
    with pytest.raises(SourceError, match="NaN"):
        Activations(path=str(out)).open(0, CPU).next(1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged: KeyError"),
        ('{"format": "spalf-activations", "version": 99}', "version 99; this spalf reads"),
        ('{"format": "something", "version": 1}', 'format "something"'),
        ('{"format": "spalf-activations", "version": 1, "dtype": "int8"}', "damaged: ValueError"),
    ],
)
def test_a_damaged_manifest_is_refused(out: Path, content: str, message: str) -> None:
    (out / "manifest.json").write_text(content)
    with pytest.raises(SourceError, match=message):
        Activations(path=str(out)).facts()


def test_a_directory_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no manifest.json \(make shards with: spalf harvest"):
        Activations(path=str(tmp_path)).facts()


# ------------------------------------------------------------------------------------------------------------- writing
def test_a_harvest_that_fails_leaves_no_directory_and_the_next_one_works(tmp_path: Path) -> None:
    class Ending:
        facts = PLANTED.facts()

        def next(self, n: int) -> Batch:
            raise SourceError("the text ended")

    with pytest.raises(SourceError, match="the text ended"):
        write_shards(Ending(), tmp_path / "s", 20)  # type: ignore[arg-type]
    assert not (tmp_path / "s").exists()
    out = write_shards(PLANTED.open(0, CPU), tmp_path / "s", 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]
    assert isinstance(Activations(path=str(out)).open(0, CPU), ActivationsStream)


def test_nothing_is_overwritten_and_options_are_checked(out: Path, tmp_path: Path) -> None:
    stream = PLANTED.open(0, CPU)
    with pytest.raises(SourceError, match="exists"):
        write_shards(stream, out, 20)
    with pytest.raises(SourceError, match='shards cannot be "hdf5"'):
        write_shards(stream, tmp_path / "t", 20, format="hdf5")
    with pytest.raises(SourceError, match="0 rows to harvest"):
        write_shards(stream, tmp_path / "t", 0)


@pytest.mark.parametrize("error", [SourceError, KeyboardInterrupt])
def test_a_harvest_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    stream = Synthetic().open(0, torch.device("cpu"))
    served = stream.next
    left = [1]

    def next_(n: int):  # type: ignore[no-untyped-def]
        if not left:
            raise error("the text ended")
        left.pop()
        assert (tmp_path / "out.partial").is_dir()
        return served(n)

    monkeypatch.setattr(stream, "next", next_)
    with pytest.raises(error, match="the text ended"):
        write_shards(stream, tmp_path / "out", 100, shard_bytes=50 * 64 * 4)
    assert list(tmp_path.iterdir()) == []
