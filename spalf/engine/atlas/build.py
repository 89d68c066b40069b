"""Look at a state's features on held-out data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.engine.atlas import anchoring, directions, usage
from spalf.engine.atlas.firings import Firings, firings
from spalf.engine.atlas.records import Anchored, Atlas, Feature
from spalf.engine.evaluate import untouched
from spalf.errors import SourceError

TOKENS, PARTNERS, NEIGHBOURS = 6, 6, 6


@torch.no_grad()
def atlas(
    plan: Plan,
    state: TrainingState,
    *,
    features: int = 4096,
    sequences: int = 512,
    contexts: int = 8,
    only: Collection[int] = (),
    held: Firings | None = None,
) -> Atlas:
    """Records of at most `features` features, on `sequences` held-out contexts. Leaves `state` as it was.

    Of a wider dictionary they are spread evenly over the densities, silent ones included, unless `only` names them. A
    feature shows at most `contexts` of its strongest contexts, and half as many from the rest of its range. `held` is
    what has been looked at already.
    """
    with untouched(state):
        held = firings(plan, state, sequences) if held is None else held
        count_F = held.count_F()
        chosen_I = torch.tensor(sorted(only)) if only else usage.spread(count_F, features)
        told = _usage(held, chosen_I, contexts) | _directions(plan, state, chosen_I)
        ahead = {name: getattr(plan.recipe.stratum[name], "of", "") != "activation" for name in state.anchors}
        tied, taken = anchoring.anchors(state), anchoring.absorption(held, state, ahead)
        found = _features(state, chosen_I, count_F, told, tied, taken)
        text = _text(state, held, found)
    spans = state.sae.rows
    return Atlas(
        width=held.width,
        rows=held.rows,
        rows_of={name: span.stop - span.start for name, span in spans.items()},
        silent=int((count_F == 0).sum()),
        density=tuple(usage.decades(count_F[span], held.rows) for span in spans.values()),
        features=found,
        sequences=() if held.tokens_ST is None else tuple(map(tuple, held.tokens_ST.tolist())),
        text=text,
    )


def _usage(held: Firings, chosen_I: Tensor, contexts: int) -> dict[str, Sequence[Any]]:
    """Fields of the chosen features that come of where they fire."""
    peak_F, mean_F, bars_FH = usage.levels(held)
    return {
        "peak": peak_F[chosen_I].tolist(),
        "mean": mean_F[chosen_I].tolist(),
        "histogram": [tuple(h) if any(h) else () for h in bars_FH[chosen_I].tolist()],
        "tokens": usage.tokens(held, chosen_I, TOKENS),
        "partners": usage.partners(held, chosen_I, PARTNERS),
        "places": [usage.places(held, f, contexts, contexts // 2) for f in chosen_I.tolist()],
    }


def _directions(plan: Plan, state: TrainingState, chosen_I: Tensor) -> dict[str, Sequence[Any]]:
    """Fields of the chosen features that come of where they point."""
    rows_FD = directions.rows(state)
    own_I = chosen_I.to(rows_FD.device)
    few_ID = rows_FD[own_I]
    out: dict[str, Sequence[Any]] = {"neighbours": directions.nearest(few_ID, rows_FD, NEIGHBOURS, own_I)}
    if "truth" in plan.facts.provides:
        truth_PD = torch.nn.functional.normalize(state.stream.truth(), dim=-1)
        out["planted"] = directions.nearest(few_ID, truth_PD, 1)
    if {"unembedding", "tokens"} <= plan.facts.provides:
        try:
            W_VD = state.stream.unembedding()
        except SourceError:  # the hook is not on the residual stream: its directions say nothing about tokens
            return out
        out["promoted"], out["suppressed"] = directions.through(few_ID, W_VD.to(few_ID), TOKENS)
    return out


def _features(
    state: TrainingState,
    chosen_I: Tensor,
    count_F: Tensor,
    told: Mapping[str, Sequence[Any]],
    tied: Mapping[int, Anchored],
    absorption: Mapping[int, float],
) -> tuple[Feature, ...]:
    names = [name for name, span in state.sae.rows.items() for _ in range(span.start, span.stop)]
    return tuple(
        Feature(
            id=f,
            stratum=names[f],
            fired=int(count_F[f]),
            anchored=tied.get(f),
            absorption=absorption.get(f),
            **{name: values[i] for name, values in told.items()},
        )
        for i, f in enumerate(chosen_I.tolist())
    )


def _text(state: TrainingState, held: Firings, found: Sequence[Feature]) -> dict[int, str]:
    """What every token id reads as that a sequence or a feature mentions."""
    if held.tokens_ST is None:
        return {}
    ids = set(held.tokens_ST.flatten().tolist())
    for f in found:
        ids.update(v for v, _ in (*f.promoted, *f.suppressed))
        ids.update([f.anchored.token] if f.anchored is not None else [])
    ordered = sorted(ids)
    return dict(zip(ordered, state.stream.text(torch.tensor(ordered)), strict=True))
