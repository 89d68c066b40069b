"""One training step of each dictionary_learning trainer, by its own `update`; the argument is where to write.

Its package imports nnsight and wandb at the top; no trainer uses either.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor

common.stand_in("wandb")
common.stand_in("nnsight", LanguageModel=object)
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.gdm import GatedSAETrainer  # noqa: E402
from dictionary_learning.trainers.jumprelu import JumpReluTrainer  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer  # noqa: E402
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate  # noqa: E402
from dictionary_learning.trainers.top_k import TopKTrainer  # noqa: E402

SHAPE = {"activation_dim": common.D, "dict_size": common.F, "layer": 0, "lm_name": "none", "device": "cpu"}
WARM = {"steps": 100, "lr": 1e-3, "warmup_steps": 0}
L1 = {**WARM, "l1_penalty": 0.3}
TOP = {**WARM, "k": 5, "threshold_start_step": 1}
LINEAR: common.Names = {
    "W_enc": ("encoder.weight", False),
    "W_dec": ("decoder.weight", True),
    "b_enc": ("encoder.bias", False),
}
STANDARD: common.Names = {**LINEAR, "b_dec": ("bias", False)}
TOPK: common.Names = {**LINEAR, "b_dec": ("b_dec", False)}
PLAIN: common.Names = {
    "W_enc": ("W_enc", True),
    "W_dec": ("W_dec", False),
    "b_enc": ("b_enc", False),
    "b_dec": ("b_dec", False),
}
JUMP: common.Names = {**PLAIN, "threshold": ("threshold", False)}
GATED: common.Names = {
    "W_enc": ("encoder.weight", False),
    "W_dec": ("decoder.weight", True),
    "b_dec": ("decoder_bias", False),
    "b_gate": ("gate_bias", False),
    "b_mag": ("mag_bias", False),
    "r_mag": ("r_mag", False),
}
Case = tuple[str, type, dict[str, Any], common.Names]


def cases() -> Iterator[Case]:
    """(name, class, options, parameters). Each is at step 3, for at step 0 some replace b_dec by a median."""
    yield "standard", StandardTrainer, {**L1, "sparsity_warmup_steps": 0}, STANDARD
    yield "standard_warm_up", StandardTrainer, {**L1, "sparsity_warmup_steps": 10}, STANDARD
    yield "standard_april", StandardTrainerAprilUpdate, {**L1, "sparsity_warmup_steps": 0}, STANDARD
    yield "topk", TopKTrainer, TOP, TOPK
    yield "batchtopk", BatchTopKTrainer, TOP, TOPK
    yield "gated", GatedSAETrainer, {**L1, "sparsity_warmup_steps": 0}, GATED
    jump = {"bandwidth": 0.2, "sparsity_penalty": 0.7, "target_l0": 6.0, "sparsity_warmup_steps": 0}
    yield "jumprelu", JumpReluTrainer, {**WARM, **jump}, JUMP
    yield "matryoshka", MatryoshkaBatchTopKTrainer, {**TOP, "group_fractions": [0.25, 0.25, 0.5]}, PLAIN


STEP = 3


def drawn_weights(seed: int, names: common.Names) -> common.Weights:
    """Biases of the right names; a threshold is positive."""
    held = common.weights(seed, tuple(n for n in names if n not in ("W_enc", "W_dec", "b_dec", "threshold")))
    if "threshold" in names:
        draw = torch.Generator().manual_seed(2000 + seed)
        held["threshold"] = 0.1 + 0.3 * torch.rand(common.F, generator=draw, dtype=torch.float64)
    return held


def step(case: Case, seed: int) -> dict[str, Tensor]:
    """What goes in, what `update` makes of it, and the parameters after it."""
    _, kind, options, names = case
    held, x_BD = drawn_weights(seed, names), common.batch(seed)
    trainer = kind(**SHAPE, **options)
    common.pour(trainer.ae, held, names)
    dead_F = torch.zeros(common.F, dtype=torch.bool)
    if hasattr(trainer, "num_tokens_since_fired"):
        dead_F[common.DEAD] = True
        trainer.num_tokens_since_fired[dead_F] = trainer.dead_feature_threshold
    # A copy, because `loss` counts firings and moves thresholds.
    log = copy.deepcopy(trainer).loss(x_BD, step=STEP, logging=True)
    with common.recorded(trainer.ae, names) as out:
        trainer.update(STEP, x_BD)
    out.update({f"weight.{k}": v for k, v in held.items()})
    out.update({f"after.{k}": v for k, v in common.drawn(trainer.ae, names, torch.Tensor.clone).items()})
    out.update({f"loss.{k}": torch.tensor(v) for k, v in log.losses.items()})
    out.update({"x": x_BD, "codes": log.f, "hat": log[1], "dead": dead_F})
    if hasattr(trainer.ae, "k"):
        out["topk_threshold"] = trainer.ae.threshold
    return out


def main(directory: Path) -> None:
    for seed, case in enumerate(cases()):
        common.write(directory, case[0], step(case, seed))


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    main(Path(sys.argv[1]))
