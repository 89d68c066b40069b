"""How long the lists of the Triton backend are, without a step that waits for the device to know."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

STEP = 64
"""Capacities are multiples of it, so that few sizes are ever compiled or allocated."""

LAG = 2
"""Steps after which a count is read: by then it has long been there."""

MEMORY = 256
"""Looks after which a capacity may shrink."""


def rounded(n: float) -> int:
    """The multiple of STEP at or above `n`, at least one."""
    return max(STEP, -(-int(n) // STEP) * STEP)


@define(eq=False)
class Capacity:
    """How many entries a row may list: half as many again as the longest list of late.

    Counts are read two steps after they were made, so that no step waits for the device. A list that turns out too
    short sets the overflow of its code, and the step that it belongs to changes nothing.
    """

    limit: int = 0
    longest: Tensor | None = None
    """Of the last list that was made in training: one tensor for all steps, for a recorded step writes to it too."""
    waiting: deque[tuple[Tensor, Any]] = field(factory=deque)
    seen: deque[int] = field(factory=lambda: deque(maxlen=MEMORY))

    def take_note(self, longest: int) -> None:
        """Have the limit follow a list's length."""
        self.seen.append(longest)
        if longest > 0.8 * self.limit:
            self.limit = rounded(1.5 * longest)
        elif len(self.seen) == MEMORY and 3 * max(self.seen) < self.limit:
            self.limit = rounded(1.5 * max(self.seen))

    def watch(self, count_B: Tensor) -> None:
        """Keep the longest of a training step's lists, on the device."""
        if self.longest is None:
            self.longest = torch.zeros((), dtype=torch.int64, device=count_B.device)
        self.longest.copy_(count_B.max())

    def settle(self) -> None:
        """Send what the last step kept on its way to the host, and take note of the one of two steps ago."""
        if self.longest is None:
            return
        if not self.longest.is_cuda:
            self.take_note(int(self.longest))
            return
        if len(self.waiting) == LAG:
            held, arrived = self.waiting.popleft()
            arrived.synchronize()
            self.take_note(int(held))
        else:
            held, arrived = torch.empty((), dtype=torch.int64, pin_memory=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
        held.copy_(self.longest, non_blocking=True)
        arrived.record()
        self.waiting.append((held, arrived))
