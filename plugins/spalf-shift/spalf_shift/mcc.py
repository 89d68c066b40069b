"""Mean correlation coefficients, each by its own name, with the floors that chance alone reaches.

(a) decoder rows of two dictionaries, one-to-one. (b) decoder rows against known directions, by signed cosine,
one-to-one. (c) codes against labels: the best feature is chosen on one split and scored on another.

Shapes: N pairs, F features, G features of another dictionary, C concepts, D d_model.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.functional import normalize

FORMS = ("both", "on", "off")
"""How a feature may answer to a concept: with a sign for either change, or to one of them alone."""


def correlation(code_NF: Tensor, target_NC: Tensor) -> Tensor:
    """Pearson correlation [F, C] over rows; 0 where a column is constant."""

    def standard(x: Tensor) -> Tensor:
        centred = x.double() - x.double().mean(0)
        norm = centred.norm(dim=0)
        return centred / torch.where(norm > 1e-12, norm, torch.inf)

    return standard(code_NF).T @ standard(target_NC)


def targets(labels_NC: Tensor) -> Tensor:
    """The three readings [3, N, C] of labels -1, 0, 1, in the order of FORMS."""
    return torch.stack([labels_NC, (labels_NC > 0).to(labels_NC), (labels_NC < 0).to(labels_NC)])


def assigned(similarity_FC: Tensor) -> tuple[Tensor, Tensor]:
    """The one-to-one assignment of greatest sum: (row, column) indices, as many as the smaller side has."""
    from scipy.optimize import linear_sum_assignment

    row, column = linear_sum_assignment(similarity_FC.numpy(), maximize=True)
    return torch.from_numpy(row), torch.from_numpy(column)


def assigned_mean(similarity_FC: Tensor) -> float:
    """Mean similarity under the best one-to-one assignment."""
    row, column = assigned(similarity_FC)
    return float(similarity_FC[row, column].mean())


def dictionary_mcc(rows_FD: Tensor, other_GD: Tensor, *, signed: bool = False) -> float:
    """(a): mean Pearson correlation over the entries of matched rows, absolute unless `signed`.

    Random dictionaries are not at 0: about .21 at F = 1,024 in 256 dimensions, .16 at 4,096 in 512, absolute.
    """
    pearson_FG = correlation(rows_FD.T, other_GD.T)
    return assigned_mean(pearson_FG if signed else pearson_FG.abs())


def direction_mcc(rows_FD: Tensor, directions_CD: Tensor, *, signed: bool = True) -> float:
    """(b): mean cosine of known directions with the rows matched to them one-to-one, absolute unless `signed`.

    For codes of either sign give each row twice, as it is and negated: neither is its direction more than the other.
    """
    cosine_FC = normalize(rows_FD.double(), dim=1) @ normalize(directions_CD.double(), dim=1).T
    return assigned_mean(cosine_FC if signed else cosine_FC.abs())


@frozen(kw_only=True, eq=False)
class Matches:
    """For each concept [C]: its feature, the reading of the label (an index into FORMS) and the sign of the answer."""

    feature_C: Tensor
    form_C: Tensor
    sign_C: Tensor


def choose(code_NF: Tensor, labels_NC: Tensor, *, one_to_one: bool = False) -> Matches:
    """The feature of greatest absolute correlation with each concept, under the reading that suits it best."""
    found_3FC = torch.stack([correlation(code_NF, target_NC) for target_NC in targets(labels_NC)])
    size_FC, form_FC = found_3FC.abs().max(0)
    if one_to_one:
        row, column = assigned(size_FC)
        feature_C = torch.zeros(size_FC.shape[1], dtype=torch.int64)
        feature_C[column] = row
    else:
        feature_C = size_FC.argmax(0)
    concept_C = torch.arange(size_FC.shape[1])
    form_C = form_FC[feature_C, concept_C]
    sign_C = found_3FC[form_C, feature_C, concept_C].sign()
    return Matches(feature_C=feature_C, form_C=form_C, sign_C=sign_C)


def score(matches: Matches, code_NF: Tensor, labels_NC: Tensor) -> Tensor:
    """Correlation [C] of each concept's chosen feature on other rows, with the sign and reading chosen before.

    Chance is at 0 here, and a feature that answers the other way round counts against itself.
    """
    concept_C = torch.arange(labels_NC.shape[1])
    target_NC = targets(labels_NC)[matches.form_C, :, concept_C].T
    pairwise_CC = correlation(code_NF[:, matches.feature_C], target_NC)
    return matches.sign_C * pairwise_CC.diagonal()


def chosen_and_scored(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], *, one_to_one: bool = False
) -> Tensor:
    """(c) per concept [C]: `choose` on (codes, labels) of one split, `score` on those of another."""
    return score(choose(*first, one_to_one=one_to_one), *second)


def permuted(labels_NC: Tensor, seed: int) -> Tensor:
    """The labels of other rows: the floor of what correlates with nothing."""
    return labels_NC[torch.randperm(len(labels_NC), generator=torch.Generator().manual_seed(seed))]
