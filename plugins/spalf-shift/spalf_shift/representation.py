"""What is compared: ways to turn a pair of activations into a code, with a direction for each feature.

Shapes: N pairs, D d_model, F features, C concepts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.functional import normalize

from spalf import Pairs, Plan, Raw, SourceError, TrainingState, White


@frozen(kw_only=True, eq=False)
class Representation:
    """Codes [N, F] of pairs, float32 on the CPU, and what one unit of each feature adds in model space [F, D]."""

    code: Callable[[Pairs], Tensor]
    rows_FD: Tensor


def labels_of(pairs: Pairs) -> Tensor:
    """Labels [N, C] as float32. Raises SourceError where the pairs have none."""
    if pairs.labels_NC is None:
        raise SourceError("these pairs are not labelled, so no concept can be looked for (harvest labelled sentences)")
    return pairs.labels_NC.float()


def of_differences(plan: Plan) -> bool:
    """Whether a plan's dictionary has been trained on differences, or on the activations at their ends."""
    use: str = plan.recipe.source.__spalf__.use  # type: ignore[attr-defined]
    return use == "difference"


@torch.no_grad()
def of_state(plan: Plan, state: TrainingState) -> Representation:
    """A dictionary's codes: of b - a where it was trained on differences, otherwise the code of b less that of a."""

    def encode(x_ND: Tensor) -> Tensor:
        parts = torch.split(x_ND.to(state.device), 4096)
        return torch.cat([state.sae.encode(state.metric.white(Raw(x)), True).dense() for x in parts]).cpu()

    def code(pairs: Pairs) -> Tensor:
        with torch.no_grad():
            if of_differences(plan):
                return encode(pairs.b_ND - pairs.a_ND)
            return encode(pairs.b_ND) - encode(pairs.a_ND)

    rows_FD = state.metric.raw_direction(White(state.sae.log_gain.exp() * state.sae.W_dec_FD))
    return Representation(code=code, rows_FD=rows_FD.detach().cpu())


def linear(rows_FD: Tensor) -> Representation:
    """Projections of b - a on unit rows."""
    unit_FD = normalize(rows_FD, dim=1)
    return Representation(code=lambda pairs: (pairs.b_ND - pairs.a_ND) @ unit_FD.T, rows_FD=unit_FD)


def random_rows(features: int, d_model: int, seed: int) -> Tensor:
    """A random dictionary: unit rows, uniform on the sphere."""
    draw = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(features, d_model, generator=draw), dim=1)


def principal(pairs: Pairs, features: int) -> Representation:
    """The leading principal directions of b - a, about zero: mirrored pairs have no mean."""
    delta_ND = (pairs.b_ND - pairs.a_ND).double()
    _, vectors_DD = torch.linalg.eigh(delta_ND.T @ delta_ND)
    return linear(vectors_DD.flip(1)[:, :features].T.float())


def mean_shifts(pairs: Pairs) -> Tensor:
    """The mean shift [C, D] of switching each concept on, over the pairs in which it changes. Sees the labels."""
    labels_NC = labels_of(pairs)
    count_C = labels_NC.abs().sum(0)
    if bool((count_C == 0).any()):
        missing = ", ".join(name for name, n in zip(pairs.concepts, count_C.tolist(), strict=True) if n == 0)
        raise SourceError(f"no pair changes {missing} (give more pairs, or drop the concept)")
    return labels_NC.T @ (pairs.b_ND - pairs.a_ND) / count_C[:, None]
