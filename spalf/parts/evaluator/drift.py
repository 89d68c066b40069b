"""Whether anchored rows still stand for their tokens. Shapes: A anchored rows, D d_model, V vocabulary."""

from __future__ import annotations

from typing import ClassVar

import torch
from attrs import field
from attrs.validators import gt
from torch import Tensor
from torch.nn.functional import normalize

from spalf.core.recipe import Plan
from spalf.core.slots import evaluator
from spalf.core.state import Anchor, TrainingState
from spalf.core.values import White


@evaluator("drift_fidelity")
class DriftFidelity:
    """How far anchored decoder rows still point at their tokens, in model space.

    Mean and least cosine with the anchor, and `own_token`, the share of rows whose best-matching anchor is their own.
    With an unembedding also `promotes_own` and `promotes_own_top`: the share of rows whose own token is the one, or
    among the `top`, that the row raises most of the whole vocabulary (row times unembedding; the final norm is left
    out, and a common shift of all logits changes no rank). Nothing where no stratum is anchored.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    top: int = field(default=10, validator=gt(0))
    """How many promoted tokens a row's own may be among."""

    def __call__(self, plan: Plan, state: TrainingState) -> dict[str, float]:
        out = {}
        has_words = "unembedding" in plan.facts.provides
        with torch.no_grad():
            for name, anchor in sorted(state.anchors.items()):
                rows_AD = normalize(state.metric.raw_direction(White(state.sae.W_dec_FD[state.sae.rows[name]])), dim=-1)
                own_A = (rows_AD * anchor.directions_AD).sum(-1)
                best_A = torch.cat([(part @ anchor.directions_AD.T).argmax(-1) for part in torch.split(rows_AD, 1024)])
                here_A = torch.arange(len(best_A), device=best_A.device)
                out[f"{name}.cosine_mean"] = float(own_A.mean())
                out[f"{name}.cosine_min"] = float(own_A.min())
                out[f"{name}.own_token"] = float((best_A == here_A).double().mean())
                if has_words:
                    rank_A = _ranks(rows_AD, anchor, state.stream.unembedding())
                    out[f"{name}.promotes_own"] = float((rank_A == 0).double().mean())
                    out[f"{name}.promotes_own_top"] = float((rank_A < self.top).double().mean())
        return out


def _ranks(rows_AD: Tensor, anchor: Anchor, unembedding_VD: Tensor) -> Tensor:
    """How many tokens each row raises more than its own, [A]."""
    ranks = []
    for part_AD, ids_A in zip(torch.split(rows_AD, 256), torch.split(anchor.ids_A, 256), strict=True):
        logit_AV = part_AD @ unembedding_VD.T
        ranks.append((logit_AV > logit_AV.gather(1, ids_A[:, None])).sum(1))
    return torch.cat(ranks)
