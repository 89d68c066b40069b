"""Features in context: the held-out tokens that fire a feature most."""

from __future__ import annotations

from attrs import frozen
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.engine.atlas import Firings, Place, firings, usage
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
        held = firings(plan, state, sequences)
        count_F = held.count_F()
        chosen_I = _densest_first(count_F, features, least=contexts)
        return [
            FeatureExample(
                feature=f,
                stratum=next(name for name, rows in state.sae.rows.items() if rows.start <= f < rows.stop),
                density=int(count_F[f]) / held.rows,
                contexts=tuple(_context(state, held, place, window) for place in usage.places(held, f, contexts)),
            )
            for f in chosen_I.tolist()
        ]


def _densest_first(count_F: Tensor, features: int, least: int) -> Tensor:
    """Feature ids at evenly spaced ranks of density among those that fire at least `least` times."""
    order_I = count_F.argsort(descending=True, stable=True)
    order_I = order_I[count_F[order_I] >= least]
    return order_I[usage.ranks(len(order_I), features)]


def _context(state: TrainingState, held: Firings, place: Place, window: int) -> Context:
    assert held.tokens_ST is not None
    tokens_T = held.tokens_ST[place.sequence]
    begin, end = max(0, place.position - window), min(len(tokens_T), place.position + window // 2 + 1)
    values = dict(place.activations)
    return Context(
        tokens=tuple(state.stream.text(tokens_T[begin:end])),
        values=tuple(values.get(t, 0.0) for t in range(begin, end)),
        peak=place.position - begin,
    )
