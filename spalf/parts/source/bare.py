"""What a stream without a language model answers when it is asked for one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from torch import Tensor

from spalf.core.values import Raw, Sequences
from spalf.errors import SourceError


class Bare:
    """The half of `Stream` that needs a language model or planted features; every method raises SourceError."""

    source: str
    """The use that a recipe names, for messages."""

    def _lacks(self, what: str, remedy: str) -> NoReturn:
        raise SourceError(f'source "{self.source}" has no {what} ({remedy})')

    def sequences(self, n: int) -> Sequences:
        self._lacks("text", "use huggingface or transformer_lens")

    def activations(self, sequences: Sequences) -> Raw:
        self._lacks("language model", "use huggingface or transformer_lens")

    def logits(self, sequences: Sequences, patch: Callable[[Raw], Raw] | None = None) -> Tensor:
        self._lacks("language model", "use huggingface or transformer_lens")

    def unembedding(self) -> Raw:
        self._lacks("unembedding", "use huggingface or transformer_lens")

    def token_counts(self) -> Tensor:
        self._lacks("text", "use huggingface or transformer_lens")

    def text(self, tokens: Tensor) -> list[str]:
        self._lacks("tokenizer", "use huggingface or transformer_lens")

    def tokens(self, text: str) -> Tensor:
        self._lacks("tokenizer", "use huggingface or transformer_lens")

    def truth(self) -> Raw:
        self._lacks("planted directions", "use synthetic")
