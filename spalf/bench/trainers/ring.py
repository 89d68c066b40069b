"""One stream of activations for several processes: batches in shared memory, and pipes that say which are ready.

A byte down a consumer's first pipe means one more batch, a byte up its second one that the batch has been copied. Pipes
order memory, wake whoever waits, and end with the process at the other side; nobody polls. Letters: S slots, B rows,
D d_model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

TOKEN = b"\x01"


def opened(path: Path, slots: int, rows: int, width: int) -> Tensor:
    """The ring [S, B, D], float32, of a file that every process of it maps; made where there is none."""
    flat = torch.from_file(str(path), shared=True, size=slots * rows * width, dtype=torch.float32)
    return flat.view(slots, rows, width)


class Writer:
    """The side that harvests. A consumer is (the end that is written, the end that is read) of its two pipes."""

    def __init__(self, ring_SBD: Tensor, consumers: Sequence[tuple[int, int]]) -> None:
        self._ring_SBD = ring_SBD
        self._freed = dict.fromkeys(consumers, 0)
        self._written = 0

    @property
    def consumers(self) -> int:
        """How many have not gone away."""
        return len(self._freed)

    def put(self, x_BD: Tensor) -> None:
        """Write one batch once every consumer has copied what its slot held."""
        slots = len(self._ring_SBD)
        for consumer in list(self._freed):
            while consumer in self._freed and self._freed[consumer] <= self._written - slots:
                self._hear(consumer)
        self._ring_SBD[self._written % slots].copy_(x_BD)
        self._written += 1
        for consumer in list(self._freed):
            try:
                os.write(consumer[0], TOKEN)
            except BrokenPipeError:
                del self._freed[consumer]

    def _hear(self, consumer: tuple[int, int]) -> None:
        """Wait for some batches of one consumer; one that has ended is forgotten."""
        said = os.read(consumer[1], 4096)
        if said:
            self._freed[consumer] += len(said)
        else:
            del self._freed[consumer]


def batches(ring_SBD: Tensor, ready: int, freed: int, device: torch.device) -> Iterator[Tensor]:
    """Copies [B, D] of the batches on `device`, until the writer ends."""
    side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    count = 0
    while os.read(ready, 1):
        x_BD = _copied(ring_SBD[count % len(ring_SBD)], device, side)
        count += 1
        with suppress(BrokenPipeError):  # all is written and the writer has ended: what is ready stays readable
            os.write(freed, TOKEN)
        yield x_BD


def _copied(slot_BD: Tensor, device: torch.device, side: torch.cuda.Stream | None) -> Tensor:
    """On CUDA by a stream of its own, so that a copy need not wait for the step before it."""
    if side is None:
        return slot_BD.clone()
    with torch.cuda.stream(side):
        x_BD = slot_BD.to(device)
    side.synchronize()
    own = torch.cuda.current_stream(device)
    own.wait_stream(side)
    x_BD.record_stream(own)
    return x_BD
