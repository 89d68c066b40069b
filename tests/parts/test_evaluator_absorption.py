"""The first-letter task in a world where it is known which latents absorb.

Every word is its letter's direction plus a direction of its own. A latent per letter and a latent per word find them;
the words in ABSORBED silence their letter's latent, and their own latent speaks for the letter as well.
Shapes: S contexts, T positions, L letters, W words, F features, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.core.values import Raw, Sequences
from spalf.engine.build import build
from spalf.parts.evaluator import absorption
from spalf.parts.evaluator.absorption import LETTERS, WORD, FeatureAbsorption
from spalf.testing import toy_plan
from spalf.testing.whole import CPU

pytestmark = pytest.mark.slow  # together more than `make check` has time for

EACH = 6
"""Words of a letter."""
WORDS = [f" {letter}{chr(97 + i) * 2}" for letter in LETTERS for i in range(EACH)]
TEXTS = [*WORDS, "123", " a1", "\n", "-", " "]
ABSORBED = [WORDS.index(w) for w in (" saa", " sbb", " scc", " abb")]
LETTER, OWN = 5.0, 3.0


class World:
    """A stream of random words; also its own held-out part."""

    def sequences(self, n: int) -> Sequences:
        draw = torch.Generator().manual_seed(1)
        tokens_ST = torch.randint(len(TEXTS), (n, 32), generator=draw)
        return Sequences(tokens_ST=tokens_ST, real_ST=torch.ones_like(tokens_ST, dtype=torch.bool))

    def activations(self, sequences: Sequences) -> Raw:
        return Raw(directions()[sequences.tokens_ST])

    def text(self, tokens: Tensor) -> list[str]:
        return [TEXTS[i] for i in tokens.tolist()]

    def held_out(self) -> World:
        return self


def directions() -> Tensor:
    """The activation of each token [V, D]."""
    x_VD = torch.zeros(len(TEXTS), len(LETTERS) + len(WORDS))
    for w in range(len(WORDS)):
        x_VD[w, w // EACH] = LETTER
        x_VD[w, len(LETTERS) + w] = OWN
    return x_VD


@pytest.fixture
def world() -> tuple[Plan, TrainingState]:
    letters, width = len(LETTERS), len(LETTERS) + len(WORDS)
    plan = toy_plan(whitener="identity", source__d_model=str(width), knobs__F=str(width))
    state = build(plan, CPU)
    plan = evolve(plan, facts=evolve(plan.facts, n_vocab=len(TEXTS), provides=frozenset({"tokens", "activations"})))
    enc_FD, dec_FD = torch.eye(width), torch.eye(width)
    for w in ABSORBED:
        enc_FD[w // EACH, letters + w] = -LETTER / OWN
        dec_FD[letters + w, w // EACH] = LETTER / OWN
    state.learner.assign("W_enc_FD", enc_FD)
    state.learner.assign("W_dec_FD", dec_FD)
    state.learner.assign("_activator.log_threshold_F", torch.zeros(width))
    stream: Any = World()
    state.stream = stream
    state.sae._rows = {"anchored": slice(0, letters), "free": slice(letters, width)}  # type: ignore[attr-defined]
    return plan, state


def test_what_was_planted_is_found(world: tuple[Plan, TrainingState]) -> None:
    out = FeatureAbsorption(sequences=128)(*world)
    assert out["letters"] == 26.0
    assert out["probe_f1"] == pytest.approx(1.0, abs=0.02)
    # Half of the words with s, and one of six with a; all words are looked at equally often.
    wanted = (3 / 6 + 1 / 6) / 26
    assert out["absorption_full"] == pytest.approx(wanted, rel=1e-6)
    assert out["absorption_fraction"] == pytest.approx(wanted, abs=1e-3)
    assert out["absorption_full.free"] == out["absorption_full"]
    assert out["absorption_full.anchored"] == 0.0
    assert out["token_types"] == len(WORDS)
    assert out["words"] == len(WORDS) * 8
    assert out["absorption_full.ci_low"] < wanted < out["absorption_full.ci_high"]


def test_without_absorbing_latents_there_is_none(world: tuple[Plan, TrainingState]) -> None:
    plan, state = world
    state.learner.assign("W_enc_FD", torch.eye(state.sae.width))
    state.learner.assign("W_dec_FD", torch.eye(state.sae.width))
    out = FeatureAbsorption(sequences=128)(plan, state)
    assert out["absorption_full"] == 0.0
    assert out["absorption_fraction"] == pytest.approx(0.0, abs=1e-3)
    assert out["main_latents"] == 1.0
    assert out["main_f1"] == 1.0


def test_a_model_that_knows_no_letter_gives_no_number(world: tuple[Plan, TrainingState]) -> None:
    plan, state = world

    class Blank(World):
        def activations(self, sequences: Sequences) -> Raw:
            x_STD = super().activations(sequences)
            x_STD[..., : len(LETTERS)] = 0.0
            return x_STD

        def held_out(self) -> Blank:
            return self

    stream: Any = Blank()
    state.stream = stream
    assert FeatureAbsorption(sequences=128)(plan, state) == {"letters": 0.0, "words": len(WORDS) * 8}


@pytest.mark.parametrize(
    ("text", "letter"),
    [(" self", "s"), ("The", "t"), ("\nif", "i"), ("a", "a"), ("x1", ""), ("_name", ""), ("  two", ""), ("", "")],
)
def test_words_are_letters_behind_at_most_one_space(text: str, letter: str) -> None:
    found = WORD.fullmatch(text)
    assert (found[1].lower() if found else "") == letter


def test_few_places_of_each_token() -> None:
    draw = torch.Generator().manual_seed(0)
    tokens_ST = torch.randint(5, (20, 30), generator=draw)
    wanted_ST = torch.rand(20, 30, generator=draw) < 0.9
    few_ST = absorption._few_of_each(tokens_ST, wanted_ST, 7, draw)
    assert torch.bincount(tokens_ST[few_ST]).tolist() == [7] * 5
    assert not bool((few_ST & ~wanted_ST).any())
    assert torch.equal(absorption._few_of_each(tokens_ST, wanted_ST, 600, draw), wanted_ST)
