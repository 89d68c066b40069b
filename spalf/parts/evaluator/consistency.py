"""Whether other runs found the same features. Shapes: F features, D d_model."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import ClassVar

from attrs import field

from spalf.core.recipe import Plan
from spalf.core.slots import evaluator
from spalf.core.state import TrainingState
from spalf.core.values import White
from spalf.engine import checkpoint, matching
from spalf.engine.evaluate import untouched

SAME = 0.7
"""Cosine above which a matched pair is called one feature."""


@evaluator("consistency")
class Consistency:
    """PW-MCC between this dictionary and those of `runs` (2505.20254): do other seeds find the same features?

    The mean cosine, with its sign and in model space, of decoder rows under the best one-to-one assignment
    (Hungarian), averaged over all pairs of dictionaries; `pw_mcc_floor` is what random directions reach, `shared` the
    share of matched pairs above a cosine of 0.7. Above 16 384 rows a sample of 1024 is matched to all of the other's.
    Each of `runs` is a run or a checkpoint of a recipe with the same whitener; one that cannot be read raises
    CheckpointError. Without `runs` there is only the floor.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    runs: tuple[str, ...] = field()
    """Directories of other runs, relative to where the command runs."""

    def __call__(self, plan: Plan, state: TrainingState) -> dict[str, float]:
        with untouched(state):
            own_FD = state.metric.raw_direction(White(state.sae.W_dec_FD.detach()))
            others = [matching.raw_decoder(checkpoint.find(Path(run)), plan) for run in self.runs]
            dictionaries = [own_FD, *(rows_FD.to(own_FD.device) for rows_FD in others)]
            out = {"pw_mcc_floor": matching.floor(own_FD, len(own_FD)), "dictionaries": float(len(dictionaries))}
            found = [matching.matched(a_FD, b_FD) for a_FD, b_FD in combinations(dictionaries, 2)]
        if found:
            out["pw_mcc"] = sum(m.mean for m in found) / len(found)
            out["shared"] = sum(float((m.cosine_P > SAME).double().mean()) for m in found) / len(found)
        return out


EXAMPLES = {("evaluator", "consistency"): {"runs": ()}}
