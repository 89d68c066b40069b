"""Rows to study: scikit-learn's digits, a local MNIST directory, or activations of a language model.

Shape letters: N rows, D dimensions.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from spalf import RunError, SourceError, compile_recipe

ROWS = 1138
"""Training rows of the whole study: 45 % of them are as many as there are features, 512."""
IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
IDX_FILES = {"train": ("train-images-idx3-ubyte", "train-images.idx3-ubyte"), "test": ("t10k-images-idx3-ubyte",)}
EMBEDDED = (
    'source={ use = "huggingface", model = "embedded", text = "stdlib", layer = 2, context = 128, sequences = 32, '
    'pool = 512, shuffle = 65536, dtype = "float32" }'
)
LANGUAGE = ("name=study", EMBEDDED, 'strata=["free"]', 'phases=["calibrate"]', "knobs.F=512")


@frozen(kw_only=True, eq=False)
class Rows:
    """Training rows [N, D] and test rows, float32, and where they come from."""

    name: str
    train_ND: Tensor
    test_ND: Tensor


def digits(rows: int = ROWS, seed: int = 0) -> Rows:
    """`rows` of the 1,797 images of 8 x 8 that scikit-learn carries, and the others for testing.

    Raises RunError without scikit-learn, or where `rows` leave nothing to test on.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as e:
        raise RunError("pam study: needs scikit-learn for its digits (pip install 'spalf-pam[study]')") from e
    x_ND = torch.from_numpy(load_digits().data.astype(np.float32)) / 16.0
    if rows >= len(x_ND):
        raise RunError(f"pam study: {rows} rows leave none of the {len(x_ND)} digits to test on (lower --rows)")
    order = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(seed))
    return Rows(name="digits", train_ND=x_ND[order[:rows]], test_ND=x_ND[order[rows:]])


def mnist(directory: Path, rows: int = ROWS, test_rows: int = 2048, seed: int = 0) -> Rows:
    """Of a directory of IDX files, gzipped or not, `rows` random training images and the first test images, in [0, 1].

    Raises SourceError where a file is missing, is no IDX file or holds fewer rows.
    """
    train_ND, test_ND = (_images(directory, part) for part in ("train", "test"))
    if len(train_ND) < rows:
        raise SourceError(f"{directory}: has {len(train_ND)} training images where {rows} are asked for (lower --rows)")
    order = torch.randperm(len(train_ND), generator=torch.Generator().manual_seed(seed))
    return Rows(name="mnist", train_ND=train_ND[order[:rows]], test_ND=test_ND[:test_rows])


def language(rows: int = ROWS, test_rows: int = 2048, seed: int = 0) -> Rows:
    """Activations after the middle block of the embedded model; test rows are of documents that training never sees."""
    source = compile_recipe("spalf", LANGUAGE).recipe.source
    stream = source.open(seed, torch.device("cpu"))
    return Rows(name="language", train_ND=stream.next(rows).x_BD, test_ND=stream.held_out().next(test_rows).x_BD)


def read_idx(path: Path) -> Tensor:
    """The array of one IDX file as float32 in its own units. Raises SourceError where it is none."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError) as e:
        raise SourceError(f"{path}: cannot be read: {e}") from e
    kind, axes = (content[2], content[3]) if len(content) >= 4 else (0, 0)
    if content[:2] != b"\0\0" or kind not in IDX_TYPES or not axes:
        raise SourceError(f"{path}: is no IDX file (its first bytes are {content[:4].hex() or 'missing'})")
    start = 4 + 4 * axes
    shape = np.frombuffer(content[4:start], dtype=">u4")
    held = np.frombuffer(content[start:], dtype=np.uint8)
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(IDX_TYPES[kind]).itemsize
    if len(shape) != axes or len(held) != size:
        raise SourceError(f"{path}: holds {len(held)} bytes where its header asks for {size} (fetch it again)")
    array = held.view(IDX_TYPES[kind]).reshape([int(n) for n in shape])
    return torch.from_numpy(array.astype(np.float32))


def _images(directory: Path, part: str) -> Tensor:
    names: Sequence[str] = [f"{stem}{end}" for stem in IDX_FILES[part] for end in ("", ".gz")]
    found = next((directory / name for name in names if (directory / name).is_file()), None)
    if found is None:
        raise SourceError(f"{directory}: has none of {', '.join(names)} (give a directory with MNIST's IDX files)")
    images = read_idx(found)
    if images.ndim != 3:
        raise SourceError(f"{found}: holds an array of {images.ndim} axes, not images (give MNIST's image files)")
    return images.reshape(len(images), -1) / 255.0
