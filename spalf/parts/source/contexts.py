"""From documents to contexts: tokenise, join with an end-of-text token, cut to equal lengths; no padding.

Shapes: S contexts, T positions.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from attrs import field, frozen
from torch import Tensor

from spalf.errors import SourceError
from spalf.parts.source.documents import Document, Documents, Ids, Keep, document_id

BATCH_DOCUMENTS = 64
BATCH_CHARACTERS = 1 << 20
REMEMBERED = 1 << 22
"""Token ids that a vocabulary remembers: 16 MiB of them."""


@frozen(kw_only=True, eq=False)
class Vocabulary:
    """A tokenizer and the ids that packing needs. `tokenizer` is None where only token files are read.

    Texts that were encoded are remembered, up to REMEMBERED ids in all: the two orders in which a run reads its text,
    and every later epoch, are of the same documents.
    """

    tokenizer: Any
    size: int
    end_of_text: int
    begin: int | None
    """Put before each context; None: nothing is."""
    _memory: dict[bytes, npt.NDArray[np.int32]] = field(factory=dict, init=False, repr=False)

    def encode(self, documents: Sequence[Document]) -> list[Ids]:
        """Token ids of each document, without special tokens. Raises SourceError at an id the model does not know."""
        encoded = iter(self._encode_texts([d.content for d in documents if isinstance(d.content, str)]))
        out = []
        for document in documents:
            ids = next(encoded) if isinstance(document.content, str) else document.content
            if len(ids) and int(ids.max()) >= self.size:
                raise SourceError(
                    f"token id {int(ids.max())} in the text, but the model knows {self.size} "
                    "(the text was tokenised for another model)"
                )
            out.append(ids)
        return out

    def _encode_texts(self, texts: Sequence[str]) -> list[Ids]:
        """Of texts that are not remembered, all at once."""
        if texts and self.tokenizer is None:
            raise SourceError("the model has no tokenizer (put its files beside the config, or read token files)")
        keys = [hashlib.blake2b(t.encode("utf-8", "surrogatepass"), digest_size=16).digest() for t in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._memory}
        fresh = dict(zip(new, _tokenise(self.tokenizer, list(new.values())) if new else (), strict=True))
        room = REMEMBERED - sum(map(len, self._memory.values()))
        for key, ids in fresh.items():
            if len(ids) <= room:
                self._memory[key] = ids.astype(np.int32)
                room -= len(ids)
        return [fresh[key] if key in fresh else self._memory[key].astype(np.int64) for key in keys]

    @contextmanager
    def encoding(self, documents: Iterable[Document], tokens: int) -> Iterator[None]:
        """Inside the block, a thread of its own encodes documents, in order, until `tokens` ids are remembered.

        The tokenizer works without the interpreter's lock, so it costs little to whoever imports and loads meanwhile.
        What is not done by the end of the block is left; the block may not use the vocabulary itself.
        """
        is_over = threading.Event()

        def work() -> None:
            found = 0
            try:
                for batch in _batches(iter(documents)):
                    found += sum(map(len, self.encode(batch)))
                    if found >= tokens or is_over.is_set():
                        return
            except Exception:
                return  # whoever reads the text meets it again, and tells

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def document(self, text: str) -> Tensor:
        """Ids [T] of one text behind the id that it would begin behind in a context, on the CPU."""
        if self.tokenizer is None:
            raise SourceError("the model has no tokenizer (put its files beside the config)")
        [ids] = self.encode([Document(part=0, index=0, key=b"", content=text)])
        first = self.end_of_text if self.begin is None else self.begin
        return torch.from_numpy(np.concatenate([np.array([first], dtype=np.int64), ids]))

    def decode(self, tokens: Tensor) -> list[str]:
        """Each id of a 1-d tensor as readable text; an id that the tokenizer does not know as `<id>`."""
        ids = tokens.tolist()
        if self.tokenizer is None:
            return [f"<{i}>" for i in ids]
        known = len(self.tokenizer)
        return [self.tokenizer.decode([i]) if 0 <= i < known else f"<{i}>" for i in ids]


def _tokenise(tokenizer: Any, texts: list[str]) -> list[Ids]:
    """Ids of each text. Past a tokenizer that only hands texts on to its library: that has a call without offsets."""
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    if not _hands_on(tokenizer):
        return [np.asarray(ids, dtype=np.int64) for ids in tokenizer(texts, **options)["input_ids"]]
    tokenizer([""], **options)  # sets the library up as every call does, whatever a caller before has left there
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.asarray(one.ids, dtype=np.int64) for one in encoded]


def _hands_on(tokenizer: Any) -> bool:
    """Whether it has the `tokenizers` library behind it, and changes nothing of how transformers calls that."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return False
    from transformers import PreTrainedTokenizerFast as Plain

    names = ("__call__", "_encode_plus", "_batch_encode_plus")
    return isinstance(tokenizer, Plain) and all(
        getattr(type(tokenizer), name, None) is getattr(Plain, name, None) for name in names
    )


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Groups for the tokenizer, which is faster on many at once; bounded in documents and in characters.

    They double from one document on: whoever wants a first context alone does not wait for a whole group.
    """
    batch: list[Document] = []
    size, most = 0, 1
    for document in documents:
        batch.append(document)
        size += len(document.content)
        if len(batch) == most or size >= BATCH_CHARACTERS:
            yield batch
            batch, size, most = [], 0, min(2 * most, BATCH_DOCUMENTS)
    if batch:
        yield batch


class Contexts:
    """Equal contexts of the documents that `keep` wants, by a cursor (epoch, part, index, token).

    The cursor names the document in which the next context starts and how many of its tokens are used.
    """

    def __init__(self, documents: Documents, vocabulary: Vocabulary, *, length: int, keep: Keep, repeat: bool) -> None:
        self._documents, self._vocabulary, self._keep = documents, vocabulary, keep
        self._repeat = repeat
        self._begin = vocabulary.begin
        self._text = length - (self._begin is not None)
        self.length = length
        self._epoch = self._part = self._index = self._token = self._skip = 0
        self._rest: Ids = np.empty(0, dtype=np.int64)
        self._document = 0
        self._stream = self._read(0, 0, 0)

    def take(self, n: int, *, one_epoch: bool = False) -> Tensor:
        """The tokens of `take_marked`."""
        return self.take_marked(n, one_epoch=one_epoch)[0]

    def take_marked(self, n: int, *, one_epoch: bool = False) -> tuple[Tensor, Tensor]:
        """The next `n` contexts and the id of each token's document, int64 [n, T] on the CPU.

        Fewer only at the end of a text that does not repeat; with `one_epoch` also where the text starts over: the
        context that reaches into the next epoch is the last one, and there is one at least.
        """
        pieces: list[Ids] = []
        documents: list[Ids] = []
        missing = n * self._text if self._advance() else 0
        epoch = self._epoch
        while missing > 0 and self._advance():
            if one_epoch and self._epoch > epoch:
                missing %= self._text
            piece = self._rest[:missing]
            pieces.append(piece)
            documents.append(np.full(len(piece), self._document, dtype=np.int64))
            missing -= len(piece)
            self._token += len(piece)
            self._rest = self._rest[len(piece) :]
        rows_ST, document_ST = self._cut(pieces), self._cut(documents)
        if self._begin is not None:
            rows_ST = torch.cat([torch.full((len(rows_ST), 1), self._begin), rows_ST], dim=1)
            document_ST = torch.cat([document_ST[:, :1], document_ST], dim=1)
        return rows_ST, document_ST

    def _cut(self, pieces: list[Ids]) -> Tensor:
        """Pieces of text end to end, in rows of a context's length; what is left over is dropped."""
        flat = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)
        whole = len(flat) // self._text
        return torch.from_numpy(flat[: whole * self._text].reshape(whole, self._text))

    def _advance(self) -> bool:
        """Make sure that some tokens are left to use; False at the end."""
        while len(self._rest) == 0:
            found = next(self._stream, None)
            if found is None:
                return False
            self._epoch, self._part, self._index, self._document, self._rest = found
            self._rest = self._rest[self._skip :]
            self._token, self._skip = self._skip, 0
        return True

    def _read(self, epoch: int, part: int, index: int) -> Iterator[tuple[int, int, int, int, Ids]]:
        """Place, id and tokens of each document from a place on, each ended by the end-of-text token."""
        end = np.array([self._vocabulary.end_of_text], dtype=np.int64)
        while True:
            any_text = part > 0 or index > 0
            wanted = (d for d in self._documents.read(epoch, part, index) if self._keep(d.key))
            for batch in _batches(wanted):
                for document, ids in zip(batch, self._vocabulary.encode(batch), strict=True):
                    if len(ids):
                        any_text = True
                        marked = document_id(document.key)
                        yield epoch, document.part, document.index, marked, np.concatenate([ids, end])
            if not any_text:
                raise SourceError(
                    f'text "{self._documents.name}" has no document in this split '
                    "(give it more documents, change held_out, or name held_out_from; "
                    "a single document cannot be split: set held_out_from, or split the file)"
                )
            if not self._repeat:
                return
            epoch, part, index = epoch + 1, 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "part": self._part, "index": self._index, "token": self._token}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch, self._part, self._index, self._token = (int(state[k]) for k in ("epoch", "part", "index", "token"))
        self._skip = self._token
        self._rest = np.empty(0, dtype=np.int64)
        self._stream = self._read(self._epoch, self._part, self._index)
