"""How long the lists of the Triton backend are, without a step that waits for the device to know."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

STEP = 64
"""Capacities are multiples of it, so that few sizes are ever compiled or allocated."""

TOTAL_STEP = 1 << 14
"""The same of all rows' entries together."""

LAG = 2
"""Steps after which a count is read: by then it has long been there."""

MEMORY = 256
"""Looks after which a capacity may shrink."""


def rounded(n: float, step: int = STEP) -> int:
    """The multiple of `step` at or above `n`, at least one."""
    return max(step, -(-int(n) // step) * step)


@define(eq=False)
class Bound:
    """A length that is allowed for what is measured in every step: `room` times the greatest of late."""

    room: float
    step: int
    limit: int = 0
    seen: deque[int] = field(factory=lambda: deque(maxlen=MEMORY))

    def take_note(self, measured: int) -> None:
        """Grow before the limit is reached, shrink where it has long been far away."""
        self.seen.append(measured)
        if measured > self.limit * (1 + 1 / self.room) / 2:
            self.limit = rounded(self.room * measured, self.step)
        elif len(self.seen) == MEMORY and 2 * self.room * max(self.seen) < self.limit:
            self.limit = rounded(self.room * max(self.seen), self.step)


@define(eq=False)
class Capacity:
    """How many entries a row may list, half as many again as the longest list of late, and how many all rows may.

    Counts are read two steps after they were made, so that no step waits for the device. Lists that turn out too
    long set the overflow of their code, and the step that they belong to changes nothing.
    """

    row: Bound = field(factory=lambda: Bound(room=1.5, step=STEP))
    total: Bound = field(factory=lambda: Bound(room=1.25, step=TOTAL_STEP))
    measured: Tensor | None = None
    """(longest list, entries of all lists) of the last step: one tensor for all, for a recorded step writes too."""
    waiting: deque[tuple[Tensor, Any]] = field(factory=deque)

    def take_note(self, longest: int, entries: int) -> None:
        """Have both limits follow."""
        self.row.take_note(longest)
        self.total.take_note(entries)

    def watch(self, count_B: Tensor) -> None:
        """Keep what a training step's lists measure, on the device."""
        if self.measured is None:
            self.measured = torch.zeros(2, dtype=torch.int64, device=count_B.device)
        self.measured.copy_(torch.stack([count_B.max().long(), count_B.sum()]))

    def settle(self) -> None:
        """Send what the last step kept on its way to the host, and take note of the one of two steps ago."""
        if self.measured is None:
            return
        if not self.measured.is_cuda:
            self.take_note(*self.measured.tolist())
            return
        if len(self.waiting) == LAG:
            held, arrived = self.waiting.popleft()
            arrived.synchronize()
            self.take_note(*held.tolist())
        else:
            held, arrived = torch.empty(2, dtype=torch.int64, pin_memory=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
        held.copy_(self.measured, non_blocking=True)
        arrived.record()
        self.waiting.append((held, arrived))
