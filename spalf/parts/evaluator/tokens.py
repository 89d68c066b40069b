"""Which features stand for one token that the model reads.

Shapes: N firings, P pairs of a feature and a token, F features, V vocabulary, A anchored rows.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import ge, gt
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.slots import evaluator
from spalf.core.state import TrainingState
from spalf.engine.atlas import firings
from spalf.engine.evaluate import untouched


@frozen(kw_only=True, eq=False)
class _Seen:
    """Firings by feature, the strongest of each first: the token that each stands on, and the one after it.

    The one after a context's end is -1.
    """

    feature_N: Tensor
    here_N: Tensor
    next_N: Tensor
    count_F: Tensor
    count_V: Tensor

    @property
    def rank_N(self) -> Tensor:
        """How many firings of its feature are stronger than each."""
        begin_F = self.count_F.cumsum(0) - self.count_F
        return torch.arange(len(self.feature_N)) - begin_F[self.feature_N]

    def f1(self) -> tuple[Tensor, Tensor, Tensor]:
        """(feature, token, F1) of every pair that meets: 2 n_fv / (n_f + n_v)."""
        vocabulary = len(self.count_V)
        key_P, both_P = torch.unique(self.feature_N * vocabulary + self.here_N, return_counts=True)
        feature_P, token_P = key_P // vocabulary, key_P % vocabulary
        return feature_P, token_P, 2.0 * both_P.double() / (self.count_F[feature_P] + self.count_V[token_P])


@evaluator("token_features")
class TokenFeatures:
    """Which features stand for one token that the model reads, in held-out text; anchored or not.

    `single` is the share of features whose `top` strongest firings all stand on one token, of those that fire so often;
    `single.<stratum>` likewise. `detected` asks how well one feature says which token stands there: for each of the
    `tokens` commonest tokens of the text the largest F1 of any feature's firing, and the mean over tokens. Both need
    no anchors, so that dictionaries with and without them compare.

    Of each stratum with anchors, `<stratum>.fires` is the share of rows that fire at all, and of these `own_peak` the
    share whose strongest firing stands on their own token and `own_next` the share where their own token comes next,
    which is what a row of the unembedding means. `own_f1` is the mean F1 of a row's firing as a sign of its own token,
    over rows whose token occurs: what a row's name is worth without looking at it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    sequences: int = field(default=512, validator=gt(0))
    """Held-out contexts that are looked at."""
    top: int = field(default=10, validator=gt(1))
    """Strongest firings of a feature that have to agree."""
    tokens: int = field(default=0, validator=ge(0))
    """Commonest tokens that are looked for; 0: F / 4, the default number of anchors."""

    def __call__(self, plan: Plan, state: TrainingState) -> dict[str, float]:
        with untouched(state):
            seen = _look(plan, state, self.sequences)
        feature_P, token_P, f1_P = seen.f1()
        wanted = self.tokens or max(1, plan.knobs.F // 4)
        common_V = seen.count_V.argsort(descending=True, stable=True)[: min(wanted, int((seen.count_V > 0).sum()))]
        best_V = torch.zeros(len(seen.count_V), dtype=torch.float64).scatter_reduce(0, token_P, f1_P, "amax")
        out = {"detected": float(best_V[common_V].mean()), "tokens": float(len(common_V))}
        out |= self._single(seen, state)
        here_F, next_F = _strongest(seen, seen.here_N), _strongest(seen, seen.next_N)
        for name, anchor in sorted(state.anchors.items()):
            span, ids_A = state.sae.rows[name], anchor.ids_A.cpu()
            fires_A = seen.count_F[span] > 0
            out[f"{name}.fires"] = float(fires_A.double().mean())
            if bool(fires_A.any()):
                out[f"{name}.own_peak"] = float((here_F[span] == ids_A)[fires_A].double().mean())
                out[f"{name}.own_next"] = float((next_F[span] == ids_A)[fires_A].double().mean())
            own_A = _own(feature_P - span.start, token_P, f1_P, ids_A)
            occurs_A = seen.count_V[ids_A] > 0
            if bool(occurs_A.any()):
                out[f"{name}.own_f1"] = float(own_A[occurs_A].mean())
        return out

    def _single(self, seen: _Seen, state: TrainingState) -> dict[str, float]:
        """Shares of features whose strongest firings are all of one token."""
        few_N = seen.rank_N < self.top
        feature_N, here_N = seen.feature_N[few_N], seen.here_N[few_N]
        least_F = torch.full_like(seen.count_F, len(seen.count_V)).scatter_reduce(0, feature_N, here_N, "amin")
        most_F = torch.full_like(seen.count_F, -1).scatter_reduce(0, feature_N, here_N, "amax")
        often_F, one_F = seen.count_F >= self.top, least_F == most_F
        every = {"single": slice(None)}
        if len(state.sae.rows) > 1:
            every |= {f"single.{name}": span for name, span in state.sae.rows.items()}
        return {
            name: float(one_F[span][often_F[span]].double().mean())
            for name, span in every.items()
            if bool(often_F[span].any())
        }


def _look(plan: Plan, state: TrainingState, sequences: int) -> _Seen:
    held = firings(plan, state, sequences)
    assert held.tokens_ST is not None, "compile asks for tokens"
    here_R = held.tokens_ST[:, 1:].flatten()
    next_R = torch.cat([held.tokens_ST[:, 2:], torch.full_like(held.tokens_ST[:, :1], -1)], dim=1).flatten()
    by_value_N = held.value_N.argsort(descending=True, stable=True)
    order_N = by_value_N[held.feature_N[by_value_N].argsort(stable=True)]
    return _Seen(
        feature_N=held.feature_N[order_N],
        here_N=here_R[held.row_N[order_N]],
        next_N=next_R[held.row_N[order_N]],
        count_F=held.count_F(),
        count_V=torch.bincount(here_R, minlength=plan.facts.n_vocab),
    )


def _strongest(seen: _Seen, token_N: Tensor) -> Tensor:
    """The token of each feature's strongest firing [F]; -2 where it does not fire."""
    first_N = seen.rank_N == 0
    token_F = torch.full_like(seen.count_F, -2)
    token_F[seen.feature_N[first_N]] = token_N[first_N]
    return token_F


def _own(row_P: Tensor, token_P: Tensor, f1_P: Tensor, ids_A: Tensor) -> Tensor:
    """The F1 of each anchored row for its own token [A]; 0 where the two never meet."""
    is_row_P = (row_P >= 0) & (row_P < len(ids_A))
    row_P, token_P, f1_P = row_P[is_row_P], token_P[is_row_P], f1_P[is_row_P]
    is_own_P = token_P == ids_A[row_P]
    own_A = torch.zeros(len(ids_A), dtype=torch.float64)
    own_A[row_P[is_own_P]] = f1_P[is_own_P]
    return own_A


EXAMPLES = {("evaluator", "token_features"): {"sequences": 32, "top": 3}}
