"""The first-letter task on the tokens of held-out text: no prompts, no download.

Shapes: N tokens in context, D d_model, F features, L letters, V vocabulary, S contexts, T positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import ge, gt, le, lt
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from spalf.core.recipe import Plan
from spalf.core.slots import evaluator
from spalf.core.state import TrainingState
from spalf.core.values import Raw, White
from spalf.engine.absorption import Rule, absorbed
from spalf.engine.bootstrap import Tally, Totals, measured
from spalf.engine.evaluate import untouched
from spalf.engine.probing import Contrast, Probe, best_f1, f1, logistic

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORD = re.compile(r"\s?([A-Za-z])[A-Za-z]*")
MOST_SPLIT = 10
"""Latents that a letter may be split over."""
SPLIT_GAIN = 0.03
"""F1 that one more latent has to add to count as part of a split."""
CHUNK = 512
FOLDS = 5


@frozen(kw_only=True, eq=False)
class Words:
    """Tokens that spell a word or its beginning, in context: activation, token id, first letter, and fold."""

    x_ND: Raw
    token_N: Tensor
    letter_N: Tensor
    fold_N: Tensor

    @property
    def is_letter_NL(self) -> Tensor:
        return one_hot(self.letter_N, len(LETTERS)).bool()

    def chunks(self, state: TrainingState, where_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Row numbers [n] and codes [n, F] of the rows where `where_N` is true."""
        for rows_n in torch.split(where_N.nonzero()[:, 0], CHUNK):
            yield rows_n, state.sae.encode(state.metric.white(Raw(self.x_ND[rows_n]))).dense()


@frozen(kw_only=True, eq=False)
class Own:
    """A letter's own latents, and the F1 of a probe on them."""

    latents: Tensor
    f1: float


