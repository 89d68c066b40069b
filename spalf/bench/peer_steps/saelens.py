"""SAELens: `SAETrainer.step`, with forward, backward, clipping, default Adam, schedules and firing statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .measure import Subject, Task, threshold
from .stand_ins import stand_in


class SaeLens:
    """A training SAE of SAELens with everything at its default but what the task sets."""

    def __init__(self, task: Task, batches: list[Tensor], kind: str, options: dict[str, Any]) -> None:
        stand_in("wandb")
        library, trainer = import_module("sae_lens"), import_module("sae_lens.training.sae_trainer")
        config = getattr(library, f"{kind}TrainingSAEConfig")(
            d_in=task.d, d_sae=task.width, device=task.device, dtype="float32", **options
        )
        self.version: str = library.__version__
        self.sae = getattr(library, f"{kind}TrainingSAE")(config)
        self.sae.to(task.device)
        # Its sparse products know no bfloat16: SAELens names float32 without autocast as their use.
        autocast = task.precision == "bf16" and not options.get("use_sparse_activations")
        self.note = f"{'bf16 autocast' if autocast else 'no autocast'}, default Adam, gradient clipped to norm 1"
        self.trainer = trainer.SAETrainer(
            cfg=import_module("sae_lens.config").SAETrainerConfig(
                total_training_samples=10**9,
                train_batch_size_samples=task.batch,
                device=task.device,
                autocast=autocast,
                lr=task.lr,
                lr_end=task.lr,
            ),
            sae=self.sae,
            data_provider=iter(()),
        )
        if kind == "JumpReLU":
            self._calibrate(batches[0][:256], task.l0)
        self._last: Any = None

    @torch.no_grad()
    def _calibrate(self, x_BD: Tensor, l0: int) -> None:
        self.sae.threshold.fill_(threshold((x_BD - self.sae.b_dec) @ self.sae.W_enc + self.sae.b_enc, l0))

    def step(self, x_BD: Tensor) -> Tensor:
        self._last = self.trainer.step(x_BD)
        self.trainer.n_training_steps += 1
        loss: Tensor = self._last.loss.detach()
        return loss

    def l0(self) -> float:
        z_BF = self._last.feature_acts
        value: Tensor = z_BF.coalesce().values() if z_BF.is_sparse else z_BF
        return float(value.count_nonzero()) / int(z_BF.shape[0])

    def parameters(self) -> Iterable[Tensor]:
        found: Iterable[Tensor] = self.sae.parameters()
        return found


def _of(kind: str, **options: Any) -> Callable[[Task, list[Tensor]], Subject]:
    return lambda task, batches: SaeLens(task, batches, kind, options)


SUBJECTS: dict[str, Callable[[Task, list[Tensor]], Subject]] = {
    "SAELens JumpReLU": _of("JumpReLU", jumprelu_sparsity_loss_mode="step", l0_coefficient=1.0),
    "SAELens TopK": lambda task, batches: SaeLens(task, batches, "TopK", {"k": task.l0}),
    # Its backward of sparse activations fails while they are rescaled by decoder norms (aten::view on a sparse tensor).
    "SAELens TopK sparse": lambda task, batches: SaeLens(
        task,
        batches,
        "TopK",
        {"k": task.l0, "use_sparse_activations": True, "rescale_acts_by_decoder_norm": False},
    ),
    "SAELens BatchTopK": lambda task, batches: SaeLens(task, batches, "BatchTopK", {"k": float(task.l0)}),
}
