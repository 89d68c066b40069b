"""What a reconstruction costs the language model. Shapes: S contexts, T positions, P predicted ones, N real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from attrs import field
from attrs.validators import gt
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.slots import evaluator
from spalf.core.state import TrainingState
from spalf.core.values import Raw, Sequences, White
from spalf.engine import language
from spalf.engine.bootstrap import Samples, Tally, Totals, measured
from spalf.engine.evaluate import untouched
from spalf.engine.step import reconstructor

SEQUENCES = 8
"""Contexts per pass of the patched model: [8, T, V] float32 logits fit anywhere."""
COSTLESS = 1e-4
"""Nats that an ablation has to cost before a share of it means anything."""

Patch = Callable[[Raw], Raw]


@evaluator("downstream_loss")
class DownstreamLoss:
    """The language model's loss with its activation reconstructed, and with it ablated to the mean and to zero.

    Means over `sequences` held-out contexts, then ratios: loss_recovered = (CE_mean - CE_patched) /
    (CE_mean - CE_clean), left out where ablation costs nothing. Position 0 has no context and is left clean in every
    variant; cross-entropy and KL are in nats per predicted position. Intervals are over documents, of which
    `documents` were seen; a position belongs to the document of the token that it predicts.

    How the cost is spread: `ce_gap.early` and `ce_gap.late` are means over the first and the last quarter of a
    context; `.document_mean` and `.document_std` take each document's own mean as one number; `.position_std` is over
    positions, of which the KL's median and 99th percentile are given, for a few of them carry most of it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    sequences: int = field(default=64, validator=gt(0))
    """Held-out contexts."""

    def __call__(self, plan: Plan, state: TrainingState) -> dict[str, float]:
        tally, kl = Tally(), []
        with untouched(state):
            for part in state.stream.sequences(self.sequences).split(SEQUENCES):
                kl.append(_add(tally, state, _patches(plan, state), part))
        samples, kl_N = tally.samples(_measure), torch.cat(kl).double()
        spread = {"kl.position_median": float(kl_N.median()), "kl.position_p99": float(kl_N.quantile(0.99))}
        return measured(samples, {**_document_spread(samples), **spread, "positions": float(len(kl_N))})


def _patches(plan: Plan, state: TrainingState) -> dict[str, Patch]:
    mean_D = state.metric.raw(White(torch.zeros(plan.facts.d_model, device=state.device)))
    return {
        "patched": language.patch_after_first(reconstructor(state)),
        "mean_ablated": language.patch_after_first(lambda x: Raw(mean_D.to(x.dtype).expand_as(x))),
        "zero_ablated": language.patch_after_first(lambda x: Raw(torch.zeros_like(x))),
    }


def _add(tally: Tally, state: TrainingState, patches: dict[str, Patch], part: Sequences) -> Tensor:
    """Add some contexts to the tally; their KL of the patched model [N], on the host."""
    real_SP = part.real_ST[:, 1:]
    clean_STV = state.stream.logits(part)
    sums = {"ce.clean": language.cross_entropy(clean_STV, part.tokens_ST)[real_SP]}
    for name, patch in patches.items():
        logits_STV = state.stream.logits(part, patch)
        sums[f"ce.{name}"] = language.cross_entropy(logits_STV, part.tokens_ST)[real_SP]
        if name != "zero_ablated":
            sums[f"kl.{name}"] = language.kl(clean_STV, logits_STV)[:, :-1][real_SP]
    gap_N = sums["ce.patched"].double() - sums["ce.clean"].double()
    length = real_SP.shape[1]
    place_N = torch.arange(length, device=real_SP.device).expand_as(real_SP)[real_SP]
    for name, here_N in (("early", place_N < length / 4), ("late", place_N >= length * 3 / 4)):
        sums[f"n.{name}"], sums[f"gap.{name}"] = here_N.double(), torch.where(here_N, gap_N, 0.0)
    tally.add(tally.units(part)[:, 1:][real_SP], n=torch.ones_like(gap_N), gap_square=gap_N.square(), **sums)
    return sums["kl.patched"].cpu()


def _measure(totals: Totals) -> dict[str, Tensor]:
    n_R = totals["n"]
    ce = {k: totals[f"ce.{k}"] / n_R for k in ("clean", "patched", "mean_ablated", "zero_ablated")}
    out = {f"ce_{name}": value_R for name, value_R in ce.items()}
    out["ce_gap"] = ce["patched"] - ce["clean"]
    for name, key in (("mean_ablated", "loss_recovered"), ("zero_ablated", "loss_recovered_zero")):
        cost_R = ce[name] - ce["clean"]
        out[key] = torch.where(cost_R > COSTLESS, (ce[name] - ce["patched"]) / cost_R, torch.nan)
    out["kl"] = totals["kl.patched"] / n_R
    out["kl_mean_ablated"] = totals["kl.mean_ablated"] / n_R
    for name in ("early", "late"):
        out[f"ce_gap.{name}"] = totals[f"gap.{name}"] / totals[f"n.{name}"]
    out["ce_gap.position_std"] = (totals["gap_square"] / n_R - out["ce_gap"].square()).clamp(min=0).sqrt()
    return out


def _document_spread(samples: Samples) -> dict[str, float]:
    """Mean and standard deviation over documents of their own means, each counted once whatever its length."""
    n_U, out = samples.sums["n"], {}
    gap_U = (samples.sums["ce.patched"] - samples.sums["ce.clean"]) / n_U
    for name, mean_U in (("ce_gap", gap_U), ("kl", samples.sums["kl.patched"] / n_U)):
        out[f"{name}.document_mean"] = float(mean_U.mean())
        out[f"{name}.document_std"] = float(mean_U.std(correction=0))
    return out
