"""Steering: does adding a concept's direction to an activation switch the concept on, and nothing else?

Shapes: N pairs, D d_model, F features, C concepts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from attrs import frozen
from torch import Tensor
from torch.nn.functional import normalize

from spalf import Pairs
from spalf_shift.mcc import FORMS, Matches
from spalf_shift.probe import array, classifier, is_mixed
from spalf_shift.representation import Representation, labels_of

STRENGTH = 0.1


@frozen(kw_only=True)
class Steered:
    """Means over concepts, each in [0, 1].

    `flipped`: of the activations without the concept, the share in which a probe finds it afterwards. `kept`: the share
    of all other concepts' probes that say what they said. `accuracy`: flipped and kept, the mean over activations of
    their product. `probe`: how good the probes are on activations they have not seen.
    """

    flipped: float
    kept: float
    accuracy: float
    probe: float


def directions(representation: Representation, matches: Matches, pairs: Pairs) -> Tensor:
    """What to add to switch each concept on [C, D]: its feature's row times its mean code over the pairs that do.

    A feature that answers to switching off alone is taken off by its mean code there.
    """
    code_NF, labels_NC = representation.code(pairs), labels_of(pairs)
    out = []
    for c, (feature, form) in enumerate(zip(matches.feature_C.tolist(), matches.form_C.tolist(), strict=True)):
        code_N, label_N = code_NF[:, feature], labels_NC[:, c]
        on, off = (_mean(code_N[label_N == value]) for value in (1, -1))
        amount = {"both": (on - off) / 2, "on": on, "off": -off}[FORMS[form]]
        out.append(amount * representation.rows_FD[feature])
    return torch.stack(out)


def _mean(x: Tensor) -> Tensor:
    return x.mean() if len(x) else x.new_zeros(())


def probes(pairs: Pairs) -> list[Any]:
    """A classifier per concept, of real activations with and without it: both ends of the pairs in which it changes."""
    out = []
    for c in range(len(pairs.concepts)):
        x_ND, y_N = _ends(pairs, c)
        out.append(classifier(STRENGTH).fit(array(x_ND), y_N.numpy()) if is_mixed(y_N.numpy()) else None)
    return out


def _ends(pairs: Pairs, c: int) -> tuple[Tensor, Tensor]:
    label_N = labels_of(pairs)[:, c]
    changed = label_N != 0
    x_ND = torch.cat([pairs.a_ND[changed], pairs.b_ND[changed]])
    return x_ND, torch.cat([label_N[changed] < 0, label_N[changed] > 0])


def steer(steps_CD: Tensor, fitted: list[Any], pairs: Pairs) -> Steered:
    """Add `steps_CD[c]` to every `a` of the pairs that switch concept c on, and ask all probes."""
    labels_NC = labels_of(pairs)
    rows: list[tuple[float, float, float, float]] = []
    for c, probe in enumerate(fitted):
        a_ND = pairs.a_ND[labels_NC[:, c] == 1]
        if probe is None or len(a_ND) == 0:
            continue
        others = [p for i, p in enumerate(fitted) if i != c and p is not None]
        before, after = array(a_ND), array(a_ND + steps_CD[c])
        flipped_N = probe.predict(after)
        kept_N = np.mean([p.predict(before) == p.predict(after) for p in others], axis=0) if others else flipped_N
        x_ND, y_N = _ends(pairs, c)
        right = float((probe.predict(array(x_ND)) == y_N.numpy()).mean())
        rows.append((float(flipped_N.mean()), float(kept_N.mean()), float((flipped_N * kept_N).mean()), right))
    means = np.asarray(rows).mean(0) if rows else np.zeros(4)
    return Steered(flipped=float(means[0]), kept=float(means[1]), accuracy=float(means[2]), probe=float(means[3]))


def at_length(steps_CD: Tensor, like_CD: Tensor) -> Tensor:
    """Steps in the directions of `steps_CD`, each as long as that of `like_CD`; a step of 0 stays one."""
    length_C1: Tensor = torch.linalg.vector_norm(like_CD, dim=1, keepdim=True)
    return normalize(steps_CD, dim=1) * length_C1


def random_steps(steps_CD: Tensor, seed: int) -> Tensor:
    """Steps of the same lengths in random directions: what pushing alone does."""
    draw = torch.Generator().manual_seed(seed)
    return at_length(torch.randn(steps_CD.shape, generator=draw), steps_CD)
