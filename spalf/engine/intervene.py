"""Changing a feature inside the language model, and nothing else.

A change is a difference in the model's own coordinates: x' = x + decode(z') - decode(z). What the dictionary does not
explain, x - decode(z), stays in x' as it was. Position 0 has no context and is never read or changed.

Shape letters as in spalf/core/values.py; P = T - 1 positions that predict a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from attrs import frozen
from torch import Tensor

from spalf.core.protocols import Stream
from spalf.core.state import TrainingState
from spalf.core.values import Code, Raw, Sequences, White
from spalf.engine import language

SEQUENCES = 8
"""Contexts per pass of a changed model: logits of [8, T, V] fit anywhere."""

Edit = Callable[[Raw, Tensor], Raw]
"""From activations x [..., D] and their codes z [..., F] to what the model reads instead."""


def whole(tokens_ST: Tensor) -> Sequences:
    """Contexts without padding."""
    return Sequences(tokens_ST=tokens_ST, real_ST=torch.ones_like(tokens_ST, dtype=torch.bool))


def code_of(state: TrainingState, z_BF: Tensor) -> Code:
    """The dense code that holds these activations."""
    overflow = torch.zeros((), dtype=torch.bool, device=z_BF.device)
    gate_BF = (z_BF != 0).to(z_BF.dtype)
    return Code(pre_BK=z_BF, gate_BK=gate_BF, z_BK=z_BF, index_BK=None, width=state.sae.width, overflow=overflow)


def encode(state: TrainingState, x: Raw) -> Tensor:
    """Codes [..., F] of raw activations [..., D]."""
    flat_BD = Raw(x.reshape(-1, x.shape[-1]).float())
    return state.sae.encode(state.metric.white(flat_BD)).dense().reshape(*x.shape[:-1], state.sae.width)


def decode(state: TrainingState, z: Tensor) -> Raw:
    """Raw activations [..., D] of codes [..., F], with every bias and mean."""
    white_BD = state.sae.decode(code_of(state, z.reshape(-1, z.shape[-1])))
    return Raw(state.metric.raw(white_BD).reshape(*z.shape[:-1], -1))


def difference(state: TrainingState, change: Tensor) -> Raw:
    """decode(z + change) - decode(z) [..., D], whatever z is; exactly zero where the change [..., F] is.

    Decoding is affine, so this is decode(change) - decode(0): what a backend rounds is then of the change's own size.
    """
    flat_BF = change.reshape(-1, change.shape[-1])
    white_BD = state.sae.decode(code_of(state, torch.cat([torch.zeros_like(flat_BF[:1]), flat_BF])))
    return Raw(state.metric.raw_direction(White(white_BD[1:] - white_BD[0])).reshape(*change.shape[:-1], -1))


def direction(state: TrainingState, feature: int) -> Raw:
    """What one unit of a feature adds to the raw activation, [D]: gain and un-whitening included."""
    one_F = torch.zeros(state.sae.width, device=state.device)
    one_F[feature] = 1.0
    return difference(state, one_F)


def patch(state: TrainingState, edit: Edit) -> Callable[[Raw], Raw]:
    """A patch of activations [S, T, D] that applies `edit` after the first position."""

    def apply(x_STD: Raw) -> Raw:
        wide = Raw(x_STD.float())
        return edit(wide, encode(state, wide))

    return language.patch_after_first(apply)


def edited(state: TrainingState, fn: Callable[[Tensor], Tensor], *, error: bool) -> Edit:
    """The model reads x + decode(fn(z)) - decode(z); without `error`, decode(fn(z)) alone."""

    def edit(x: Raw, z: Tensor) -> Raw:
        after = fn(z.clone())
        return Raw(x + difference(state, after - z)) if error else decode(state, after)

    return edit


def added(state: TrainingState, feature: int, amount: float, *, error: bool) -> Edit:
    """The model reads x and `amount` units of a feature; without `error`, its reconstruction and those units."""
    offset_D = amount * direction(state, feature)

    def edit(x: Raw, z: Tensor) -> Raw:
        return Raw((x if error else decode(state, z)) + offset_D)

    return edit


def unchanged(state: TrainingState, *, error: bool) -> Callable[[Raw], Raw] | None:
    """What a change is compared with: the model as it is; without `error`, the model that reads reconstructions."""
    return None if error else patch(state, lambda _, z: decode(state, z))


@torch.no_grad()
def generate(
    stream: Stream,
    tokens_T: Tensor,
    count: int,
    fn: Callable[[Raw], Raw] | None,
    *,
    temperature: float,
    seed: int,
) -> Tensor:
    """`count` tokens that the model, patched by `fn`, writes after `tokens_T`: greedy, or sampled at a temperature > 0.

    Draws are a function of the seed and made on the CPU, so two patches see the same ones. The model reads the last
    `context` tokens at most: what it was harvested on.
    """
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        seen_T = tokens_T[-stream.facts.context :] if stream.facts.context else tokens_T
        logits_V = stream.logits(whole(seen_T[None]), fn)[0, -1].float()
        if temperature > 0:
            p_V = (logits_V / temperature).softmax(-1).cpu()
            token = torch.multinomial(p_V, 1, generator=draw).to(tokens_T.device)
        else:
            token = logits_V.argmax(keepdim=True)
        tokens_T = torch.cat([tokens_T, token])
    return tokens_T[len(tokens_T) - count :]


# ------------------------------------------------------------------------------------------------------- ablation
@frozen(kw_only=True)
class Effect:
    """What a change does at some positions, in nats per predicted token; NaN where there is no position.

    `loss` is the cross-entropy before, `change` what the change adds to it, `error` the standard error of `change`
    over contexts (NaN for a single one), `kl` the mean KL(before || after).
    """

    positions: int
    loss: float
    change: float
    error: float
    kl: float


@frozen(kw_only=True, repr=False)
class Ablation:
    """A feature set to 0 wherever it fires on held-out text, all else kept.

    Measured on the `contexts` of the `looked_at` ones in which it fires; nothing changes in the others, nor before its
    first firing. `fires` are the positions at which it fires, `elsewhere` all others of these contexts; `later` are
    those of `elsewhere` that come after a firing, which attention can carry the change to.
    """

    feature: int
    looked_at: int
    contexts: int
    fires: Effect
    elsewhere: Effect
    later: Effect

    def __repr__(self) -> str:
        told = [
            f"feature {self.feature} fires in {self.contexts} of {self.looked_at} contexts; set to 0, loss changes by"
        ]
        for where, one in (("where it fires", self.fires), ("elsewhere", self.elsewhere)):
            told.append(
                f"  {one.change:+.3g} +- {one.error:.2g} nats {where} ({one.positions} tokens, KL {one.kl:.3g})"
            )
        return "\n".join(told)


@torch.no_grad()
def ablate(state: TrainingState, feature: int, tokens_ST: Tensor, looked_at: int, *, error: bool = True) -> Ablation:
    """Measure on contexts in which the feature fires; without `error` both sides read reconstructions."""
    direction_D = direction(state, feature)
    base = unchanged(state, error=error)
    edit = patch(state, lambda x, z: Raw((x if error else decode(state, z)) - z[..., feature, None] * direction_D))
    parts = []
    for begin in range(0, len(tokens_ST), SEQUENCES):
        few = whole(tokens_ST[begin : begin + SEQUENCES].to(state.device))
        before_STV, after_STV = state.stream.logits(few, base), state.stream.logits(few, edit)
        loss_SP = language.cross_entropy(before_STV, few.tokens_ST)
        change_SP = language.cross_entropy(after_STV, few.tokens_ST) - loss_SP
        kl_SP = language.kl(before_STV, after_STV)[:, :-1]
        fires_SP = _fires(state, few, feature)
        parts.append(torch.stack([loss_SP, change_SP, kl_SP, fires_SP.to(loss_SP)]).double().cpu())
    empty = torch.zeros(4, 0, max(1, tokens_ST.shape[1] - 1), dtype=torch.float64)
    loss_SP, change_SP, kl_SP, on_SP = torch.cat([empty, *parts], dim=1)
    fires_SP = on_SP > 0
    later_SP = (fires_SP.cumsum(1) > 0) & ~fires_SP

    def effect(at_SP: Tensor) -> Effect:
        return _effect(loss_SP, change_SP, kl_SP, at_SP)

    return Ablation(
        feature=feature,
        looked_at=looked_at,
        contexts=int(fires_SP.any(1).sum()),
        fires=effect(fires_SP),
        elsewhere=effect(~fires_SP),
        later=effect(later_SP),
    )


def _fires(state: TrainingState, sequences: Sequences, feature: int) -> Tensor:
    """Where the feature fires among the positions that predict a token, [S, P]; never at the first."""
    z_STF = encode(state, Raw(state.stream.activations(sequences)[:, 1:-1]))
    return torch.nn.functional.pad(z_STF[..., feature] != 0, (1, 0))


def _effect(loss_SP: Tensor, change_SP: Tensor, kl_SP: Tensor, at_SP: Tensor) -> Effect:
    """Means over the positions of `at_SP`; contexts are the independent units of the standard error."""
    n_S = at_SP.sum(1).double()
    n = float(n_S.sum())
    if not n:
        return Effect(positions=0, loss=math.nan, change=math.nan, error=math.nan, kl=math.nan)
    mean = float((change_SP * at_SP).sum()) / n
    # Of a ratio of sums over S contexts: S / (S - 1) sum_s (d_s - mean n_s)^2 / n^2
    of = n_S > 0
    rest_S = ((change_SP * at_SP).sum(1) - mean * n_S)[of]
    s = len(rest_S)
    variance = float(rest_S.square().sum()) / n**2 * s / (s - 1) if s > 1 else math.nan
    return Effect(
        positions=int(n),
        loss=float((loss_SP * at_SP).sum()) / n,
        change=mean,
        error=math.sqrt(variance),
        kl=float((kl_SP * at_SP).sum()) / n,
    )
