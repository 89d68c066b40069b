"""Intervals over documents: known answers, coverage where positions of a document are alike, pairing.

Shapes: U units, N positions, R resamples, S contexts, T positions of one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from spalf.core.values import Sequences
from spalf.engine.bootstrap import (
    Measured,
    Samples,
    Tally,
    Totals,
    differences,
    draws,
    intervals,
    measured,
)


def mean(totals: Totals) -> dict[str, Tensor]:
    return {"mean": totals["value"] / totals["count"]}


def tallied(unit_N: Tensor, value_N: Tensor) -> Samples:
    tally = Tally()
    for part in torch.arange(len(unit_N)).split(7):
        tally.add(unit_N[part], value=value_N[part], count=torch.ones(len(part)))
    return tally.samples(mean)


def clustered(seed: int, units: int = 30, each: int = 20, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Values whose spread lies between documents, not inside them; their true mean is `shift`."""
    draw = torch.Generator().manual_seed(seed)
    level_U = torch.randn(units, generator=draw, dtype=torch.float64)
    value_N = level_U.repeat_interleave(each) + 0.1 * torch.randn(units * each, generator=draw, dtype=torch.float64)
    return torch.arange(units).repeat_interleave(each), value_N + shift


def test_sums_do_not_depend_on_the_order_or_the_pieces() -> None:
    unit_N = torch.tensor([9, 4, 4, 9, 2, 9, 9, 4, 2, 2, 4])
    value_N = torch.arange(11, dtype=torch.float64)
    samples = tallied(unit_N, value_N)
    assert samples.unit_U.tolist() == [2, 4, 9]
    assert samples.sums["value"].tolist() == [4 + 8 + 9, 1 + 2 + 7 + 10, 0 + 3 + 5 + 6]
    assert samples.values() == {"mean": pytest.approx(5.0)}


def test_values_of_several_axes_are_summed() -> None:
    tally = Tally()
    tally.add(torch.tensor([1, 0, 1]), x=torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    samples = tally.samples(lambda totals: {"norm": totals["x"].square().sum(-1)})
    assert samples.sums["x"].tolist() == [[3.0, 4.0], [6.0, 8.0]]
    assert samples.values() == {"norm": 81.0 + 144.0}


def test_contexts_stand_for_documents_where_none_are_known() -> None:
    tokens_ST = torch.zeros(2, 3, dtype=torch.int64)
    unknown = Sequences(tokens_ST=tokens_ST, real_ST=tokens_ST == 0)
    known = Sequences(tokens_ST=tokens_ST, real_ST=tokens_ST == 0, document_ST=tokens_ST + 7)
    tally = Tally()
    assert tally.units(unknown).tolist() == [[0, 0, 0], [1, 1, 1]]
    assert tally.units(unknown).tolist() == [[2, 2, 2], [3, 3, 3]]
    assert tally.units(known).tolist() == [[7, 7, 7], [7, 7, 7]]


@pytest.mark.parametrize("known", [True, False])
def test_contexts_are_split_with_their_documents(known: bool) -> None:
    tokens_ST = torch.arange(10).view(5, 2)
    whole = Sequences(tokens_ST=tokens_ST, real_ST=tokens_ST > 0, document_ST=tokens_ST // 4 if known else None)
    parts = list(whole.split(2))
    assert [len(part.tokens_ST) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.tokens_ST for part in parts]), tokens_ST)
    assert torch.equal(torch.cat([part.real_ST for part in parts]), tokens_ST > 0)
    if known:
        documents = [part.document_ST for part in parts]
        assert torch.equal(torch.cat([d for d in documents if d is not None]), tokens_ST // 4)
    else:
        assert all(part.document_ST is None for part in parts)


def test_the_interval_is_the_loop_s() -> None:
    """Against numpy, one resample at a time."""
    unit_N, value_N = clustered(3)
    weight_RU = draws(30, seed=5).numpy()
    assert (weight_RU.sum(1) == 30).all()
    sums = np.array([value_N[unit_N == u].sum() for u in range(30)])
    resampled = [(w * sums).sum() / (w * 20).sum() for w in weight_RU]
    from scipy.stats import norm, t

    tail = norm.cdf((30 / 29) ** 0.5 * t.ppf(0.025, 29))
    assert 0.01 < tail < 0.025
    low, high = intervals(tallied(unit_N, value_N), seed=5)["mean"]
    assert (low, high) == pytest.approx(np.quantile(resampled, [tail, 1 - tail]), abs=1e-12)


def test_deterministic_and_seeded() -> None:
    samples = tallied(*clustered(0))
    assert intervals(samples) == intervals(samples)
    assert intervals(samples) != intervals(samples, seed=1)


def test_intervals_cover_the_truth_and_those_over_positions_do_not() -> None:
    covered = naive = 0
    for seed in range(200):
        unit_N, value_N = clustered(seed, units=25)
        low, high = intervals(tallied(unit_N, value_N), seed)["mean"]
        covered += low <= 0.0 <= high
        half = 1.96 * float(value_N.std()) / len(value_N) ** 0.5
        naive += abs(float(value_N.mean())) <= half
    assert 0.91 <= covered / 200 <= 0.985
    assert naive / 200 < 0.5


def test_pairing_finds_what_is_lost_in_the_documents_noise() -> None:
    unit_N, value_N = clustered(1)
    draw = torch.Generator().manual_seed(10)
    worse_N = value_N + 0.05 + 0.1 * torch.randn(len(value_N), generator=draw, dtype=torch.float64)
    paired = differences(tallied(unit_N, value_N), tallied(unit_N, worse_N))["mean"]
    assert paired.paired
    assert paired.exceeds_noise
    assert paired.low < 0.05 < paired.high
    apart = differences(tallied(unit_N, value_N), tallied(unit_N + 100, worse_N))["mean"]
    assert not apart.paired
    assert not apart.exceeds_noise
    assert apart.value == paired.value


def test_a_state_does_not_differ_from_itself() -> None:
    samples = tallied(*clustered(2))
    same = differences(samples, samples)["mean"]
    assert (same.value, same.low, same.high, same.exceeds_noise) == (0.0, 0.0, 0.0, False)


@pytest.mark.slow
def test_no_difference_is_found_in_noise_too_often() -> None:
    found = sum(
        differences(tallied(*clustered(s)), tallied(clustered(s)[0], clustered(s + 1000)[1]), s)["mean"].exceeds_noise
        for s in range(200)
    )
    assert found <= 20


def test_one_document_has_no_interval() -> None:
    samples = tallied(torch.zeros(5, dtype=torch.int64), torch.arange(5.0))
    assert intervals(samples) == {}
    assert differences(samples, samples) == {}
    assert measured(samples) == {"mean": 2.0, "documents": 1.0}


def test_what_means_nothing_is_left_out() -> None:
    tally = Tally()
    tally.add(torch.arange(3), a=torch.tensor([0.0, 1.0, 2.0]), b=torch.tensor([0.0, 1.0, 1.0]))
    out = measured(tally.samples(lambda t: {"never": t["a"] / 0.0, "rarely": t["a"] / t["b"]}), {"rows": 3.0})
    assert out == {"rarely": 1.5, "rows": 3.0, "documents": 3.0}, "a resample of document 0 alone has no ratio"
    assert isinstance(out, Measured)
    assert out.samples is not None
