"""What a law is judged by on one problem; shapes as in `control_loop`.

The violation that counts, r, is g where the constraint binds at the optimum and [g]+ where it does not. A multiplier's
error is lam - lam*, as a share of the problem's largest lam*, and as the mean over seeds where noise has no say.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spalf.bench.control_loop import EVERY, Trace
from spalf.bench.control_plants import Plant

FLOORS = {"settling": 50.0, "overshoot": 0.05, "error": 0.01, "noise": 0.02, "end": 0.005}
"""Every measure, and how much of it counts as little: a score is the mean of ln(1 + measure / floor)."""
FAR = 0.5
"""Violations count as at most this: how far off a problem starts says nothing of a law."""
BAND = 0.1


def measures(plant: Plant, trace: Trace) -> dict[str, Tensor]:
    """For each configuration, [C]:

    settling: steps until every multiplier stays within a tenth of lam*'s scale (where lam* is not known: until |r|,
    smoothed over nine ticks, stays within .1); overshoot: the largest excess over lam* (|r| below 0); error: root mean
    square of r, the control error's energy; noise: deviation of the multipliers between seeds over the last third;
    end: root mean square of r at the last step. All from the step at which the plant is judged.
    """
    first = plant.judged // EVERY
    lam, g, target_TM = trace.lam[first:], trace.g[first:], trace.target_TM[first:]
    binds_TM = ~(target_TM <= 0)  # NaN, where lam* is not known, binds
    r = torch.where(binds_TM[:, None, None], g, g.clamp(min=0))
    away_TCM = (lam.mean(2) - target_TM[:, None]) / _scale(plant, target_TM) if plant.known else -_smooth(r.mean(2))
    wrong_TC = (away_TCM.abs() > BAND).any(-1)
    ticks_T1 = torch.arange(1, len(wrong_TC) + 1)[:, None]
    late = lam[-(len(lam) // 3) :]
    spread_C = (late - late.mean(2, keepdim=True)).square().sum(2).mean((0, 2)) / max(1, lam.shape[2] - 1)
    return {
        "settling": ((wrong_TC * ticks_T1).amax(0) * EVERY).double(),
        "overshoot": away_TCM.clamp(min=0).amax((0, 2)),
        "error": r.clamp(-FAR, FAR).square().mean((0, 2, 3)).sqrt(),
        "noise": spread_C.sqrt() / _scale(plant, target_TM),
        "end": r[-1].square().mean((1, 2)).sqrt(),
    }


def score(measured: dict[str, Tensor]) -> Tensor:
    """[C], lower is better; a difference of .1 is about a tenth in every measure. A law that diverged scores high."""
    shares = [(measured[name] / floor).nan_to_num(1e6, 1e6).log1p() for name, floor in FLOORS.items()]
    return torch.stack(shares).mean(0)


def _scale(plant: Plant, target_TM: Tensor) -> float:
    return float(target_TM.max()) if plant.known else 1.0


def _smooth(r_TCM: Tensor) -> Tensor:
    """Running means over nine ticks."""
    padded = r_TCM.permute(1, 2, 0)
    return torch.nn.functional.avg_pool1d(padded, 9, 1, 4, count_include_pad=False).permute(2, 0, 1)