@evaluator("feature_absorption")
class FeatureAbsorption:
    """Whether latents for "starts with s" go silent where another latent speaks for the token (2409.14507).

    Tokens of held-out text that are letters alone are labelled with their first letter. Logistic probes on the
    activations give one direction per letter, in five folds over token types, so that a token is judged by a probe that
    never saw its type; letters whose probes have an F1 below `probe_f1` are left out, for the model does not know them.
    A letter's own latents are found by k-sparse probing on the same four folds: one, and more as long as each adds 0.03
    to the F1. Of the tokens that carry the letter and that the probe finds, `absorption_full` is the share whose own
    latents are all 0 while another latent of cosine >= `cosine` puts at least `share` of the projection there, and
    `absorption_fraction` the mean fraction that up to three others take over (SAEBench, 2503.09532); both are means
    over letters. `absorption_full.<stratum>` is the part of the first whose absorbing latent is of that stratum: a row
    that is anchored to a token absorbs by construction. `main_latents` and `main_f1` are of a letter's own latents.

    Unlike SAEBench the tokens stand in running text, not in a spelling prompt; the projection is taken from the
    decoder's bias on, which no latent has to explain; latents are ranked by difference of means, not by an L1 probe.
    Intervals are over token types. With no letter left there is only the number of words.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    sequences: int = field(default=512, validator=gt(0))
    """Held-out contexts that are searched for words."""
    occurrences: int = field(default=8, validator=gt(0))
    """Places at which one token is looked at, at most."""
    probe_f1: float = field(default=0.3, validator=[ge(0.0), lt(1.0)])
    """F1 on unseen token types below which a letter is left out; SAEBench asks for 0.6, which small models miss."""
    share: float = field(default=0.4, validator=[gt(0.0), le(1.0)])
    """Least share of the projection that absorbing latents make up."""
    cosine: float = field(default=0.025, validator=ge(0.0))
    """Least cosine to the probe of a latent that absorbs in full."""

    def __call__(self, plan: Plan, state: TrainingState) -> dict[str, float]:
        with untouched(state):
            words = _words(plan, state, self.sequences, self.occurrences)
            extra = {"letters": 0.0, "words": float(len(words.token_N))}
            if len(set(words.fold_N.tolist())) < FOLDS:
                return extra
            probes, said_NL = _probes(words)
            score = {at: f1(said_NL[:, at], words.is_letter_NL[:, at]) for at in range(len(LETTERS))}
            known = [at for at, value in score.items() if value >= self.probe_f1]
            if not known:
                return extra
            tally = Tally()
            owned: list[Own] = []
            for fold, probe in enumerate(probes):
                own = _own_latents(state, words, fold, known)
                self._add(tally, state, words, said_NL & (words.fold_N == fold)[:, None], probe, own)
                owned += own.values()
            extra["letters"] = float(len(known))
            extra["probe_f1"] = sum(score[at] for at in known) / len(known)
            extra["main_f1"] = sum(one.f1 for one in owned) / len(owned)
            extra["main_latents"] = sum(len(one.latents) for one in owned) / len(owned)
            return measured(tally.samples(_measure), extra, units="token_types")

    def _add(
        self, tally: Tally, state: TrainingState, words: Words, said_NL: Tensor, probe: Probe, own: dict[int, Own]
    ) -> None:
        """Per token type: true positives, absorbed ones (in all and by stratum) and fractions, [N, letters] each."""
        raw_FD = state.metric.raw_direction(White(state.sae.log_gain.exp() * state.sae.W_dec_FD))
        origin_D = state.metric.raw(White(state.sae.b_dec_D))
        rule = Rule(cosine=self.cosine, share=self.share)
        for column, (at, one) in enumerate(own.items()):
            direction_D = normalize(probe.weight_CK[at].to(raw_FD), dim=0)
            along_F = raw_FD @ direction_D
            cosine_F = along_F / raw_FD.norm(dim=1).clamp(min=1e-12)
            for rows_n, z_nF in words.chunks(state, said_NL[:, at] & (words.letter_N == at)):
                target_n = (words.x_ND[rows_n] - origin_D) @ direction_D
                out = absorbed(z_nF, along_F, cosine_F, target_n, one.latents, rule)
                values = {"n": torch.ones_like(target_n), "full": out.full_N, "fraction": out.fraction_N}
                for name, span in state.sae.rows.items():
                    values[f"full.{name}"] = out.full_N & (out.latent_N >= span.start) & (out.latent_N < span.stop)
                here = one_hot(torch.tensor(column, device=rows_n.device), len(own)).double()
                tally.add(words.token_N[rows_n], **{k: v[:, None] * here for k, v in values.items()})


def _probes(words: Words) -> tuple[list[Probe], Tensor]:
    """The probes of each fold, trained on the others, and which letters they find in each token [N, L]."""
    x_ND, is_letter_NL, fold_N = words.x_ND.cpu(), words.is_letter_NL.cpu(), words.fold_N.cpu()
    said_NL, probes = torch.zeros_like(is_letter_NL), []
    for fold in range(FOLDS):
        seen_N = fold_N != fold
        probe = logistic(x_ND[seen_N], is_letter_NL[seen_N], l2=3e-3, steps=100)
        score_NL = probe.score(x_ND)
        for at in range(len(LETTERS)):
            _, threshold = best_f1(score_NL[seen_N, at], is_letter_NL[seen_N, at])
            said_NL[~seen_N, at] = score_NL[~seen_N, at] > threshold
        probes.append(probe)
    return probes, said_NL.to(words.fold_N.device)


def _own_latents(state: TrainingState, words: Words, fold: int, known: list[int]) -> dict[int, Own]:
    """The own latents of each known letter, chosen on all folds but one."""
    seen_N = words.fold_N != fold
    is_letter_NL = words.is_letter_NL[:, known]
    contrast = Contrast(len(known), state.sae.width, state.device)
    for rows_n, z_nF in words.chunks(state, seen_N):
        contrast.add(z_nF, is_letter_NL[rows_n], ~is_letter_NL[rows_n])
    top_LK = contrast.top(MOST_SPLIT)
    z_NLK = torch.cat([z_nF[:, top_LK].cpu() for _, z_nF in words.chunks(state, seen_N)])
    out = {}
    for column, at in enumerate(known):
        count, score = _split(z_NLK[:, column], is_letter_NL[seen_N, column].cpu())
        out[at] = Own(latents=top_LK[column, :count], f1=score)
    return out


def _words(plan: Plan, state: TrainingState, sequences: int, occurrences: int) -> Words:
    """At most `occurrences` places of each token that is a word, drawn from held-out text; folds by token type."""
    draw = torch.Generator().manual_seed(0)
    letter_V = torch.full((plan.facts.n_vocab,), -1)
    for token, text in enumerate(state.stream.text(torch.arange(plan.facts.n_vocab))):
        word = WORD.fullmatch(text)
        if word is not None:
            letter_V[token] = LETTERS.index(word[1].lower())
    fold_V = torch.randint(FOLDS, (plan.facts.n_vocab,), generator=draw)
    contexts = state.stream.sequences(sequences)
    tokens_ST = contexts.tokens_ST.cpu()
    wanted_ST = contexts.real_ST.cpu() & (letter_V[tokens_ST] >= 0)
    wanted_ST[:, 0] = False
    wanted_ST = _few_of_each(tokens_ST, wanted_ST, occurrences, draw).to(state.device)
    parts = zip(contexts.split(16), torch.split(wanted_ST, 16), strict=True)
    x_ND = torch.cat([state.stream.activations(part)[want_ST].float() for part, want_ST in parts])
    token_N = contexts.tokens_ST[wanted_ST]
    return Words(
        x_ND=Raw(x_ND),
        token_N=token_N,
        letter_N=letter_V.to(state.device)[token_N],
        fold_N=fold_V.to(state.device)[token_N],
    )


def _few_of_each(tokens_ST: Tensor, wanted_ST: Tensor, most: int, draw: torch.Generator) -> Tensor:
    """`wanted_ST` with at most `most` places per token, chosen at random."""
    place_N = wanted_ST.flatten().nonzero()[:, 0]
    place_N = place_N[torch.randperm(len(place_N), generator=draw)]
    token_N, order_N = tokens_ST.flatten()[place_N].sort(stable=True)
    first_N = torch.searchsorted(token_N, token_N)
    kept_N = place_N[order_N[torch.arange(len(token_N)) - first_N < most]]
    few_ST = torch.zeros_like(wanted_ST).flatten()
    few_ST[kept_N] = True
    return few_ST.view_as(wanted_ST)


def _split(z_NK: Tensor, is_N: Tensor) -> tuple[int, float]:
    """How many of the ranked latents a letter is split over, and the F1 of a probe on them."""
    score, kept = 0.0, 0
    for k in range(1, z_NK.shape[1] + 1):
        probe = logistic(z_NK[:, :k], is_N[:, None], l2=1e-4)
        now, _ = best_f1(probe.score(z_NK[:, :k])[:, 0], is_N)
        if kept and now - score <= SPLIT_GAIN:
            break
        score, kept = now, k
    return kept, score


def _measure(totals: Totals) -> dict[str, Tensor]:
    """Shares per letter, then their mean over the letters that this resample has."""
    n_RL = totals["n"]
    out = {}
    for name, sum_RL in totals.items():
        if name != "n":
            share_RL = torch.where(n_RL > 0, sum_RL / n_RL.clamp(min=1), torch.nan)
            key = "absorption_fraction" if name == "fraction" else f"absorption_{name}"
            out[key] = share_RL.nanmean(-1)
    return out


EXAMPLES = {("evaluator", "feature_absorption"): {"sequences": 128, "probe_f1": 0.1}}
