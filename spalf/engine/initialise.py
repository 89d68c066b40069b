"""From calibrated moments to a dictionary that is ready to train: anchors, rows, thresholds, gain."""

from __future__ import annotations

import torch
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.core.values import White

CHUNK = 1024  # features calibrated at a time, so that [tokens, F] is never held


def sample_size(density: float) -> int:
    """Tokens for a quantile at 1 - density: at least 20 expected exceedances; density 0 asks for no quantile."""
    return max(8192, min(131_072, int(20 / density))) if density else 8192


@torch.no_grad()
def initialise(plan: Plan, state: TrainingState, white_BD: White) -> None:
    """Tied unit rows, thresholds at a quantile of the pre-activation, least-squares gain.

    `white_BD` is a calibration sample. The gain is <y, r> / <r, r> with r = z W_dec, so that the reconstruction starts
    at the best scale that these rows allow.
    """
    recipe, sae, draw = plan.recipe, state.sae, state.rng.device
    for name, rows in sae.rows.items():
        n = rows.stop - rows.start
        anchor = recipe.stratum[name].anchor(state.stream, n)
        if anchor is not None:
            state.anchors[name] = anchor
        sae.W_dec_FD.detach()[rows] = recipe.stratum[name].start(n, state.metric, anchor, draw)
    state.learner.project_()
    sae.measure_by(state.metric)
    # After the projection, which may move a row by a rounding: tied to the last bit.
    sae.W_enc_FD.detach().copy_(sae.W_dec_FD)
    density = start_density(plan)
    read_BD = white_BD - sae.b_dec_D if sae.activator.pre_bias else white_BD
    for begin in range(0, sae.width, CHUNK):
        rows = slice(begin, min(begin + CHUNK, sae.width))
        sae.activator.calibrate_(read_BD @ sae.W_enc_FD[rows].T, density, rows)
    state.learner.assign("log_gain", _gain(state, white_BD).log())
    state.silent_F.zero_()


def start_density(plan: Plan) -> float:
    """Share of features active per row at the start: `start` times the target, where the activation has that option.

    0 where `start` is: the activation begins as it was built.
    """
    multiple = float(getattr(plan.recipe.activation, "start", 1.0))
    return min(0.5, multiple * plan.knobs.L0_target / plan.knobs.F)


def _gain(state: TrainingState, white_BD: White) -> Tensor:
    sae = state.sae
    dot = torch.zeros((), dtype=torch.float64, device=white_BD.device)
    square = torch.zeros_like(dot)
    for y_BD in torch.split(white_BD, 4096):
        r_BD = sae.machine.ops.decode(sae.encode(White(y_BD)), sae)
        dot += (y_BD * r_BD).sum(dtype=torch.float64)
        square += (r_BD * r_BD).sum(dtype=torch.float64)
    return (dot / square.clamp(min=1e-12)).clamp(min=1e-4).float()
