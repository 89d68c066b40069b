"""Evaluators on labelled pairs: does a feature stand for a concept, can it be read, does it steer?

Shapes: N pairs, F features, C concepts, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from attrs import field
from attrs.validators import deep_iterable, ge, gt
from torch import Tensor

from spalf import Pairs, Plan, SourceError, TrainingState, evaluator, read_pairs
from spalf_shift import mcc, probe, steering
from spalf_shift.representation import Representation, labels_of, linear, mean_shifts, of_state, random_rows
from spalf_shift.split import by_sentence

PERMUTATIONS = 5
"""Draws that a floor is the mean of."""


def pairs_for(given: str, plan: Plan) -> Pairs:
    """The pairs of a directory, or of the recipe's own source. Raises SourceError where there are none with labels."""
    path = given or str(getattr(plan.recipe.source, "pairs", ""))
    if not path:
        raise SourceError("no pairs to measure on (set the evaluator's `pairs` to a harvested directory)")
    pairs = read_pairs(path)
    labels_of(pairs)
    if pairs.facts.d_model != plan.facts.d_model:
        raise SourceError(
            f"{path} has activations of {pairs.facts.d_model} dimensions, this dictionary takes {plan.facts.d_model} "
            "(harvest at the same hook)"
        )
    return pairs


def concept_scores(this: Representation, pairs: Pairs, seed: int) -> dict[str, float]:
    """The numbers of `concept_mcc`, for anything that gives codes."""
    first, second = by_sentence(pairs, (0.5, 0.5), seed)
    labels = labels_of(first), labels_of(second)
    codes = this.code(first), this.code(second)
    n_features, d_model = this.rows_FD.shape
    random = linear(random_rows(n_features, d_model, seed + 1))
    out = {
        "c": _mean(mcc.chosen_and_scored((codes[0], labels[0]), (codes[1], labels[1]))),
        "c_permuted": _floor(
            lambda i: mcc.chosen_and_scored(
                (codes[0], mcc.permuted(labels[0], i)), (codes[1], mcc.permuted(labels[1], i))
            ),
            seed,
        ),
        "c_random": _mean(mcc.chosen_and_scored((random.code(first), labels[0]), (random.code(second), labels[1]))),
    }
    if n_features >= labels[0].shape[1]:
        out["c_one_to_one"] = _mean(
            mcc.chosen_and_scored((codes[0], labels[0]), (codes[1], labels[1]), one_to_one=True)
        )
    rows_FD, other_FD = (_both_ways(r, codes[0]) for r in (this.rows_FD, random.rows_FD))
    shifts_CD = mean_shifts(second)
    for name, signed in (("b_signed", True), ("b_absolute", False)):
        out[name] = mcc.direction_mcc(rows_FD, shifts_CD, signed=signed)
        out[f"{name}_random"] = mcc.direction_mcc(other_FD, shifts_CD, signed=signed)
    return out


def _both_ways(rows_FD: Tensor, code_NF: Tensor) -> Tensor:
    """Rows and their opposites, where codes of either sign leave open which of the two a feature stands for."""
    return torch.cat([rows_FD, -rows_FD]) if bool((code_NF < 0).any()) else rows_FD


def _mean(x_C: Tensor) -> float:
    return float(x_C.mean())


def _floor(draw: Callable[[int], Tensor], seed: int) -> float:
    return sum(_mean(draw(seed + i)) for i in range(PERMUTATIONS)) / PERMUTATIONS


@evaluator("concept_mcc")
class ConceptMcc:
    """Do features stand for concepts? Correlations with the known changes of `pairs`, each with its floors.

    `c`: codes against labels, mean over concepts; for each the best feature, its sign and its reading (both changes, on
    alone, off alone) are chosen on one half of the pairs and scored on the other, which shares no sentence with it.
    `c_one_to_one`: the same with no feature used twice. `c_permuted`: with the labels of other pairs, 0 in expectation.
    `c_random`: with as many random directions, which is what any projection of this data gets. `b_signed`: cosine of
    decoder rows with each concept's mean shift on the second half, matched one-to-one, rows of signed codes standing
    for both directions; `b_absolute` likewise; `..._random` with random rows.

    A dictionary trained on differences encodes b - a; any other one gives the code of b less that of a.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    pairs: str = ""
    """A labelled directory that training has not seen; the source's own where it is left out."""
    seed: int = field(default=0, validator=ge(0))
    """Of the split and of the floors."""

    def __call__(self, plan: Plan, state: TrainingState) -> dict[str, float]:
        return concept_scores(of_state(plan, state), pairs_for(self.pairs, plan), self.seed)


