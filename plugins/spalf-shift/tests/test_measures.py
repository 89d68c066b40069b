"""What the numbers mean: floors of chance, splits without a common sentence, planted shifts that are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve
from spalf_shift import mcc, probe, steering
from spalf_shift.evaluator import concept_scores, probe_scores, steering_scores
from spalf_shift.representation import Representation, labels_of, linear, mean_shifts, principal, random_rows
from spalf_shift.split import by_sentence, groups_of, take
from torch import Tensor

from spalf import Pairs, SourceError

from .conftest import planted


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------ floors
@pytest.mark.parametrize(("features", "d_model", "absolute"), [(1024, 256, 0.206), (256, 64, 0.36)])
def test_floor_of_two_random_dictionaries(features: int, d_model: int, absolute: float) -> None:
    ours, theirs = random_rows(features, d_model, 1), random_rows(features, d_model, 2)
    signed = mcc.dictionary_mcc(ours, theirs, signed=True)
    assert mcc.dictionary_mcc(ours, theirs) == pytest.approx(absolute, abs=0.01)
    assert signed < mcc.dictionary_mcc(ours, theirs), "a sign that is free adds to what chance reaches"


@pytest.mark.parametrize(("rows", "floor"), [(500, 0.171), (1000, 0.121), (5000, 0.054)])
def test_floor_of_the_best_of_4096_features(rows: int, floor: float) -> None:
    best_C = mcc.correlation(normal(rows, 4096), normal(rows, 8, seed=1)).abs().amax(0)
    assert float(best_C.mean()) == pytest.approx(floor, rel=0.05)


def test_choosing_and_scoring_apart_has_its_floor_at_zero() -> None:
    code_NF = normal(1000, 512)
    labels_NC = torch.randint(-1, 2, (1000, 8), generator=torch.Generator().manual_seed(1)).float()
    first, second = (code_NF[:500], labels_NC[:500]), (code_NF[500:], labels_NC[500:])
    in_sample = mcc.score(mcc.choose(*first), *first).mean()
    assert float(in_sample) > 0.12
    assert abs(float(mcc.chosen_and_scored(first, second).mean())) < 0.04


def test_equal_dictionaries_agree_in_any_order_and_sign() -> None:
    rows_FD = random_rows(40, 16, 0)
    other_FD = -rows_FD[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    assert mcc.dictionary_mcc(rows_FD, other_FD) == pytest.approx(1.0, abs=1e-6)
    assert mcc.dictionary_mcc(rows_FD, other_FD, signed=True) < 0.8


def test_directions_by_signed_cosine() -> None:
    rows_FD = torch.eye(4)
    directions_CD = torch.tensor([[2.0, 0, 0, 0], [0, -1, 0, 0]])
    assert mcc.direction_mcc(rows_FD, directions_CD, signed=False) == 1.0
    assert mcc.direction_mcc(rows_FD, directions_CD) == 0.5
    assert mcc.direction_mcc(torch.cat([rows_FD, -rows_FD]), directions_CD) == 1.0


def test_a_one_sided_feature_is_read_as_one() -> None:
    labels_NC = torch.tensor([[1.0], [0], [-1], [1], [0], [-1]])
    for code, form in ((labels_NC, "both"), (labels_NC.clamp(min=0), "on"), ((-labels_NC).clamp(min=0), "off")):
        matches = mcc.choose(code, labels_NC)
        assert mcc.FORMS[int(matches.form_C)] == form
        assert float(mcc.score(matches, code, labels_NC)) == pytest.approx(1.0)


def test_a_feature_that_turns_round_counts_against_itself() -> None:
    labels_NC = torch.tensor([[1.0], [0], [-1]])
    matches = mcc.choose(labels_NC, labels_NC)
    assert float(mcc.score(matches, -labels_NC, labels_NC)) == pytest.approx(-1.0)


def test_one_to_one_uses_no_feature_twice() -> None:
    label_N1 = normal(200, 1)
    both_N2 = torch.cat([label_N1, label_N1 + 0.1 * normal(200, 1, seed=1)], dim=1)
    code_NF = torch.cat([label_N1, normal(200, 1, seed=2)], dim=1)
    assert mcc.choose(code_NF, both_N2).feature_C.tolist() == [0, 0]
    assert sorted(mcc.choose(code_NF, both_N2, one_to_one=True).feature_C.tolist()) == [0, 1]


# ------------------------------------------------------------------------------------------------------------- split
def sentences(pairs: Pairs) -> set[int]:
    return {*pairs.sentence_a_N.tolist(), *pairs.sentence_b_N.tolist()}


@pytest.mark.parametrize("seed", range(5))
def test_no_sentence_is_in_two_parts(seed: int) -> None:
    pairs = chained(planted(groups=90), links=20)
    parts = by_sentence(pairs, (0.5, 0.2, 0.3), seed)
    for i, part in enumerate(parts):
        for other in parts[:i]:
            assert not sentences(part) & sentences(other)
    assert sum(map(len, parts)) == len(pairs)
    assert len(parts[0]) / len(pairs) == pytest.approx(0.5, abs=0.1)


def chained(pairs: Pairs, links: int) -> Pairs:
    """The same with `links` pairs that join the sentences of two others."""
    a_N, b_N = pairs.sentence_a_N.clone(), pairs.sentence_b_N.clone()
    a_N[1 : links + 1] = b_N[:links]
    return evolve(pairs, sentence_a_N=a_N, sentence_b_N=b_N)


def test_mirrored_pairs_and_chains_stay_together() -> None:
    a_N, b_N = torch.tensor([0, 1, 1, 5, 6]), torch.tensor([1, 0, 2, 6, 5])
    group_N = groups_of(a_N, b_N).tolist()
    assert len(set(group_N[:3])) == 1
    assert group_N[3] == group_N[4] != group_N[0]


def test_what_cannot_be_split_is_refused() -> None:
    one = take(planted(), torch.tensor([0, 80]))  # a pair and its mirror image
    with pytest.raises(SourceError, match="2 pairs in 1 groups without a sentence in common"):
        by_sentence(one, (0.5, 0.5), 0)


def test_the_split_is_a_function_of_the_seed() -> None:
    pairs = planted()
    first, same, other = (by_sentence(pairs, (0.5, 0.5), seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first.sentence_a_N, same.sentence_a_N)
    assert not torch.equal(first.sentence_a_N, other.sentence_a_N)


# ------------------------------------------------------------------------------------------------- planted concepts
def test_mean_shifts_are_the_planted_ones() -> None:
    pairs = planted(noise=0.0)
    rows_CD = mean_shifts(pairs)
    delta_ND = pairs.b_ND - pairs.a_ND
    found = torch.linalg.lstsq(labels_of(pairs), delta_ND).solution
    cosine = torch.nn.functional.cosine_similarity(rows_CD, found, dim=1)
    assert float(cosine.min()) > 0.9


def solved(pairs: Pairs) -> Representation:
    """The planted shifts themselves, by least squares: an oracle."""
    rows_CD = torch.linalg.lstsq(labels_of(pairs), pairs.b_ND - pairs.a_ND).solution
    return linear(rows_CD)


def test_an_oracle_scores_one_and_chance_does_not() -> None:
    pairs = planted(groups=200)
    found = concept_scores(solved(pairs), pairs, 0)
    assert found["c"] > 0.98
    assert found["c_one_to_one"] > 0.98
    assert found["b_signed"] > 0.9
    assert abs(found["c_permuted"]) < 0.1
    assert found["c_random"] < 0.8 < found["c"]
    assert found["b_signed_random"] < 0.6


def test_probes_find_what_one_feature_holds() -> None:
    pairs = planted(groups=200)
    good = probe_scores(solved(pairs), pairs, (1, 2, 50), 0)
    assert good["auc@1"] > 0.97
    assert "auc@50" not in good, "there are three features"
    assert set(good) == {f"{name}@{k}" for name in ("accuracy", "auc", "corr") for k in (1, 2)}
    noise = Representation(code=lambda p: normal(len(p), 3), rows_FD=random_rows(3, 24, 0))
    assert probe_scores(noise, pairs, (1,), 0)["auc@1"] < 0.65


def test_the_sweep_ranks_by_coefficient_and_refits() -> None:
    label_N = (normal(600) > 0).numpy()
    x = probe.array(torch.cat([normal(600, 4, seed=3), torch.from_numpy(label_N)[:, None] + 0.3 * normal(600, 1)], 1))
    split = probe.Split(
        train=(x[:300], label_N[:300]), validation=(x[300:400], label_N[300:400]), test=(x[400:], label_N[400:])
    )
    found = probe.sweep(split, (1, 5, 10))
    assert sorted(found) == [1, 5]
    assert found[1].auc > 0.95
    assert found[1].accuracy > 0.85


def test_steering_switches_a_concept_on_and_nothing_else() -> None:
    pairs = planted(groups=300)
    found = steering_scores(solved(pairs), pairs, 0)
    assert found["probe"] > 0.95
    assert found["flipped"] > 0.9
    assert found["kept"] > 0.9
    assert found["accuracy_random"] < 0.5 < found["accuracy"]
    assert found["accuracy_at_length"] == pytest.approx(found["accuracy"], abs=0.1), "an oracle's step is the shift"
    half = Representation(code=solved(pairs).code, rows_FD=0.2 * solved(pairs).rows_FD)
    weak = steering_scores(half, pairs, 0)
    assert weak["flipped"] < 0.5 < weak["flipped_at_length"], "the direction is right, and a fifth of the shift in it"


def test_a_step_is_the_feature_s_own_shift() -> None:
    pairs = planted(groups=300, noise=0.0)
    oracle = solved(pairs)
    steps_CD = steering.directions(oracle, mcc.choose(oracle.code(pairs), labels_of(pairs)), pairs)
    torch.testing.assert_close(steps_CD.norm(dim=1), torch.ones(3), rtol=0.1, atol=0)
    one_sided = Representation(code=lambda p: oracle.code(p).clamp(min=0), rows_FD=oracle.rows_FD)
    matches = mcc.choose(one_sided.code(pairs), labels_of(pairs))
    assert {mcc.FORMS[i] for i in matches.form_C.tolist()} == {"on"}
    torch.testing.assert_close(steering.directions(one_sided, matches, pairs), steps_CD, rtol=0.3, atol=0.1)


def test_principal_directions_do_not_separate_concepts_of_one_size() -> None:
    pairs = planted(groups=300)
    assert concept_scores(principal(pairs, 3), pairs, 0)["c"] < concept_scores(solved(pairs), pairs, 0)["c"] - 0.05


def test_pairs_without_labels_are_refused() -> None:
    bare: Any = evolve(planted(), labels_NC=None, concepts=())
    with pytest.raises(SourceError, match="not labelled"):
        labels_of(bare)
