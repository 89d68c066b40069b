"""Rows that are tied to a token: how far they have moved, and who speaks for their token instead of them.

Shapes: A anchored rows, D model width, R rows of held-out text, N entries, K features of few rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

from spalf.core.state import TrainingState
from spalf.core.values import White
from spalf.engine.absorption import Rule, absorbed
from spalf.engine.atlas.firings import Firings, ranges
from spalf.engine.atlas.records import Anchored

OCCURRENCES = 256
"""Places of a token that absorption is judged on, at most; evenly spaced over the text."""
LEAST = 5
"""Places below which nothing is said of absorption."""


def anchors(state: TrainingState) -> dict[int, Anchored]:
    """By feature id, what each anchored row is tied to and how far it has moved."""
    out: dict[int, Anchored] = {}
    for name, anchor in state.anchors.items():
        span = state.sae.rows[name]
        now_AD = state.sae.W_dec_FD[span].detach()
        start_AD = normalize(state.metric.white_direction(anchor.directions_AD), dim=-1)
        moved_A = (now_AD - start_AD).norm(dim=-1)
        raw_AD = normalize(state.metric.raw_direction(White(now_AD)), dim=-1)
        cosine_A = (raw_AD * normalize(anchor.directions_AD, dim=-1)).sum(-1)
        told = zip(anchor.ids_A.tolist(), moved_A.tolist(), cosine_A.tolist(), strict=True)
        for i, (token, drift, cosine) in enumerate(told):
            out[span.start + i] = Anchored(token=token, drift=drift, cosine=cosine)
    return out


def absorption(held: Firings, state: TrainingState, ahead: Mapping[str, bool]) -> dict[int, float]:
    """By id of an anchored feature, the share of its token's places at which another feature speaks for it.

    `ahead` tells of each stratum whether its anchors are rows of the unembedding, whose places are those where the
    token comes next; else they are mean activations, whose places are those where it stands. The feature is absorbed
    at one if it is silent while another feature alone puts at least 0.4 of what the dictionary puts along the anchor
    there, at a cosine of at least 0.025: full absorption (2409.14507, 2503.09532) with the anchor in the place of a
    probe. Places where the dictionary puts nothing along it do not count; below LEAST nothing is said.
    """
    if held.tokens_ST is None:
        return {}
    next_R = torch.cat([held.tokens_ST[:, 2:], torch.full_like(held.tokens_ST[:, :1], -1)], dim=1).flatten()
    here_R = held.tokens_ST[:, 1:].flatten()
    entry_N, first_R, in_row_R = held.by_row()
    out: dict[int, float] = {}
    for name, anchor in state.anchors.items():
        places, order_R = (next_R if ahead[name] else here_R).sort(stable=True)
        for i, token in enumerate(anchor.ids_A.tolist()):
            begin, end = torch.searchsorted(places, torch.tensor([token, token + 1])).tolist()
            step = max(1, -(-(end - begin) // OCCURRENCES))
            row_R = order_R[begin:end:step]
            entry, which = ranges(first_R[row_R], in_row_R[row_R])
            feature = state.sae.rows[name].start + i
            direction_D = normalize(anchor.directions_AD[i].detach(), dim=0)
            share = _absorbed(held, state, entry_N[entry], which, len(row_R), feature, direction_D)
            if share is not None:
                out[feature] = share
    return out


def _absorbed(
    held: Firings, state: TrainingState, entry: Tensor, which: Tensor, rows: int, feature: int, direction_D: Tensor
) -> float | None:
    """The share of `rows` at which `feature` is absorbed, of those where anything is put along the direction."""
    ids_K, column = torch.unique(torch.cat([torch.tensor([feature]), held.feature_N[entry]]), return_inverse=True)
    z_RK = torch.zeros(rows, len(ids_K))
    z_RK[which, column[1:]] = held.value_N[entry]
    device_K = ids_K.to(state.device)
    raw_KD = state.metric.raw_direction(White(state.sae.W_dec_FD.detach()[device_K]))
    along_K = (raw_KD @ direction_D).cpu()
    cosine_K = along_K / raw_KD.norm(dim=1).clamp(min=1e-12).cpu()
    put_R = z_RK @ along_K
    told = absorbed(z_RK, along_K, cosine_K, put_R, column[:1], Rule())
    if int((put_R > 0).sum()) < LEAST:
        return None
    return float(told.full_N[put_R > 0].float().mean())
