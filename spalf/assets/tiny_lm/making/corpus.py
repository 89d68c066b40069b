"""Which files of the standard library are text to learn from, and which are held out."""

from __future__ import annotations

import ast
import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

logger = logging.getLogger("tiny_lm")

Split = Literal["train", "validation", "heldout"]

FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
SUITE_FOLDERS = frozenset({"test", "tests", "idlelib"})


def is_corpus_file(relative_path: str) -> bool:
    """Whether a file under the standard library's folder is standard library, the same on every machine.

    Left out are installed packages and the files that a build of the interpreter writes (`_sysconfigdata*`,
    `config-*`): they hold the paths of one machine.
    """
    parts = PurePosixPath(relative_path).parts
    generated = parts[-1].startswith("_sysconfigdata") or any(part.startswith("config-") for part in parts[:-1])
    return parts[-1].endswith(".py") and not generated and FOREIGN_FOLDERS.isdisjoint(parts)


def is_suite_file(relative_path: str) -> bool:
    """Whether a file belongs to a test suite or to IDLE: more text to learn from, but not what the quickstart reads."""
    return not SUITE_FOLDERS.isdisjoint(PurePosixPath(relative_path).parts)


def is_heldout(relative_path: str) -> bool:
    """Whether a file is in the held-out twentieth.

    It depends on the path alone ("json/decoder.py"), so everybody can apply it to the interpreter in front of him: no
    list of files has to be kept, and a file stays held out from one version of Python to the next.
    """
    digest = hashlib.blake2b(relative_path.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 20 == 0


def split_of(relative_path: str) -> Split:
    """The split of a file. The held-out twentieth of the test suites chooses the epoch and the hyper-parameters."""
    if not is_heldout(relative_path):
        return "train"
    return "validation" if is_suite_file(relative_path) else "heldout"


@dataclass(frozen=True)
class Document:
    """One source file: its path relative to the standard library, with slashes, and its text."""

    path: str
    text: str

    @property
    def split(self) -> Split:
        return split_of(self.path)

    @property
    def n_bytes(self) -> int:
        return len(self.text.encode())


def read_documents(stdlib: Path) -> list[Document]:
    """All corpus files that decode as UTF-8 and parse, in path order.

    What does not parse is there to be wrong: the inputs of lib2to3's and of the tokenizer's tests.
    """
    documents = []
    paths = sorted(path.relative_to(stdlib).as_posix() for path in stdlib.rglob("*.py"))
    for path in filter(is_corpus_file, paths):
        try:
            text = (stdlib / path).read_bytes().decode()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            logger.info("left out, does not parse: %s", path)
            continue
        if text.strip():
            documents.append(Document(path, text))
    return documents


def drop_near_copies(documents: Sequence[Document], threshold: float = 0.7) -> tuple[list[Document], list[str]]:
    """Drop every training file whose lines are nearly those of an evaluation file or of an earlier training file.

    The similarity is the Jaccard index of the sets of lines of at least 12 characters. Nearly all of what goes is
    `encodings`: tables of characters, of which many are copies of one another, across the border of the splits too.
    Evaluation files all stay.
    """
    ordered = sorted(documents, key=lambda document: document.split == "train")  # stable: evaluation files first
    owners: dict[str, list[int]] = {}
    lines: list[set[str]] = []
    kept: list[Document] = []
    dropped: list[str] = []
    for document in ordered:
        own = {line.strip() for line in document.text.splitlines() if len(line.strip()) >= 12}
        shared = Counter(other for line in own for other in owners.get(line, ()))
        similar = (count / len(own | lines[other]) for other, count in shared.items())
        if document.split == "train" and max(similar, default=0.0) >= threshold:
            dropped.append(document.path)
            continue
        for line in own:
            owners.setdefault(line, []).append(len(kept))
        kept.append(document)
        lines.append(own)
    return sorted(kept, key=lambda document: document.path), dropped
