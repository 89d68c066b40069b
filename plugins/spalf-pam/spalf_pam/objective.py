"""What the phase minimises, as functions of a state; `space` ("raw" or "white") is where lengths are measured."""

from __future__ import annotations

import torch
from torch import Tensor

from spalf import Autoencoder, Code, Forward, TrainingState, White


def error(state: TrainingState, forward: Forward, space: str) -> Tensor:
    """mean ||x - x_hat||^2 / V, V the total variance, with its graph."""
    gap_BD = _measured(state, White(forward.white_BD - forward.white_hat_BD), space)
    return gap_BD.square().sum(-1).mean() / state.metric.variance(space)


def l1(state: TrainingState, code: Code, space: str) -> Tensor:
    """mean sum_i z_i ||w_i|| / sqrt(V), w_i held fixed: no scaling of codes against rows lowers it."""
    value: Tensor = mean_F(code) @ lengths(state, space) / spread(state, space)
    return value


def spread(state: TrainingState, space: str) -> Tensor:
    """sqrt(V)."""
    root: Tensor = state.metric.variance(space).sqrt()
    return root


@torch.no_grad()
def lengths(state: TrainingState, space: str) -> Tensor:
    """gain ||w_i|| [F]: how far a unit of each code moves the reconstruction."""
    rows_FD = _measured(state, White(state.sae.W_dec_FD), space)
    out_F: Tensor = state.sae.log_gain.exp() * rows_FD.norm(dim=1)
    return out_F


def mean_F(code: Code) -> Tensor:
    """Mean code of each feature over the rows, [F], with its graph; never [B, F] from a compact code."""
    if code.index_BK is None:
        return code.z_BK.mean(0)
    sum_F = code.z_BK.new_zeros(code.width + 1).scatter_add(0, code.index_BK.reshape(-1), code.z_BK.reshape(-1))
    return sum_F[: code.width] / code.z_BK.shape[0]


def distance(sae: Autoencoder, W_enc_FD: Tensor, b_enc_F: Tensor) -> Tensor:
    """Mean over features of ||e - e_t||^2 + (b - b_t)^2, with its graph."""
    rows = (sae.W_enc_FD - W_enc_FD).square().sum()
    return (rows + (sae.b_enc_F - b_enc_F).square().sum()) / sae.width


def _measured(state: TrainingState, rows: White, space: str) -> Tensor:
    return state.metric.raw_direction(rows) if space == "raw" else rows
