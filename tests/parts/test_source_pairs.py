"""The file of paired activations: what is written comes back, and what is wrong is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from spalf import Facts, Pairs, SourceError, read_pairs, write_pairs


def some_pairs(**changes: Any) -> Pairs:
    draw = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {
        "a_ND": torch.randn(5, 3, generator=draw),
        "b_ND": torch.randn(5, 3, generator=draw),
        "labels_NC": torch.tensor([[1, 0], [-1, 0], [0, 1], [0, 0], [1, -1]], dtype=torch.int8),
        "concepts": ("plural", "past tense"),
        "sentence_a_N": torch.arange(5),
        "sentence_b_N": torch.arange(5, 10),
        "facts": Facts(d_model=3, hook="blocks.1", model="tiny"),
    }
    return Pairs(**{**options, **changes})


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    pairs = some_pairs()
    back = read_pairs(write_pairs(tmp_path / "p", pairs))
    assert pairs.labels_NC is not None
    assert back.labels_NC is not None
    assert torch.equal(back.labels_NC, pairs.labels_NC)
    assert back.labels_NC.dtype == torch.int8
    for name in ("a_ND", "b_ND", "sentence_a_N", "sentence_b_N"):
        assert torch.equal(getattr(back, name), getattr(pairs, name)), name
    assert (back.concepts, len(back)) == (pairs.concepts, 5)
    assert (back.facts.d_model, back.facts.hook, back.facts.model) == (3, "blocks.1", "tiny")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p"]


def test_the_file_is_as_documented(tmp_path: Path) -> None:
    with safe_open(write_pairs(tmp_path / "p", some_pairs()) / "pairs.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"a_ND", "b_ND", "labels_NC", "sentence_a_N", "sentence_b_N"}
        metadata = file.metadata()
    assert json.loads(metadata["concepts"]) == ["plural", "past tense"]
    assert json.loads(metadata["facts"]) == {"d_model": 3, "hook": "blocks.1", "model": "tiny"}


def test_pairs_without_labels(tmp_path: Path) -> None:
    back = read_pairs(write_pairs(tmp_path / "p", some_pairs(labels_NC=None, concepts=())))
    assert back.labels_NC is None
    assert back.concepts == ()


def test_tensors_may_share_memory(tmp_path: Path) -> None:
    pairs = some_pairs()
    back = read_pairs(write_pairs(tmp_path / "p", some_pairs(b_ND=pairs.a_ND, a_ND=pairs.a_ND)))
    assert torch.equal(back.a_ND, back.b_ND)


def test_what_exists_stays(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    with pytest.raises(SourceError, match="exists"):
        write_pairs(tmp_path / "p", some_pairs())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b_ND": torch.zeros(4, 3)}, r"b_ND is \(4, 3\)"),
        ({"b_ND": torch.zeros(5, 3, dtype=torch.float64)}, r"b_ND is .*float64"),
        ({"a_ND": torch.full((5, 3), torch.nan)}, "a_ND holds NaN"),
        ({"sentence_a_N": torch.zeros(5)}, "sentence_a_N is"),
        ({"sentence_b_N": torch.arange(4)}, "sentence_b_N is"),
        ({"concepts": ()}, "come together"),
        ({"concepts": ("plural",)}, r"labels_NC is \(5, 2\)"),
        ({"labels_NC": torch.full((5, 2), 2, dtype=torch.int8)}, "other values than -1, 0 and 1"),
        ({"facts": Facts(d_model=4)}, r"it has to be \(5, 4\)"),
    ],
)
def test_what_disagrees_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        some_pairs(**changes)


def test_a_directory_without_pairs(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no pairs\.safetensors"):
        read_pairs(tmp_path)


def test_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "pairs.safetensors").write_bytes(b"not one")
    with pytest.raises(SourceError, match="is damaged: SafetensorError"):
        read_pairs(tmp_path)
    save_file({"a_ND": torch.zeros(1, 3)}, tmp_path / "pairs.safetensors")
    with pytest.raises(SourceError, match="is damaged: KeyError"):
        read_pairs(tmp_path)


def test_a_file_that_disagrees_names_its_path(tmp_path: Path) -> None:
    facts = {"concepts": "[]", "facts": json.dumps({"d_model": 4, "hook": "", "model": ""})}
    tensors = {"a_ND": torch.zeros(1, 3), "b_ND": torch.zeros(1, 3)}
    ids = {"sentence_a_N": torch.zeros(1, dtype=torch.int64), "sentence_b_N": torch.ones(1, dtype=torch.int64)}
    save_file({**tensors, **ids}, tmp_path / "pairs.safetensors", metadata=facts)
    with pytest.raises(SourceError, match=r"pairs\.safetensors: a_ND is \(1, 3\)"):
        read_pairs(tmp_path)
