"""Rows of one dictionary matched to rows of another. Shapes: N and F rows, D d_model, P pairs."""

from __future__ import annotations

from pathlib import Path

import torch
from attrs import evolve, frozen
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from spalf.core.recipe import Plan
from spalf.core.slots import label
from spalf.core.values import Raw, White
from spalf.engine import checkpoint
from spalf.errors import CheckpointError

WHOLE = 16_384
"""Rows up to which a matching takes in all; an assignment costs their number cubed."""
SAMPLE = 1024
"""Rows that are matched where there are more."""


@frozen(kw_only=True, eq=False)
class Matching:
    """Pairs of rows under the best one-to-one assignment, by their numbers in the whole, and the cosine of each."""

    first_P: Tensor
    second_P: Tensor
    cosine_P: Tensor

    @property
    def mean(self) -> float:
        return float(self.cosine_P.mean())


def assigned(cosine_NF: Tensor) -> Matching:
    """The one-to-one assignment with the largest sum of cosines (Hungarian); min(N, F) pairs."""
    from scipy.optimize import linear_sum_assignment

    first, second = linear_sum_assignment(cosine_NF.cpu().double().numpy(), maximize=True)
    first_P, second_P = torch.from_numpy(first), torch.from_numpy(second)
    return Matching(first_P=first_P, second_P=second_P, cosine_P=cosine_NF.cpu()[first_P, second_P])


def matched(a_ND: Tensor, b_FD: Tensor, *, signed: bool = True, seed: int = 0) -> Matching:
    """Rows of `a` assigned to rows of `b` by cosine, or by its absolute value where a sign means nothing.

    Above 16 384 rows a sample of `a`, drawn from `seed`, is matched to all of `b`: a sample of both would lose most
    partners. A sampled row competes with fewer others, so a floor has to be sampled in the same way.
    """
    row_N = torch.arange(len(a_ND))
    if max(len(a_ND), len(b_FD)) > WHOLE and len(a_ND) > SAMPLE:
        row_N = torch.randperm(len(a_ND), generator=torch.Generator().manual_seed(seed))[:SAMPLE]
        a_ND = a_ND[row_N.to(a_ND.device)]
    cosine_NF = normalize(a_ND.float(), dim=-1) @ normalize(b_FD.float(), dim=-1).T
    found = assigned(cosine_NF if signed else cosine_NF.abs())
    return evolve(found, first_P=row_N[found.first_P])


def floor(a_ND: Tensor, rows: int, *, signed: bool = True, seed: int = 0) -> float:
    """The mean cosine that `rows` random directions reach: what a matching has to exceed to mean anything."""
    draw = torch.Generator().manual_seed(seed)
    random_FD = torch.randn(rows, a_ND.shape[1], generator=draw).to(a_ND.device)
    return matched(a_ND, random_FD, signed=signed, seed=seed).mean


def raw_decoder(path: Path, plan: Plan) -> Raw:
    """Decoder rows [F, D] in model space of another checkpoint, read with this plan's whitener; needs no source.

    Raises CheckpointError where the file cannot be read, or was whitened by another component or to another width.
    """
    components = checkpoint.metadata(path)["components"]
    use = label(type(plan.recipe.whitener)).use
    if f"whitener.{use}" not in components:
        theirs = next((ref.partition(".")[2] for ref in components if ref.startswith("whitener.")), "nothing")
        raise CheckpointError(f'{path}: is whitened by "{theirs}" and this run by "{use}" (use spalf compare)')
    facts = checkpoint.facts(path)
    if facts.d_model != plan.facts.d_model:
        raise CheckpointError(
            f"{path}: has d_model {facts.d_model} and this run {plan.facts.d_model}: no row can match"
        )
    metric = plan.recipe.whitener.build(facts)
    try:
        held = load_file(path / "tensors.safetensors")
        metric.load_state_dict({k.removeprefix("metric."): v for k, v in held.items() if k.startswith("metric.")})
        W_dec_FD = load_file(path / "model.safetensors")["learner.model.W_dec_FD"]
    except (OSError, SafetensorError, KeyError, RuntimeError) as e:
        raise CheckpointError(f"{path}: its decoder cannot be read: {' '.join(str(e).split())}") from e
    return metric.raw_direction(White(W_dec_FD.float()))
