"""What the gradients of the two matrices are made of, kept until one pass turns it into an Adam step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define, field, frozen
from torch import Tensor

from spalf.core.state import Learner
from spalf.kernels import moments, steps, vectors
from spalf.kernels.lists import ByFeature, Lists, nothing, power_of_2, turn_over


@define(eq=False)
class Share:
    """One code's share of both gradients over its listed entries: dec += z grad of each pair, enc += force white."""

    found: Lists
    overflow: Tensor | None = None
    pairs: list[tuple[Tensor, Tensor]] = field(factory=list)
    """(z [B, K], grad [B, D]), several where a list is used more than once."""
    force_BK: Tensor | None = None
    white_BD: Tensor | None = None


@define(eq=False)
class Pull:
    """A gradient strength (W_dec[rows] - target) on a range of rows, strength a scalar on the device.

    The update that applies it leaves each row's squared distance in `away_A`.
    """

    rows: slice
    target_AD: Tensor
    strength: Tensor
    away_A: Tensor


@frozen(eq=False)
class Away:
    """Squared distances of a range of rows from their targets, and which writing of both they are of.

    The target is held, so that no other tensor can come to lie where it did.
    """

    of: tuple[int, ...]
    target_AD: Tensor
    away_A: Tensor

    @staticmethod
    def key(weight_FD: Tensor, target_AD: Tensor, rows: slice) -> tuple[int, ...]:
        written = (weight_FD.data_ptr(), weight_FD._version, target_AD.data_ptr(), target_AD._version)
        return *written, rows.start, rows.stop


@define(eq=False)
class Shares:
    """The shares of one backward pass, by the list they belong to; `open` while that pass runs."""

    open: bool = False
    by_list: dict[int, Share] = field(factory=dict)
    pull: Pull | None = None
    away: Away | None = None
    """Held while every update leaves new ones: the next distance is then a sum over rows, not a pass over weights."""

    def of(self, found: Lists) -> Share:
        """The share of the code that has these lists."""
        return self.by_list.setdefault(found.index_BK.data_ptr(), Share(found))

    def add(self, found: Lists, z_BK: Tensor, grad_BD: Tensor) -> None:
        """dec += z grad over these entries."""
        self.of(found).pairs.append((z_BK.detach(), grad_BD))

    def take(self) -> tuple[list[Share], Pull | None]:
        """All of them, which are then forgotten; so are distances that the update to come does not renew."""
        out = [*self.by_list.values()], self.pull
        if self.away is not None and (self.pull is None or self.pull.away_A is not self.away.away_A):
            self.away = None
        self.by_list.clear()
        self.pull = None
        return out


def fits(learner: Learner) -> bool:
    """Whether one pass can do what this learner asks: plain Adam on both matrices, whose rows are free or unit."""
    known = all(hasattr(s, "sphere") for s in learner.strata.values())
    groups = learner.optimizer.param_groups
    trained = {id(p) for group in groups for p in group["params"] if p.requires_grad}
    moves_both = {id(learner.sae.W_dec_FD), id(learner.sae.W_enc_FD)} <= trained
    fused = all(bool(group.get("fused")) for group in groups)
    return learner.rule.rule == "adam" and known and fused and moves_both


def _joined(parts: Sequence[Tensor | None], like: Sequence[tuple[int, ...]], to: Tensor) -> Tensor:
    """Parts one behind the other, contiguous, of the type and device of `to`; zeros of `like` for those missing."""
    filled = [to.new_zeros(n) if p is None else p.to(to.dtype) for p, n in zip(parts, like, strict=True)]
    return (filled[0] if len(filled) == 1 else torch.cat(filled)).contiguous()


