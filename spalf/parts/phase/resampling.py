"""`resampling`: a constrained stretch that gives features that never fire a new start.

Shapes: N rows of a sample, R resampled features, F features, D d_model.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from attrs import evolve, field
from attrs.validators import ge, gt, le
from torch import Tensor, nn
from torch.nn.functional import normalize

from spalf.core.recipe import Derived, Plan
from spalf.core.slots import phase
from spalf.core.state import TrainingState
from spalf.core.values import Code, Raw, Reading, White
from spalf.engine import initialise
from spalf.engine.step import look
from spalf.errors import Problem, RecipeError
from spalf.parts.phase.constrained import Constrained


@phase("resampling")
class Resampling(Constrained):
    """`constrained`, with features that are silent started anew (Bricken et al. 2023, "Towards Monosemanticity").

    Every `every` steps, while the whole run's progress is at most `until`, a feature that has not fired for `window`
    activations gets one input of a fresh sample for its direction, less the decoder's bias: inputs are drawn without
    replacement, with probability proportional to the square of their loss, the squared error in `space`. The decoder
    row is that direction at unit length, the encoder row `scale` times the mean length of an alive one, the bias 0.
    What the activation keeps per feature (thresholds) is calibrated on the sample to the target's density, so that a
    new feature fires as often as it should. One that selects by order, or by one threshold for all, keeps nothing
    there, and would never select a row that short (measured on `topk`: never in 2048 inputs); with it the encoder
    row's length is calibrated instead. `relu` has neither: a new feature fires on about half of the inputs at first.

    The optimizer's moments of these rows are set to 0: kept, the old ones would push the new rows back to where the
    dead ones went. Rows of an anchored stratum are tied to their tokens and never resampled. Where more features are
    silent than the sample has rows, the longest silent go first. The sample spends no training budget; how many
    features a phase has resampled is among the state's measured numbers.
    """

    every: int = field(default=0, validator=ge(0))
    """Steps between resamplings, counted from the phase's first; 0: an eighth of the run's steps."""
    until: float = field(default=0.5, validator=[gt(0.0), le(1.0)])
    """Share of the whole run's steps behind which none is resampled: a new feature needs time to learn."""
    window: int = field(default=0, validator=ge(0))
    """Activations without firing; 0: as many as half of `every` steps see."""
    scale: float = field(default=0.2, validator=gt(0.0))
    """Length of a new encoder row in mean lengths of alive ones."""
    space: Literal["raw", "white"] = "raw"
    """Where an input's loss is measured."""

    def settle(self, plan: Plan) -> Resampling:
        """With `every` and `window` filled in. Raises RecipeError where no step of the run would resample."""
        every = self.every or max(1, plan.total_steps // 8)
        if every > self.until * plan.total_steps:
            latest = int(self.until * plan.total_steps)
            message = f"{every} steps come after the last one that may resample, {latest} of {plan.total_steps}"
            raise RecipeError([Problem("every", message, "lower it, raise until, or use constrained")])
        window = self.window or max(1, every * plan.recipe.budget.batch // 2)
        settled: Resampling = evolve(cast(Any, self), every=every, window=window)
        return settled

    def derive(self, plan: Plan) -> list[Derived]:
        """Rows for `spalf compile`."""
        last = int(self.until * plan.total_steps)
        return [
            Derived(path="every", value=self.every, formula="total_steps / 8, or as given", origin="phase.every"),
            Derived(path="window", value=self.window, formula="every * batch / 2, or as given", origin="phase.window"),
            Derived(path="last", value=last, formula="until * total_steps", origin="phase.until"),
        ]

    def step(self, plan: Plan, state: TrainingState) -> Reading:
        is_due = state.clock.due(self.every)
        reading = super().step(plan, state)
        if not is_due or state.clock.step > self.until * plan.total_steps:
            return reading
        features_R = silent(state, self.window)
        count = self.resample_(plan, state, features_R) if len(features_R) else 0
        total = f"{state.clock.phase}.resampled"
        state.measured[total] = state.measured.get(total, 0.0) + count
        counted = torch.tensor(float(count), device=state.device)
        return evolve(reading, values={**reading.values, "resampled": counted})

    @torch.no_grad()
    def resample_(self, plan: Plan, state: TrainingState, features_R: Tensor) -> int:
        """Give the first of `features_R` [R] a new start, as many as there are inputs; returns how many."""
        sae, density = state.sae, min(0.5, plan.knobs.L0_target / plan.knobs.F)
        x_ND = state.stream.next(initialise.sample_size(density)).x_BD
        loss_N, least_N = self._look(plan, state, x_ND)
        # Relative to the largest, as a square may overflow; the smallest number keeps exact zeros out of the draw.
        weight_N = (loss_N / loss_N.max().clamp(min=torch.finfo(loss_N.dtype).tiny)).square()
        features_R = features_R[: int((weight_N > 0).sum())]
        if not len(features_R):
            return 0
        chosen_R = torch.multinomial(weight_N, len(features_R), replacement=False, generator=state.rng.device)
        white_ND = state.metric.white(x_ND)
        centred_ND = White(white_ND - sae.b_dec_D)
        direction_RD = normalize(centred_ND[chosen_R], dim=1)
        read_ND = centred_ND if sae.activator.pre_bias else white_ND
        length_R = torch.full_like(direction_RD[:, 0], self.scale * _alive_length(state, features_R))
        if not _own(state):
            length_R = selected_length(read_ND, direction_RD, least_N, density, length_R)
        encoder_RD = length_R[:, None] * direction_RD
        state.learner.assign("W_dec_FD", direction_RD, features_R)
        state.learner.assign("W_enc_FD", encoder_RD, features_R)
        state.learner.assign("b_enc_F", torch.zeros_like(length_R), features_R)
        recalibrate_(plan, state, features_R, read_ND, encoder_RD, density)
        state.learner.project_()
        state.learner.forget(features_R)
        state.silent_F[features_R] = 0
        return len(features_R)

    def _look(self, plan: Plan, state: TrainingState, x_ND: Raw) -> tuple[Tensor, Tensor]:
        """Of each row [N]: its squared error, and the pre-activation above which a further entry would be active."""
        losses, least = [], []
        for few_BD in torch.split(x_ND, plan.recipe.budget.batch):
            seen = look(state, Raw(few_BD))
            error_BD = White(seen.white_BD - seen.white_hat_BD)
            in_space = state.metric.raw_direction(error_BD) if self.space == "raw" else error_BD
            losses.append(in_space.square().sum(-1))
            least.append(_least_kept(state, seen.code))
        return torch.cat(losses), torch.cat(least)


def _least_kept(state: TrainingState, code: Code) -> Tensor:
    """Of each row [B]: the smallest kept pre-activation where entries are selected by order, else the threshold."""
    if not state.sae.activator.k:
        return state.sae.activator.threshold_F()[:1].expand(len(code.pre_BK))
    return torch.where(code.gate_BK > 0, code.pre_BK, torch.inf).amin(-1)


def _alive_length(state: TrainingState, features_R: Tensor) -> float:
    """Mean length of the encoder's other rows; 1 where there are none."""
    alive_F = torch.ones(state.sae.width, dtype=torch.bool, device=state.device)
    alive_F[features_R] = False
    return float(state.sae.W_enc_FD[alive_F].norm(dim=1).mean()) if bool(alive_F.any()) else 1.0


def selected_length(
    read_ND: White, direction_RD: Tensor, least_N: Tensor, density: float, otherwise_R: Tensor
) -> Tensor:
    """Lengths [R] at which unit rows are active on a share `density` of the sample: s p > least, p the row's product.

    So s is the quantile `density` of least / p over the rows with p > 0. `otherwise_R` where there is none above 0.
    """
    n = len(read_ND)
    k = min(max(1, round(density * n)), n)
    found = []
    for part_CD in torch.split(direction_RD, initialise.CHUNK):
        pre_CN = part_CD @ read_ND.T
        ratio_CN = torch.where(pre_CN > 0, least_N / pre_CN, torch.inf)
        found.append(ratio_CN.kthvalue(k, dim=1).values)
    length_R = torch.cat(found)
    return torch.where(length_R.isfinite() & (length_R > 0), length_R, otherwise_R)


def silent(state: TrainingState, window: int) -> Tensor:
    """Features [R] of no anchored stratum that have not fired for `window` activations, the longest silent first."""
    silent_F = state.silent_F.clone()
    for name, rows in state.sae.rows.items():
        if name in state.anchors:
            silent_F[rows] = -1
    count = int((silent_F >= window).sum())
    return torch.sort(silent_F, descending=True, stable=True).indices[:count]


def recalibrate_(
    plan: Plan, state: TrainingState, features_R: Tensor, read_ND: White, encoder_RD: Tensor, density: float
) -> None:
    """Set what the activation keeps per feature for `features_R` as at the start, at `density`.

    A fresh activator of R features is calibrated and its leaves are copied: one may hold numbers for all features
    together, such as a global threshold, which a calibration of a few must not touch.
    """
    fresh = plan.recipe.activation.build(len(features_R))
    cast(nn.Module, fresh).to(state.device)
    for begin in range(0, len(features_R), initialise.CHUNK):
        rows = slice(begin, min(begin + initialise.CHUNK, len(features_R)))
        fresh.calibrate_(read_ND @ encoder_RD[rows].T, density, rows)
    new = cast(nn.Module, fresh).state_dict()
    for key, value in _own(state).items():
        value[features_R] = new[key].to(value)


def _own(state: TrainingState) -> dict[str, Tensor]:
    """What the activation keeps per feature, by name."""
    held = cast(nn.Module, state.sae.activator).state_dict()
    return {key: value for key, value in held.items() if value.ndim and value.shape[0] == state.sae.width}
