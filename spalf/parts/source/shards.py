"""Activations on disk: shards of rows and, written last, a manifest that says what they are.

    manifest.json  unembedding.safetensors  training-00000.safetensors ...  held_out-00000.safetensors ...

npy shards hold bfloat16 as uint16, which numpy lacks. Shapes: N rows of a shard, D d_model, V vocabulary.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from attrs import evolve, frozen
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from spalf.core.protocols import Stream
from spalf.core.values import Facts
from spalf.errors import SourceError

FORMAT = "spalf-activations"
VERSION = 1
DTYPES = ("float32", "bfloat16", "float16")
SPLITS = ("training", "held_out")
KEY = "activations"
ROWS_AT_ONCE = 8192


# ---------------------------------------------------------------------------------------------------------- writing
def write_shards(
    stream: Stream,
    out: Path,
    rows: int,
    *,
    held_out: int | None = None,
    format: str = "safetensors",
    dtype: str = "float32",
    shard_bytes: int = 1 << 28,
) -> Path:
    """Write `rows` training rows of a stream, and held-out ones (a twentieth as many, if None), to the directory `out`.

    All is written beside `out`, and renamed when whole or removed at a failure. Raises SourceError where `out` exists
    or an option is unknown.
    """
    if format not in ("safetensors", "npy") or dtype not in DTYPES:
        raise SourceError(f'shards cannot be "{format}" of "{dtype}" (safetensors or npy; {", ".join(DTYPES)})')
    if rows < 1:
        raise SourceError(f"{rows} rows to harvest (ask for at least one)")
    if out.exists():
        raise SourceError(f"{out} exists (name another directory, or remove it)")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_all(stream, partial, rows, held_out=held_out, format=format, dtype=dtype, shard_bytes=shard_bytes)
        partial.rename(out)
    except BaseException:  # an interrupt too: shards without a manifest are of no use to anyone
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def _write_all(
    stream: Stream, partial: Path, rows: int, *, held_out: int | None, format: str, dtype: str, shard_bytes: int
) -> None:
    """Shards, the unembedding and, last, the manifest in the directory `partial`."""
    facts = stream.facts
    as_dtype = cast(torch.dtype, getattr(torch, dtype))
    per_shard = max(1, shard_bytes // (facts.d_model * as_dtype.itemsize))
    wanted = {"training": rows, "held_out": -(-rows // 20) if held_out is None else held_out}
    listed: dict[str, list[dict[str, Any]]] = {}
    for split in SPLITS:
        listed[split] = []
        of_split = stream if split == "training" or not wanted[split] else stream.held_out()
        for start in range(0, wanted[split], per_shard):
            x_ND = _rows(of_split, min(per_shard, wanted[split] - start), as_dtype)
            path = partial / f"{split}-{start // per_shard:05d}.{format}"
            _write(path, x_ND, format)
            listed[split].append({"file": path.name, "rows": len(x_ND), "bytes": path.stat().st_size})
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "dtype": dtype,
        "facts": _facts_as_table(facts),
        "unembedding": _write_unembedding(stream, partial),
        **listed,
    }
    _durably(partial / "manifest.json", json.dumps(manifest, indent=1).encode())


def _rows(stream: Stream, n: int, dtype: torch.dtype) -> Tensor:
    """The next `n` rows, on the CPU; asked for in small batches, so that a device needs no room for a shard."""
    pieces = [stream.next(min(ROWS_AT_ONCE, n - i)).x_BD.to("cpu", dtype) for i in range(0, n, ROWS_AT_ONCE)]
    return torch.cat(pieces)


def _write(path: Path, x_ND: Tensor, format: str) -> None:
    if format == "safetensors":
        save_file({KEY: x_ND.contiguous()}, path)
    else:
        np.save(path, _as_numpy(x_ND))
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _as_numpy(x: Tensor) -> Any:
    return x.view(torch.int16).numpy().view("<u2") if x.dtype == torch.bfloat16 else x.numpy()


def _durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _write_unembedding(stream: Stream, directory: Path) -> str:
    """The unembedding and the token counts, so that features can be anchored without the model; "" without one."""
    if "unembedding" not in stream.facts.provides:
        return ""
    try:
        W_VD = stream.unembedding()
    except SourceError:  # a hook off the residual stream: its width is not the unembedding's
        return ""
    name = "unembedding.safetensors"
    tensors = {"unembedding": W_VD.contiguous().cpu(), "token_counts": stream.token_counts().cpu()}
    save_file(tensors, directory / name)
    return name


def _facts_as_table(facts: Facts) -> dict[str, Any]:
    names = ("d_model", "n_vocab", "hook", "model", "context", "n_parameters", "flops_to_hook", "flops_full")
    return {name: getattr(facts, name) for name in names}


# ---------------------------------------------------------------------------------------------------------- reading
@frozen(kw_only=True)
class Span:
    """Rows `start` to `stop` of one shard."""

    file: str
    start: int
    stop: int


@frozen(kw_only=True)
class Manifest:
    """What a directory of shards holds, as its manifest says."""

    directory: Path
    dtype: torch.dtype
    facts: Facts
    unembedding: str
    shards: dict[str, tuple[tuple[str, int, int], ...]]
    """(file, rows, bytes) of each split's shards."""

    def check_files(self) -> None:
        """Raises SourceError at the first shard that is missing, short or not what the manifest says."""
        for file, rows, size in (one for split in SPLITS for one in self.shards[split]):
            path = self.directory / file
            if not path.is_file():
                raise SourceError(f"{path} is missing (harvest again, or copy the whole directory)")
            if path.stat().st_size != size:
                found = path.stat().st_size
                raise SourceError(f"{path} has {found} bytes, its manifest says {size} (it was cut: copy it again)")
            shape = read_shape(path)
            if shape != (rows, self.facts.d_model):
                wanted = (rows, self.facts.d_model)
                raise SourceError(f"{path} holds {shape}, its manifest says {wanted} (harvest again)")

    def spans(self, held_out: bool, share: float) -> tuple[Span, ...]:
        """A split's rows; without held-out shards the last `share` of the training rows is held out."""
        if self.shards["held_out"]:
            chosen = self.shards["held_out" if held_out else "training"]
            return tuple(Span(file=f, start=0, stop=n) for f, n, _ in chosen)
        total = sum(n for _, n, _ in self.shards["training"])
        border = total - max(1, round(share * total))
        found, first = [], 0
        for file, n, _ in self.shards["training"]:
            cut = min(max(border - first, 0), n)
            start, stop = (cut, n) if held_out else (0, cut)
            if stop > start:
                found.append(Span(file=file, start=start, stop=stop))
            first += n
        return tuple(found)

    def rows(self, held_out: bool, share: float) -> int:
        """How many rows a split has."""
        return sum(span.stop - span.start for span in self.spans(held_out, share))

    def load_unembedding(self) -> dict[str, Tensor]:
        """`unembedding` [V, D] float32 and `token_counts` [V] int64."""
        try:
            return load_file(self.directory / self.unembedding)
        except (OSError, SafetensorError) as e:
            raise SourceError(f"{self.directory / self.unembedding} cannot be read: {e}") from e


