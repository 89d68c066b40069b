"""The one shuffle of all sources: a block of rows is harvested in order, permuted, and served once.

A cursor is (block, offset, the supply's own cursor where the block began): to resume, the block is harvested again.
Shapes: N rows of a block, B rows of a batch, D d_model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from spalf.core.values import Raw
from spalf.errors import SourceError


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


class Supply(Protocol):
    """Rows in an order that is fixed by options and seed, with a cursor of plain numbers and texts."""

    def fill_(self, out_ND: Tensor) -> int:
        """Write the next rows to the front of `out_ND`; returns how many, fewer than N at the end only."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Blocks:
    """Shuffled blocks of `rows` rows of a supply, kept in `dtype` on `device`: rows * d_model * itemsize bytes.

    The order within a block is a function of (seed, block number).
    """

    def __init__(
        self, supply: Supply, *, rows: int, d_model: int, dtype: torch.dtype, device: torch.device, seed: int
    ) -> None:
        self._supply = supply
        self._shape = (rows, d_model)
        self._dtype, self._device, self._seed = dtype, device, seed
        self._block, self._offset = 0, 0
        self._start = supply.state_dict()
        self._rows_ND: Tensor | None = None
        self._order_N: Tensor | None = None

    def next(self, n: int) -> Raw:
        """The next `n` rows [n, D] in float32. Raises SourceError where the supply ends before."""
        pieces = []
        missing = n
        while missing > 0:
            order_N = self._harvest()
            taken_B = order_N[self._offset : self._offset + missing]
            assert self._rows_ND is not None
            pieces.append(self._rows_ND.index_select(0, taken_B).float())
            missing -= len(taken_B)
            self._offset += len(taken_B)
            if self._offset == len(order_N):
                self._block, self._offset, self._order_N = self._block + 1, 0, None
                self._start = self._supply.state_dict()
        return Raw(pieces[0] if len(pieces) == 1 else torch.cat(pieces))

    def _harvest(self) -> Tensor:
        """The current block's order, its rows in place. The buffer is made once and reused."""
        if self._order_N is None:
            if self._rows_ND is None:
                self._rows_ND = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            filled = self._supply.fill_(self._rows_ND)
            if filled == 0:
                raise SourceError(
                    f"the source ended in block {self._block}: it has no more rows "
                    "(let it start over with repeat = true, or lower budget.tokens)"
                )
            if not bool(torch.isfinite(self._rows_ND[:filled]).all()):
                raise SourceError(
                    f"block {self._block} of the source holds NaN or infinite activations "
                    '(harvest with dtype = "float32" or "bfloat16"; float16 overflows in many models)'
                )
            draw = generator("block", self._seed, self._block)
            self._order_N = torch.randperm(filled, generator=draw).to(self._device)
        return self._order_N

    def state_dict(self) -> dict[str, Any]:
        """Block, offset in it, and the supply's cursor at its start: flat, numbers and texts."""
        return {"block": self._block, "offset": self._offset, **under("start", self._start)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a cursor; the block is harvested again when a row of it is asked for."""
        start = below("start", state)
        self._supply.load_state_dict(start)
        self._block, self._offset = int(state["block"]), int(state["offset"])
        self._start, self._order_N = start, None
