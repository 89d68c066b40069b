"""Absorption of single tokens: made-up cases, and the definition written out as a loop.

Shapes: N tokens, F features.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spalf.engine.absorption import Absorbed, Rule, absorbed

MAIN = torch.tensor([0, 1])
ALONG = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.02])
COSINE = torch.tensor([0.9, 0.9, 0.5, 0.05, 0.01])


def one(z: list[float], target: float = 1.0, rule: Rule | None = None) -> Absorbed:
    return absorbed(torch.tensor([z]), ALONG, COSINE, torch.tensor([target]), MAIN, rule or Rule())


@pytest.mark.parametrize(
    ("z", "full", "fraction", "why"),
    [
        ([0, 0, 1, 0, 0], True, 1.0, "another latent says all of it"),
        ([0, 0, 0.4, 0, 0], True, 1.0, "just enough"),
        ([0, 0, 0.39, 0, 0], False, 0.0, "not enough of the projection"),
        ([0, 0, 0, 1, 0], True, 0.0, "aligned enough for one measure and not for the other"),
        ([0, 0, 0, 0, 60], False, 0.0, "big but hardly aligned"),
        ([0.5, 0, 0.5, 0, 0], False, 0.5, "shared half and half"),
        ([0.5, 0, 2.0, 0, 0], False, 0.5, "no more is absorbed than is missing"),
        ([1, 0, 1, 0, 0], False, 0.0, "nothing is missing"),
        ([0, 0, 0, 0, 0], False, 0.0, "nobody speaks"),
    ],
)
def test_cases(z: list[float], full: bool, fraction: float, why: str) -> None:
    out = one(z)
    assert bool(out.full_N[0]) is full, why
    assert float(out.fraction_N[0]) == pytest.approx(fraction), why


def test_the_absorbing_latent_is_named() -> None:
    assert int(one([0, 0, 0.5, 0.2, 0]).latent_N[0]) == 2


def test_a_token_that_projects_on_nothing_is_not_absorbed() -> None:
    out = one([0, 0, 1, 0, 0], target=-1.0)
    assert not bool(out.full_N[0])
    assert float(out.fraction_N[0]) == 0.0


def by_hand(z: list[float], along: list[float], cosine: list[float], target: float, main: int, rule: Rule) -> float:
    """The fraction for one token, one condition after the other."""
    put = [a * b for a, b in zip(z, along, strict=True)]
    own = sum(put[:main])
    able = sorted((p for p, c in zip(put[main:], cosine[main:], strict=True) if c >= rule.partial_cosine and p > 0))
    others = sum(able[::-1][: rule.latents])
    if target <= 0 or own >= target or others < rule.share * target:
        return 0.0
    if own <= 0:
        return 1.0
    taken = min(others, target - own)
    return taken / (taken + own)


numbers = st.floats(-2.0, 2.0, width=32)
codes = st.one_of(st.just(0.0), st.floats(0.0, 3.0, width=32))


@given(
    st.lists(
        st.tuples(st.one_of(st.just(0.0), st.floats(0.0, 3.0, width=32)), numbers, numbers), min_size=3, max_size=7
    ),
    numbers,
    st.integers(1, 3),
)
def test_the_fraction_is_the_definition_s(entries: list[tuple[float, float, float]], target: float, main: int) -> None:
    z, along, cosine = map(list, zip(*entries, strict=True))
    rule = Rule()
    wide = [torch.tensor(v, dtype=torch.float64) for v in (z, along, cosine, [target])]
    main = min(main, len(z) - 1)
    out = absorbed(wide[0][None], wide[1], wide[2], wide[3], torch.arange(main), rule)
    assert float(out.fraction_N[0]) == pytest.approx(by_hand(z, along, cosine, target, main, rule), abs=1e-9)
    if bool(out.full_N[0]):
        assert all(v == 0 for v in z[:main])
        assert z[int(out.latent_N[0])] * along[int(out.latent_N[0])] >= rule.share * target
