"""What several terms share."""

from __future__ import annotations

import torch
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.values import Clock, Code, View, White
from spalf.errors import Problem, RecipeError, RunError
from spalf.kernels.squares import sum_of_squares


def listed(value_F: Tensor, code: Code) -> Tensor:
    """One value per feature, at each entry of the code; 0 at padding."""
    if code.index_BK is None:
        return value_F
    return torch.cat([value_F, value_F.new_zeros(1)])[code.index_BK]


def ramp(clock: Clock, warmup: int) -> float:
    """Steps done over `warmup`, at most 1; 1 where `warmup` is 0."""
    return min(1.0, clock.step / warmup) if warmup else 1.0


def reaches(plan: Plan, warmup: int) -> None:
    """Raises RecipeError where the run ends before a weight has risen."""
    if warmup >= plan.total_steps:
        message = f"is {warmup} steps, of {plan.total_steps} in all: the weight is never reached"
        raise RecipeError([Problem("warmup", message, "lower it, or raise budget.tokens")])


def lengths(view: View) -> Tensor:
    """What one unit of each code adds to the whitened reconstruction: gain ||w_j||, [F]."""
    norm_F: Tensor = torch.linalg.vector_norm(view.sae.W_dec_FD, dim=1)
    return view.sae.log_gain.exp() * norm_F


def mean_square(error_BD: Tensor) -> Tensor:
    """Mean over rows of ||e||^2."""
    return sum_of_squares(error_BD) / error_BD.shape[0]


def decoded(view: View, z_BF: Tensor, rows: slice | Tensor) -> White:
    """gain z W_dec of the features `rows`, without bias: what they add to the whitened reconstruction."""
    sae = view.sae
    return White(sae.log_gain.exp() * sae.machine.mesh.sum(z_BF @ sae.W_dec_FD[rows]))


def needs_gate(plan: Plan, term: str) -> None:
    """Raises RecipeError where the recipe's activation has no gate with a pre-activation of its own."""
    if not getattr(plan.recipe.activation, "has_gate", False):
        hint = 'use activation "gated", or leave the term out of the phases'
        raise RecipeError([Problem("", f"{term} reads the gate, and this activation has none", hint)])


def gate_pre(view: View, term: str) -> Tensor:
    """The gate's pre-activation per listed entry. Raises RunError where the activator has none."""
    read = getattr(view.sae.activator, "gate_pre", None)
    if read is None:
        raise RunError(f'{term} reads the gate, and this activation has none (use "gated", or leave the term out)')
    pre_BK: Tensor = read(view.forward.code.pre_BK, view.forward.code.index_BK)
    return pre_BK