def probe_scores(this: Representation, pairs: Pairs, ks: tuple[int, ...], seed: int) -> dict[str, float]:
    """The numbers of `concept_probe`, for anything that gives codes."""
    parts = by_sentence(pairs, (0.5, 0.2, 0.3), seed)
    codes = [probe.array(this.code(part)) for part in parts]
    sums: dict[str, list[float]] = {}
    for c in range(len(pairs.concepts)):
        on = [(labels_of(part)[:, c] > 0).numpy() for part in parts]
        if not all(map(probe.is_mixed, on)):
            continue
        split = probe.Split(train=(codes[0], on[0]), validation=(codes[1], on[1]), test=(codes[2], on[2]))
        for k, one in probe.sweep(split, ks).items():
            for name in ("accuracy", "auc", "corr"):
                sums.setdefault(f"{name}@{k}", []).append(getattr(one, name))
    if not sums:
        raise SourceError("no concept is switched on and not in every part of these pairs (harvest more of them)")
    return {name: sum(values) / len(values) for name, values in sums.items()}


@evaluator("concept_probe")
class ConceptProbe:
    """Can a concept be read from few features? Logistic probes for "this pair switches the concept on", by K.

    Features are ranked by |coefficient| in a fit of all of them, and a probe is fitted again on the first K. Pairs are
    split three ways by sentence: fit, choice of the regularisation, test; no sentence is in two of them. Means over
    concepts of `accuracy@K` (balanced, chance .5), `auc@K` and `corr@K`, the correlation of score and label. Ks above
    the number of features are left out.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    pairs: str = ""
    """As of `concept_mcc`."""
    ks: tuple[int, ...] = field(default=probe.K_SWEEP, validator=deep_iterable(gt(0)))
    seed: int = field(default=0, validator=ge(0))
    """Of the split."""

    def __call__(self, plan: Plan, state: TrainingState) -> dict[str, float]:
        return probe_scores(of_state(plan, state), pairs_for(self.pairs, plan), self.ks, self.seed)


def steering_scores(this: Representation, pairs: Pairs, seed: int) -> dict[str, float]:
    """The numbers of `steering_accuracy`, for anything that gives codes."""
    first, second = by_sentence(pairs, (0.5, 0.5), seed)
    matches = mcc.choose(this.code(first), labels_of(first))
    steps_CD = steering.directions(this, matches, first)
    fitted = steering.probes(first)
    result = steering.steer(steps_CD, fitted, second)
    full_CD = steering.at_length(steps_CD, mean_shifts(first))
    full = steering.steer(full_CD, fitted, second)
    chance = steering.steer(steering.random_steps(full_CD, seed + 1), fitted, second)
    return {
        "accuracy": result.accuracy,
        "flipped": result.flipped,
        "kept": result.kept,
        "probe": result.probe,
        "accuracy_at_length": full.accuracy,
        "flipped_at_length": full.flipped,
        "kept_at_length": full.kept,
        "accuracy_random": chance.accuracy,
        "flipped_random": chance.flipped,
    }


@evaluator("steering_accuracy")
class SteeringAccuracy:
    """Does a feature's direction switch its concept on, and nothing else?

    Features are chosen as in `concept_mcc`, on one half of the pairs. On the other, each `a` without the concept gets
    the feature's direction times its mean code over the pairs that switch the concept on. Logistic probes, fitted on
    real activations of the first half, then judge: `flipped`, the share in which the concept's probe finds it; `kept`,
    the share of the other concepts' probes that say what they said; `accuracy`, the mean of their product.
    `..._at_length` gives every direction the length of the concept's mean shift, which the labels know: what the
    direction is worth, apart from how much of the shift its feature holds. `..._random` takes random directions of that
    length. `probe` is how often the probes are right about real activations, the most that can be asked.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    pairs: str = ""
    """As of `concept_mcc`."""
    seed: int = field(default=0, validator=ge(0))
    """Of the split and of the random directions."""

    def __call__(self, plan: Plan, state: TrainingState) -> dict[str, float]:
        return steering_scores(of_state(plan, state), pairs_for(self.pairs, plan), self.seed)
