"""SAELens: a folder of cfg.json and sae_weights.safetensors, which SAEBench, SAEDashboard and Neuronpedia read too.

Its matrices are W_enc [D, F] and W_dec [F, D]. Written in the layout of version 6; older ones are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from spalf.engine.export import publish, text_file
from spalf.errors import ExchangeError
from spalf.exchange import files
from spalf.exchange.dictionary import About, Activation, Dictionary

VERSION = "6.54.12"
"""Of the layout. Without it, or with one before 6, SAELens drops the names of hook and model on reading."""
ARCHITECTURES: Mapping[Activation, str] = {"relu": "standard", "jumprelu": "jumprelu", "topk": "topk", "gated": "gated"}
READS = ("standard", "jumprelu", "topk", "gated", "batchtopk", "matryoshka_batchtopk")
NORMALISED = "folded on saving by the trainers that use it; otherwise train without, or fold it first"


def write(dictionary: Dictionary, directory: Path, dtype: torch.dtype) -> Path:
    """`directory` as SAE.load_from_disk reads it. Raises ExchangeError at what SAELens cannot express."""
    dictionary.refuse_negative_thresholds("SAELens")
    dictionary.refuse_step("SAELens")
    plain = dictionary.recentred(False).rounded(dtype)
    held: dict[str, Tensor] = {"W_enc": plain.W_enc_FD.T, "W_dec": plain.W_dec_FD, "b_dec": plain.b_dec_D}
    if plain.activation == "gated":
        b_gate_F, r_mag_F = plain.gate()
        held.update({"b_gate": b_gate_F, "b_mag": plain.b_enc_F, "r_mag": r_mag_F})
    else:
        held["b_enc"] = plain.b_enc_F
    if plain.activation == "jumprelu":
        assert plain.threshold_F is not None
        held["threshold"] = plain.threshold_F
    tensors = {name: tensor.to(dtype if tensor.ndim == 2 else torch.float32) for name, tensor in held.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    config = json.dumps(_config(plain), indent=1) + "\n"
    return publish(
        directory,
        {"sae_weights.safetensors": lambda path: save_file(tensors, path), "cfg.json": text_file(config)},
    )


def _config(plain: Dictionary) -> dict[str, Any]:
    about = plain.about
    selecting = {"k": plain.k, "rescale_acts_by_decoder_norm": False} if plain.activation == "topk" else {}
    return {
        "architecture": ARCHITECTURES[plain.activation],
        "d_in": plain.d_model,
        "d_sae": plain.width,
        "dtype": "float32",  # to compute in, which its biases need where the matrices are kept in less
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if about.hook.endswith("hook_z") else "none",
        **selecting,
        "metadata": {
            "sae_lens_version": VERSION,
            "sae_lens_training_version": None,
            "model_name": about.model or None,
            "hook_name": about.hook or None,
            "hook_layer": about.layer,
            "hook_head_index": None,
            "context_size": about.context or None,
            "prepend_bos": about.bos,
            "dataset_path": about.dataset or None,
            "model_from_pretrained_kwargs": {},
            "seqpos_slice": None,
            "exclude_special_tokens": False,
            "spalf": dict(about.details),
        },
    }


def read(directory: Path) -> Dictionary:
    """A folder of SAELens. Raises ExchangeError at what spalf cannot express, and names it."""
    path = directory / "cfg.json"
    config = _renamed(files.read_json(path))
    weights = directory / "sae_weights.safetensors"
    held = files.read_safetensors(weights)
    architecture = _architecture(path, config)
    d_model, width = files.matrix(weights, held, "W_enc")
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_model, width), "W_dec": (width, d_model), "b_dec": (d_model,)}
    names = ("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",)
    shapes.update(dict.fromkeys(names, (width,)))
    if architecture in ("batchtopk", "matryoshka_batchtopk") and "topk_threshold" in held:
        held["threshold"] = held.pop("topk_threshold").expand(width)
        architecture = "jumprelu"
    if architecture == "jumprelu" and "log_threshold" in held:
        held["threshold"] = held.pop("log_threshold").exp()
    if architecture == "jumprelu":
        shapes["threshold"] = (width,)
    tensors = files.take(weights, held, shapes)
    k = files.number(path, config, "k") if architecture == "topk" else 0
    if architecture == "topk" and config.get("rescale_acts_by_decoder_norm"):
        _unit_rows(tensors)
    return Dictionary(
        activation=next(ours for ours, theirs in ARCHITECTURES.items() if theirs == architecture),
        W_enc_FD=tensors["W_enc"].T,
        W_dec_FD=tensors["W_dec"],
        b_enc_F=tensors["b_mag" if architecture == "gated" else "b_enc"],
        b_dec_D=tensors["b_dec"],
        threshold_F=tensors.get("threshold"),
        k=k,
        b_gate_F=tensors.get("b_gate"),
        r_mag_F=tensors.get("r_mag"),
        centred=bool(config.get("apply_b_dec_to_input", True)),
        about=_about(config),
    )


def _renamed(config: dict[str, Any]) -> dict[str, Any]:
    """The names of version 6 for those of the versions before it."""
    older = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    config = {older.get(key, key): value for key, value in config.items()}
    k = (config.get("activation_fn_kwargs") or {}).get("k")
    if config.get("activation_fn") == "topk" and k is not None:
        # Older files call a top-k dictionary "standard" and say what it is beside that.
        config.update({"architecture": "topk", "k": k})
    return config


def _architecture(path: Path, config: Mapping[str, Any]) -> str:
    """Its name, once everything that spalf does not do is refused."""
    architecture = config.get("architecture", "standard")
    if architecture not in READS:
        raise ExchangeError(f'{path}: architecture is "{architecture}" (spalf reads {", ".join(READS)})')
    if config.get("d_out") not in (None, config.get("d_in")):
        raise ExchangeError(f"{path}: d_out is set: this is a transcoder, and spalf reads autoencoders")
    normalised = config.get("normalize_activations")
    if normalised not in (None, False, "none"):
        raise ExchangeError(f'{path}: normalize_activations is "{normalised}" ({NORMALISED})')
    if config.get("finetuning_scaling_factor"):
        raise ExchangeError(f"{path}: finetuning_scaling_factor is set (fold it into the decoder first)")
    if config.get("activation_fn", "relu") not in ("relu", "topk"):
        raise ExchangeError(f'{path}: activation_fn is "{config["activation_fn"]}" (spalf reads relu and topk)')
    return str(architecture)


def _unit_rows(tensors: dict[str, Tensor]) -> None:
    """What `rescale_acts_by_decoder_norm` means, in place: as if the decoder's rows had unit norm."""
    length_F = tensors["W_dec"].norm(dim=1)
    length_F = torch.where(length_F > 0, length_F, 1.0)
    tensors["W_enc"] = tensors["W_enc"] * length_F
    tensors["b_enc"] = tensors["b_enc"] * length_F
    tensors["W_dec"] = tensors["W_dec"] / length_F[:, None]


def _about(config: Mapping[str, Any]) -> About:
    """Version 6 keeps the model's side in `metadata`, older ones beside the rest."""
    told = {**config, **(config.get("metadata") or {})}
    return About(
        model=files.text(told, "model_name"),
        hook=files.text(told, "hook_name"),
        context=files.count(told, "context_size"),
        bos=bool(told.get("prepend_bos")),
        dataset=files.text(told, "dataset_path"),
        details={"sae_lens_version": told.get("sae_lens_version")},
    )
