"""Evaluators: finite named numbers about a state, on documents that training never saw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import deep_iterable, gt
from torch import Tensor
from torch.nn.functional import normalize

from spalf.core.recipe import Plan
from spalf.core.slots import evaluator
from spalf.core.state import TrainingState
from spalf.core.values import Raw, Sequences, White
from spalf.engine import language
from spalf.engine.evaluate import untouched
from spalf.engine.frontier import rescaled
from spalf.engine.step import reconstructor

SEQUENCES = 8
"""Contexts per pass of the patched model: [8, T, V] float32 logits fit anywhere."""
COSTLESS = 1e-4
"""Nats that an ablation has to cost before a share of it means anything."""


def _parts(sequences: Sequences) -> Iterator[Sequences]:
    for begin in range(0, sequences.tokens_ST.shape[0], SEQUENCES):
        part = slice(begin, begin + SEQUENCES)
        yield Sequences(tokens_ST=sequences.tokens_ST[part], real_ST=sequences.real_ST[part])


@frozen(kw_only=True)
class Loss:
    """Sums over predicted positions: cross-entropy and KL from the clean model, both in nats."""

    ce: float = 0.0
    kl: float = 0.0
    positions: int = 0

    def plus(self, ce_SP: Tensor, kl_SP: Tensor, real_SP: Tensor) -> Loss:
        return Loss(
            ce=self.ce + float((ce_SP * real_SP).sum(dtype=torch.float64)),
            kl=self.kl + float((kl_SP * real_SP).sum(dtype=torch.float64)),
            positions=self.positions + int(real_SP.sum()),
        )

    @property
    def mean_ce(self) -> float:
        return self.ce / max(1, self.positions)

    @property
    def mean_kl(self) -> float:
        return self.kl / max(1, self.positions)


@evaluator("downstream_loss")
class DownstreamLoss:
    """The language model's loss with its activation reconstructed, and with it ablated to the mean and to zero.

    Means over `sequences` held-out contexts, then ratios: loss_recovered = (CE_mean - CE_patched) /
    (CE_mean - CE_clean), left out where ablation costs nothing. Position 0 has no context and is left clean in every
    variant; cross-entropy and KL are in nats per predicted position.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    sequences: int = field(default=64, validator=gt(0))

    def __call__(self, plan: Plan, state: TrainingState) -> dict[str, float]:
        mean_D = state.metric.raw(White(torch.zeros(plan.facts.d_model, device=state.device)))
        patches = {
            "clean": None,
            "patched": language.patch_after_first(reconstructor(state)),
            "mean_ablated": language.patch_after_first(lambda x: Raw(mean_D.to(x.dtype).expand_as(x))),
            "zero_ablated": language.patch_after_first(lambda x: Raw(torch.zeros_like(x))),
        }
        losses = {name: Loss() for name in patches}
        with untouched(state):
            for part in _parts(state.stream.sequences(self.sequences)):
                clean_STV = state.stream.logits(part)
                real_SP = part.real_ST[:, 1:].float()
                for name, patch in patches.items():
                    logits_STV = clean_STV if patch is None else state.stream.logits(part, patch)
                    ce_SP = language.cross_entropy(logits_STV, part.tokens_ST)
                    kl_SP = language.kl(clean_STV, logits_STV)[:, :-1]
                    losses[name] = losses[name].plus(ce_SP, kl_SP, real_SP)
        return self._report(losses)

    @staticmethod
    def _report(losses: dict[str, Loss]) -> dict[str, float]:
        ce = {name: loss.mean_ce for name, loss in losses.items()}
        out = {f"ce_{name}": value for name, value in ce.items()}
        out["ce_gap"] = ce["patched"] - ce["clean"]
        for name, key in (("mean_ablated", "loss_recovered"), ("zero_ablated", "loss_recovered_zero")):
            cost = ce[name] - ce["clean"]
            if cost > COSTLESS:
                out[key] = (ce[name] - ce["patched"]) / cost
        out["kl"] = losses["patched"].mean_kl
        out["kl_mean_ablated"] = losses["mean_ablated"].mean_kl
        out["positions"] = float(losses["patched"].positions)
        return out


