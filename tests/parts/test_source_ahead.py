"""Harvesting ahead: the rows, cursors and errors of a stream that does not, the passes spread over the steps.

On a CPU the bookkeeping is driven by lanes that stand in for a CUDA stream: one does its work at once, one as late as
it may. What only a device can show is marked `gpu`.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spalf.errors import SourceError
from spalf.parts.source import Activations, Huggingface, ahead, language
from spalf.parts.source.blocks import READY_AT, Blocks
from spalf.parts.source.shards import write_shards
from spalf.testing.tiny_model import write_model, write_text

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Moment:
    """A mark that the device passes when it is told to, or waited for."""

    def __init__(self, lane: "Queue") -> None:
        self.lane, self.passed = lane, False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.lane.log += "S"
        self.passed = True


class Queue:
    """A lane that writes down what is asked of it; late work is done when it is joined."""

    def __init__(self, late: bool = False) -> None:
        self.late, self.log = late, ""
        self.pending: list[Callable[[], object]] = []
        self.marks: list[Moment] = []

    def do(self, write: Callable[[], object]) -> None:
        self.pending.append(write)
        if not self.late:
            self.flush()

    def flush(self) -> None:
        while self.pending:
            self.pending.pop(0)()

    def follow(self) -> None:
        self.log += "F"

    def work(self) -> AbstractContextManager[object]:
        self.log += "W"
        return nullcontext()

    def share(self, tensor: Tensor) -> None:
        assert tensor.device == CPU

    def mark(self) -> Moment:
        self.log += "M"
        self.marks.append(Moment(self))
        return self.marks[-1]

    def join(self) -> None:
        self.log += "J"
        self.flush()


class Counting:
    """Row i is (i, -i), in passes of `stride`; ends after `end` rows, breaks after `broken`, is NaN in row `bad`."""

    def __init__(
        self,
        lane: Queue | None = None,
        *,
        stride: int = 3,
        end: int = 10**6,
        broken: int = 10**6,
        bad: int = -1,
    ) -> None:
        self.lane, self.stride, self.end, self.broken, self.bad = lane, stride, end, broken, bad
        self.row, self.fills = 0, 0

    def fill_(self, out_ND: Tensor) -> int:
        self.fills += 1
        n = min(len(out_ND), self.end - self.row)
        if self.row + n > self.broken:
            raise SourceError("the network is gone")
        rows_N = torch.arange(self.row, self.row + n).float()
        x_ND = torch.stack([rows_N, -rows_N], dim=1)
        x_ND[rows_N == self.bad, 1] = torch.nan
        out_ND[:n] = x_ND[:n] * 0  # what a late lane leaves unwritten is not what it will be
        if self.lane is None:
            out_ND[:n] = x_ND
        else:
            self.lane.do(lambda: out_ND[:n].copy_(x_ND))
        self.row += n
        return n

    def state_dict(self) -> dict[str, Any]:
        return {"row": self.row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.row = state["row"]


def blocks(supply: Counting, *, rows: int = 10, dtype: torch.dtype = torch.float32) -> Blocks:
    return Blocks(supply, rows=rows, d_model=2, dtype=dtype, device=CPU, seed=0, lane=supply.lane)


SIZES = st.lists(st.integers(1, 29), min_size=1, max_size=6)


@given(rows=st.integers(1, 13), stride=st.integers(1, 15), sizes=SIZES, late=st.booleans())
def test_rows_and_cursors_are_those_of_a_stream_that_does_not(
    rows: int, stride: int, sizes: list[int], late: bool
) -> None:
    plain = blocks(Counting(stride=stride), rows=rows)
    other = blocks(Counting(Queue(late), stride=stride), rows=rows)
    for n in sizes:
        assert torch.equal(plain.next(n), other.next(n))
        assert plain.state_dict() == other.state_dict()


@given(rows=st.integers(1, 13), before=SIZES, after=SIZES, late=st.booleans())
def test_a_cursor_is_that_of_what_was_served(rows: int, before: list[int], after: list[int], late: bool) -> None:
    """Killed at any step: what had been harvested ahead is harvested again, by a stream of either kind."""
    killed = blocks(Counting(Queue(late)), rows=rows)
    for n in before:
        killed.next(n)
    resumed = [blocks(Counting(lane), rows=rows) for lane in (None, Queue(late))]
    resumed[1].next(7)  # a half-harvested block of its own is forgotten
    for stream in resumed:
        stream.load_state_dict(killed.state_dict())
        assert stream.state_dict() == killed.state_dict()
    for n in after:
        wanted = killed.next(n)
        assert all(torch.equal(stream.next(n), wanted) for stream in resumed)
        assert all(stream.state_dict() == killed.state_dict() for stream in resumed)


def test_passes_are_spread_over_the_steps_and_none_is_left_for_the_border() -> None:
    supply = Counting(Queue(), stride=4)
    stream = blocks(supply, rows=80)  # 20 passes
    per_step = []
    for _ in range(60):  # of 4 rows: three blocks in all
        before = supply.fills
        stream.next(4)
        per_step.append(supply.fills - before)
    per_step[0] -= 20  # the first block has to be there before the first row
    for block in range(3):
        mine = per_step[20 * block : 20 * (block + 1)]
        assert sum(mine) == 20, "the next block is not whole where this one ends"
        assert max(mine) == 2, "a step launches more than two passes"
        assert sum(mine[: int(20 * READY_AT) + 1]) == 20, "the next block is late"


def test_a_block_is_read_behind_its_last_pass_and_overwritten_behind_its_last_row() -> None:
    lane = Queue()
    stream = blocks(Counting(lane))
    for _ in range(40):
        stream.next(1)
    # Each block: follow what the caller did, work, mark the end, and be joined before the first row is read. The marks
    # here are never passed, so each block is verified when it is left.
    assert re.fullmatch(r"FW+MJ(FW+MSJ)+(FW*M?S?)?", lane.log), lane.log


def test_the_host_does_not_wait_for_a_device_that_is_in_time() -> None:
    lane = Queue()
    stream = blocks(Counting(lane))
    for _ in range(40):
        stream.next(1)
        for mark in lane.marks:
            mark.passed = True
    assert "S" not in lane.log


def test_the_last_block_may_be_short_and_then_the_source_ends() -> None:
    stream = blocks(Counting(Queue(), end=14))
    assert sorted(stream.next(14)[:, 0].tolist()) == list(range(14))
    for _ in range(2):
        with pytest.raises(SourceError, match=r"ended in block 2.*no more rows.*repeat"):
            stream.next(1)


def test_an_error_ahead_is_raised_when_its_block_is_wanted() -> None:
    stream = blocks(Counting(Queue(), broken=12))
    plain = blocks(Counting())
    assert torch.equal(stream.next(10), plain.next(10)), "a run that ends here never needed the next block"
    cursor = stream.state_dict()
    assert cursor == plain.state_dict()
    with pytest.raises(SourceError, match="the network is gone"):
        stream.next(1)
    assert stream.state_dict() == cursor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_are_not_finite_are_refused_once_the_device_has_told(dtype: torch.dtype) -> None:
    def start() -> tuple[Blocks, Queue]:
        lane = Queue()
        stream = blocks(Counting(lane, bad=13), dtype=dtype)
        stream.next(11)
        return stream, lane

    message = r"block 1 .* NaN or infinite.*float32"
    stream, _ = start()
    with pytest.raises(SourceError, match=message):  # no checkpoint is written behind such a row
        stream.state_dict()
    stream, lane = start()
    stream.next(1)
    lane.marks[1].passed = True
    with pytest.raises(SourceError, match=message):
        stream.next(1)
    stream, _ = start()
    with pytest.raises(SourceError, match=message):
        stream.next(10)


def test_on_a_cpu_nothing_is_harvested_before_it_is_wanted() -> None:
    assert ahead.lane_of(CPU, overlap=True) is None
    supply = Counting(stride=5)
    stream = blocks(supply)
    stream.next(10)
    assert supply.fills == 2
    assert len(stream._slots) == 1
    stream.next(1)
    assert (supply.fills, len(stream._slots)) == (4, 1)


def test_products_are_exact_on_cuda_alone_and_as_before_afterwards() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with ahead.exact_products(CUDA):
            assert torch.get_float32_matmul_precision() == "highest"
        with ahead.exact_products(CPU):
            assert torch.get_float32_matmul_precision() == "high"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


# ------------------------------------------------------------------------------------------------ sources as a whole
@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Huggingface:
    home: Path = tmp_path_factory.mktemp("ahead")
    model, text = write_model(home / "model", layers=3), write_text(home / "text.jsonl")
    return Huggingface(
        model=str(model), text=str(text), layer=1, context=12, sequences=3, shuffle=150, held_out=0.25, dtype="float32"
    )


@pytest.fixture(scope="module")
def shards(source: Huggingface, tmp_path_factory: pytest.TempPathFactory) -> Activations:
    out = tmp_path_factory.mktemp("ahead") / "shards"
    write_shards(source.open(0, CPU), out, 700, held_out=100, shard_bytes=120 * 64)
    return Activations(path=str(out), shuffle=150)


@pytest.fixture(params=["source", "shards"])
def either(request: pytest.FixtureRequest) -> Huggingface | Activations:
    found: Huggingface | Activations = request.getfixturevalue(request.param)
    return found


def test_sources_overlap_bit_for_bit(either: Huggingface | Activations, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, lanes = either.open(0, CPU), []

    def lane_of(device: torch.device, overlap: bool) -> Queue | None:
        lanes.append(Queue() if overlap else None)
        return lanes[-1]

    monkeypatch.setattr("spalf.parts.source.language.lane_of", lane_of)
    monkeypatch.setattr("spalf.parts.source.activations.lane_of", lane_of)
    stream = either.open(0, CPU)
    for n in (40, 40, 40, 200, 7):
        assert torch.equal(stream.next(n).x_BD, plain.next(n).x_BD)
        assert stream.state_dict() == plain.state_dict()
    resumed = either.open(0, CPU)
    resumed.load_state_dict(stream.state_dict())
    assert torch.equal(resumed.next(300).x_BD, plain.next(300).x_BD)
    stream.held_out()
    evolve(either, overlap=False).open(0, CPU)
    assert [lane is not None for lane in lanes] == [True, True, False, False], "held-out streams look no block ahead"
    assert re.match(r"FW+MJFW", lanes[0].log)


def test_contexts_of_a_stream_need_no_mask(source: Huggingface) -> None:
    stream = source.open(0, CPU)
    few = stream.sequences(4)
    assert [part.is_padded for part in few.split(3)] == [False, False]
    few.real_ST[0, 3:] = False  # not looked at
    assert torch.equal(stream.activations(few), stream.activations(evolve(few, real_ST=torch.ones_like(few.real_ST))))
    padded = evolve(few, is_padded=True)
    assert language._mask(padded) is padded.real_ST


def test_transformers_is_not_left_to_ask_the_device_for_packed_rows(source: Huggingface) -> None:
    """Its forward pass would wait for the answer; if it no longer looks under this name, the guard is of no use."""
    from transformers import masking_utils

    real = masking_utils.find_packed_sequence_indices
    stream = source.open(0, CPU)
    with pytest.MonkeyPatch.context() as patch:
        asked = []
        patch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: asked.append(1))
        few = stream.sequences(1)
        stream.activations(few)
        stream.logits(few)
        assert not asked
        stream._model._model(input_ids=few.tokens_ST, use_cache=False)
        assert asked, "this release of transformers looks for packed rows elsewhere"
    assert masking_utils.find_packed_sequence_indices is real


def test_attention_may_be_named(source: Huggingface) -> None:
    rows = {}
    for name in ("auto", "sdpa", "eager"):
        stream = evolve(source, attention=name).open(0, CPU)
        rows[name] = stream.next(20).x_BD
        used = stream._model._model.config._attn_implementation
        assert used == ("sdpa" if name == "auto" else name)
    assert torch.equal(rows["auto"], rows["sdpa"])
    assert torch.allclose(rows["auto"], rows["eager"], atol=1e-5)
    with pytest.raises(ValueError, match="flash"):
        evolve(source, attention="flash")


# ------------------------------------------------------------------------------------------------------- on a device
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_overlapped_rows_equal_plain_ones_on_a_device(source: Huggingface, dtype: str) -> None:
    """Over 50 batches, with the caller's stream now busy and now idle, and allocations of both sides interleaved."""
    mine = evolve(source, dtype=dtype, shuffle=2200, sequences=16)
    plain, stream = evolve(mine, overlap=False).open(0, CUDA), mine.open(0, CUDA)
    kept = []
    for i in range(50):
        if i % 3 == 0:
            torch.cuda._sleep(20_000_000)  # the caller lags behind: a slot must not be overwritten under it
        x_BD = stream.next(192).x_BD
        scratch = torch.full_like(x_BD, torch.nan)  # memory that was freed too early would be handed out here
        kept.append((x_BD, x_BD * 1.0))
        del scratch
    for i, (x_BD, copy_BD) in enumerate(kept):
        wanted = plain.next(192).x_BD
        assert torch.equal(x_BD, wanted), f"batch {i}"
        assert torch.equal(copy_BD, wanted), f"the copy of batch {i}"
    assert stream.state_dict() == plain.state_dict()


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("overlap", [True, False])
def test_one_bad_number_is_found_on_a_device(bad: float, overlap: bool) -> None:
    class Bad(Counting):
        def fill_(self, out_ND: Tensor) -> int:
            first = self.row
            n = super().fill_(out_ND)
            out_ND[:n] = out_ND[:n].sin()
            if first <= 65_000 < first + n:
                out_ND[65_000 - first, 1] = bad
            return n

    def start() -> Blocks:
        lane = ahead.lane_of(CUDA, overlap)
        return Blocks(Bad(stride=4096), rows=50_000, d_model=2, dtype=torch.bfloat16, device=CUDA, seed=0, lane=lane)

    def save(stream: Blocks) -> None:
        stream.next(2)
        stream.state_dict()

    def go_on(stream: Blocks) -> None:
        for _ in range(30):
            stream.next(5000)

    for act in (save, go_on):
        stream = start()
        stream.next(49_999)
        stream.state_dict()
        with pytest.raises(SourceError, match=r"block 1 .* NaN or infinite"):
            act(stream)


