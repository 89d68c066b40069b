"""Reading the files of other libraries: every mistake is an ExchangeError that names the file."""

from __future__ import annotations

import json
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spalf.errors import ExchangeError


def read_json(path: Path) -> dict[str, Any]:
    """A table. Raises ExchangeError where the file is missing or holds something else."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ExchangeError(f"{path}: no such file (give the directory that holds it)") from e
    except (OSError, ValueError) as e:
        raise ExchangeError(f"{path}: cannot be read: {e}") from e
    if not isinstance(held, dict):
        raise ExchangeError(f"{path}: holds a {type(held).__name__}, not a table")
    return held


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Raises ExchangeError where the file is missing or broken."""
    try:
        return load_file(path)
    except FileNotFoundError as e:
        raise ExchangeError(f"{path}: no such file (give the directory that holds it)") from e
    except (OSError, SafetensorError) as e:
        raise ExchangeError(f"{path}: cannot be read: {e}") from e


def read_pickle(path: Path) -> dict[str, Tensor]:
    """A pickled table of tensors; nothing but tensors is unpickled. Raises ExchangeError otherwise."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as e:
        raise ExchangeError(f"{path}: no such file (give the directory that holds it)") from e
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as e:
        said = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ExchangeError(f"{path}: is no plain table of tensors: {said}") from e
    if not isinstance(held, dict) or not all(isinstance(v, Tensor) for v in held.values()):
        raise ExchangeError(f"{path}: is no plain table of tensors")
    return held


def take(path: Path, held: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of these names and shapes, float64. Raises ExchangeError that lists every misfit, spare ones too."""
    problems = [f"{name} is missing" for name in shapes if name not in held]
    problems += [f"{name} is not known" for name in held if name not in shapes]
    problems += [
        f"{name} has shape {tuple(held[name].shape)}, not {shape}"
        for name, shape in shapes.items()
        if name in held and tuple(held[name].shape) != shape
    ]
    problems += [f"{n} is not finite" for n in shapes if n in held and not bool(held[n].double().isfinite().all())]
    if problems:
        raise ExchangeError(f"{path}: {'; '.join(problems)}")
    return {name: held[name].double() for name in shapes}


def number(path: Path, table: Mapping[str, Any], key: str) -> int:
    """A positive whole number of a table. Raises ExchangeError otherwise."""
    value = table.get(key)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ExchangeError(f"{path}: {key} is {value!r}, not a positive whole number")
    return value


def matrix(path: Path, held: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """The shape of a matrix that the others' shapes follow from. Raises ExchangeError where it is none."""
    if name not in held or held[name].ndim != 2:
        here = ", ".join(sorted(held)) or "nothing"
        raise ExchangeError(f"{path}: has no matrix {name} (it holds {here})")
    rows, columns = held[name].shape
    return rows, columns


def text(table: Mapping[str, Any], *keys: str) -> str:
    """The first of these that is text, else ""."""
    return next((value for key in keys if isinstance(value := table.get(key), str)), "")


def count(table: Mapping[str, Any], *keys: str) -> int:
    """The first of these that is a whole number, else 0."""
    found: Collection[Any] = [table.get(key) for key in keys]
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), 0)
