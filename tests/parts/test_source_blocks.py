"""Shuffled blocks: each block is a permutation of the next rows of its supply, and a cursor brings it back."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spalf.errors import SourceError
from spalf.parts.source.blocks import Blocks, derive_seed, generator

CPU = torch.device("cpu")


class Counting:
    """Row i is (i, -i), in passes of `stride`; ends after `end` rows, or raises after `broken`."""

    def __init__(self, end: int = 10**6, stride: int = 1000, broken: int = 10**6) -> None:
        self.row, self.end, self.fills, self.stride, self.broken = 0, end, 0, stride, broken

    def fill_(self, out_ND: Tensor) -> int:
        self.fills += 1
        n = min(len(out_ND), self.end - self.row)
        if self.row + n > self.broken:
            raise SourceError("the network is gone")
        rows = torch.arange(self.row, self.row + n)
        out_ND[:n] = torch.stack([rows, -rows], dim=1)
        self.row += n
        return n

    def state_dict(self) -> dict[str, Any]:
        return {"row": self.row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.row = state["row"]


def blocks(
    supply: Counting | None = None, *, rows: int = 10, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Blocks:
    return Blocks(supply or Counting(), rows=rows, d_model=2, dtype=dtype, device=CPU, seed=seed)


def test_a_block_serves_each_of_its_rows_once() -> None:
    served = blocks().next(30)[:, 0].reshape(3, 10)
    for number, of_block in enumerate(served.long().tolist()):
        assert sorted(of_block) == list(range(10 * number, 10 * number + 10))
    orders = {tuple(x - 10 * n for x in of_block) for n, of_block in enumerate(served.long().tolist())}
    assert len(orders) == 3, "blocks are permuted alike"
    assert tuple(range(10)) not in orders, "a block is not permuted at all"


def test_the_order_depends_on_the_seed() -> None:
    assert not torch.equal(blocks(seed=0).next(10), blocks(seed=1).next(10))


@given(
    rows=st.integers(1, 13),
    before=st.lists(st.integers(1, 29), max_size=4),
    after=st.lists(st.integers(1, 29), min_size=1, max_size=4),
)
def test_a_cursor_continues_from_anywhere(rows: int, before: list[int], after: list[int]) -> None:
    whole, resumed = blocks(rows=rows), blocks(rows=rows)
    for n in before:
        whole.next(n)
    resumed.load_state_dict(whole.state_dict())
    for n in after:
        assert torch.equal(whole.next(n), resumed.next(n))
        assert whole.state_dict() == resumed.state_dict()


def test_a_cursor_at_the_end_of_a_block_harvests_only_the_next() -> None:
    whole, supply = blocks(), Counting()
    whole.next(10)
    resumed = blocks(supply)
    resumed.load_state_dict(whole.state_dict())
    assert torch.equal(resumed.next(3), whole.next(3))
    assert supply.fills == 1


def test_the_last_block_may_be_short_and_then_the_source_ends() -> None:
    stream = blocks(Counting(end=14))
    assert sorted(stream.next(14)[:, 0].tolist()) == list(range(14))
    with pytest.raises(SourceError, match=r"no more rows.*repeat"):
        stream.next(1)


def test_rows_are_kept_in_the_dtype_and_served_in_float32() -> None:
    x_BD = blocks(rows=300, dtype=torch.bfloat16).next(300)
    assert x_BD.dtype == torch.float32
    assert set(x_BD[:, 0].tolist()) == set(torch.arange(300.0).bfloat16().float().tolist())


def test_one_buffer_serves_all_blocks_and_batches_keep_their_own_rows() -> None:
    stream = blocks()
    first = stream.next(4)
    kept = first.clone()
    stream.next(40)
    assert torch.equal(first, kept), "a later block has overwritten a batch"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_are_refused(bad: float) -> None:
    class Overflowing(Counting):
        def fill_(self, out_ND: Tensor) -> int:
            n = super().fill_(out_ND)
            out_ND[3, 1] = bad
            return n

    with pytest.raises(SourceError, match=r"block 0 .* NaN or infinite.*float32"):
        blocks(Overflowing()).next(1)


def test_a_cursor_of_another_source_is_refused() -> None:
    with pytest.raises(ValueError, match="saved by another source"):
        blocks().load_state_dict({"chunk": 0, "offset": 0})


def test_seeds_are_the_same_everywhere_and_for_ever() -> None:
    assert derive_seed("a", 1) == 6_431_086_039_603_022_688
    assert derive_seed("a", 1) != derive_seed("a", 2)
    assert 0 <= derive_seed("x") < 2**63
    assert torch.equal(torch.rand(3, generator=generator("a")), torch.rand(3, generator=generator("a")))
