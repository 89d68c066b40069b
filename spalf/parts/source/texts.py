"""Paired texts: read from a file, and put through a language model, one activation per text.

    {"a": "a cat sat", "b": "cats sat", "labels": {"plural": 1}}     JSON lines; labels may be left out
    a <tab> b <tab> plural                                           .tsv or .csv, a header first; columns may end at b

A label says what changed from a to b: 1 the concept was switched on, -1 off, 0 (or left out) unchanged.
Shapes: N pairs, S texts, T positions, D d_model, C concepts.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from spalf.core.protocols import Stream
from spalf.core.values import Sequences
from spalf.errors import SourceError
from spalf.parts.source.pairs import Pairs

SHOWN = 40
"""Characters of a text that a message repeats."""


@frozen(kw_only=True)
class TextPair:
    """Two texts, and by concept what changed from `a` to `b`."""

    a: str
    b: str
    labels: Mapping[str, int] = field(factory=dict)


@frozen(kw_only=True, eq=False)
class TextPairs:
    """Distinct texts in the order in which the file has them, and each pair's places among them."""

    texts: tuple[str, ...]
    a_N: Tensor
    b_N: Tensor
    labels_NC: Tensor | None
    concepts: tuple[str, ...]


# ---------------------------------------------------------------------------------------------------------- reading
def read_text_pairs(path: Path) -> TextPairs:
    """The pairs of a file. Raises SourceError that names the line where it is not as above."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix in (".tsv", ".csv"):
                pairs = list(_columns(path, file, "\t" if path.suffix == ".tsv" else ","))
            else:
                pairs = [_object(f"{path}, line {n}", line) for n, line in enumerate(file, 1) if line.strip()]
    except UnicodeDecodeError as e:
        raise SourceError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start})") from e
    except (OSError, csv.Error) as e:
        raise SourceError(f"{path} cannot be read: {e} (give a file of paired texts, or a directory of pairs)") from e
    if not pairs:
        raise SourceError(f'{path} holds no pairs (a line is {{"a": "one text", "b": "the other"}})')
    return _numbered(pairs)


def _object(place: str, line: str) -> TextPair:
    try:
        row = json.loads(line)
    except ValueError as e:
        raise SourceError(f"{place}: is no JSON: {e}") from e
    labels = row.get("labels", {}) if isinstance(row, dict) else None
    if not isinstance(labels, dict):
        raise SourceError(f'{place}: needs "a" and "b", and "labels", if any, as a table of concepts')
    return _pair(place, row.get("a"), row.get("b"), labels)


def _columns(path: Path, file: Any, delimiter: str) -> Iterator[TextPair]:
    rows = csv.reader(file, delimiter=delimiter, strict=True)
    header = next(rows, [])
    if header[:2] != ["a", "b"] or len(set(header)) < len(header) or "" in header:
        raise SourceError(f"{path}: the first line names the columns: a, b and, if any, one per concept")
    for row in rows:
        place = f"{path}, line {rows.line_num}"
        if len(row) != len(header):
            raise SourceError(f"{place}: has {len(row)} columns, the first line names {len(header)}")
        labels = {name: _number(text) for name, text in zip(header[2:], row[2:], strict=True)}
        yield _pair(place, row[0], row[1], labels)


def _number(text: str) -> int | str:
    return int(text) if text.strip() in ("-1", "0", "1") else text


def _pair(place: str, a: Any, b: Any, labels: Mapping[str, Any]) -> TextPair:
    if not all(isinstance(text, str) and text for text in (a, b)):
        raise SourceError(f'{place}: "a" and "b" have to be text, and not empty')
    bad = {name: value for name, value in labels.items() if type(value) is not int or abs(value) > 1}
    if bad:
        raise SourceError(f"{place}: labels are -1, 0 or 1 (1: switched on from a to b, -1: off), found {bad}")
    return TextPair(a=a, b=b, labels=labels)


def _numbered(pairs: Sequence[TextPair]) -> TextPairs:
    ids: dict[str, int] = {}
    places = [[ids.setdefault(text, len(ids)) for text in (pair.a, pair.b)] for pair in pairs]
    concepts = tuple(sorted({name for pair in pairs for name in pair.labels}))
    labels = [[pair.labels.get(name, 0) for name in concepts] for pair in pairs]
    at_N2 = torch.tensor(places, dtype=torch.int64)
    return TextPairs(
        texts=tuple(ids),
        a_N=at_N2[:, 0],
        b_N=at_N2[:, 1],
        labels_NC=torch.tensor(labels, dtype=torch.int8) if concepts else None,
        concepts=concepts,
    )


# ------------------------------------------------------------------------------------------------------- harvesting
def harvest_pairs(stream: Stream, found: TextPairs, *, position: str, sequences: int) -> Pairs:
    """The activations of paired texts, each distinct text read once, `sequences` of one length at a time.

    `position` is "last", the text's last token, or "mean", over its tokens; the id that a document begins behind is no
    part of it. Raises SourceError at a text without a token or longer than the stream's context.
    """
    tokens = [stream.tokens(text) for text in found.texts]
    for text, ids_T in zip(found.texts, tokens, strict=True):
        _check_length(text, len(ids_T), stream.facts.context)
    x_SD = torch.empty(len(tokens), stream.facts.d_model)
    by_length = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    # Of one length: then nothing is padded, and what a text gives does not depend on the texts beside it.
    for _, equal in groupby(by_length, key=lambda i: len(tokens[i])):
        places = list(equal)
        for begin in range(0, len(places), sequences):
            part = places[begin : begin + sequences]
            tokens_ST = torch.stack([tokens[i] for i in part])
            real_ST = torch.ones_like(tokens_ST, dtype=torch.bool)
            x_STD = stream.activations(Sequences(tokens_ST=tokens_ST, real_ST=real_ST))
            x_SD[part] = (x_STD[:, -1] if position == "last" else x_STD[:, 1:].mean(1)).float().cpu()
    return Pairs(
        a_ND=x_SD[found.a_N],
        b_ND=x_SD[found.b_N],
        labels_NC=found.labels_NC,
        concepts=found.concepts,
        sentence_a_N=found.a_N,
        sentence_b_N=found.b_N,
        facts=stream.facts,
    )


def _check_length(text: str, length: int, context: int) -> None:
    shown = repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")
    if length < 2:
        raise SourceError(f"the text {shown} has no token (take its pair out of the file)")
    if context and length > context:
        raise SourceError(
            f"the text {shown} has {length - 1} tokens, {context - 1} fit into a context (raise source.of.context)"
        )