@evaluator("sparsity_frontier")
class SparsityFrontier:
    """L0, explained variance (raw) and, with a language model, cross-entropy over scaled thresholds.

    Every threshold is multiplied by each of `multipliers`; 1 is the trained dictionary.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    multipliers: tuple[float, ...] = field(default=(0.5, 0.7, 1.0, 1.5, 2.0, 3.0), validator=deep_iterable(gt(0.0)))
    rows: int = field(default=8192, validator=gt(0))
    sequences: int = field(default=16, validator=gt(0))

    def __call__(self, plan: Plan, state: TrainingState) -> dict[str, float]:
        out = {}
        with untouched(state):
            x_BD = state.stream.next(self.rows).x_BD
            some = state.stream.sequences(self.sequences) if "logits" in plan.facts.provides else None
            for scale in self.multipliers:
                l0, r2 = _at_scale(state, x_BD, scale)
                out[f"l0@{scale:g}"], out[f"r2_raw@{scale:g}"] = l0, r2
                if some is not None:
                    out[f"ce@{scale:g}"] = _ce_at_scale(state, some, scale)
        return out


def _at_scale(state: TrainingState, x_BD: Raw, scale: float) -> tuple[float, float]:
    """(L0, explained variance) of rows with scaled thresholds."""
    l0 = error = 0.0
    for few_BD in torch.split(x_BD, 2048):
        white_BD = state.metric.white(Raw(few_BD))
        code = rescaled(state, white_BD, scale)
        e_BD = state.metric.raw_direction(White(white_BD - state.sae.decode(code)))
        l0 += float(code.l0_B().sum())
        error += float(e_BD.square().sum(dtype=torch.float64))
    total = float((x_BD - x_BD.mean(0)).square().sum(dtype=torch.float64))
    return l0 / x_BD.shape[0], 1.0 - error / max(total, 1e-30)


def _ce_at_scale(state: TrainingState, sequences: Sequences, scale: float) -> float:
    def reconstruct(x: Raw) -> Raw:
        white_BD = state.metric.white(Raw(x.reshape(-1, x.shape[-1]).float()))
        hat_BD = state.metric.raw(state.sae.decode(rescaled(state, white_BD, scale)))
        return Raw(hat_BD.reshape(x.shape).to(x.dtype))

    total = Loss()
    for part in _parts(sequences):
        logits_STV = state.stream.logits(part, language.patch_after_first(reconstruct))
        ce_SP = language.cross_entropy(logits_STV, part.tokens_ST)
        total = total.plus(ce_SP, torch.zeros_like(ce_SP), part.real_ST[:, 1:].float())
    return total.mean_ce


@evaluator("drift_fidelity")
class DriftFidelity:
    """How far anchored decoder rows still point at their tokens, in model space.

    Mean and least cosine with the anchor, and the share of rows whose best-matching anchor is their own. Nothing
    where no stratum is anchored.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, plan: Plan, state: TrainingState) -> dict[str, float]:
        out = {}
        with torch.no_grad():
            for name, anchor in sorted(state.anchors.items()):
                rows_AD = normalize(state.metric.raw_direction(White(state.sae.W_dec_FD[state.sae.rows[name]])), dim=-1)
                own_A = (rows_AD * anchor.directions_AD).sum(-1)
                best_A = torch.cat([(part @ anchor.directions_AD.T).argmax(-1) for part in torch.split(rows_AD, 1024)])
                here_A = torch.arange(len(best_A), device=best_A.device)
                out[f"{name}.cosine_mean"] = float(own_A.mean())
                out[f"{name}.cosine_min"] = float(own_A.min())
                out[f"{name}.own_token"] = float((best_A == here_A).double().mean())
        return out


@evaluator("ground_truth")
class GroundTruth:
    """Recovery of planted features: MCC, uniqueness, and F1 of each planted feature's matched latent (2602.14687).

    MCC is the mean absolute cosine, in model space, under the best one-to-one assignment (Hungarian) of planted
    directions to decoder rows. F1 treats the assigned latent as a detector of its feature on `rows` held-out rows;
    features that fire in none of them are left out. Uniqueness is the number of distinct nearest latents per planted
    feature: 1 where no two features share one.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"truth"})
    rows: int = field(default=16_384, validator=gt(0))

    def __call__(self, plan: Plan, state: TrainingState) -> dict[str, float]:
        from scipy.optimize import linear_sum_assignment

        with untouched(state):
            truth_ND = normalize(state.stream.truth(), dim=-1)
            rows_FD = normalize(state.metric.raw_direction(White(state.sae.W_dec_FD)), dim=-1)
            cosine_NF = (truth_ND @ rows_FD.T).abs().cpu()
            feature, latent = linear_sum_assignment(cosine_NF.numpy(), maximize=True)
            nearest_N = cosine_NF.argmax(1)
            latent_of = dict(zip(feature.tolist(), latent.tolist(), strict=True))
            scores = self._f1(state, latent_of)
        return {
            "mcc": float(cosine_NF[feature, latent].mean()),
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
