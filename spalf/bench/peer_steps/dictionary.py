"""dictionary_learning: `trainer.update` under the autocast that its `trainSAE` opens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .measure import Subject, Task, threshold
from .stand_ins import stand_in


class DictionaryLearning:
    """A trainer of dictionary_learning; its step 0, which takes a median of the batch, is left out."""

    def __init__(self, task: Task, batches: list[Tensor], kind: str, options: dict[str, Any]) -> None:
        stand_in("nnsight", LanguageModel=type("LanguageModel", (), {}))
        stand_in("wandb")
        self.version: str = import_module("dictionary_learning").__version__
        self.trainer = getattr(import_module("dictionary_learning.trainers"), kind)(
            steps=10**6,
            activation_dim=task.d,
            dict_size=task.width,
            layer=0,
            lm_name="none",
            device=task.device,
            lr=task.lr,
            warmup_steps=0,
            **options,
        )
        self.task, self._step, self._last = task, 1, batches[0]
        self._kind = kind
        # trainSAE opens no autocast on a CPU.
        self._autocast = task.precision == "bf16" and task.device.startswith("cuda")
        self.note = f"{'bf16 autocast' if self._autocast else 'no autocast'}, default Adam, gradient clipped to norm 1"
        if kind == "JumpReluTrainer":
            with torch.no_grad():
                ae = self.trainer.ae
                ae.threshold.fill_(threshold(batches[0][:256] @ ae.W_enc + ae.b_enc, task.l0))

    def _context(self) -> AbstractContextManager[Any]:
        return torch.autocast("cuda", dtype=torch.bfloat16) if self._autocast else nullcontext()

    def step(self, x_BD: Tensor) -> float:
        self._last = x_BD
        with self._context():
            loss = self.trainer.update(self._step, x_BD.bfloat16() if self._autocast else x_BD)
        self._step += 1
        return float(loss)

    @torch.no_grad()
    def l0(self) -> float:
        some_BD = self._last[:64]
        batched = {"use_threshold": False} if "BatchTopK" in self._kind else {}
        return float((self.trainer.ae.encode(some_BD, **batched) != 0).sum(-1).float().mean())

    def parameters(self) -> Iterable[Tensor]:
        found: Iterable[Tensor] = self.trainer.ae.parameters()
        return found


def _jump(task: Task, batches: list[Tensor]) -> Subject:
    options = {"target_l0": float(task.l0), "sparsity_warmup_steps": 0}
    return DictionaryLearning(task, batches, "JumpReluTrainer", options)


SUBJECTS: dict[str, Callable[[Task, list[Tensor]], Subject]] = {
    "dictionary_learning JumpReLU": _jump,
    "dictionary_learning TopK": lambda task, batches: DictionaryLearning(task, batches, "TopKTrainer", {"k": task.l0}),
    "dictionary_learning BatchTopK": lambda task, batches: DictionaryLearning(
        task, batches, "BatchTopKTrainer", {"k": task.l0}
    ),
}