def read_manifest(directory: Path) -> Manifest:
    """Raises SourceError where there is none, or one that this version cannot read. Opens no shard."""
    path = directory / "manifest.json"
    if not path.is_file():
        raise SourceError(f"{directory} holds no manifest.json (make shards with: spalf harvest RECIPE {directory})")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table["format"] != FORMAT or table["version"] != VERSION:
            raise SourceError(
                f'{path}: format "{table["format"]}" version {table["version"]}; '
                f'this spalf reads "{FORMAT}" version {VERSION}'
            )
        dtype = cast(torch.dtype, getattr(torch, DTYPES[DTYPES.index(table["dtype"])]))
        facts = Facts(**table["facts"])
        provides = {"activations", "unembedding"} if table["unembedding"] else {"activations"}
        return Manifest(
            directory=directory,
            dtype=dtype,
            facts=evolve(facts, provides=frozenset(provides), bytes_per_activation=facts.d_model * dtype.itemsize),
            unembedding=table["unembedding"],
            shards={s: tuple((d["file"], d["rows"], d["bytes"]) for d in table[s]) for s in SPLITS},
        )
    except (ValueError, KeyError, TypeError) as e:
        raise SourceError(f"{path} is damaged: {type(e).__name__} {e} (harvest again)") from e


def read_shape(path: Path) -> tuple[int, ...]:
    """Shape of a shard, from its header. Raises SourceError where it is not one."""
    try:
        if path.suffix == ".npy":
            return tuple(np.load(path, mmap_mode="r").shape)
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice(KEY).get_shape())
    except (OSError, ValueError, EOFError, SafetensorError) as e:
        raise SourceError(f"{path} is not a shard: {e} (harvest again)") from e


class Reader:
    """Reads rows of shards through a memory map; keeps the last one open."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._name = ""
        self._file: Any = None

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [stop - start, D] of the shard `name`, on the CPU in its own dtype."""
        path = self._manifest.directory / name
        is_npy = path.suffix == ".npy"
        if name != self._name:
            self._file = np.load(path, mmap_mode="r") if is_npy else safe_open(path, framework="pt")
            self._name = name
        if not is_npy:
            return cast(Tensor, self._file.get_slice(KEY)[start:stop])
        x_ND = np.array(self._file[start:stop])
        if self._manifest.dtype == torch.bfloat16:
            return torch.from_numpy(x_ND.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x_ND)
