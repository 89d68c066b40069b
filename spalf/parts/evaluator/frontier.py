"""What sparsity costs after training, over scaled thresholds. Shapes: B rows, D d_model, S contexts, P predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from attrs import field
from attrs.validators import deep_iterable, gt
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.slots import evaluator
from spalf.core.state import TrainingState
from spalf.core.values import Raw, Sequences, White
from spalf.engine import language
from spalf.engine.bootstrap import Samples, Tally, measured
from spalf.engine.evaluate import untouched
from spalf.engine.frontier import rescaled

SEQUENCES = 8
"""Contexts per pass of the patched model."""


@evaluator("sparsity_frontier")
class SparsityFrontier:
    """L0, explained variance (raw) and, with a language model, cross-entropy over scaled thresholds.

    Every threshold is multiplied by each of `multipliers`; 1 is the trained dictionary. One that keeps its k largest
    entries keeps k / multiplier of them; one whose thresholds are 0 (relu) gets multiplier - 1 as the threshold of all.
    Intervals of the cross-entropy are over documents.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    multipliers: tuple[float, ...] = field(default=(0.5, 0.7, 1.0, 1.5, 2.0, 3.0), validator=deep_iterable(gt(0.0)))
    rows: int = field(default=8192, validator=gt(0))
    """Held-out activations for L0 and explained variance."""
    sequences: int = field(default=16, validator=gt(0))
    """Held-out contexts for cross-entropy."""

    def __call__(self, plan: Plan, state: TrainingState) -> dict[str, float]:
        out = {}
        with untouched(state):
            x_BD = state.stream.next(self.rows).x_BD
            for scale in self.multipliers:
                out[f"l0@{scale:g}"], out[f"r2_raw@{scale:g}"] = _at_scale(state, x_BD, scale)
            if "logits" not in plan.facts.provides:
                return out
            return measured(_losses(state, state.stream.sequences(self.sequences), self.multipliers), out)


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


def _losses(state: TrainingState, sequences: Sequences, scales: tuple[float, ...]) -> Samples:
    """`ce@scale` by document."""
    tally = Tally()
    for part in sequences.split(SEQUENCES):
        real_SP = part.real_ST[:, 1:]
        sums: dict[str, Tensor] = {}
        for scale in scales:
            logits_STV = state.stream.logits(part, _patch(state, scale))
            sums[f"ce@{scale:g}"] = language.cross_entropy(logits_STV, part.tokens_ST)[real_SP]
        tally.add(tally.units(part)[:, 1:][real_SP], n=torch.ones(int(real_SP.sum()), device=real_SP.device), **sums)
    return tally.samples(lambda totals: {k: v / totals["n"] for k, v in totals.items() if k != "n"})


def _patch(state: TrainingState, scale: float) -> Callable[[Raw], Raw]:
    def reconstruct(x: Raw) -> Raw:
        white_BD = state.metric.white(Raw(x.reshape(-1, x.shape[-1]).float()))
        hat_BD = state.metric.raw(state.sae.decode(rescaled(state, white_BD, scale)))
        return Raw(hat_BD.reshape(x.shape).to(x.dtype))

    return language.patch_after_first(reconstruct)
