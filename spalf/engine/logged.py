"""What only a logged line holds of a step."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from spalf.core.state import TrainingState
from spalf.core.values import Forward, White

SPREAD = (5, 50, 95)
"""Percentiles over features in which thresholds and bandwidths are logged."""


@torch.no_grad()
def logged(state: TrainingState, forward: Forward, silent_F: Tensor, dead_window: int) -> dict[str, Tensor]:
    """Scalars: two more products, a dead count, two sorts of F numbers. While recorded, none may come from the host."""
    numbers = {}
    error_BD = White(forward.white_BD - forward.white_hat_BD).detach()
    for space, e_BD in (("raw", state.metric.raw_direction(White(error_BD))), ("white", error_BD)):
        numbers[f"r2_{space}"] = 1 - e_BD.square().sum(-1).mean() / state.metric.variance(space)
    numbers["gain"] = state.sae.log_gain.detach().exp()
    numbers["dead"] = (silent_F > dead_window).float().mean()
    lr = state.learner.optimizer.param_groups[0]["lr"]
    # On the device it is one tensor for all steps, which the next one writes over.
    numbers["lr"] = lr.detach().float().clone() if isinstance(lr, Tensor) else torch.tensor(float(lr))
    return {**numbers, **_spread(state)}


@cache
def _spread_at(device: torch.device) -> Tensor:
    """SPREAD as shares; made once, not while a step is recorded."""
    return torch.tensor([p / 100 for p in SPREAD], device=device)


def _spread(state: TrainingState) -> dict[str, Tensor]:
    """Quantiles over features of the thresholds, and of the windows around them where an activation has windows."""
    activator = state.sae.activator
    theta_F, window_F = activator.threshold_F(), getattr(activator, "bandwidth_F", None)
    held = {} if activator.k else {"threshold": theta_F}
    if window_F is not None:
        held["bandwidth"] = window_F
    at = _spread_at(theta_F.device)
    return {
        f"{name}.p{p:02}": q
        for name, value_F in held.items()
        for p, q in zip(SPREAD, torch.quantile(value_F.float(), at), strict=True)
    }
