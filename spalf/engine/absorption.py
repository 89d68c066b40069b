"""Feature absorption: a concept's own latents are silent where another latent speaks for it (2409.14507).

Definitions as in SAEBench (2503.09532). Shapes: N tokens that carry the concept, F features, D d_model.
"""

from __future__ import annotations

import torch
from attrs import field, frozen
from attrs.validators import ge, gt, le
from torch import Tensor


@frozen(kw_only=True)
class Rule:
    """When a latent absorbs. Cosines are between its decoder row and the probe's direction, in model space."""

    cosine: float = field(default=0.025, validator=ge(-1.0))
    """Least cosine of the latent that absorbs in full."""
    share: float = field(default=0.4, validator=[gt(0.0), le(1.0)])
    """Least share of the token's projection on the probe that absorbing latents make up."""
    partial_cosine: float = field(default=0.1, validator=ge(-1.0))
    """Least cosine of a latent that absorbs in part."""
    latents: int = field(default=3, validator=gt(0))
    """How many latents may absorb in part together."""


@frozen(kw_only=True, eq=False)
class Absorbed:
    """Per token: whether it is absorbed in full, by which latent, and the fraction that is absorbed."""

    full_N: Tensor
    latent_N: Tensor
    fraction_N: Tensor


def absorbed(z_NF: Tensor, along_F: Tensor, cosine_F: Tensor, target_N: Tensor, main: Tensor, rule: Rule) -> Absorbed:
    """What of a concept is absorbed in each token.

    `along_F` is each decoder row's component along the probe's unit direction, so z_i along_i is what latent i puts
    there; `target_N` is what there is to be put there; `main` are the concept's own latents.
    In full: all main latents are 0, and the latent that puts most there has cosine >= rule.cosine and puts there at
    least rule.share of the target. In part: with A the summed contributions of the `rule.latents` largest positive ones
    of cosine >= rule.partial_cosine outside main, and M those of main, the fraction is 0 where M >= target or
    A < rule.share target, 1 where M <= 0, else min(A, target - M) / (min(A, target - M) + M).
    """
    put_NF = z_NF * along_F
    main_N = put_NF[:, main].sum(1)
    is_silent_N = (z_NF[:, main] == 0).all(1)
    others_NF = put_NF.clone()
    others_NF[:, main] = -torch.inf
    most_N, latent_N = others_NF.max(1)
    has_target_N = target_N > 0
    enough = rule.share * target_N
    full_N = has_target_N & is_silent_N & (most_N >= enough) & (cosine_F[latent_N] >= rule.cosine)
    able_NF = torch.where(cosine_F >= rule.partial_cosine, others_NF, 0.0).clamp(min=0)
    able_N = able_NF.topk(min(rule.latents, able_NF.shape[1]), dim=1).values.sum(1)
    taken_N = torch.minimum(able_N, target_N - main_N)
    part_N = taken_N / (taken_N + main_N)
    fraction_N = torch.where(main_N <= 0, torch.ones_like(part_N), part_N)
    is_none_N = ~has_target_N | (main_N >= target_N) | (able_N < enough)
    return Absorbed(full_N=full_N, latent_N=latent_N, fraction_N=torch.where(is_none_N, 0.0, fraction_N))
