"""Where text comes from: the standard library, local files, token files or a hub dataset, one document at a time.

A place is (epoch, part, index): a pass over the text, a file of it in that pass's order, a document of that file.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from attrs import frozen

from spalf.errors import SourceError
from spalf.parts.source.blocks import generator

Ids = npt.NDArray[np.int64]
Keep = Callable[[bytes], bool]


@frozen(kw_only=True, eq=False)
class Document:
    """Text, or token ids of a token file. `key` is what decides whether it is held out."""

    part: int
    index: int
    key: bytes
    content: str | Ids


class Documents(Protocol):
    """Documents in an order that is a function of (options, seed, epoch)."""

    @property
    def name(self) -> str: ...

    def read(self, epoch: int, part: int, index: int) -> Iterator[Document]:
        """One pass from a place on."""
        ...


def is_held_out(key: bytes, one_in: int) -> bool:
    """Whether a document is in the held-out one of `one_in`; depends on its key alone."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % one_in == 0


def document_id(key: bytes) -> int:
    """The same number for a document wherever it is met: in any epoch, order or process. Fits an int64.

    Salted, so that its remainders are spread evenly among held-out documents too, which are those of one remainder.
    """
    return int.from_bytes(hashlib.blake2b(key, digest_size=8, salt=b"document").digest(), "big") >> 1


# --------------------------------------------------------------------------------------------- the standard library
FOREIGN = frozenset({"site-packages", "dist-packages", "__pycache__"})
SUITES = frozenset({"test", "tests", "idle_test"})
GENERATED = frozenset({"encodings", "pydoc_data"})


def is_stdlib_file(relative: str) -> bool:
    """Whether `relative` ("json/decoder.py") is plain library source, the same on every machine.

    Left out are installed packages, test suites, what a build writes (`_sysconfigdata*`, `config-*`), and two folders
    that scripts generate: character tables and a manual's prose are a sixth of the text and none of it Python to learn.
    """
    parts = PurePosixPath(relative).parts
    built = parts[-1].startswith("_sysconfigdata") or any(p.startswith("config-") for p in parts[:-1])
    return not built and (FOREIGN | SUITES | GENERATED).isdisjoint(parts)


@functools.cache
def _stdlib_files(root: Path) -> tuple[str, ...]:
    """Sorted relative paths; looked up once a process, and not below installed packages, which may be many."""
    found = []
    for folder, below, names in os.walk(root):
        below[:] = [b for b in below if b not in FOREIGN]
        here = PurePosixPath(Path(folder).relative_to(root).as_posix())
        found += [str(here / name) for name in names if name.endswith(".py")]
    return tuple(sorted(f for f in found if is_stdlib_file(f)))


@frozen(kw_only=True)
class StandardLibrary:
    """The running interpreter's standard library: one document a file, UTF-8 only, keyed by its relative path."""

    seed: int
    root: Path
    name: str = "stdlib"

    def read(self, epoch: int, part: int, index: int) -> Iterator[Document]:
        files = _stdlib_files(self.root)
        order = torch.randperm(len(files), generator=generator("files", self.seed, epoch)).tolist()
        for place in range(part, len(files)):
            relative = files[order[place]]
            try:
                text = (self.root / relative).read_bytes().decode()
            except UnicodeDecodeError:
                continue
            yield Document(part=place, index=0, key=relative.encode(), content=text)


# ------------------------------------------------------------------------------------------------------ local files
def _lines(path: Path, start: int, column: str) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number < start or not line.strip():
                continue
            try:
                yield number, json.loads(line)[column]
            except (json.JSONDecodeError, KeyError, TypeError) as e:
                hint = f'set column to the one that holds the text; it is "{column}"'
                raise SourceError(f"{path}, line {number + 1}: no text ({e}); {hint}") from e


def _parquet(path: Path, start: int, column: str) -> Iterator[tuple[int, str]]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    if column not in file.schema_arrow.names:
        raise SourceError(f'{path} has no column "{column}" (set column to one of {file.schema_arrow.names})')
    number = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if number + rows > start:
            for row, text in enumerate(file.read_row_group(group, columns=[column])[column].to_pylist(), number):
                if row >= start and text is not None:
                    yield row, text
        number += rows


def _whole(path: Path, start: int) -> Iterator[tuple[int, str]]:
    if start == 0:
        yield 0, path.read_text(encoding="utf-8")


def _tokens(path: Path, start: int, end_of_text: int, draw: torch.Generator) -> Iterator[tuple[int, Ids]]:
    """Documents of a little-endian uint16 file, which `end_of_text` separates, in an order of their own."""
    ids = np.memmap(path, dtype="<u2", mode="r")
    ends = np.append(np.flatnonzero(ids == end_of_text), len(ids))
    starts = np.append(0, ends[:-1] + 1)
    order = torch.randperm(len(ends), generator=draw).tolist()
    for index in range(start, len(ends)):
        one = order[index]
        yield index, ids[starts[one] : ends[one]].astype(np.int64)


