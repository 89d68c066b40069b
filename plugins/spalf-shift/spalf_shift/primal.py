"""The primal side of an extrapolated step: any optimizer of spalf, with the half step that Cooper asks for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spalf import Clock, Learner


class Extrapolated:
    """A learner as Cooper's extrapolating optimizer sees it: `extrapolation`, then `step`.

    `extrapolation` goes one step from where the parameters are, and puts the optimizer's moments back: of the two
    gradients of a step only the second, taken at the half-way point, enters them. Cooper's own ExtraAdam counts both,
    which halves the memory of its averages and doubles its bias correction. `step` applies that gradient from the old
    parameters.

    Decoder gradients are made tangent before either step, at the rows that the step starts from, and rows have their
    norm after each, so that the half-way point is feasible too: both are the learner's own.
    """

    def __init__(self, learner: Learner, clock: Clock, rate: float) -> None:
        self._learner, self._clock, self._rate = learner, clock, rate
        self._old: dict[str, Tensor] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of the optimizer that is wrapped."""
        return self._learner.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self._learner.optimizer.zero_grad(set_to_none=set_to_none)

    @torch.no_grad()
    def extrapolation(self) -> None:
        """To the half-way point; the parameters are remembered, the moments put back."""
        moments = {
            parameter: {k: v.clone() if isinstance(v, Tensor) else v for k, v in kept.items()}
            for parameter, kept in self._learner.optimizer.state.items()
        }
        self._old = {name: p.detach().clone() for name, p in self._learner.sae.named_parameters()}
        self._learner.advance(self._clock, self._rate)
        self._learner.optimizer.state.clear()
        self._learner.optimizer.state.update(moments)

    @torch.no_grad()
    def step(self) -> None:
        """From the remembered parameters, by the gradient that is there."""
        for name, parameter in self._learner.sae.named_parameters():
            if name in self._old:
                parameter.copy_(self._old[name])
        self._old = {}
        self._learner.advance(self._clock, self._rate)
