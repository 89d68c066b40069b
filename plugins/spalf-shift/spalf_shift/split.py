"""Splits that keep every sentence on one side.

Shapes: N pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from attrs import evolve
from torch import Tensor

from spalf import Pairs, SourceError


def take(pairs: Pairs, index_K: Tensor) -> Pairs:
    """The pairs at `index_K`."""
    labels_NC = pairs.labels_NC
    return evolve(
        pairs,
        a_ND=pairs.a_ND[index_K],
        b_ND=pairs.b_ND[index_K],
        labels_NC=None if labels_NC is None else labels_NC[index_K],
        sentence_a_N=pairs.sentence_a_N[index_K],
        sentence_b_N=pairs.sentence_b_N[index_K],
    )


def groups_of(sentence_a_N: Tensor, sentence_b_N: Tensor) -> Tensor:
    """A group per pair, int64 [N]: pairs that share a sentence, directly or by way of others, are in one group.

    So a mirrored pair is in its pair's group, and all variants of a sentence are in one.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    _, at = np.unique(np.concatenate([sentence_a_N.numpy(), sentence_b_N.numpy()]), return_inverse=True)
    n = len(sentence_a_N)
    a, b, size = at[:n], at[n:], int(at.max(initial=-1)) + 1
    _, group = connected_components(coo_matrix((np.ones(n), (a, b)), shape=(size, size)), directed=False)
    return torch.from_numpy(group[a].astype(np.int64))


def by_sentence(pairs: Pairs, shares: Sequence[float], seed: int) -> list[Pairs]:
    """Parts of `pairs`, about `shares` of it each, by a draw of whole groups: no sentence is in two parts.

    Raises SourceError where a part would be empty: there are too few groups of pairs without a sentence in common.
    """
    group_N = groups_of(pairs.sentence_a_N, pairs.sentence_b_N)
    count = int(group_N.max()) + 1 if len(group_N) else 0
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    size_G = torch.bincount(group_N, minlength=count)[order].cumsum(0)
    edges = torch.tensor(shares, dtype=torch.float64).cumsum(0) / sum(shares) * len(pairs)
    # A group goes to the part in which its middle lies.
    middle_G = size_G.double() - torch.bincount(group_N, minlength=count)[order].double() / 2
    part_G = torch.empty(count, dtype=torch.int64)
    part_G[order] = torch.searchsorted(edges[:-1].contiguous(), middle_G)
    parts = [take(pairs, (part_G[group_N] == i).nonzero()[:, 0]) for i in range(len(shares))]
    if any(len(part) == 0 for part in parts):
        raise SourceError(
            f"{len(pairs)} pairs in {count} groups without a sentence in common cannot be split into {len(shares)} "
            "parts (give more pairs of other sentences)"
        )
    return parts
