"""One training step of each SAELens trainer, by its own `SAETrainer.step`; run as `python saelens_steps.py OUT`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import common
import torch
from torch import Tensor

common.stand_in("wandb")
from sae_lens.config import SAETrainerConfig  # noqa: E402
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig  # noqa: E402
from sae_lens.saes.gated_sae import GatedTrainingSAE, GatedTrainingSAEConfig  # noqa: E402
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig  # noqa: E402
from sae_lens.saes.matryoshka_batchtopk_sae import (  # noqa: E402
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig  # noqa: E402
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig  # noqa: E402
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig  # noqa: E402
from sae_lens.training.sae_trainer import SAETrainer  # noqa: E402

SHAPE = {"d_in": common.D, "d_sae": common.F, "dtype": "float64"}
MATRICES: common.Names = {"W_enc": ("W_enc", True), "W_dec": ("W_dec", False), "b_dec": ("b_dec", False)}
PLAIN: common.Names = {**MATRICES, "b_enc": ("b_enc", False)}
JUMP: common.Names = {**PLAIN, "threshold": ("threshold", False)}
GATED: common.Names = {**MATRICES, **{name: (name, False) for name in ("b_gate", "b_mag", "r_mag")}}
Case = tuple[str, type[TrainingSAE], TrainingSAEConfig, common.Names, int, bool]


def cases() -> Iterator[Case]:
    """(name, class, options, parameters, steps taken before, whether some features are dead)."""
    yield "standard", StandardTrainingSAE, StandardTrainingSAEConfig(**SHAPE, l1_coefficient=0.3), PLAIN, 0, False
    yield (
        "standard_warm_up",
        StandardTrainingSAE,
        StandardTrainingSAEConfig(**SHAPE, l1_coefficient=0.3, l1_warm_up_steps=10),
        PLAIN,
        4,
        False,
    )
    yield "topk", TopKTrainingSAE, TopKTrainingSAEConfig(**SHAPE, k=5), PLAIN, 0, False
    yield "topk_dead", TopKTrainingSAE, TopKTrainingSAEConfig(**SHAPE, k=5), PLAIN, 0, True
    yield "batchtopk", BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig(**SHAPE, k=5), PLAIN, 0, True
    yield "gated", GatedTrainingSAE, GatedTrainingSAEConfig(**SHAPE, l1_coefficient=0.3), GATED, 0, False
    jump = {"l0_coefficient": 0.2, "jumprelu_bandwidth": 0.2}
    yield "jumprelu", JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig(**SHAPE, **jump), JUMP, 0, False
    yield (
        "jumprelu_pre_act",
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig(**SHAPE, **jump, pre_act_loss_coefficient=0.01),
        JUMP,
        0,
        True,
    )
    yield (
        "jumprelu_quadratic",
        JumpReLUTrainingSAE,
        JumpReLUTrainingSAEConfig(**SHAPE, **jump, jumprelu_sparsity_loss_mode="quadratic", target_l0=6.0),
        JUMP,
        0,
        False,
    )
    yield (
        "matryoshka",
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig(**SHAPE, k=5, matryoshka_widths=[10, 20, common.F]),
        PLAIN,
        0,
        True,
    )


def drawn_weights(seed: int, names: common.Names) -> common.Weights:
    """Biases of the right names; a threshold is positive and a float32 number, as SAELens keeps it."""
    held = common.weights(seed, tuple(n for n in names if n not in ("W_enc", "W_dec", "b_dec", "threshold")))
    if "threshold" in names:
        draw = torch.Generator().manual_seed(2000 + seed)
        held["threshold"] = (0.1 + 0.3 * torch.rand(common.F, generator=draw)).double()
    return held


def step(case: Case, seed: int) -> dict[str, Tensor]:
    """What goes in, what `SAETrainer.step` makes of it, and the parameters after it."""
    _, kind, options, names, before, dead = case
    held, x_BD = drawn_weights(seed, names), common.batch(seed)
    sae = kind(options)
    common.pour(sae, held, names)
    config = SAETrainerConfig(
        total_training_samples=100 * common.B, train_batch_size_samples=common.B, lr=1e-3, lr_end=1e-3
    )
    trainer = SAETrainer(config, sae, iter(()))
    for _ in range(before):
        for scheduler in trainer.coefficient_schedulers.values():
            scheduler.step()
    dead_F = torch.zeros(common.F, dtype=torch.bool)
    dead_F[common.DEAD] = dead
    trainer.n_forward_passes_since_fired[dead_F] = config.dead_feature_window + 1
    with common.recorded(sae, names) as out:
        output = trainer.step(x_BD)
    out.update({f"weight.{k}": v for k, v in held.items()})
    out.update({f"after.{k}": v for k, v in common.drawn(sae, names, torch.Tensor.clone).items()})
    out.update({f"loss.{k}": v for k, v in output.losses.items()})
    out.update({"x": x_BD, "codes": output.feature_acts, "hat": output.sae_out, "dead": dead_F})
    if hasattr(sae, "topk_threshold"):
        out["topk_threshold"] = sae.topk_threshold
    return out


def main(directory: Path) -> None:
    for seed, case in enumerate(cases()):
        common.write(directory, case[0], step(case, seed))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
