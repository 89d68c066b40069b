"""Features in context: the held-out tokens that fire a feature most."""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.core.values import White
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

    Empty where the source has no tokens. The choice looks at density alone, never at how readable a feature is.
    """
    if "tokens" not in plan.facts.provides:
        return []
    with untouched(state):
        tokens_ST, z_parts = _encode(state, sequences)
        density_F = torch.stack([(z > 0).sum(0) for z in z_parts]).sum(0) / sum(len(z) for z in z_parts)
        chosen = _spread(density_F, features, least=contexts / sum(len(z) for z in z_parts))
        z_NC = torch.cat([z[:, chosen] for z in z_parts])
        return [
            _example(
                state, tokens_ST, z_NC[:, i].reshape(tokens_ST.shape), int(f), float(density_F[f]), contexts, window
            )
            for i, f in enumerate(chosen.tolist())
        ]


def _encode(state: TrainingState, sequences: int) -> tuple[Tensor, list[Tensor]]:
    """Token ids [S, T] and dense codes of all positions, in parts; position 0, which has no context, is silent."""
    taken = state.stream.sequences(sequences)
    parts = []
    for begin in range(0, sequences, 16):
        few = type(taken)(tokens_ST=taken.tokens_ST[begin : begin + 16], real_ST=taken.real_ST[begin : begin + 16])
        x_STD = state.stream.activations(few)
        white_BD = state.metric.white(type(x_STD)(x_STD.reshape(-1, x_STD.shape[-1]).float()))
        z_STF = state.sae.encode(White(white_BD)).dense().reshape(*few.tokens_ST.shape, -1).clone()
        z_STF[:, 0] = 0.0
        parts.append(z_STF.reshape(-1, z_STF.shape[-1]))
    return taken.tokens_ST, parts


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
    best = peaks_S.argsort(descending=True)[:contexts]
    shown = []
    for s in best.tolist():
        at = int(at_S[s])
        begin, end = max(0, at - window), min(tokens_ST.shape[1], at + window // 2 + 1)
        text = tuple(state.stream.text(tokens_ST[s, begin:end]))
        shown.append(Context(tokens=text, values=tuple(z_ST[s, begin:end].tolist()), peak=at - begin))
    stratum = next(name for name, rows in state.sae.rows.items() if rows.start <= feature < rows.stop)
    return FeatureExample(feature=feature, stratum=stratum, density=density, contexts=tuple(shown))
