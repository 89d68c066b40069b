"""Probes: which change of a concept happened, read from the K features that a linear classifier weighs most.

Shapes: N pairs, F features, K of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor

K_SWEEP = (1, 2, 5, 10, 25, 50, 100)
STRENGTHS = (0.01, 0.1, 1.0)
"""Inverse regularisation that inner validation chooses from."""

Array = NDArray[np.float64]


@frozen(kw_only=True)
class Score:
    """On rows that neither fit nor choice have seen: balanced accuracy (chance .5), area under the ROC curve, |r|."""

    accuracy: float
    auc: float
    corr: float


@frozen(kw_only=True, eq=False)
class Split:
    """Codes [N, F] and labels of one concept [N], boolean, of the three parts."""

    train: tuple[Array, NDArray[np.bool_]]
    validation: tuple[Array, NDArray[np.bool_]]
    test: tuple[Array, NDArray[np.bool_]]

    def only(self, columns: NDArray[np.int64]) -> Split:
        """The same rows, with some features."""
        parts = [(x[:, columns], y) for x, y in (self.train, self.validation, self.test)]
        return Split(train=parts[0], validation=parts[1], test=parts[2])


def is_mixed(label_N: NDArray[np.bool_]) -> bool:
    """Whether both classes occur, without which there is nothing to tell apart."""
    return bool(label_N.any() and not label_N.all())


def classifier(strength: float) -> Any:
    """A logistic regression on standardised features, classes weighted alike."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = LogisticRegression(C=strength, class_weight="balanced", solver="newton-cholesky", max_iter=200)
    return make_pipeline(StandardScaler(), regression)


def fitted(split: Split) -> Any:
    """The classifier whose regularisation does best on the validation part."""
    from sklearn.metrics import roc_auc_score

    made = [classifier(strength).fit(*split.train) for strength in STRENGTHS]
    x, y = split.validation
    return max(made, key=lambda model: roc_auc_score(y, model.decision_function(x)))


def scored(model: Any, part: tuple[Array, NDArray[np.bool_]]) -> Score:
    """A classifier on one part."""
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    x, y = part
    says = model.decision_function(x)
    spread = float(says.std()) * float(y.std())
    corr = abs(float(((says - says.mean()) * (y - y.mean())).mean()) / spread) if spread > 0 else 0.0
    return Score(accuracy=float(balanced_accuracy_score(y, says > 0)), auc=float(roc_auc_score(y, says)), corr=corr)


def sweep(split: Split, ks: Sequence[int] = K_SWEEP) -> dict[int, Score]:
    """Scores by K: features ranked by |coefficient| in a fit of all of them on the training part, then a refit of K.

    Ks above the number of features are left out. The test part is looked at once per K, and chooses nothing.
    """
    width = split.train[0].shape[1]
    weight_F = np.abs(fitted(split)[-1].coef_[0])
    order = np.argsort(-weight_F, kind="stable")
    return {k: scored(fitted(part), part.test) for k in ks if k <= width for part in [split.only(order[:k])]}


def array(x: Tensor) -> Array:
    """A tensor as scikit-learn takes it."""
    out: Array = x.double().numpy()
    return out
