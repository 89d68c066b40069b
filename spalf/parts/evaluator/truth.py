"""Recovery of planted features. Shapes as in spalf/core/values.py; N planted features."""

from __future__ import annotations

from typing import ClassVar

import torch
from attrs import field
from attrs.validators import gt
from torch.nn.functional import normalize

from spalf.core.recipe import Plan
from spalf.core.slots import evaluator
from spalf.core.state import TrainingState
from spalf.core.values import White
from spalf.engine import matching
from spalf.engine.evaluate import untouched


@evaluator("ground_truth")
class GroundTruth:
    """Recovery of planted features: MCC, uniqueness, and F1 of each planted feature's matched latent (2602.14687).

    MCC is the mean absolute cosine, in model space, under the best one-to-one assignment (Hungarian) of planted
    directions to decoder rows; `mcc_floor` is that of random rows. F1 treats the assigned latent as a detector of its
    feature on `rows` held-out rows; features that fire in none of them are left out. Uniqueness is the number of
    distinct nearest latents per planted feature: 1 where no two features share one.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"truth"})
    rows: int = field(default=16_384, validator=gt(0))
    """Held-out activations for F1."""

    def __call__(self, plan: Plan, state: TrainingState) -> dict[str, float]:
        with untouched(state):
            truth_ND = normalize(state.stream.truth(), dim=-1)
            rows_FD = normalize(state.metric.raw_direction(White(state.sae.W_dec_FD)), dim=-1)
            cosine_NF = (truth_ND @ rows_FD.T).abs().cpu()
            found = matching.assigned(cosine_NF)
            nearest_N = cosine_NF.argmax(1)
            latent_of = dict(zip(found.first_P.tolist(), found.second_P.tolist(), strict=True))
            scores = self._f1(state, latent_of)
        return {
            "mcc": found.mean,
            "mcc_floor": matching.floor(truth_ND, len(rows_FD), signed=False),
            "uniqueness": len(set(nearest_N.tolist())) / len(nearest_N),
            **scores,
        }

    def _f1(self, state: TrainingState, latent_of: dict[int, int]) -> dict[str, float]:
        """Mean F1, precision and recall over planted features that fire."""
        feature = torch.tensor(sorted(latent_of), device=state.device)
        latent = torch.tensor([latent_of[n] for n in sorted(latent_of)], device=state.device)
        both_N = torch.zeros(len(feature), dtype=torch.float64, device=state.device)
        said_N, true_N = torch.zeros_like(both_N), torch.zeros_like(both_N)
        for _ in range(max(1, self.rows // 2048)):
            batch = state.stream.next(2048)
            assert batch.truth_BN is not None, "a source that provides truth fills truth_BN on its held-out stream"
            said_BN = state.sae.encode(state.metric.white(batch.x_BD)).dense()[:, latent] > 0
            true_BN = batch.truth_BN[:, feature] > 0
            both_N += (said_BN & true_BN).sum(0)
            said_N += said_BN.sum(0)
            true_N += true_BN.sum(0)
        fires = true_N > 0
        precision = (both_N / said_N.clamp(min=1))[fires]
        recall = (both_N / true_N.clamp(min=1))[fires]
        f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        return {"f1": float(f1.mean()), "precision": float(precision.mean()), "recall": float(recall.mean())}
