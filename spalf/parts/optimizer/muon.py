"""Muon for the two matrices, AdamW for all else, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from attrs import field
from attrs.validators import deep_iterable, ge, gt, lt
from torch import nn

from spalf.core.slots import optimizer
from spalf.errors import ComponentError
from spalf.parts.optimizer.rates import Bounded

MATRICES = ("W_enc_FD", "W_dec_FD")


class Both(torch.optim.Optimizer):
    """Two optimizers over parts of the same parameters that look like one: shared groups and shared state."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        super().__init__([*first.param_groups, *second.param_groups], {})
        self._parts = (first, second)
        # The very dicts of the parts: whoever sets a rate or pours a moment here reaches them.
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        for part in self._parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """A step of each part. Takes no closure."""
        assert closure is None, "the loss has been computed"
        for part in self._parts:
            part.step()


@optimizer("muon")
class Muon(Bounded):
    """Muon for the two matrices, AdamW for the rest: momentum, orthogonalised by five Newton-Schulz iterations.

    torch's own (torch 2.9 or newer), scaled so that a step's entries are 0.2 of the rate on average, as Adam's are
    (arXiv 2502.16982): one `lr` serves both. Such a step moves no direction of the activations more than another, where
    Adam's follows the few that many features share. On planted features more directions are found and more features
    die (measured in docs/decisions/0009). The iterations cost about 4 d_model / batch of a step with a dense code.
    """

    rule: ClassVar[str] = ""
    size: ClassVar[float] = 0.2

    momentum: float = field(default=0.95, validator=[ge(0.0), lt(1.0)])
    """Memory of the matrices' gradient (with Nesterov's look ahead)."""
    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=deep_iterable([ge(0.0), lt(1.0)]))
    """As AdamW's, for biases, thresholds and gain."""
    eps: float = field(default=1e-8, validator=gt(0.0))
    """As AdamW's."""

    def build(self, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """One group per parameter, with its name. Raises ComponentError where torch is older than 2.9."""
        made: Any = getattr(torch.optim, "Muon", None)
        if made is None:
            raise ComponentError(f"optimizer: torch {torch.__version__} has no Muon (install torch>=2.9, or use adam)")
        groups = self.groups(named)
        matrices = [g for g in groups if g["name"] in MATRICES]
        others = [g for g in groups if g["name"] not in MATRICES]
        first = made(matrices, lr=self.lr, momentum=self.momentum, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        second = torch.optim.AdamW(others, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=0.0)
        return Both(first, second)
