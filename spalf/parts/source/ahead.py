"""Where a source's work on a device is queued, so that the next block is harvested while the present one is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A moment in a lane's work, as `torch.cuda.Event` keeps it."""

    def query(self) -> bool:
        """Whether the device has passed it; does not wait."""
        ...

    def synchronize(self) -> None:
        """Wait for it, on the host."""
        ...


class Lane(Protocol):
    """A queue of device work beside the caller's own. Nothing here waits on the host but `Mark.synchronize`."""

    def follow(self) -> None:
        """What is queued from now on begins after all that the caller has asked of the device so far."""
        ...

    def work(self) -> AbstractContextManager[object]:
        """Device work inside the block goes to this queue, and returns before it is done."""
        ...

    def share(self, tensor: Tensor) -> None:
        """The lane uses `tensor`, which the caller made: its memory is not handed on before the lane is done."""
        ...

    def mark(self) -> Mark:
        """The end of what has been queued so far."""
        ...

    def join(self) -> None:
        """What the caller asks of the device from now on begins after all that has been queued here."""
        ...


class SideStream:
    """A CUDA stream of its own.

    What is allocated inside `work` comes from the stream's own pool and is used on it alone; what both sides use is
    allocated by the caller and shared.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def follow(self) -> None:
        self._stream.wait_event(torch.cuda.current_stream(self._device).record_event())

    def work(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def share(self, tensor: Tensor) -> None:
        tensor.record_stream(self._stream)

    def mark(self) -> Mark:
        end: Mark = self._stream.record_event()
        return end

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._stream.record_event())


def lane_of(device: torch.device, overlap: bool) -> Lane | None:
    """A lane where there is something to overlap with: on CUDA, if `overlap` is wanted."""
    return SideStream(device) if overlap and device.type == "cuda" else None


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`; on CUDA through pinned memory, so that the host does not wait for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def put_(out: Tensor, x: Tensor) -> None:
    """Write a CPU tensor over `out`; as `sent` where they are on two devices."""
    if out.is_cuda and not x.is_cuda:
        out.copy_(x.pin_memory(), non_blocking=True)
    else:
        out.copy_(x)


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """On CUDA, float32 products are not rounded to TF32 inside: rows may not depend on the moment of their harvest."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
