"""What a dictionary's decoder rows say in model space: neighbours, tokens, planted directions.

Shapes: F features, I chosen features, D model width, V vocabulary, P planted directions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from spalf.core.state import TrainingState
from spalf.core.values import White
from spalf.engine.atlas.records import Pairs

BLOCK = 256


def rows(state: TrainingState) -> Tensor:
    """Decoder rows [F, D] in model space, unit norm."""
    return normalize(state.metric.raw_direction(White(state.sae.W_dec_FD.detach())), dim=-1)


def nearest(from_ID: Tensor, to_D: Tensor, most: int, own_I: Tensor | None = None) -> list[Pairs]:
    """For each row of `from_ID` the rows of `to_D` with the largest cosines; `own_I` are left out. Both unit rows."""
    out: list[Pairs] = []
    for begin in range(0, len(from_ID), BLOCK):
        cosine = from_ID[begin : begin + BLOCK] @ to_D.T
        if own_I is not None:
            cosine.scatter_(1, own_I[begin : begin + BLOCK, None].to(cosine.device), -2.0)
        out += _best(cosine, min(most, len(to_D) - (own_I is not None)))
    return out


def through(from_ID: Tensor, unembedding_VD: Tensor, most: int) -> tuple[list[Pairs], list[Pairs]]:
    """Tokens that each row raises most and lowers most, by its product with the centred unembedding.

    Centred, since a shift that all logits share changes no probability.
    """
    centred_VD = unembedding_VD - unembedding_VD.mean(0)
    up: list[Pairs] = []
    down: list[Pairs] = []
    for few_ID in torch.split(from_ID, BLOCK):
        logit_IV = few_ID @ centred_VD.T
        up += _best(logit_IV, most)
        down += [tuple((v, -x) for v, x in pairs) for pairs in _best(-logit_IV, most)]
    return up, down


def _best(score: Tensor, most: int) -> list[Pairs]:
    best = score.topk(max(0, min(most, score.shape[1])))
    each = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [tuple(zip(ids, xs, strict=True)) for ids, xs in each]
