"""dictionary_learning: a folder of ae.pt, a pickled table of tensors, and config.json.

Most of its classes read x minus the decoder's bias; JumpReluAutoEncoder reads x.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spalf.engine.export import publish, text_file
from spalf.errors import ExchangeError
from spalf.exchange import files
from spalf.exchange.dictionary import About, Activation, Dictionary

CLASSES: Mapping[Activation, str] = {
    "relu": "AutoEncoder",
    "jumprelu": "JumpReluAutoEncoder",
    "topk": "AutoEncoderTopK",
    "gated": "GatedAutoEncoder",
}
LINEAR = {"encoder.weight": "W_enc_FD", "decoder.weight": "W_dec_FD"}
TENSORS: Mapping[str, Mapping[str, str]] = {
    "AutoEncoder": {**LINEAR, "encoder.bias": "b_enc_F", "bias": "b_dec_D"},
    "AutoEncoderNew": {**LINEAR, "encoder.bias": "b_enc_F", "decoder.bias": "b_dec_D"},
    "AutoEncoderTopK": {**LINEAR, "encoder.bias": "b_enc_F", "b_dec": "b_dec_D"},
    "BatchTopKSAE": {**LINEAR, "encoder.bias": "b_enc_F", "b_dec": "b_dec_D"},
    "MatryoshkaBatchTopKSAE": {"W_enc": "W_enc_FD", "W_dec": "W_dec_FD", "b_enc": "b_enc_F", "b_dec": "b_dec_D"},
    "GatedAutoEncoder": {
        **LINEAR,
        "decoder_bias": "b_dec_D",
        "mag_bias": "b_enc_F",
        "gate_bias": "b_gate_F",
        "r_mag": "r_mag_F",
    },
    "JumpReluAutoEncoder": {
        "W_enc": "W_enc_FD",
        "W_dec": "W_dec_FD",
        "b_enc": "b_enc_F",
        "b_dec": "b_dec_D",
        "threshold": "threshold_F",
    },
}
"""Names in the file -> fields of a Dictionary."""
TURNED = ("decoder.weight", "W_enc")
"""What is stored [D, F]."""
NOT_CENTRED = ("JumpReluAutoEncoder", "AutoEncoderNew")


def write(dictionary: Dictionary, directory: Path, dtype: torch.dtype) -> Path:
    """`directory` as utils.load_dictionary reads it. Raises ExchangeError at what the library cannot express."""
    dictionary.refuse_negative_thresholds("dictionary_learning")
    dictionary.refuse_step("dictionary_learning")
    kind = CLASSES[dictionary.activation]
    plain = dictionary.recentred(kind not in NOT_CENTRED).rounded(dtype)
    own = plain.tensors()
    held = {theirs: own[ours].T if theirs in TURNED else own[ours] for theirs, ours in TENSORS[kind].items()}
    tensors = {name: tensor.to(dtype if tensor.ndim == 2 else torch.float32) for name, tensor in held.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if kind == "AutoEncoderTopK":
        # Its loader is strict. A negative threshold means that none has been measured, and encode uses k.
        tensors |= {"k": torch.tensor(plain.k, dtype=torch.int), "threshold": torch.tensor(-1.0)}
    config = json.dumps(_config(plain, kind), indent=1) + "\n"
    return publish(directory, {"ae.pt": lambda path: torch.save(tensors, path), "config.json": text_file(config)})


def _config(plain: Dictionary, kind: str) -> dict[str, Any]:
    about = plain.about
    trainer = {
        "trainer_class": "spalf",
        "dict_class": kind,
        "activation_dim": plain.d_model,
        "dict_size": plain.width,
        "layer": about.layer,
        "lm_name": about.model,
        "submodule_name": about.hook,
        **({"k": plain.k} if plain.k else {}),
    }
    return {"trainer": trainer, "buffer": {"ctx_len": about.context}, "spalf": dict(about.details)}


def read(directory: Path) -> Dictionary:
    """A folder of dictionary_learning. Raises ExchangeError at what spalf cannot express, and names it."""
    path, weights = directory / "config.json", directory / "ae.pt"
    config = files.read_json(path)
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        raise ExchangeError(f"{path}: has no table trainer, which names the class")
    kind = str(trainer.get("dict_class"))
    if kind not in TENSORS:
        raise ExchangeError(f'{path}: trainer.dict_class is "{kind}" (spalf reads {", ".join(TENSORS)})')
    held = files.read_pickle(weights)
    one_threshold = held.pop("threshold", None) if "threshold" not in TENSORS[kind] else None
    k = held.pop("k", None)
    for spare in ("group_sizes",):
        held.pop(spare, None)
    tensors = _tensors(weights, held, kind)
    activation: Activation = next((ours for ours, theirs in CLASSES.items() if theirs == kind), "relu")
    extra: dict[str, Any] = {}
    if kind == "AutoEncoderTopK":
        extra["k"] = int(k) if k is not None else files.number(path, trainer, "k")
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        activation = "jumprelu"
        extra["threshold_F"] = _one_threshold(weights, one_threshold, tensors["b_enc_F"])
    return Dictionary(
        activation=activation,
        centred=kind not in NOT_CENTRED,
        about=_about(config, trainer),
        **tensors,
        **extra,
    )


def _tensors(path: Path, held: Mapping[str, Tensor], kind: str) -> dict[str, Any]:
    """Fields of a Dictionary, a feature as a row."""
    names = TENSORS[kind]
    encoder = next(theirs for theirs, ours in names.items() if ours == "W_enc_FD")
    width, d_model = files.matrix(path, held, encoder)[:: -1 if encoder in TURNED else 1]
    shapes: dict[str, tuple[int, ...]] = {}
    for theirs, ours in names.items():
        shape = {"FD": (width, d_model), "D": (d_model,), "F": (width,)}[ours.rpartition("_")[2]]
        shapes[theirs] = shape[::-1] if theirs in TURNED else shape
    found = files.take(path, held, shapes)
    return {ours: found[theirs].T if theirs in TURNED else found[theirs] for theirs, ours in names.items()}


def _one_threshold(path: Path, threshold: Tensor | None, like_F: Tensor) -> Tensor:
    """The learned threshold for every feature. Raises ExchangeError where training has not measured one yet."""
    if threshold is None or float(threshold) < 0:
        raise ExchangeError(f"{path}: holds no measured threshold, so it has no code at inference (train it further)")
    return torch.full_like(like_F, float(threshold))


def _about(config: Mapping[str, Any], trainer: Mapping[str, Any]) -> About:
    layer = trainer.get("layer")
    hook = files.text(trainer, "submodule_name")
    if not hook.startswith("blocks.") and isinstance(layer, int):
        hook = f"blocks.{layer}.hook_resid_post"  # what its trainers mean by a layer
    buffer = config.get("buffer")
    return About(
        model=files.text(trainer, "lm_name"),
        hook=hook,
        context=files.count(buffer, "ctx_len") if isinstance(buffer, dict) else 0,
    )
