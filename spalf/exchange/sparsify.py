"""sparsify (EleutherAI): a folder of cfg.json and sae.safetensors; read only. Both matrices are [F, D]."""

from __future__ import annotations

from pathlib import Path

from spalf.errors import ExchangeError
from spalf.exchange import files
from spalf.exchange.dictionary import About, Dictionary


def read(directory: Path) -> Dictionary:
    """A folder of sparsify. Raises ExchangeError at what spalf cannot express, and names it.

    The width is that of the tensors: `num_latents = 0` in the config leaves it to an expansion factor.
    """
    path, weights = directory / "cfg.json", directory / "sae.safetensors"
    config = files.read_json(path)
    for key in ("transcode", "skip_connection"):
        if config.get(key):
            raise ExchangeError(f"{path}: {key} is set: this is a transcoder, and spalf reads autoencoders")
    if (activation := config.get("activation", "topk")) != "topk":
        raise ExchangeError(f'{path}: activation is "{activation}" (spalf reads topk)')
    held = files.read_safetensors(weights)
    width, d_model = files.matrix(weights, held, "encoder.weight")
    found = files.take(
        weights,
        held,
        {
            "encoder.weight": (width, d_model),
            "encoder.bias": (width,),
            "W_dec": (width, d_model),
            "b_dec": (d_model,),
        },
    )
    return Dictionary(
        activation="topk",
        k=files.number(path, config, "k"),
        W_enc_FD=found["encoder.weight"],
        W_dec_FD=found["W_dec"],
        b_enc_F=found["encoder.bias"],
        b_dec_D=found["b_dec"],
        centred=True,
        about=About(hook=_hook(directory.name)),
    )


def _hook(name: str) -> str:
    """sparsify names a folder after the module it was trained on, such as layers.6 or h.6: a block's output."""
    kind, _, layer = name.rpartition(".")
    is_block = layer.isdecimal() and kind.rpartition(".")[2] in ("layers", "h", "blocks")
    return f"blocks.{layer}.hook_resid_post" if is_block else ""
