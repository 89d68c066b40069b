"""What a list of firings says about single features.

Shapes: F features, I chosen features, N entries, R sampled rows, H bars.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spalf.engine.atlas.firings import Firings, ranges
from spalf.engine.atlas.records import DECADES, Pairs, Place

BARS = 24
SAMPLE = 128
"""Firings of a feature that its partners are counted on, evenly spaced over the text."""
REACH = 128
"""Positions on either side of a peak that its context covers."""
BLOCK = 256


def ranks(of: int, most: int) -> Tensor:
    """All ranks below `of`, or `most` evenly spaced ones."""
    if of <= most:
        return torch.arange(of)
    return ((torch.arange(most, dtype=torch.float64) + 0.5) / most * of).long()


def spread(count_F: Tensor, features: int) -> Tensor:
    """Ids, ascending: all, or `features` at evenly spaced ranks of how often they fire."""
    return count_F.argsort(descending=True, stable=True)[ranks(len(count_F), features)].sort().values


def decades(count_F: Tensor, rows: int) -> tuple[int, ...]:
    """Features that fire by log10 of their density, one count per bar of DECADES."""
    log_F = (count_F[count_F > 0] / rows).log10()
    inner = torch.tensor(DECADES[1:-1], dtype=log_F.dtype)
    counts = torch.bincount(torch.bucketize(log_F, inner, right=True), minlength=len(DECADES) - 1)
    return tuple(counts.tolist())


def levels(held: Firings) -> tuple[Tensor, Tensor, Tensor]:
    """Peak [F], mean activation [F], and a histogram [F, BARS] of each feature's activations from 0 to its peak."""
    count_F = held.count_F()
    zero_F = torch.zeros(held.width)
    peak_F = zero_F.scatter_reduce(0, held.feature_N, held.value_N, "amax")
    mean_F = zero_F.index_add(0, held.feature_N, held.value_N) / count_F.clamp(min=1)
    share_N = held.value_N / peak_F[held.feature_N].clamp(min=1e-30)
    bar_N = (share_N * BARS).long().clamp(0, BARS - 1)
    flat = torch.bincount(held.feature_N * BARS + bar_N, minlength=held.width * BARS)
    return peak_F, mean_F, flat.reshape(held.width, BARS)


def tokens(held: Firings, chosen_I: Tensor, most: int) -> list[Pairs]:
    """For each chosen feature the tokens with the largest shares of its summed activation."""
    if held.tokens_ST is None:
        return [()] * len(chosen_I)
    token_R = held.tokens_ST[:, 1:].reshape(-1)
    vocabulary = int(token_R.max()) + 1
    key_N, at_N = torch.unique(held.feature_N * vocabulary + token_R[held.row_N], return_inverse=True)
    mass_N = torch.zeros(len(key_N), dtype=torch.float64).index_add(0, at_N, held.value_N.double())
    feature_N, id_N = key_N // vocabulary, key_N % vocabulary
    out: list[Pairs] = []
    for f in chosen_I.tolist():
        part = _part(feature_N, f)
        mass = mass_N[part]
        best = mass.topk(min(most, len(mass)))
        shares = (best.values / mass.sum().clamp(min=1e-30)).tolist()
        out.append(_pairs(id_N[part][best.indices].tolist(), shares))
    return out


def partners(held: Firings, chosen_I: Tensor, most: int, least: int = 3) -> list[Pairs]:
    """For each chosen feature the features that fire with it, by the cosine of the two firing patterns.

    Counted on at most SAMPLE of its firings; a partner fires on at least `least` of them.
    """
    count_F = held.count_F()
    begin_F = count_F.cumsum(0) - count_F
    by_row_N, first_R, in_row_R = held.by_row()
    out: list[Pairs] = []
    for few_I in torch.split(chosen_I, BLOCK):
        owner, rows = _sample(held, few_I, count_F, begin_F)
        entry, which = ranges(first_R[rows], in_row_R[rows])
        key = owner[which] * held.width + held.feature_N[by_row_N[entry]]
        together_IF = torch.bincount(key, minlength=len(few_I) * held.width).reshape(-1, held.width)
        sampled_I = count_F[few_I].clamp(max=SAMPLE)
        share_IF = together_IF / sampled_I.clamp(min=1)[:, None]
        # n_ij / sqrt(n_i n_j), where n_ij = share n_i
        score_IF = share_IF * (count_F[few_I].clamp(min=1)[:, None] / count_F.clamp(min=1)).sqrt()
        score_IF[together_IF < least] = 0.0
        score_IF[torch.arange(len(few_I)), few_I] = 0.0
        best = score_IF.topk(min(most, held.width))
        for scores, ids, share_F in zip(best.values.tolist(), best.indices.tolist(), share_IF, strict=True):
            kept = [j for s, j in zip(scores, ids, strict=True) if s > 0]
            out.append(_pairs(kept, share_F[kept].tolist()))
    return out


def _sample(held: Firings, few_I: Tensor, count_F: Tensor, begin_F: Tensor) -> tuple[Tensor, Tensor]:
    """(index into few_I, row) of at most SAMPLE evenly spaced firings of each feature."""
    n_I = count_F[few_I].clamp(max=SAMPLE)
    owner = torch.arange(len(few_I)).repeat_interleave(n_I)
    step = torch.arange(len(owner)) - (n_I.cumsum(0) - n_I)[owner]
    entry = begin_F[few_I][owner] + step * count_F[few_I][owner] // n_I[owner]
    return owner, held.row_N[entry]


def places(held: Firings, feature: int, strongest: int, between: int = 0) -> tuple[Place, ...]:
    """The strongest contexts of a feature, then `between` evenly spaced over the rest of its firings.

    Each is of another sequence.
    """
    if held.tokens_ST is None:
        return ()
    row_N, value_N = held.of(feature)
    order = value_N.argsort(descending=True, stable=True).tolist()
    sequence = (row_N // held.span).tolist()
    used: dict[int, int] = {}
    _take(order, sequence, used, strongest)
    if len(used) == strongest:
        for i in range(between):
            _take(order[len(order) * (i + 1) // (between + 1) :], sequence, used, 1)
    return tuple(_place(held, row_N, value_N, s, rank, order) for s, rank in used.items())


def _take(order: Sequence[int], sequence: Sequence[int], used: dict[int, int], most: int) -> None:
    """Add up to `most` entries of sequences that are not used yet, in order."""
    wanted = len(used) + most
    for entry in order:
        if len(used) == wanted:
            return
        used.setdefault(sequence[entry], entry)


def _place(held: Firings, row_N: Tensor, value_N: Tensor, sequence: int, entry: int, order: list[int]) -> Place:
    peak = int(row_N[entry])
    first, last = sequence * held.span, (sequence + 1) * held.span - 1
    near = torch.tensor([max(first, peak - REACH), min(last, peak + REACH) + 1])
    part = slice(*torch.searchsorted(row_N, near).tolist())
    positions = (row_N[part] % held.span + 1).tolist()
    stronger = int((value_N > value_N[entry]).sum())
    return Place(
        sequence=sequence,
        position=peak % held.span + 1,
        rank=stronger / max(1, len(order) - 1),
        activations=_pairs(positions, value_N[part].tolist()),
    )


def _part(sorted_N: Tensor, value: int) -> slice:
    ends = torch.searchsorted(sorted_N, torch.tensor([value, value + 1]))
    return slice(int(ends[0]), int(ends[1]))


def _pairs(ids: Sequence[int], numbers: Sequence[float]) -> Pairs:
    return tuple(zip(ids, numbers, strict=True))
