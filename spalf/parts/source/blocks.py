"""The one shuffle of all sources: a block of rows is harvested in order, permuted, and served once.

A cursor is (block, offset, the supply's own cursor where the block began): to resume, the block is harvested again.
With a lane the next block is harvested pass by pass while the present one is served; the cursor knows nothing of it.
Shapes: N rows of a block, B rows of a batch, D d_model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from spalf.core.values import Raw
from spalf.errors import SourceError
from spalf.parts.source.ahead import Lane, Mark, put_


def derive_seed(*parts: object) -> int:
    """A seed below 2**63 that depends on every part, and on no platform or process."""
    text = "/".join(str(p) for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts: object, device: torch.device | None = None) -> torch.Generator:
    """A generator that starts from `derive_seed(*parts)`, on the CPU unless a device is given."""
    return torch.Generator(device=device or torch.device("cpu")).manual_seed(derive_seed(*parts))


def below(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries under `prefix.`, without it. Raises ValueError where there are none."""
    start = f"{prefix}."
    found = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    if not found:
        raise ValueError(f"the cursor has no entry {start}* (it was saved by another source)")
    return found


def under(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The same entries, each name with `prefix.` before it."""
    return {f"{prefix}.{k}": v for k, v in state.items()}


HELD_OUT_ROWS = 1 << 16  # a held-out stream's block at most: it is there to be measured on, beside the training one
READY_AT = 7 / 8
"""How much of the present block is used when the next one is asked of the device as a whole; the rest is its slack."""


class Supply(Protocol):
    """Rows in an order that is fixed by options and seed, with a cursor of plain numbers and texts."""

    @property
    def stride(self) -> int:
        """Rows of one pass: a block filled by one call or by calls of this many rows each is the same, bit for bit."""
        ...

    def fill_(self, out_ND: Tensor) -> int:
        """Write the next rows to the front of `out_ND`; returns how many, fewer than N at the end only."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class _Slot:
    """Memory of one block, made once and used for many: its rows, their order, and their largest size."""

    def __init__(self, rows: int, d_model: int, dtype: torch.dtype, device: torch.device, lane: Lane | None) -> None:
        self.rows_ND = torch.empty((rows, d_model), dtype=dtype, device=device)
        self.order_N = torch.empty(rows, dtype=torch.int64, device=device)
        self.peak = torch.zeros((), dtype=dtype, device=device)
        # Pinned, the copy does not wait for the device, and it is read when the device is known to have passed it.
        self.is_queued = lane is not None and device.type == "cuda"
        self.seen_peak = torch.zeros((), dtype=dtype, pin_memory=self.is_queued)
        if lane is not None:
            for tensor in (self.rows_ND, self.order_N, self.peak):
                lane.share(tensor)


class _Fill:
    """One block on its way into a slot: pass by pass, then its order."""

    def __init__(self, supply: Supply, slot: _Slot, number: int, seed: int) -> None:
        self.slot, self.number = slot, number
        self.start = supply.state_dict()
        self.filled = 0
        self.is_whole = False
        self.failure: SourceError | None = None
        self.done: Mark | None = None
        self._supply, self._seed = supply, seed
        self._is_read = False

    def advance(self) -> None:
        """One pass, or at last the order. An error is kept until the block is wanted: the run may end before."""
        if self._is_read:
            self._finish()
            return
        slot, rest = self.slot, len(self.slot.rows_ND) - self.filled
        rows_ND = slot.rows_ND[self.filled : self.filled + min(self._supply.stride, rest)]
        try:
            n = self._supply.fill_(rows_ND)
        except SourceError as e:
            self.failure, self.is_whole = e, True
            return
        if self.filled == 0:
            slot.peak.zero_()
        if n:
            # max |x|: NaN and infinity both come through, without a tensor of the block's size.
            torch.maximum(slot.peak, torch.linalg.vector_norm(rows_ND[:n], torch.inf), out=slot.peak)
        self.filled += n
        self._is_read = n < len(rows_ND) or self.filled == len(slot.rows_ND)

    def _finish(self) -> None:
        draw = generator("block", self._seed, self.number)
        put_(self.slot.order_N[: self.filled], torch.randperm(self.filled, generator=draw))
        self.slot.seen_peak.copy_(self.slot.peak, non_blocking=self.slot.is_queued)
        self.is_whole = True

    def check(self) -> None:
        """Raises SourceError where a row is not finite; to be asked once the device has passed `done`."""
        self.done = None
        if not bool(torch.isfinite(self.slot.seen_peak)):
            raise SourceError(
                f"block {self.number} of the source holds NaN or infinite activations "
                '(harvest with dtype = "float32" or "bfloat16"; float16 overflows in many models)'
            )


class Blocks:
    """Shuffled blocks of `rows` rows of a supply, kept in `dtype` on `device`: rows * d_model * itemsize bytes.

    The order within a block is a function of (seed, block number). With a `lane` there are two blocks in memory: passes
    of the next one are queued there as rows of the present one are served, in step with them. Rows and cursors are
    those of a stream without one.
    """

    def __init__(
        self,
        supply: Supply,
        *,
        rows: int,
        d_model: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        lane: Lane | None = None,
    ) -> None:
        self._supply, self._seed, self._lane = supply, seed, lane
        self._rows, self._d_model, self._dtype, self._device = rows, d_model, dtype, device
        self._slots: dict[int, _Slot] = {}
        self._block, self._offset = 0, 0
        self._start = supply.state_dict()
        self._present: _Fill | None = None
        self._ahead: _Fill | None = None

    def next(self, n: int) -> Raw:
        """The next `n` rows [n, D] in float32. Raises SourceError where the supply ends before.

        Rows that are not finite raise it too: at once, or with a lane as soon as the device has told.
        """
        pieces = []
        missing = n
        while missing > 0:
            fill = self._present = self._present or self._harvest()
            taken_B = fill.slot.order_N[self._offset : min(self._offset + missing, fill.filled)]
            pieces.append(fill.slot.rows_ND.index_select(0, taken_B).float())
            missing -= len(taken_B)
            self._offset += len(taken_B)
            if self._offset == fill.filled:
                self._leave(fill)
        self._harvest_ahead()
        return Raw(pieces[0] if len(pieces) == 1 else torch.cat(pieces))

    def present(self) -> tuple[Tensor, Mapping[str, Any]]:
        """The block that is being served, its rows as the supply gave them, and the supply's cursor where it began.

        In `dtype`, not a copy. Harvests it where that has not been done; moves no cursor.
        """
        fill = self._present = self._present or self._harvest()
        return fill.slot.rows_ND[: fill.filled], fill.start

    def _leave(self, fill: _Fill) -> None:
        self._verify(fill)
        self._block, self._offset, self._present = self._block + 1, 0, None
        self._start = self._supply.state_dict() if self._ahead is None else self._ahead.start

    def _begin(self, number: int) -> _Fill:
        """A fill of the slot that block `number - 1` does not use."""
        at = number % 2 if self._lane else 0
        if at not in self._slots:
            self._slots[at] = _Slot(self._rows, self._d_model, self._dtype, self._device, self._lane)
        if self._lane is not None:
            self._lane.follow()  # the slot was made, or last read, by the caller's queue
        return _Fill(self._supply, self._slots[at], number, self._seed)

    def _advance(self, fill: _Fill) -> None:
        with self._lane.work() if self._lane is not None else nullcontext():
            fill.advance()
        if fill.is_whole and self._lane is not None:
            fill.done = self._lane.mark()

    def _harvest(self) -> _Fill:
        """The current block, whole: what is still missing of it is asked for now."""
        fill, self._ahead = self._ahead or self._begin(self._block), None
        while not fill.is_whole:
            self._advance(fill)
        if fill.failure is not None:
            raise fill.failure
        if fill.filled == 0:
            raise SourceError(
                f"the source ended in block {self._block}: it has no more rows "
                "(let it start over with repeat = true, or lower budget.tokens)"
            )
        if self._lane is None:
            fill.check()
        else:
            self._lane.join()
        return fill

    def _harvest_ahead(self) -> None:
        """With a lane: as many passes of the next block as are due, so that the host never queues a block at once."""
        fill = self._present
        if self._lane is None or fill is None:
            return
        if fill.done is not None and fill.done.query():
            fill.check()
        if self._ahead is None:
            self._ahead = self._begin(self._block + 1)
        due = self._rows * self._offset / (READY_AT * fill.filled)
        while not self._ahead.is_whole and self._ahead.filled < due:
            self._advance(self._ahead)

    def _verify(self, fill: _Fill | None) -> None:
        """Wait until it is known that the rows were finite, where it is not yet: no cursor may stand behind others."""
        if fill is not None and fill.done is not None:
            fill.done.synchronize()
            fill.check()

    def state_dict(self) -> dict[str, Any]:
        """Block, offset in it, and the supply's cursor at its start: flat, numbers and texts.

        It is that of the rows that were served, whatever was harvested ahead. Raises SourceError where one was not
        finite.
        """
        self._verify(self._present)
        return {"block": self._block, "offset": self._offset, **under("start", self._start)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a cursor; the block is harvested again when a row of it is asked for."""
        start = below("start", state)
        self._supply.load_state_dict(start)
        self._block, self._offset = int(state["block"]), int(state["offset"])
        self._start, self._present, self._ahead = start, None, None
