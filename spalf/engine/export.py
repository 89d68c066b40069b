"""Fold the whitening into a dictionary that takes and gives raw activations, and write it.

Shape letters: F features, D d_model. A feature is a row, in both matrices.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from spalf.core.built import Autoencoder, Metric
from spalf.core.recipe import Plan
from spalf.core.slots import label
from spalf.core.state import TrainingState
from spalf.core.values import Raw, White
from spalf.engine.checkpoint import sync, versions
from spalf.errors import CheckpointError
from spalf.nn import form_of

FORMAT = "spalf.dictionary.1"
REFINED_FORMAT = "spalf.dictionary.2"
"""With `step`: a name of its own, so that a reader which would leave the refinement out refuses it."""
FORMULA = "p = x W_enc' + b_enc;  z = p where p > threshold, else 0;  x_hat = z W_dec + b_dec"
FORMULA_K = (
    "p = x W_enc' + b_enc;  z = p where p > threshold and p / scale is among the k largest of its row, else 0;  "
    "x_hat = z W_dec + b_dec"
)
FORMULA_REFINED = (
    "p = x W_enc' + b_enc;  u = p where p > threshold, else 0;  "
    "z = max(0, u + step * (x - u W_dec - b_dec) W_dec') where p > threshold, else 0;  x_hat = z W_dec + b_dec"
)
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
CHUNK = 8192  # rows folded at a time: both matrices in float64 at once are four times the model


@torch.no_grad()
def fold(metric: Metric, sae: Autoencoder, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The dictionary in model space, computed in float64; the two matrices in `dtype`, the vectors at least float32.

    W_enc, W_dec [F, D], W_dec with unit rows; b_enc, threshold, scale [F]; b_dec [D]. It is applied to x itself, with
    nothing subtracted first: p = x W_enc' + b_enc, z = p 1[p > threshold], x_hat = z W_dec + b_dec. Its codes are
    `scale` times the trained ones, so an activation that keeps the k largest has to sort by p / scale. A gated
    dictionary becomes one of this form: its gate is a threshold on what its magnitude is affine in.
    Refined codes add `step` [F]: each open z becomes [z + step <x - x_hat, d>]+ with its unit row d, once. It is left
    out where every step is 0.
    Raises CheckpointError for signed codes, for refined ones that are not selected by thresholds from 0 on, and for
    those that are refined by other weights than model space's.
    """
    if sae.activator.signed:
        raise CheckpointError("not exported: codes of this activation have both signs, and the format has z >= 0")
    wide = copy.deepcopy(metric).double() if isinstance(metric, nn.Module) else metric
    vector = torch.promote_types(dtype, torch.float32)
    # The raw point that the encoder's rows see as 0.
    b_dec_D = White(sae.b_dec_D.double())
    centre_D = wide.raw(b_dec_D if sae.activator.pre_bias else White(torch.zeros_like(b_dec_D)))
    bias_F, slope_F, threshold_F = _affine(sae)
    parts: dict[str, list[Tensor]] = {name: [] for name in ("W_enc", "W_dec", "b_enc", "threshold", "scale")}
    for start in range(0, sae.width, CHUNK):
        rows = slice(start, start + CHUNK)
        # D_raw = gain * D W^-1, c = row norms; a row of zeros has no direction and stays one
        raw_FD = sae.log_gain.double().exp() * wide.raw_direction(White(sae.W_dec_FD[rows].double()))
        norm_F = raw_FD.norm(dim=1)
        c_F = torch.where(norm_F > 0, norm_F, 1.0)
        # p = (x - mean) W E': the rows are E W, by the map that takes directions to whitened space (W is symmetric)
        in_F = c_F * slope_F[rows]
        enc_FD = (in_F[:, None] * wide.white_direction(Raw(sae.W_enc_FD[rows].double()))).to(dtype)
        parts["W_dec"].append((raw_FD / c_F[:, None]).to(dtype))
        parts["W_enc"].append(enc_FD)
        # With the centre through the rows as they were rounded: what rounding adds then acts on x - centre, not on x.
        parts["b_enc"].append((c_F * bias_F[rows] - enc_FD.double() @ centre_D).to(vector))
        parts["threshold"].append((c_F * threshold_F[rows]).to(vector))
        parts["scale"].append(c_F.to(vector))
    out = {name: torch.cat(chunks) for name, chunks in parts.items()}
    step_F = _step(wide, sae)
    if step_F is not None:
        # z_raw = c z, and <e W^-2, w> = <x - x_hat, c d> / gain with d the unit row: each brings one c
        out["step"] = (step_F * out["scale"].double().square()).to(vector)
    return {**out, "b_dec": wide.raw(b_dec_D).to(vector)}


