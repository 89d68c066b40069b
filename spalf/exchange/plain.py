"""spalf's own form: config.json and sae.safetensors, both matrices [F, D]; what `spalf export` writes unless told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from spalf.engine.export import FORMAT, REFINED_FORMAT
from spalf.errors import ExchangeError
from spalf.exchange import files
from spalf.exchange.dictionary import About, Dictionary


def read(directory: Path) -> Dictionary:
    """A folder that `spalf export` wrote. Raises ExchangeError at one that is none, or is cut short."""
    path, weights = directory / "config.json", directory / "sae.safetensors"
    config = files.read_json(path)
    form = config.get("format")
    if form not in (FORMAT, REFINED_FORMAT):
        raise ExchangeError(f"{path}: format is {form!r}, this version reads {FORMAT!r} and {REFINED_FORMAT!r}")
    held = files.read_safetensors(weights)
    width, d_model = files.matrix(weights, held, "W_enc")
    names = ("b_enc", "threshold", "scale", *(("step",) if form == REFINED_FORMAT else ()))
    vectors = dict.fromkeys(names, (width,))
    found = files.take(
        weights, held, {"W_enc": (width, d_model), "W_dec": (width, d_model), "b_dec": (d_model,), **vectors}
    )
    k = files.count(config, "k")
    scale_F = found["scale"] if k else found["scale"].new_ones(width)
    if k and bool(found["threshold"].any()):
        raise ExchangeError(f"{path}: has both k and thresholds, which no activation here has")
    step_F = _step(path, found, k)
    is_relu = not k and step_F is None and not bool(found["threshold"].any())
    return Dictionary(
        activation="topk" if k else "relu" if is_relu else "jumprelu",
        k=k,
        W_enc_FD=found["W_enc"] / scale_F[:, None],
        W_dec_FD=found["W_dec"] * scale_F[:, None],
        b_enc_F=found["b_enc"] / scale_F,
        b_dec_D=found["b_dec"],
        threshold_F=None if k or is_relu else found["threshold"],
        step_F=step_F,
        about=About(
            model=files.text(config, "model"),
            hook=files.text(config, "hook"),
            context=files.count(config, "context"),
            details={"recipe": config.get("recipe"), "step": config.get("step")},
        ),
    )


def _step(path: Path, found: Mapping[str, Tensor], k: int) -> Tensor | None:
    """The refinement, or None without one and where it moves nothing."""
    step_F = found.get("step")
    if step_F is None or not bool(step_F.any()):
        return None
    if k or bool((found["threshold"] < 0).any()):
        raise ExchangeError(f"{path}: has steps with k or with thresholds below 0, which no activation here has")
    return step_F
