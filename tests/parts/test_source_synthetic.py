"""The planted world is what its options say: rates, correlation, hierarchy, coherence, anisotropy."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from spalf.core.values import Batch
from spalf.errors import SourceError
from spalf.parts.source.synthetic import Synthetic, SyntheticStream, directions, firing_rates, mixing

CPU = torch.device("cpu")


def drawn(options: Synthetic, n: int = 40_000) -> tuple[Batch, Tensor]:
    batch = options.open(0, CPU).held_out().next(n)
    assert batch.truth_BN is not None
    return batch, (batch.truth_BN > 0).double()


def test_rates_fall_by_zipf_from_most_to_least() -> None:
    rate_N = firing_rates(Synthetic(features=100, zipf=1.0, most=0.3, least=0.001))
    assert rate_N[0] == pytest.approx(0.3)
    assert rate_N[-1] == pytest.approx(0.001)
    # (p_2 - least) / (p_1 - least) = (1/2 - 1/100) / (1 - 1/100)
    assert (rate_N[1] - 0.001) / 0.299 == pytest.approx(0.49 / 0.99)


@pytest.mark.parametrize("rank", [0, 4])
def test_features_fire_at_their_rates_with_and_without_correlation(rank: int) -> None:
    options = Synthetic(features=60, rank=rank, correlation=0.5, most=0.4, least=0.01)
    _, on_BN = drawn(options)
    rate_N = firing_rates(options)
    error_N = (on_BN.mean(0) - rate_N) / (rate_N * (1 - rate_N) / len(on_BN)).sqrt()
    assert float(error_N.abs().max()) < 4.5  # standard errors, 60 features


def test_correlation_is_of_low_rank_and_only_where_asked() -> None:
    def off_diagonal(options: Synthetic) -> Tensor:
        _, on_BN = drawn(options)
        return torch.corrcoef(on_BN.T) - torch.eye(options.features)

    common = {"features": 12, "zipf": 0.1, "most": 0.4, "least": 0.2}
    independent = off_diagonal(Synthetic(**common, rank=0))
    correlated = off_diagonal(Synthetic(**common, rank=2, correlation=0.8))
    assert float(independent.abs().max()) < 0.03
    assert float(correlated.abs().max()) > 0.3
    assert float(correlated.min()) < -0.1, "factors push both ways"


def test_a_child_fires_only_with_its_parent_and_siblings_exclude_each_other() -> None:
    options = Synthetic(features=40, trees=2, branching=3, depth=3, most=0.6, least=0.3, zipf=0.2)
    assert options.level_sizes() == [2, 6, 18]
    _, on_BN = drawn(options, 5000)
    levels = on_BN[:, :26].split([2, 6, 18], dim=1)
    for parent_BP, child_BC in pairwise(levels):
        of_parent = child_BC.reshape(len(on_BN), -1, 3)
        assert float(of_parent.sum(2).max()) == 1.0, "siblings fire together"
        assert bool((of_parent.sum(2) <= parent_BP).all()), "a child fires without its parent"
        assert float(child_BC.mean(0).min()) > 0, "a child never fires"
    assert float(on_BN[:, 26:].sum(1).max()) > 3, "features outside the trees are free"


def test_trees_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SourceError, match=r"trees = 10 need 210 features and there are 64"):
        Synthetic(features=64, trees=10, branching=4, depth=3).facts()


def test_magnitudes_are_rectified_normals() -> None:
    options = Synthetic(d_model=8, features=4, strongest=5.0, weakest=2.0, spread=0.5, most=0.5, least=0.4)
    batch, on_BN = drawn(options)
    assert batch.truth_BN is not None
    mean_N = batch.truth_BN.double().sum(0) / on_BN.sum(0)
    assert torch.allclose(mean_N, torch.tensor([5.0, 4.0, 3.0, 2.0], dtype=torch.float64), atol=0.03)
    first = batch.truth_BN[:, 0]
    assert float(first[first > 0].std()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("condition", [1.0, 30.0])
def test_rows_are_the_codes_times_the_true_directions_plus_a_constant(condition: float) -> None:
    options = Synthetic(condition=condition, bias=2.0)
    stream = options.open(0, CPU)
    batch = stream.held_out().next(2000)
    assert batch.truth_BN is not None
    rest_BD = batch.x_BD - batch.truth_BN @ stream.truth()
    assert float((rest_BD - rest_BD[0]).abs().max()) < 1e-3 * float(batch.x_BD.abs().max())
    if condition == 1.0:
        assert float(rest_BD[0].norm()) == pytest.approx(2.0, rel=1e-4)


def test_mixing_acts_on_the_whole_row() -> None:
    plain, mixed = Synthetic(d_model=16, bias=2.0), Synthetic(d_model=16, bias=2.0, condition=30.0)
    x_BD, mixed_BD = (options.open(0, CPU).next(200).x_BD for options in (plain, mixed))
    assert torch.allclose(mixed_BD, x_BD @ mixing(mixed), atol=1e-4)


def test_mixing_is_symmetric_positive_with_the_stated_condition_number() -> None:
    mix_DD = mixing(Synthetic(d_model=24, condition=50.0)).double()
    assert torch.allclose(mix_DD, mix_DD.T, atol=1e-6)
    values_D = torch.linalg.eigvalsh(mix_DD)
    assert float(values_D[0]) > 0
    assert float(values_D[-1] / values_D[0]) == pytest.approx(50.0, rel=1e-4)
    assert float(values_D.log().sum()) == pytest.approx(0.0, abs=1e-4)


def test_decorrelation_brings_coherence_near_the_bound() -> None:
    def coherence(options: Synthetic) -> Tensor:
        d_ND = directions(options, CPU)
        assert torch.allclose(d_ND.norm(dim=1), torch.ones(len(d_ND)), atol=1e-5)
        return (d_ND @ d_ND.T).abs().fill_diagonal_(0.0)

    at_random, better = coherence(Synthetic(decorrelate=0)), coherence(Synthetic())
    welch = math.sqrt((256 - 64) / (64 * 255))  # no 256 unit vectors in 64 dimensions have a lower largest cosine
    assert float(better.max()) < 2 * welch < 0.5 * float(at_random.max())
    assert float(better.max(1).values.mean()) == pytest.approx(0.155, abs=0.01)  # 2602.14687 has about 0.15


def test_the_world_is_one_for_all_seeds() -> None:
    one, other = (Synthetic().open(seed, CPU) for seed in (0, 1))
    assert torch.equal(one.truth(), other.truth())
    assert not torch.equal(one.truth(), Synthetic(world=1).open(0, CPU).truth())


def test_training_batches_carry_codes_only_when_asked() -> None:
    assert Synthetic().open(0, CPU).next(3).truth_BN is None
    told = Synthetic(labels=True).open(0, CPU).next(3)
    assert told.truth_BN is not None
    assert torch.equal(told.x_BD, Synthetic().open(0, CPU).next(3).x_BD)


def test_what_needs_a_language_model_says_who_has_one() -> None:
    stream = Synthetic().open(0, CPU)
    assert isinstance(stream, SyntheticStream)
    with pytest.raises(
        SourceError, match=r'source "synthetic" has no unembedding \(use huggingface or transformer_lens'
    ):
        stream.unembedding()