@pytest.mark.gpu
def test_stored_rows_overlap_on_a_device(shards: Activations) -> None:
    plain, stream = evolve(shards, overlap=False).open(0, CUDA), shards.open(0, CUDA)
    for _ in range(50):
        assert torch.equal(stream.next(48).x_BD, plain.next(48).x_BD)
    assert stream.state_dict() == plain.state_dict()


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [3, 11, 12, 25])
def test_a_resumed_stream_goes_on_bit_for_bit_on_a_device(source: Huggingface, steps: int) -> None:
    mine = evolve(source, shuffle=2200, sequences=16)
    stream, resumed = mine.open(0, CUDA), mine.open(0, CUDA)
    for _ in range(steps):
        stream.next(192)
    resumed.next(500)
    resumed.load_state_dict(stream.state_dict())
    for _ in range(25):
        assert torch.equal(stream.next(192).x_BD, resumed.next(192).x_BD)
    assert stream.state_dict() == resumed.state_dict()


@pytest.mark.gpu
def test_the_host_never_waits_for_the_device_while_it_harvests(source: Huggingface) -> None:
    stream = evolve(source, shuffle=2200, sequences=16, dtype="bfloat16").open(0, CUDA)
    stream.next(192)
    stream.activations(stream.sequences(4))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(50):  # over four blocks
            stream.next(192)
        stream.activations(stream.sequences(4))
        stream.logits(stream.sequences(4))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_stream_that_is_dropped_leaves_no_write_behind(source: Huggingface) -> None:
    """Work ahead may still run when its stream is gone: its memory must not be given to somebody else before."""
    mine = evolve(source, shuffle=22_000, sequences=256)
    for _ in range(5):
        stream = mine.open(0, CUDA)
        stream.next(20_000)
        del stream
        theirs = [torch.full((22_000, 16), 7.0, dtype=torch.float32, device=CUDA) for _ in range(4)]
        torch.cuda.synchronize()
        assert all(bool((x == 7.0).all()) for x in theirs)
