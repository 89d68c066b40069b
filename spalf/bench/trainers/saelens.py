"""SAELens' training SAEs by its own `SAETrainer.step`, as its `fit` calls it, without language models and trackers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spalf.bench.trainers.order import Order, misfit, stand_in

KINDS = {
    "topk": "TopKTrainingSAE",
    "batchtopk": "BatchTopKTrainingSAE",
    "jumprelu": "JumpReLUTrainingSAE",
    "matryoshka": "MatryoshkaBatchTopKTrainingSAE",
}
NORMALISED = "expected_average_only_in"
"""The normalisation that its tutorials and its synthetic benchmark train with; folded into the weights at the end."""


def version() -> str:
    """Of what is installed."""
    stand_in("wandb")  # imported at the top of its trainer, and used where log_to_wandb is on
    return str(import_module("sae_lens").__version__)


def train(order: Order, stream: Iterator[Tensor], out: Path) -> None:
    """Train, and save into `out` as the library saves for inference."""
    sae, config = _made(order)
    trainer = import_module("sae_lens.training.sae_trainer").SAETrainer(cfg=config, sae=sae, data_provider=stream)
    scaler = trainer.activation_scaler
    if sae.cfg.normalize_activations == NORMALISED:
        scaler.estimate_scaling_factor(order.d_model, stream, order.normalise)
    elif sae.cfg.normalize_activations == "covariance_whitening":
        scaler.estimate_whitening(order.d_model, stream, order.normalise)
    for x_BD in islice(stream, order.steps):
        trainer.step(x_BD)
        trainer.n_training_steps += 1
    if trainer.n_training_steps < order.steps:
        raise RuntimeError(f"the stream ended after {trainer.n_training_steps} of {order.steps} steps")
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if scaler.whitening is not None:
        held = scaler.whitening
        sae.fold_activation_whitening(
            mean=held.mean, whitening_matrix=held.matrix, unwhitening_matrix=held.inverse_matrix
        )
    trainer.set_final_sae_metadata()
    sae.save_inference_model(str(out))


def _made(order: Order) -> tuple[Any, Any]:
    """The SAE and the trainer's configuration. An option goes where it has a field."""
    sae_lens, training_kind = import_module("sae_lens"), import_module("sae_lens.config").SAETrainerConfig
    name = KINDS[order.kind]
    kind, config_kind = getattr(sae_lens, name), getattr(sae_lens, f"{name}Config")
    on_cuda = torch.device(order.device).type == "cuda"
    own: dict[str, Any] = {
        "d_in": order.d_model,
        "d_sae": order.width,
        "device": order.device,
        "normalize_activations": NORMALISED,
    }
    if order.kind == "jumprelu" and "target_l0" in order.options:
        own["jumprelu_sparsity_loss_mode"] = "quadratic"  # the one of its three that takes a target
    training: dict[str, Any] = {
        "total_training_samples": order.steps * order.batch,
        "train_batch_size_samples": order.batch,
        "device": order.device,
        "autocast": order.autocast and on_cuda,
        "lr_decay_steps": round(order.decay * order.steps),
        **({} if order.lr is None else {"lr": order.lr}),
    }
    places = ((own, config_kind), (training, training_kind))
    for key, value in order.options.items():
        place = next((table for table, cls in places if key in _fields(cls)), None)
        if place is None:
            raise misfit(order, key, {name for _, cls in places for name in _fields(cls)})
        place[key] = value
    training.setdefault("lr", training_kind.lr)
    training.setdefault("lr_end", training["lr"] / 10)  # its runners fill this in; a constant rate never reads it
    if order.kind == "topk":
        own["k"] = int(own["k"])
    return kind(config_kind(**own)).to(order.device), training_kind(**training)


def _fields(cls: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}
