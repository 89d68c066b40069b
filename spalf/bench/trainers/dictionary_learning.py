"""dictionary_learning's trainers by their own `update`, in the order of its `trainSAE`: autocast, scale, save."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module, metadata
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spalf.bench.trainers.order import Order, misfit, stand_in

KINDS = {
    "topk": ("top_k", "TopKTrainer"),
    "batchtopk": ("batch_top_k", "BatchTopKTrainer"),
    "jumprelu": ("jumprelu", "JumpReluTrainer"),
    "gated": ("gdm", "GatedSAETrainer"),
}
WHOLE = ("k",)
"""Options that have to be whole numbers."""


def version() -> str:
    """Of what is installed."""
    return metadata.version("dictionary-learning")


def train(order: Order, stream: Iterator[Tensor], out: Path) -> None:
    """Train, and save into `out` as `trainSAE` does."""
    stand_in("wandb")  # both are imported at its top and used for trackers and language models alone
    stand_in("nnsight", LanguageModel=object)
    trainer = _made(order)
    on_cuda = torch.device(order.device).type == "cuda"
    dtype = torch.bfloat16 if order.autocast and on_cuda else torch.float32
    norm = import_module("dictionary_learning.training").get_norm_factor(
        islice(stream, order.normalise), steps=order.normalise
    )
    trainer.config["norm_factor"] = norm
    trainer.ae.scale_biases(1.0)
    for step in range(order.steps):
        x_BD = next(stream, None)
        if x_BD is None:
            raise RuntimeError(f"the stream ended after {step} of {order.steps} steps")
        x_BD = x_BD.to(dtype)
        x_BD /= norm
        with torch.autocast("cuda", dtype=dtype) if on_cuda else nullcontext():
            trainer.update(step, x_BD)
    trainer.ae.scale_biases(norm)
    config = json.dumps({"trainer": trainer.config, "buffer": {}}, default=str)
    (out / "config.json").write_text(config, encoding="utf-8")
    torch.save({k: v.cpu() for k, v in trainer.ae.state_dict().items()}, out / "ae.pt")


def _made(order: Order) -> Any:
    module, name = KINDS[order.kind]
    kind = getattr(import_module(f"dictionary_learning.trainers.{module}"), name)
    known = set(inspect.signature(kind.__init__).parameters)
    own: dict[str, Any] = {
        "steps": order.steps,
        "activation_dim": order.d_model,
        "dict_size": order.width,
        "layer": 0,
        "lm_name": "none",
        "device": order.device,
        "seed": order.seed,
        **({"decay_start": int((1 - order.decay) * order.steps)} if order.decay else {}),
        **({} if order.lr is None else {"lr": order.lr}),
    }
    for key, value in order.options.items():
        if key not in known:
            raise misfit(order, key, known - {"self"})
        own[key] = int(value) if key in WHOLE else value
    return kind(**own)
