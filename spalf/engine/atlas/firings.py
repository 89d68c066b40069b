"""Every activation of every feature on held-out data, as one sorted list.

Shapes: S sequences, T positions, N entries (a feature and a row that it fires on), F features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from attrs import frozen
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.core.values import Code, Raw, Sequences, White
from spalf.errors import SourceError

PART = 16
"""Sequences per pass: dense codes of [16, T, F] fit anywhere."""


@frozen(kw_only=True, eq=False)
class Firings:
    """Entries sorted by feature, then by row; on the CPU. `rows` were looked at.

    Row r of tokens is position 1 + r % (T - 1) of sequence r // (T - 1): the first position has no context and is left
    out. `tokens_ST` is None where the source has no tokens; then rows are activations in the order they came.
    """

    width: int
    rows: int
    row_N: Tensor
    feature_N: Tensor
    value_N: Tensor
    tokens_ST: Tensor | None

    @property
    def span(self) -> int:
        """Rows per sequence."""
        return self.rows if self.tokens_ST is None else self.tokens_ST.shape[1] - 1

    def count_F(self) -> Tensor:
        """Rows that fire each feature."""
        return torch.bincount(self.feature_N, minlength=self.width)

    def by_row(self) -> tuple[Tensor, Tensor, Tensor]:
        """Entries sorted by row [N]; where each row's begin among them, and how many it has [R]."""
        in_row_R = torch.bincount(self.row_N, minlength=self.rows)
        return self.row_N.argsort(stable=True), in_row_R.cumsum(0) - in_row_R, in_row_R

    def of(self, feature: int) -> tuple[Tensor, Tensor]:
        """(rows, activations) of one feature, rows ascending."""
        ends = torch.searchsorted(self.feature_N, torch.tensor([feature, feature + 1]))
        part = slice(int(ends[0]), int(ends[1]))
        return self.row_N[part], self.value_N[part]


def ranges(begin: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """All integers of the ranges [begin, begin + length), and the index of the range that each belongs to."""
    which = torch.arange(len(begin)).repeat_interleave(length)
    return begin[which] + torch.arange(len(which)) - (length.cumsum(0) - length)[which], which


@torch.no_grad()
def firings(plan: Plan, state: TrainingState, sequences: int, rows: int = 65_536) -> Firings:
    """Look at `sequences` contexts of the state's stream, or at `rows` activations of one without tokens.

    Contexts that the text repeats count once, padded ones not at all, and a text that ends early gives what it has.
    Raises SourceError where it has nothing.
    """
    if "tokens" not in plan.facts.provides:
        return _of_rows(state, rows)
    tokens_ST = _distinct(state, sequences)
    pieces = []
    for begin in range(0, len(tokens_ST), PART):
        part_ST = tokens_ST[begin : begin + PART]
        taken = Sequences(tokens_ST=part_ST, real_ST=torch.ones_like(part_ST, dtype=torch.bool))
        x_STD = state.stream.activations(taken)[:, 1:].float()
        code = state.sae.encode(state.metric.white(Raw(x_STD.flatten(0, 1))))
        pieces.append(_entries(code, begin * (tokens_ST.shape[1] - 1)))
    rows = tokens_ST.shape[0] * (tokens_ST.shape[1] - 1)
    return _sorted(pieces, state.sae.width, rows, tokens_ST.cpu())


def _of_rows(state: TrainingState, rows: int) -> Firings:
    pieces = []
    for begin in range(0, rows, 2048):
        white_BD: White = state.metric.white(state.stream.next(min(2048, rows - begin)).x_BD)
        pieces.append(_entries(state.sae.encode(white_BD), begin))
    return _sorted(pieces, state.sae.width, rows, None)


def _distinct(state: TrainingState, sequences: int) -> Tensor:
    """Tokens [S, T] of at most `sequences` contexts, each once, in the order of the text."""
    found: dict[tuple[int, ...], Tensor] = {}
    for tokens_T in _contexts(state, sequences):
        found.setdefault(tuple(tokens_T.tolist()), tokens_T)
    if not found:
        raise SourceError("no held-out context is without padding (shorten source.context)")
    return torch.stack(list(found.values()))


def _contexts(state: TrainingState, sequences: int) -> Iterator[Tensor]:
    """Whole contexts, without those that are padded."""
    for begin in range(0, sequences, PART):
        try:
            taken = state.stream.sequences(min(PART, sequences - begin))
        except SourceError:
            if begin == 0:
                raise
            return
        yield from taken.tokens_ST[taken.real_ST.all(1)]


def _entries(code: Code, first_row: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row, feature, activation) of what fires in a code."""
    at_B, at_K = (code.gate_BK > 0).nonzero(as_tuple=True)
    feature_N = at_K if code.index_BK is None else code.index_BK[at_B, at_K]
    return (at_B + first_row).cpu(), feature_N.long().cpu(), code.z_BK[at_B, at_K].float().cpu()


def _sorted(pieces: list[tuple[Tensor, Tensor, Tensor]], width: int, rows: int, tokens_ST: Tensor | None) -> Firings:
    row_N, feature_N, value_N = (torch.cat(each) for each in zip(*pieces, strict=True))
    order_N = feature_N.argsort(stable=True)  # rows ascend already, and a stable sort leaves them so
    return Firings(
        width=width,
        rows=rows,
        row_N=row_N[order_N],
        feature_N=feature_N[order_N],
        value_N=value_N[order_N],
        tokens_ST=tokens_ST,
    )
