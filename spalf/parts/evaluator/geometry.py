"""How a dictionary's rows lie to each other. Shapes as in spalf/core/values.py; R sampled rows of a matrix or batch."""

from __future__ import annotations

from typing import ClassVar

import torch
from attrs import field
from attrs.validators import gt, le
from torch import Tensor
from torch.nn.functional import normalize

from spalf.core.recipe import Plan
from spalf.core.slots import evaluator
from spalf.core.state import TrainingState
from spalf.core.values import White
from spalf.engine.evaluate import untouched

WHOLE = slice(None)


@evaluator("geometry")
class Geometry:
    """Angles between decoder rows in model space, rows at unit length: of the whole dictionary and of each stratum.

    `coherence` is the largest |cosine| of two rows and `coherence_mean` the mean over rows of the largest to any other;
    `welch` is the least coherence that so many rows can have in d dimensions. `duplicates` is the share of rows with
    another at a cosine above `duplicate`. `cosine_square` is the mean over all pairs, 1 / d for random directions, and
    `coactivation` the same over pairs that fire together, which says how far features that share a token share a
    direction. `frame_energy` is |D'D / tr(D'D) - I / d|^2 (2602.02224), 0 for a tight frame; `.white` is in whitened
    coordinates. Above `rows` rows the nearest other one is looked for from a sample.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    duplicate: float = field(default=0.9, validator=[gt(0.0), le(1.0)])
    """Cosine above which two rows count as one direction."""
    rows: int = field(default=8192, validator=gt(1))
    """Rows whose nearest other row is looked for."""
    sample: int = field(default=1024, validator=gt(0))
    """Held-out activations for co-activation."""

    def __call__(self, plan: Plan, state: TrainingState) -> dict[str, float]:
        out: dict[str, float] = {}
        spans = {"": WHOLE} if len(state.sae.rows) == 1 else {"": WHOLE, **state.sae.rows}
        with untouched(state):
            white_FD = state.sae.W_dec_FD.detach().float()
            raw_FD = state.metric.raw_direction(White(white_FD))
            for name, span in spans.items():
                unit_FD = normalize(raw_FD[span], dim=-1)
                found = {
                    **self._nearest(unit_FD),
                    **_spread(unit_FD),
                    "frame_energy.white": _frame_energy(normalize(white_FD[span], dim=-1)),
                    "coactivation": self._coactivation(state, span),
                }
                out.update({f"{name}.{key}" if name else key: value for key, value in found.items()})
            if plan.knobs.F > 1:
                out["welch"] = _welch(plan.knobs.F, plan.facts.d_model)
        return out

    def _nearest(self, unit_FD: Tensor) -> dict[str, float]:
        rows = len(unit_FD)
        if rows < 2:
            return {}
        draw = torch.Generator().manual_seed(0)
        chosen_R = torch.randperm(rows, generator=draw)[: self.rows].to(unit_FD.device)
        largest, nearest = [], []
        for part_R in torch.split(chosen_R, 1024):
            cosine_RF = unit_FD[part_R] @ unit_FD.T
            cosine_RF[torch.arange(len(part_R), device=part_R.device), part_R] = 0.0
            largest.append(cosine_RF.abs().amax(1))
            nearest.append(cosine_RF.amax(1))
        largest_R, nearest_R = torch.cat(largest), torch.cat(nearest)
        return {
            "coherence": float(largest_R.max()),
            "coherence_mean": float(largest_R.double().mean()),
            "duplicates": float((nearest_R > self.duplicate).double().mean()),
        }

    def _coactivation(self, state: TrainingState, span: slice) -> float:
        """Mean squared cosine of features that fire together, over held-out rows, each row counted once."""
        code = state.sae.encode(state.metric.white(state.stream.held_out().next(self.sample).x_BD))
        every_R = torch.arange(self.sample, device=state.device)
        direction = state.metric.raw_direction
        return float(state.sae.machine.ops.coactivation(code, state.sae, every_R, span, direction, state.rng.device))


def _spread(unit_FD: Tensor) -> dict[str, float]:
    """Mean squared cosine of all pairs, by |D'D|^2 = sum of all squared cosines, and the frame energy."""
    out = {"frame_energy": _frame_energy(unit_FD)}
    rows = len(unit_FD)
    if rows > 1:
        wide_FD = unit_FD.double()
        out["cosine_square"] = float(((wide_FD.T @ wide_FD).square().sum() - rows) / (rows * (rows - 1)))
    return out


def _frame_energy(unit_FD: Tensor) -> float:
    wide_FD = unit_FD.double()
    frame_DD = wide_FD.T @ wide_FD
    frame_DD = frame_DD / frame_DD.trace().clamp(min=1e-30)
    return float((frame_DD - torch.eye(len(frame_DD), device=frame_DD.device) / len(frame_DD)).square().sum())


def _welch(rows: int, d: int) -> float:
    """sqrt((F - d) / (d (F - 1))); 0 where so many rows can be orthogonal."""
    return float(max(0.0, (rows - d) / (d * (rows - 1))) ** 0.5)