def _until_last(parts: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Without what is missing at the end: an entry of weight 0 is never followed to its row."""
    return parts[: max((i + 1 for i, p in enumerate(parts) if p is not None), default=1)]


def _sources(
    by: ByFeature, shares: Sequence[Share], weights: Sequence[Tensor | None], rows: Sequence[Tensor | None], to: Tensor
) -> tuple[Tensor, Tensor]:
    """(a weight per entry, the rows that they point at) of one term of all shares."""
    value_N = _joined(
        [None if w is None else w.reshape(-1) for w in weights],
        [(s.found.index_BK.numel(),) for s in shares],
        to.new_zeros((), dtype=torch.float32),
    )
    kept = _until_last(rows)
    return by.take(value_N), _joined(kept, [(s.found.index_BK.shape[0], to.shape[-1]) for s in shares[: len(kept)]], to)


def _hyper(learner: Learner, parameter: Tensor, step: Tensor, skip: Tensor) -> Tensor:
    """Count a step, and give rate, betas, eps, 1 - beta1^t, sqrt(1 - beta2^t) and t, float32 [7] on the device."""
    group = next(g for g in learner.optimizer.param_groups if g["params"][0] is parameter)
    rate = group["lr"]
    if not isinstance(rate, Tensor):
        rate = torch.full((), rate, device=parameter.device)  # filled there: a copy from the host would wait
    out = torch.empty(7, device=parameter.device)
    beta1, beta2 = group["betas"]
    steps.count_step[(1,)](step, skip, rate, out, BETA1=beta1, BETA2=beta2, EPS=group["eps"])
    return out


def sphere_of(learner: Learner) -> Tensor:
    """int8 [F], 1 for rows that their stratum keeps at unit norm."""
    sphere_F = torch.zeros(learner.sae.width, dtype=torch.int8)
    for name, rows in learner.sae.rows.items():
        sphere_F[rows] = int(learner.strata[name].sphere)  # type: ignore[attr-defined]
    return sphere_F.to(learner.sae.W_dec_FD.device)


def _skip(shares: list[Share], device: torch.device) -> Tensor:
    """Whether any list was cut, float32 scalar in {0, 1}."""
    flags = [s.overflow for s in shares if s.overflow is not None]
    return torch.stack(flags).any().float() if flags else torch.zeros((), device=device)


@define(eq=False)
class Sources:
    """What the rows' gradients are summed from: entries by feature, and of each term weights and rows to point at."""

    by: ByFeature
    terms: Sequence[tuple[Tensor, Tensor]]
    pull: Pull | None = None


@frozen(kw_only=True)
class Precision:
    """Bfloat16 copies of W_dec and W_enc, written along, and the moments' type; int8 is for `moments.Coded`."""

    dec: Tensor | None = None
    enc: Tensor | None = None
    moments: torch.dtype = torch.float32


BLOCK_N = 4
"""Entries of a feature whose rows a program reads at once."""

WIDE = 4
"""Neighbours that a thread takes, of moments and of what gradients are made of, where they have less than 4 bytes."""

_WARP = 256
"""Columns that a warp holds of a row."""


def row_block(dim: int) -> dict[str, int]:
    """One program holds a whole row."""
    return {"BLOCK_D": power_of_2(dim, 16, 1 << 16), "num_warps": power_of_2(dim // _WARP, 1, 8)}


def _arguments(
    learner: Learner, weight: Tensor, kept: torch.dtype, none: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(steps done, two moments, their scales), `none` in place of scales that are not needed."""
    if kept != torch.int8:
        return *moments.full(learner, weight, kept), none, none
    step, mean, square = moments.coded(learner, weight)
    return step, mean.code_FD, square.code_FD, mean.scale_F, square.scale_F


def _step_rows(
    learner: Learner,
    weight: torch.nn.Parameter,
    made_of: Sources,
    low: Tensor | None,
    kept: torch.dtype,
    sphere_F: Tensor,
    skip: Tensor,
) -> Tensor:
    """Gradient, projection, Adam and norm of every row of one matrix; returns sums of the first weights, [F]."""
    (width, dim), more, pull = weight.shape, weight.grad, made_of.pull
    step, moment1, moment2, scale1, scale2 = _arguments(learner, weight, kept, skip)
    hyper = _hyper(learner, weight, step, skip)
    sums_F = torch.zeros(width, device=weight.device)
    steps.update_rows[(width,)](
        made_of.by.order_F,
        made_of.by.starts_F1,
        made_of.by.row_N,
        tuple(scale_N for scale_N, _ in made_of.terms),
        tuple(source_BD for _, source_BD in made_of.terms),
        weight.data,
        moment1,
        moment2,
        scale1,
        scale2,
        weight.data if low is None else low,
        weight.data if more is None else more,
        sums_F,
        sphere_F,
        weight.data if pull is None else pull.target_AD,
        skip if pull is None else pull.strength,
        skip if pull is None else pull.away_A,
        0 if pull is None else pull.rows.start,
        0 if pull is None else pull.rows.stop,
        hyper,
        skip,
        dim,
        MORE=more is not None,
        LOW=low is not None,
        BYTES=kept.itemsize,
        BLOCK_N=BLOCK_N,
        WIDE=WIDE,
        **row_block(dim),
    )
    weight.grad = None
    return sums_F


def update_(
    learner: Learner,
    shares: list[Share],
    pull: Pull | None,
    sphere_F: Tensor,
    precision: Precision,
) -> None:
    """One Adam step of both matrices and of everything else; on the device a no-op where a list was cut.

    A `.grad` that other terms left is added.
    """
    sae = learner.sae
    dec, enc, bias = sae.W_dec_FD, sae.W_enc_FD, sae.b_enc_F
    if not shares:  # a dense code: all there is lies in `.grad`
        shares = [Share(nothing(dec.device))]
    shares = sorted(shares, key=lambda s: (s.white_BD is None, -len(s.pairs)))
    skip = _skip(shares, dec.device)
    by = turn_over([s.found for s in shares], sae.width)
    like = torch.empty(
        (0, dec.shape[1]), dtype=torch.float32 if precision.dec is None else torch.bfloat16, device=dec.device
    )
    terms = []
    for n in range(max(1, *(len(s.pairs) for s in shares))):
        z, grad = zip(*(s.pairs[n] if n < len(s.pairs) else (None, None) for s in shares), strict=True)
        terms.append(_sources(by, shares, z, grad, like))
    force = _sources(by, shares, [s.force_BK for s in shares], [s.white_BD for s in shares], like)
    kept = precision.moments
    _step_rows(learner, dec, Sources(by, terms, pull), precision.dec, kept, sphere_F, skip)
    free_F = torch.zeros_like(sphere_F)
    force_F = _step_rows(learner, enc, Sources(by, [force]), precision.enc, kept, free_F, skip)
    if bias.requires_grad:
        bias.grad = force_F if bias.grad is None else bias.grad + force_F
    _others(learner, skip)


def _others(learner: Learner, skip: Tensor) -> None:
    """The same rule for all else that has a gradient."""
    groups = learner.optimizer.param_groups
    left = [(p, group) for group in groups for p in group["params"] if p.grad is not None]
    vectors.step_([vectors.Vector(p, group, *moments.full(learner, p)) for p, group in left], skip)
