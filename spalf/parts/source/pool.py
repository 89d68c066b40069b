"""Whole contexts in shuffled pools, so that a few of them are a sample of the text and not one document.

The cursor law is that of `blocks.py`: (pool, offset, the contexts' own cursor where the pool began). Only tokens are
read ahead; no model runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spalf.parts.source.blocks import below, generator, under
from spalf.parts.source.contexts import Contexts


class Pool:
    """Contexts [S, T] in an order that is a function of (seed, pool number) within each pool.

    A pool ends with its epoch: a text shorter than a pool is not read over and over to fill one.
    """

    def __init__(self, contexts: Contexts, *, seed: int, size: int) -> None:
        self._contexts, self._seed, self._size = contexts, seed, size
        self._pool, self._offset = 0, 0
        self._start = contexts.state_dict()
        self._held: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        """Tokens of a context."""
        return self._contexts.length

    def take(self, n: int) -> Tensor:
        """The tokens of `take_marked`."""
        return self.take_marked(n)[0]

    def take_marked(self, n: int) -> tuple[Tensor, Tensor]:
        """The next `n` contexts and their documents' ids, both [n, T]; fewer only where the text ends."""
        tokens: list[Tensor] = []
        documents: list[Tensor] = []
        missing = n
        while missing > 0:
            tokens_ST, document_ST = self._held = self._held or self._shuffled()
            taken = slice(self._offset, self._offset + missing)
            tokens.append(tokens_ST[taken])
            documents.append(document_ST[taken])
            missing -= len(tokens[-1])
            self._offset += len(tokens[-1])
            if self._offset == len(tokens_ST):
                self._pool, self._offset, self._held = self._pool + 1, 0, None
                self._start = self._contexts.state_dict()
                if not len(tokens_ST):
                    break
        return torch.cat(tokens), torch.cat(documents)

    def _shuffled(self) -> tuple[Tensor, Tensor]:
        """The next pool, in its order."""
        tokens_ST, document_ST = self._contexts.take_marked(self._size, one_epoch=True)
        order = torch.randperm(len(tokens_ST), generator=generator("pool", self._seed, self._pool))
        return tokens_ST[order], document_ST[order]

    def state_dict(self) -> dict[str, Any]:
        """Pool, offset in it, and the contexts' cursor at its start: flat, numbers and texts."""
        return {"pool": self._pool, "offset": self._offset, **under("start", self._start)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a cursor; the pool is read again when a context of it is asked for, unless it is the one in hand."""
        start = below("start", state)
        if self._held is not None and (int(state["pool"]), start) == (self._pool, self._start):
            self._offset = int(state["offset"])
            return
        self._contexts.load_state_dict(start)
        self._pool, self._offset = int(state["pool"]), int(state["offset"])
        self._start, self._held = start, None
