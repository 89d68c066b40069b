"""Features in context: the held-out tokens that fire a feature most."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from attrs import frozen
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.core.values import Raw, Sequences, White
from spalf.engine.evaluate import untouched


@frozen(kw_only=True)
class Context:
    """Tokens around the place where a feature fires, the feature's activation at each, and the index of the peak."""

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    peak: int


@frozen(kw_only=True)
class FeatureExample:
    """One feature: its stratum, the share of tokens that fire it, and its strongest contexts, strongest first."""

    feature: int
    stratum: str
    density: float
    contexts: tuple[Context, ...]


def examples(
    plan: Plan, state: TrainingState, features: int = 8, contexts: int = 4, sequences: int = 256, window: int = 8
) -> list[FeatureExample]:
    """`features` examples, spread evenly over the firing densities of the features that fire, densest first.

    Each shows at most `contexts` contexts, of as many sequences. Empty where the source has no tokens. The choice looks
    at density alone, never at how readable a feature is.
    """
    if "tokens" not in plan.facts.provides:
        return []
    with untouched(state):
        taken = state.stream.sequences(sequences)
        whites = [_white(state, part) for part in _parts(taken)]
        rows = sum(w_STD.shape[0] * w_STD.shape[1] for w_STD in whites)
        # Twice over the same rows: all codes of all features would not fit, those of the chosen few do.
        fired_F = torch.stack([state.sae.encode(White(w.flatten(0, 1))).fired_F() for w in whites]).sum(0)
        chosen = _spread(fired_F / rows, features, least=contexts / rows)
        z_STC = torch.cat([_codes(state, w_STD, chosen) for w_STD in whites])
        return [
            _example(state, taken.tokens_ST, z_STC[:, :, i], int(f), float(fired_F[f]) / rows, contexts, window)
            for i, f in enumerate(chosen.tolist())
        ]


def _parts(sequences: Sequences) -> Iterator[Sequences]:
    for begin in range(0, len(sequences.tokens_ST), 16):
        part = slice(begin, begin + 16)
        yield Sequences(tokens_ST=sequences.tokens_ST[part], real_ST=sequences.real_ST[part])


def _white(state: TrainingState, sequences: Sequences) -> White:
    """Whitened activations [S, T - 1, D] of all positions but the first, which has no context."""
    return state.metric.white(Raw(state.stream.activations(sequences)[:, 1:].float()))


def _codes(state: TrainingState, white_STD: White, chosen_C: Tensor) -> Tensor:
    """Activations [S, T, C] of the chosen features, 0 at the first position."""
    z_BC = state.sae.encode(White(white_STD.flatten(0, 1))).dense()[:, chosen_C]
    z_STC = z_BC.reshape(*white_STD.shape[:2], -1)
    return torch.cat([torch.zeros_like(z_STC[:, :1]), z_STC], dim=1)


def _spread(density_F: Tensor, features: int, least: float) -> Tensor:
    """Feature ids at evenly spaced ranks of density among those that fire at least `least` of the time."""
    order = density_F.argsort(descending=True)
    order = order[density_F[order] >= least]
    if len(order) <= features:
        return order
    ranks = ((torch.arange(features, dtype=torch.float64) + 0.5) / features * len(order)).long()
    return order[ranks.to(order.device)]


def _example(
    state: TrainingState, tokens_ST: Tensor, z_ST: Tensor, feature: int, density: float, contexts: int, window: int
) -> FeatureExample:
    peaks_S, at_S = z_ST.max(1)
    best = peaks_S.argsort(descending=True)[: min(contexts, int((peaks_S > 0).sum()))]
    shown = []
    for s in best.tolist():
        at = int(at_S[s])
        begin, end = max(0, at - window), min(tokens_ST.shape[1], at + window // 2 + 1)
        text = tuple(state.stream.text(tokens_ST[s, begin:end]))
        shown.append(Context(tokens=text, values=tuple(z_ST[s, begin:end].tolist()), peak=at - begin))
    stratum = next(name for name, rows in state.sae.rows.items() if rows.start <= feature < rows.stop)
    return FeatureExample(feature=feature, stratum=stratum, density=density, contexts=tuple(shown))
