"""sparsify: the body of `Trainer.fit` between the activations and the next batch, call by call: `fit` itself needs a
language model. Its defaults (no dead-feature loss, one micro batch) leave out what is not called here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .measure import Subject, Task


class Sparsify:
    """A TopK coder of sparsify with its default optimizer (sign SGD, schedule-free) or with Adam."""

    def __init__(self, task: Task, batches: list[Tensor], adam: bool) -> None:
        if not task.device.startswith("cuda"):
            # Its decoder would take the Triton kernel wherever Triton can be imported.
            os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
        with redirect_stdout(sys.stderr):
            library, decoder = import_module("sparsify"), import_module("sparsify.utils").decoder_impl
        self.version: str = library.__version__
        config = library.SparseCoderConfig(num_latents=task.width, k=task.l0)
        self.coder = library.SparseCoder(task.d, config, device=task.device, dtype=torch.float32)
        self.coder.b_dec.data = batches[0].mean(0)
        self.optimizer, self.schedule = self._adam(task.lr) if adam else self._signum(task.lr)
        on_gpu = task.device.startswith("cuda")
        self.note = f"{'bf16 autocast, which it always uses on CUDA' if on_gpu else 'no autocast'}, {decoder.__name__}"
        self.fired_F = torch.zeros(task.width, dtype=torch.bool, device=task.device)
        self.silent_F = torch.zeros(task.width, dtype=torch.long, device=task.device)
        self._acts = torch.zeros(1, 1)

    def _signum(self, lr: float) -> tuple[Any, Any]:
        sign = import_module("sparsify.sign_sgd").SignSGD(self.coder.parameters(), lr=lr)
        wrapped = import_module("schedulefree").ScheduleFreeWrapper(sign, momentum=0.95)
        wrapped.train()
        return wrapped, None

    def _adam(self, lr: float) -> tuple[Any, Any]:
        adam = torch.optim.Adam(self.coder.parameters(), lr=lr)
        linear = import_module("transformers").get_linear_schedule_with_warmup
        return adam, linear(adam, 0, 10**7)

    def step(self, x_BD: Tensor) -> float:
        coder = self.coder
        if coder.cfg.normalize_decoder:
            coder.set_decoder_norm_to_unit_norm()
        total = (x_BD - x_BD.mean(0)).pow(2).sum()
        out = coder(x=x_BD, y=x_BD, dead_mask=None, total_variance=total)
        self.fired_F[out.latent_indices.flatten()] = True
        fvu = float(out.fvu.detach())  # it adds a Python number to its averages, in every step
        out.fvu.backward()
        if coder.cfg.normalize_decoder:
            coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.schedule is not None:
            self.schedule.step()
        with torch.no_grad():
            self.silent_F += x_BD.shape[0]
            self.silent_F[self.fired_F] = 0
            self.fired_F.zero_()
        self._acts = out.latent_acts.detach()
        return fvu

    def l0(self) -> float:
        return float((self._acts != 0).sum(-1).float().mean())

    def parameters(self) -> Iterable[Tensor]:
        found: Iterable[Tensor] = self.coder.parameters()
        return found


SUBJECTS: dict[str, Callable[[Task, list[Tensor]], Subject]] = {
    "sparsify TopK + Adam": lambda task, batches: Sparsify(task, batches, adam=True),
    "sparsify TopK": lambda task, batches: Sparsify(task, batches, adam=False),
}
