"""Terms that bring features back that have long been silent. U dead features, K the ones of a row that are tried."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from attrs import evolve, field
from attrs.validators import ge, gt
from torch import Tensor

from spalf.core.recipe import Derived, Plan
from spalf.core.slots import term
from spalf.core.values import View
from spalf.engine.step import dead_window
from spalf.errors import RunError
from spalf.parts.term.common import decoded, lengths, mean_square


def _dead(view: View, window: int) -> Tensor:
    """Numbers of the features that have not fired in the last `window` activations. Waits for the device."""
    return (view.silent_F > window).nonzero()[:, 0]


def _dense_pre(view: View, name: str) -> Tensor:
    code = view.forward.code
    if code.index_BK is not None:
        raise RunError(f"term.{name}: needs a dense code, and was given a compact one (encode with dense)")
    return code.pre_BK


def _nothing(view: View) -> Tensor:
    """0, with a graph: a term without a graph is taken for one that no step can change."""
    return 0.0 * view.sae.b_dec_D.sum()


def _window_row(window: int, plan: Plan) -> Derived:
    formula = "min(1e7, budget.tokens / 5)" if window == dead_window(plan) else "given"
    return Derived(path="window", value=window, formula=formula, origin="window")


@term("aux_k")
class AuxK:
    """weight times how far the k most active dead features of each row are from the error that the others leave.

    mean_b ||e - e_hat||^2 over mean_b ||e - mean e||^2, where e = y - y_hat takes no gradient and e_hat = gain z W_dec
    has no bias; z is the ReLU of the dead features' pre-activations (arXiv 2406.04093, 2412.06410). It is 0, and
    finite, where no feature is dead or the error vanishes. `window`: activations without firing that make a feature
    dead; 0 derives it. `k`: 0 for d / 2.

    As libraries differ: `rectify` false takes the pre-activations as they are, `normalise` false leaves the error's
    power out, and `few` scales the term by the number of dead features over k where that is less than 1.
    """

    partial: ClassVar[bool] = False
    dense: ClassVar[bool] = True
    weight: float = field(default=1 / 32, validator=gt(0.0))
    k: int = field(default=0, validator=ge(0))
    window: int = field(default=0, validator=ge(0))
    rectify: bool = True
    normalise: bool = True
    few: bool = False

    def settle(self, plan: Plan) -> AuxK:
        """Fills `k` and `window`."""
        k, window = self.k or max(1, plan.facts.d_model // 2), self.window or dead_window(plan)
        return cast(AuxK, evolve(cast(Any, self), k=k, window=window))

    def derive(self, plan: Plan) -> list[Derived]:
        """Rows for `spalf compile`."""
        formula = "d_model / 2" if self.k == max(1, plan.facts.d_model // 2) else "given"
        return [Derived(path="k", value=self.k, formula=formula, origin="k"), _window_row(self.window, plan)]

    def value(self, view: View) -> Tensor:
        """Raises RunError on a compact code, which leaves out the entries in question."""
        pre_BF, dead_U = _dense_pre(view, "aux_k"), _dead(view, self.window)
        if dead_U.numel() == 0:
            return _nothing(view)
        wanted = self.k or max(1, view.forward.white_BD.shape[1] // 2)
        k = min(wanted, dead_U.numel())
        pre_BU = pre_BF[:, dead_U]
        top = pre_BU.topk(k, dim=1, sorted=False)
        value_BK = top.values.relu() if self.rectify else top.values
        z_BU = torch.zeros_like(pre_BU).scatter(1, top.indices, value_BK)
        error_BD = (view.forward.white_BD - view.forward.white_hat_BD).detach()
        value = self.weight * mean_square(error_BD - decoded(view, z_BU, dead_U))
        if self.few:
            value = value * min(1.0, dead_U.numel() / wanted)
        if self.normalise:
            power = mean_square(error_BD - error_BD.mean(0))
            value = value / power.clamp(min=torch.finfo(power.dtype).tiny)
        return value


@term("pre_activation")
class PreActivation:
    """weight times mean_b sum_j ReLU(theta_j - p_j) gain ||w_j|| over dead features j: a pull over the threshold.

    Anthropic's loss for JumpReLU (update of January 2025), restricted as in SAELens to features that have not fired in
    `window` activations (0 derives it); `alive` true takes all features, as in the original. The threshold is pulled
    down by it too.
    """

    partial: ClassVar[bool] = True
    dense: ClassVar[bool] = True
    weight: float = field(default=3e-6, validator=gt(0.0))
    window: int = field(default=0, validator=ge(0))
    alive: bool = False

    def settle(self, plan: Plan) -> PreActivation:
        """Fills `window`."""
        return cast(PreActivation, evolve(cast(Any, self), window=self.window or dead_window(plan)))

    def derive(self, plan: Plan) -> list[Derived]:
        """The window's row for `spalf compile`."""
        return [_window_row(self.window, plan)]

    def value(self, view: View) -> Tensor:
        """Raises RunError on a compact code, which leaves out the entries in question."""
        pre_BF, sae = _dense_pre(view, "pre_activation"), view.sae
        which: Tensor | slice = slice(None) if self.alive else _dead(view, self.window)
        if isinstance(which, Tensor) and which.numel() == 0:
            return _nothing(view)
        short_BU = (sae.activator.threshold_F()[which] - pre_BF[:, which]).relu()
        return self.weight * (short_BU * lengths(view)[which]).sum(-1).mean()
