"""Documents as token ids: written once, read back, joined and cut into contexts. Shapes: N contexts, T positions."""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .corpus import Split, drop_near_copies, is_suite_file, read_documents
from .files import write_json
from .tokenizer import load_tokenizer, train_tokenizer

logger = logging.getLogger("tiny_lm")

CONTEXT = 256
Tokens = npt.NDArray[np.uint16]


def prepare(stdlib: Path, work: Path, out: Path) -> None:
    """Corpus, tokenizer and token files: `out` gets the tokenizer, `work` the tokens and `corpus.json`."""
    documents, dropped = drop_near_copies(read_documents(stdlib))
    logger.info("%d files kept, %d near copies dropped from training", len(documents), len(dropped))
    train_tokenizer((document.text for document in documents if document.split == "train"), out)
    tokenizer = load_tokenizer(out)
    work.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {
        "source": f"the standard library of CPython {platform.python_version()}",
        "files": {},
        "near_copies_dropped_from_training": {
            "files": len(dropped),
            "in_encodings": sum(path.startswith("encodings/") for path in dropped),
            "elsewhere": [path for path in dropped if not path.startswith("encodings/")],
        },
    }
    splits: tuple[Split, ...] = ("train", "validation", "heldout")
    for split in splits:
        chosen = [document for document in documents if document.split == split]
        pieces = [tokenizer.encode(document.text, add_special_tokens=False) for document in chosen]
        for document, ids in zip(chosen, pieces, strict=True):
            if tokenizer.decode(ids) != document.text:
                raise RuntimeError(f"the tokenizer does not give {document.path} back")
        tokens = np.concatenate([np.array(ids, dtype=np.uint16) for ids in pieces])
        ends = np.cumsum([len(ids) for ids in pieces])
        suite = np.array([is_suite_file(document.path) for document in chosen])
        np.savez(work / f"{split}.npz", tokens=tokens, ends=ends, suite=suite)
        facts["files"][split] = {
            "files": len(chosen),
            "bytes": sum(document.n_bytes for document in chosen),
            "tokens": int(tokens.size),
            "tokens_of_test_suites": sum(len(ids) for ids, of_suite in zip(pieces, suite, strict=True) if of_suite),
        }
        if split == "heldout":
            facts["heldout_paths"] = [document.path for document in chosen]
        logger.info("%s: %s", split, facts["files"][split])
    write_json(work / "corpus.json", facts)


def read_tokens(work: Path, split: Split, library_weight: int = 1) -> list[Tokens]:
    """The documents of a split, each an array of ids; those of no test suite come `library_weight` times."""
    with np.load(work / f"{split}.npz") as file:
        documents = np.split(file["tokens"], file["ends"][:-1])
        library = [document for document, suite in zip(documents, file["suite"], strict=True) if not suite]
    return documents + library * (library_weight - 1)


def pack(documents: Sequence[Tokens], start: int = 0) -> Tokens:
    """Documents joined by id 0 and cut into contexts [N, T] from `start` on; the incomplete last context goes."""
    joint = np.zeros(1, dtype=np.uint16)
    stream = np.concatenate([piece for document in documents for piece in (document, joint)])[start:]
    return stream[: stream.size // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
