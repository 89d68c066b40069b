"""Constraints on the decoder's rows. A anchored rows, R sampled rows of the batch."""

from __future__ import annotations

from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from attrs import field
from attrs.validators import gt, in_
from torch import Tensor
from torch.nn.functional import normalize

from spalf.core.recipe import Derived, Plan
from spalf.core.slots import constraint
from spalf.core.state import Anchor
from spalf.core.values import Code, View
from spalf.errors import Problem, RecipeError, RunError
from spalf.kernels.compact import per_row

# Anchors in whitened coordinates, by anchor: an [A, D] x [D, D] product that never changes, for anchors are made after
# the metric is fitted.
_STARTS: WeakKeyDictionary[Anchor, Tensor] = WeakKeyDictionary()

# Random unit vectors have mean squared cosine 1/d; co-active features of one context are allowed this multiple.
_RANDOM_LEVELS = 3.0


def _known(stratum: str, plan: Plan) -> None:
    """Raises RecipeError where the recipe has no such stratum."""
    if stratum not in plan.rows:
        hint = f"name one of {', '.join(plan.rows)}, or take the constraint out of the phases"
        raise RecipeError([Problem("stratum", f'"{stratum}" is not among the strata', hint)])


@constraint("drift")
class Drift:
    """||D_A - D_0||_F^2 <= within^2 A: anchored decoder rows stay near their anchors, in root mean square.

    D_0 are the anchors in whitened coordinates as unit rows, D_A the rows themselves, their norm included, so 0.1 is an
    angle of at most 5.7 degrees in root mean square. Were anchors of unequal norm, the long ones would own the budget.
    All A rows count in every step: the [A, D] x [D, D] product costs A D / (B F) of the encoder's.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    partial: ClassVar[bool] = True
    dense: ClassVar[bool] = False
    capturable: ClassVar[bool] = True
    stratum: str = "anchored"
    within: float = field(default=0.1, validator=gt(0.0))

    def budget(self, view: View) -> Tensor:
        """Raises RunError where the stratum has no anchors."""
        start_AD = self._start(view)
        return start_AD.new_tensor(self.within**2 * start_AD.shape[0])

    def value(self, view: View) -> Tensor:
        """Raises RunError where the stratum has no anchors."""
        start_AD = self._start(view)
        return view.sae.machine.ops.distance(view.sae, start_AD, view.sae.rows[self.stratum])

    def derive(self, plan: Plan) -> list[Derived]:
        """The budget's row for `spalf compile`. Raises RecipeError where the recipe has no such stratum."""
        _known(self.stratum, plan)
        value = self.within**2 * plan.rows[self.stratum]
        return [Derived(path="budget", value=value, formula="within^2 * anchored rows", origin="within")]

    @torch.no_grad()
    def _start(self, view: View) -> Tensor:
        if self.stratum not in view.anchors:
            known = ", ".join(view.anchors) or "no stratum"
            raise RunError(
                f'constraint.drift.stratum: "{self.stratum}" has no anchors, {known} has '
                "(name an anchored stratum, or leave the constraint out)"
            )
        anchor = view.anchors[self.stratum]
        if anchor not in _STARTS:
            _STARTS[anchor] = normalize(view.metric.white_direction(anchor.directions_AD), dim=-1)
        return _STARTS[anchor]


def _pairs_B(code: Code, rows: slice) -> Tensor:
    """k_b (k_b - 1) per row, k_b being its active features within `rows`."""
    k_B = per_row(code, rows)
    return k_B * (k_B - 1)


@constraint("orthogonality")
class Orthogonality:
    """Mean squared cosine of co-active decoder rows, over all pairs of the batch <= slack * 3 / d.

    Random directions reach 1/d. Estimated without bias on `sample` rows drawn with probability proportional to their
    pairs k (k - 1): the mean of the rows' own means then needs no denominator. Sampling features instead is biased, for
    a feature drawn twice counts as a pair of cosine 1. `stratum` limits it to one stratum, "" means all rows. Cosines
    are taken in model space (`space` "raw") or in whitened coordinates ("white").
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    partial: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    capturable: ClassVar[bool] = True
    stratum: str = ""
    slack: float = field(default=1.0, validator=gt(0.0))
    sample: int = field(default=256, validator=gt(0))
    space: str = field(default="raw", validator=in_(("raw", "white")))

    def budget(self, view: View) -> Tensor:
        return view.forward.white_BD.new_tensor(self.slack * _RANDOM_LEVELS / view.sae.W_dec_FD.shape[1])

    def value(self, view: View) -> Tensor:
        """Raises RunError where the dictionary has no such stratum."""
        code, rows = view.forward.code, self._rows(view)
        pairs_B = _pairs_B(code, rows)
        # Where no row has a pair any sample will do: its value is 0.
        weight_B = torch.where(pairs_B.sum() > 0, pairs_B, torch.ones_like(pairs_B))
        sample_R = torch.multinomial(weight_B, self.sample, replacement=True, generator=view.draw)
        # A metric of somebody else's may know the exact way alone.
        raw = getattr(view.metric, "rough_direction", view.metric.raw_direction)
        direction = raw if self.space == "raw" else lambda v: v
        return view.sae.machine.ops.coactivation(code, view.sae, sample_R, rows, direction, view.draw)

    def derive(self, plan: Plan) -> list[Derived]:
        """The budget's row for `spalf compile`. Raises RecipeError where the recipe has no such stratum."""
        if self.stratum:
            _known(self.stratum, plan)
        value = self.slack * _RANDOM_LEVELS / plan.facts.d_model
        return [Derived(path="budget", value=value, formula="slack * 3 / d_model", origin="slack")]

    def _rows(self, view: View) -> slice:
        if not self.stratum:
            return slice(0, view.sae.width)
        if self.stratum not in view.sae.rows:
            raise RunError(
                f'constraint.orthogonality.stratum: "{self.stratum}" is none of {", ".join(view.sae.rows)} '
                '(name one of them, or "" for all)'
            )
        return view.sae.rows[self.stratum]