@frozen(kw_only=True)
class Files:
    """Text files (one document each), jsonl and parquet (one a row), token files (.u16, .bin); keyed by content."""

    paths: tuple[Path, ...]
    seed: int
    column: str
    end_of_text: int
    name: str

    def read(self, epoch: int, part: int, index: int) -> Iterator[Document]:
        order = torch.randperm(len(self.paths), generator=generator("files", self.seed, epoch)).tolist()
        for place in range(part, len(self.paths)):
            path = self.paths[order[place]]
            for number, content in self._open(path, epoch, index if place == part else 0):
                if not isinstance(content, str | np.ndarray):
                    kind = type(content).__name__
                    raise SourceError(f'{path}: document {number} of column "{self.column}" is {kind}, not text')
                key = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content.tobytes()
                yield Document(part=place, index=number, key=key, content=content)

    def _open(self, path: Path, epoch: int, start: int) -> Iterator[tuple[int, Any]]:
        try:
            if path.suffix in (".jsonl", ".ndjson"):
                yield from _lines(path, start, self.column)
            elif path.suffix == ".parquet":
                yield from _parquet(path, start, self.column)
            elif path.suffix in (".u16", ".bin"):
                draw = generator("tokens", self.seed, epoch, path.name)
                yield from _tokens(path, start, self.end_of_text, draw)
            else:
                yield from _whole(path, start)
        except UnicodeDecodeError as e:
            raise SourceError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start})") from e
        except (OSError, ValueError) as e:  # an unreadable file, a token file of odd or no length, a broken parquet
            raise SourceError(f"{path} cannot be read: {e}") from e


def find_files(pattern: str) -> tuple[Path, ...]:
    """Files of paths, globs and directories with commas between, sorted. Raises SourceError where one matches none."""
    found: set[Path] = set()
    for entry in (e.strip() for e in pattern.split(",") if e.strip()):
        path = Path(entry).expanduser()
        if path.is_dir():
            hits = [p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")]
        else:
            hits = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        if not hits:
            raise SourceError(f'text "{entry}" matches no file (give a path, a glob, a directory or "stdlib")')
        found.update(hits)
    return tuple(sorted(found))


# ------------------------------------------------------------------------------------------------------ hub datasets
@frozen(kw_only=True)
class Hub:
    """A dataset of the hub or of a local directory, streamed in its own order through `datasets`; keyed by content."""

    dataset: str
    config: str
    split: str
    column: str

    @property
    def name(self) -> str:
        return f"{self.dataset} ({self.split})"

    def read(self, epoch: int, part: int, index: int) -> Iterator[Document]:
        if part > 0:
            return
        import datasets

        try:
            rows = datasets.load_dataset(self.dataset, self.config or None, split=self.split, streaming=True)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as e:
            raise SourceError(
                f'dataset "{self.dataset}", split "{self.split}", cannot be opened: {e} '
                "(check dataset, config and split; without a network use text = a local path)"
            ) from e
        for number, row in self._rows(rows.skip(index) if index else rows, index):
            text = row.get(self.column)
            if not isinstance(text, str):
                raise SourceError(
                    f'dataset "{self.dataset}", row {number}: column "{self.column}" holds no text '
                    f"(set column to one of {sorted(row)})"
                )
            yield Document(part=0, index=number, key=text.encode("utf-8", "surrogatepass"), content=text)

    def _rows(self, rows: Iterable[dict[str, Any]], start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Numbered rows. Raises SourceError where the next one cannot be fetched."""
        iterator = iter(rows)
        for number in itertools.count(start):
            try:
                row = next(iterator)
            except StopIteration:
                return
            except Exception as e:  # requests, httpx, aiohttp, fsspec and pyarrow share no class below this one
                raise SourceError(
                    f'dataset "{self.dataset}", split "{self.split}", row {number} cannot be read: '
                    f"{type(e).__name__}: {e} (when the network is back, resume the run from its last checkpoint: "
                    "spalf resume RUN)"
                ) from e
            yield number, row


def exactly_one(text: str, dataset: str) -> None:
    """Raises SourceError unless exactly one of text and dataset is set."""
    if bool(text) == bool(dataset):
        both = "both are set" if text else "neither is set"
        raise SourceError(f"a source reads either text or a dataset, and {both} (set text or dataset)")


def open_documents(
    *, text: str, dataset: str, config: str, split: str, column: str, seed: int, end_of_text: int
) -> Documents:
    """The documents that a source's options name. Raises SourceError unless exactly one of text and dataset is set."""
    exactly_one(text, dataset)
    if dataset:
        return Hub(dataset=dataset, config=config, split=split, column=column)
    if text == "stdlib":
        return StandardLibrary(seed=seed, root=Path(sysconfig.get_path("stdlib")))
    return Files(paths=find_files(text), seed=seed, column=column, end_of_text=end_of_text, name=text)
