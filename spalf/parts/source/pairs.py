"""Paired activations on disk: one safetensors file in a directory, every row a sentence's activation and its pair's.

    pairs.safetensors   a_ND, b_ND float32; labels_NC int8; sentence_a_N, sentence_b_N int64
                        metadata: concepts (a JSON list), facts (JSON of d_model, hook, model)

Shapes: N pairs, D d_model, C concepts.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spalf.core.values import Facts
from spalf.errors import SourceError

FILE = "pairs.safetensors"


def _checked(pairs: Pairs, attribute: Any, value: Any) -> None:
    """Shapes, dtypes and values, after the last field is set. Raises SourceError."""
    n, d = len(pairs.a_ND), pairs.facts.d_model
    for name, x_ND in (("a_ND", pairs.a_ND), ("b_ND", pairs.b_ND)):
        if x_ND.shape != (n, d) or x_ND.dtype != torch.float32:
            found = f"{tuple(x_ND.shape)} {x_ND.dtype}"
            raise SourceError(f"{name} is {found}, it has to be {(n, d)} torch.float32 (facts.d_model is {d})")
        if not bool(torch.isfinite(x_ND).all()):
            raise SourceError(f"{name} holds NaN or infinite activations (harvest with a model in float32)")
    for name, ids_N in (("sentence_a_N", pairs.sentence_a_N), ("sentence_b_N", pairs.sentence_b_N)):
        if ids_N.shape != (n,) or ids_N.dtype != torch.int64:
            found = f"{tuple(ids_N.shape)} {ids_N.dtype}"
            raise SourceError(f"{name} is {found}, it has to be {(n,)} torch.int64 (one id per sentence)")
    labels_NC, c = pairs.labels_NC, len(pairs.concepts)
    if (labels_NC is None) != (c == 0):
        raise SourceError("labels_NC and concepts come together (name a concept per column of labels_NC)")
    if labels_NC is not None:
        if labels_NC.shape != (n, c) or labels_NC.dtype != torch.int8:
            found = f"{tuple(labels_NC.shape)} {labels_NC.dtype}"
            raise SourceError(f"labels_NC is {found}, it has to be {(n, c)} torch.int8 (a column per concept)")
        if bool((labels_NC.abs() > 1).any()):
            raise SourceError("labels_NC holds other values than -1, 0 and 1 (1: flipped from 0 to 1, -1: from 1 to 0)")


@frozen(kw_only=True, eq=False)
class Pairs:
    """Activations `a_ND` and `b_ND` float32 [N, D] of paired sentences, in the model's own coordinates.

    `labels_NC` int8 [N, C] says what changed from a to b: 1 the concept was switched on, -1 off, 0 unchanged; None
    and no `concepts` where nobody knows. `sentence_a_N`, `sentence_b_N` int64 [N] are equal where the sentences are,
    so that a split can keep each sentence on one side. `facts` needs d_model, hook and model. Raises SourceError where
    these disagree.
    """

    a_ND: Tensor
    b_ND: Tensor
    labels_NC: Tensor | None = None
    concepts: tuple[str, ...] = ()
    sentence_a_N: Tensor
    sentence_b_N: Tensor
    facts: Facts = field(validator=_checked)

    def __len__(self) -> int:
        return len(self.a_ND)


def write_pairs(directory: str | Path, pairs: Pairs) -> Path:
    """Write `pairs` to a new directory and return it; whole or not at all. Raises SourceError where it exists."""
    out = Path(directory)
    if out.exists():
        raise SourceError(f"{out} exists (name another directory, or remove it)")
    names = ("a_ND", "b_ND", "labels_NC", "sentence_a_N", "sentence_b_N")
    found = {name: getattr(pairs, name) for name in names}
    # Clones: safetensors refuses tensors that share memory.
    tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in found.items() if v is not None}
    facts = {name: getattr(pairs.facts, name) for name in ("d_model", "hook", "model")}
    metadata = {"concepts": json.dumps(list(pairs.concepts)), "facts": json.dumps(facts)}
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_file(tensors, partial / FILE, metadata=metadata)
        with (partial / FILE).open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(out)
    except BaseException:  # an interrupt too: half a file is of no use to anyone
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def read_pairs(directory: str | Path) -> Pairs:
    """The pairs of a directory, on the CPU. Raises SourceError where there are none, or damaged ones."""
    path = Path(directory) / FILE
    if not path.is_file():
        raise SourceError(f"{directory} holds no {FILE} (spalf.write_pairs makes one)")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in _names(file)}
            metadata = file.metadata() or {}
        return Pairs(
            a_ND=tensors["a_ND"],
            b_ND=tensors["b_ND"],
            labels_NC=tensors.get("labels_NC"),
            concepts=tuple(str(name) for name in json.loads(metadata["concepts"])),
            sentence_a_N=tensors["sentence_a_N"],
            sentence_b_N=tensors["sentence_b_N"],
            facts=read_facts(path),
        )
    except SourceError as e:
        raise SourceError(f"{path}: {e}") from e
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise SourceError(f"{path} is damaged: {type(e).__name__} {e} (write it again)") from e


def _names(file: Any) -> list[str]:
    return list(file.keys())


def read_facts(path: Path) -> Facts:
    """What a pairs.safetensors says of its model, from its header alone. Raises SourceError."""
    try:
        with safe_open(path, framework="pt") as file:
            table = json.loads((file.metadata() or {})["facts"])
        return Facts(
            d_model=int(table["d_model"]),
            hook=str(table["hook"]),
            model=str(table["model"]),
            bytes_per_activation=4 * int(table["d_model"]),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise SourceError(f"{path} is damaged: {type(e).__name__} {e} (write it again)") from e
