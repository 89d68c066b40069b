"""The one traversal: what is flattened comes back, masks mix row by row, and every misfit is named."""

from typing import Any

import pytest
import torch
from attrs import define, frozen
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spalf.core import tree
from spalf.errors import CheckpointError


@frozen(kw_only=True, eq=False)
class Frozen:
    a: Any
    b: Any


@define(kw_only=True, eq=False)
class Mutable:
    a: Any
    b: Any


DTYPES = [torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16]
TENSORS = st.builds(
    lambda shape, dtype, seed: (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(DTYPES),
    st.integers(0, 2**20),
)
LEAVES = TENSORS | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
NAMES = st.text("abcdefgh_", min_size=1, max_size=4)
TREES = st.recursive(
    LEAVES | st.none(),
    lambda inner: (
        st.dictionaries(NAMES, inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.builds(Frozen, a=inner, b=inner)
        | st.builds(Mutable, a=inner, b=inner)
    ),
    max_leaves=8,
)


def blank(x: Any) -> Any:
    """The same tree with other leaves."""
    if isinstance(x, Tensor):
        return torch.zeros_like(x) if x.dtype is torch.bool else x + 1
    if isinstance(x, bool):
        return not x
    if isinstance(x, int | float):
        return x * 0
    if isinstance(x, str):
        return x + "!"
    if isinstance(x, dict):
        return {k: blank(v) for k, v in x.items()}
    if isinstance(x, tuple):
        return tuple(blank(v) for v in x)
    return x if x is None else type(x)(a=blank(x.a), b=blank(x.b))


def copied(flat: dict[str, tree.Leaf]) -> dict[str, tree.Leaf]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in flat.items()}


def equal(a: dict[str, tree.Leaf], b: dict[str, tree.Leaf]) -> bool:
    return a.keys() == b.keys() and all(
        isinstance(y, Tensor) and x.dtype == y.dtype and torch.equal(x, y)
        if isinstance(x, Tensor)
        else type(x) is type(y) and x == y
        for x, y in ((a[k], b[k]) for k in a)
    )


@given(state=TREES)
def test_round_trip(state: Any) -> None:
    flat = copied(tree.flatten(state))
    again = tree.restore(blank(state), flat)
    assert type(again) is type(state)
    assert equal(tree.flatten(again), flat)


@given(state=TREES)
def test_restored_leaves_share_no_memory(state: Any) -> None:
    flat = copied(tree.flatten(state))
    again = tree.flatten(tree.restore(blank(state), flat))
    for name, leaf in flat.items():
        if isinstance(leaf, Tensor) and leaf.numel():
            other = again[name]
            assert isinstance(other, Tensor)
            assert leaf.data_ptr() != other.data_ptr()


def test_paths_are_dotted_and_none_has_no_leaf() -> None:
    state = {"x": Frozen(a=(1, 2.5), b=None), "y": torch.zeros(2)}
    assert list(tree.flatten(state)) == ["x.a.0", "x.a.1", "y"]
    assert tree.flatten(3) == {"": 3}


def test_mutable_records_are_filled_in_place_and_frozen_ones_anew() -> None:
    inner = Mutable(a=1, b=2)
    state = Frozen(a=inner, b=5)
    again = tree.restore(state, {"a.a": 7, "a.b": 8, "b": 9})
    assert again.a is inner
    assert (inner.a, inner.b, again.b, state.b) == (7, 8, 9, 5)


@pytest.mark.parametrize("wrap", [lambda m: {"net": m}, lambda m: Frozen(a=m, b=1), lambda m: m])
def test_modules_speak_for_themselves(wrap: Any) -> None:
    one, other = nn.Linear(2, 3), nn.Linear(2, 3)
    flat = copied(tree.flatten(wrap(one)))
    tree.restore(wrap(other), flat)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)


def test_every_misfit_is_named() -> None:
    state = {"gone": 1, "shape": torch.zeros(2, 3), "kind": "text", "fine": 2.0, "net": nn.Linear(1, 1)}
    flat = {"shape": torch.zeros(3, 2), "kind": 4, "fine": 3, "spare": 1, "net.weight": torch.zeros(1, 1)}
    with pytest.raises(CheckpointError) as caught:
        tree.restore(state, flat)
    text = str(caught.value)
    for expected in (
        "gone: missing",
        "shape: has shape (3, 2), this recipe's is (2, 3)",
        "kind: is a int, this recipe's is a str",
        "spare: not part of this recipe's state",
        "net: ",
    ):
        assert expected in text
    assert "fine" not in text


@given(state=TREES, seed=st.integers(0, 100))
def test_a_lost_leaf_is_always_noticed(state: Any, seed: int) -> None:
    flat = copied(tree.flatten(state))
    if not flat:
        return
    lost = sorted(flat)[seed % len(flat)]
    del flat[lost]
    with pytest.raises(CheckpointError, match="missing"):
        tree.restore(blank(state), flat)


def test_what_cannot_be_saved_is_named() -> None:
    with pytest.raises(TypeError, match=r"state at a\.b is a set"):
        tree.flatten({"a": {"b": {1, 2}}})


@given(mask=st.lists(st.booleans(), min_size=2, max_size=6), width=st.integers(1, 3))
def test_where_mixes_row_by_row(mask: list[bool], width: int) -> None:
    m, mask_M = len(mask), torch.tensor(mask)
    old = Frozen(a=torch.zeros(m), b=(torch.zeros(m, width), torch.tensor(0.0)))
    new = Frozen(a=torch.ones(m), b=(torch.ones(m, width), torch.tensor(1.0)))
    mixed = tree.where(mask_M, new, old)
    assert mixed.a.bool().tolist() == mask
    assert mixed.b[0].bool().tolist() == [[on] * width for on in mask]
    assert float(mixed.b[1]) == 1.0, "what all constraints share comes from the new state"
    assert float(old.a.sum()) == 0.0
    assert float(new.a.sum()) == m


def test_where_leaves_other_leaves_to_the_new_state() -> None:
    mixed = tree.where(torch.tensor([True, False]), {"n": 2, "v": torch.ones(2)}, {"n": 1, "v": torch.zeros(2)})
    assert mixed["n"] == 2
    assert mixed["v"].tolist() == [1.0, 0.0]


@given(state=TREES)
def test_to_moves_every_tensor(state: Any) -> None:
    moved = tree.flatten(tree.to(state, torch.device("meta")))
    flat = tree.flatten(state)
    assert moved.keys() == flat.keys()
    for name, leaf in flat.items():
        other = moved[name]
        if isinstance(leaf, Tensor):
            assert isinstance(other, Tensor)
            assert (other.device.type, other.shape, other.dtype) == ("meta", leaf.shape, leaf.dtype)
        else:
            assert other == leaf
