"""Matching of dictionaries: the best assignment, its floor, samples of wide ones. Shapes: N and F rows, D d_model."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from spalf.engine import matching


def directions(rows: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_assignment_is_brute_force_s() -> None:
    cosine_NF = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    found = matching.assigned(cosine_NF)
    best = max(sum(float(cosine_NF[i, j]) for i, j in enumerate(order)) for order in permutations(range(6), 4))
    assert float(found.cosine_P.sum()) == pytest.approx(best)
    assert found.first_P.tolist() == [0, 1, 2, 3]
    assert len(set(found.second_P.tolist())) == 4


def test_length_and_order_mean_nothing_and_a_sign_does() -> None:
    a_ND = directions(20, 8)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    found = matching.matched(3.0 * a_ND, a_ND[order])
    assert found.mean == pytest.approx(1.0)
    assert torch.equal(order[found.second_P], found.first_P)
    assert matching.matched(a_ND, -a_ND).mean < 0.9
    assert matching.matched(a_ND, -a_ND, signed=False).mean == pytest.approx(1.0)


def test_a_sample_of_a_wide_dictionary_is_matched_to_all_of_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "WHOLE", 100)
    monkeypatch.setattr(matching, "SAMPLE", 30)
    a_ND = directions(200, 16)
    found = matching.matched(a_ND, a_ND.flip(0))
    assert len(found.cosine_P) == 30
    assert found.mean == pytest.approx(1.0), "no partner is lost"
    assert torch.equal(found.first_P, 199 - found.second_P), "numbers of rows, not of the sample's"
    assert matching.matched(a_ND, a_ND, seed=1).second_P.tolist() != matching.matched(a_ND, a_ND).second_P.tolist()
    assert len(matching.matched(a_ND[:20], a_ND).cosine_P) == 20


def test_the_floor_is_what_random_directions_reach() -> None:
    a_ND = directions(60, 12, seed=11)
    floors = [matching.matched(a_ND, directions(60, 12, seed)).mean for seed in range(1, 6)]
    assert matching.floor(a_ND, 60) == pytest.approx(sum(floors) / 5, abs=0.05)
    assert matching.floor(a_ND, 60) == matching.floor(a_ND, 60)
    assert matching.floor(a_ND, 600) > matching.floor(a_ND, 60) > 0.3