def _affine(sae: Autoencoder) -> tuple[Tensor, Tensor, Tensor]:
    """(bias, slope, threshold) [F] float64: z is slope * (what is read) W_enc' + bias where that exceeds threshold."""
    bias_F, threshold_F = sae.b_enc_F.double(), sae.activator.threshold_F().double()
    affine = sae.activator.affine_F()
    if affine is None:
        return bias_F, torch.ones_like(bias_F), threshold_F
    slope_F, shift_F = (x.double() for x in affine)
    return slope_F * bias_F + shift_F, slope_F, slope_F * threshold_F + shift_F


def _step(metric: Metric, sae: Autoencoder) -> Tensor | None:
    """The refinement [F] float64 in model space, for rows of length 1 there; None where nothing moves."""
    activator = sae.activator
    step_F = activator.refinement_F()
    if step_F is None or not bool(step_F.any()):
        return None
    if activator.k or activator.affine_F() is not None or bool((activator.threshold_F() < 0).any()):
        raise CheckpointError(
            "not exported: refined codes are written where thresholds from 0 on select them, not of an activation "
            "that keeps k, scales or lets negative ones through (train with activation.refine = false)"
        )
    if not _is_of(metric, sae.form_DD.double()):
        raise CheckpointError(
            "not exported: codes are refined by the weights that a phase `reweigh` has measured, one for each pair of "
            "dimensions, and the format has one number per feature (train without that phase)"
        )
    return step_F.double() / (sae.log_gain.double().exp().square() * form_scale(metric))


def _is_of(metric: Metric, form_DD: Tensor) -> bool:
    """Whether a form of errors is the metric's own, up to the rounding of its entries to float32."""
    own_DD = form_of(metric, form_DD)
    return bool((form_DD - own_DD).abs().amax() <= 1e-4 * own_DD.abs().amax())


def form_scale(metric: Metric) -> Tensor:
    """tr W^-2 / D, a scalar: what the form of an error in model space is divided by where codes are refined."""
    unit_DD = torch.eye(metric.d_model, dtype=torch.float64, device=metric.variance("raw").device)
    return metric.raw_square(White(unit_DD)) / metric.d_model


def export(plan: Plan, state: TrainingState, directory: Path, dtype: str = "float32") -> Path:
    """Write `sae.safetensors` and `config.json` into `directory` and return it.

    "bfloat16" halves the file and is lossy: a raw encoder row has large entries where the variance is small, and their
    rounding meets activations of every variance. A directory that has a config.json has the tensors that belong to it.
    Raises CheckpointError at an unknown dtype, or where a folded number is not finite.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f'export: there is no dtype "{dtype}" (use {", ".join(DTYPES)})')
    tensors = {k: v.cpu().contiguous() for k, v in fold(state.metric, state.sae, DTYPES[dtype]).items()}
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise CheckpointError(f"not exported, because these are not finite: {', '.join(bad)}")
    form = REFINED_FORMAT if "step" in tensors else FORMAT
    config = json.dumps(_config(plan, state, dtype, form), indent=1) + "\n"
    return publish(
        directory,
        {
            "sae.safetensors": lambda path: save_file(tensors, path, metadata={"format": form}),
            "config.json": text_file(config),
        },
    )


def publish(directory: Path, files: Mapping[str, Callable[[Path], object]]) -> Path:
    """Write files into `directory`, whole, and return it; the last one named tells that the others belong to it.

    All are written beside their targets and flushed. Then the last one is taken away, and put back after the others.
    """
    directory.mkdir(parents=True, exist_ok=True)
    drafts = {directory / name: directory / f".{name}.{os.getpid()}" for name in files}
    try:
        for draft, write in zip(drafts.values(), files.values(), strict=True):
            write(draft)
            sync(draft)
        [*drafts][-1].unlink(missing_ok=True)
        for path, draft in drafts.items():
            draft.replace(path)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
    sync(directory)
    return directory


def text_file(text: str) -> Callable[[Path], object]:
    """What writes `text`, for `publish`."""
    return lambda path: path.write_text(text, encoding="utf-8")


def _config(plan: Plan, state: TrainingState, dtype: str, form: str) -> dict[str, Any]:
    k = state.sae.activator.k
    formula = FORMULA_REFINED if form == REFINED_FORMAT else FORMULA_K if k else FORMULA
    return {
        "format": form,
        "formula": formula,
        "k": k,
        "d_model": plan.facts.d_model,
        "F": state.sae.width,
        "dtype": dtype,
        "hook": plan.facts.hook,
        "model": plan.facts.model,
        "activation": label(type(plan.recipe.activation)).use,
        "strata": {name: [rows.start, rows.stop] for name, rows in state.sae.rows.items()},
        "recipe": plan.recipe.name,
        "phase": state.clock.phase,
        "step": state.clock.step,
        "versions": versions(),
    }
