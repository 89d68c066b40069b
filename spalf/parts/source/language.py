"""The stream that the two language-model sources share: a hooked model over text.

Shapes: B rows, S sequences, T positions, D width at the hook, V vocabulary, N rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from attrs import evolve
from torch import Tensor

from spalf.core.values import Batch, Facts, Raw, Sequences
from spalf.errors import SourceError
from spalf.parts.source.ahead import exact_products, lane_of, sent
from spalf.parts.source.blocks import Blocks, below, derive_seed, under
from spalf.parts.source.contexts import Contexts, Vocabulary
from spalf.parts.source.options import LanguageOptions
from spalf.parts.source.pool import Pool

COUNTED_TOKENS = 1 << 20
SEQUENCE_POOL = 4096
HELD_OUT_POOL = 1024
CPU_TOKENS = 1024
"""Tokens of one pass on a CPU."""


class HookedModel(Protocol):
    """A frozen language model with one hooked place. Ids and results are on the model's device."""

    def activations(self, tokens_ST: Tensor, real_ST: Tensor | None) -> Tensor:
        """[S, T, D] at the hook in the model's dtype; nothing behind the hook runs. Without graph."""
        ...

    def logits(self, tokens_ST: Tensor, real_ST: Tensor | None, patch: Callable[[Tensor], Tensor] | None) -> Tensor:
        """[S, T, V]; `patch` takes and gives [S, T, D] in the model's dtype."""
        ...

    def unembedding(self) -> Tensor:
        """[V, D of the residual stream]."""
        ...


class _Supply:
    """Rows of contexts, in the pool's order, by passes of `sequences` contexts."""

    def __init__(self, model: HookedModel, contexts: Pool, *, skip: int, sequences: int, device: torch.device) -> None:
        self._model, self._contexts = model, contexts
        self._skip, self._sequences, self._device = skip, sequences, device

    @property
    def stride(self) -> int:
        return self._sequences * (self._contexts.length - self._skip)

    def fill_(self, out_ND: Tensor) -> int:
        with exact_products(self._device):
            return self._fill_(out_ND)

    def _fill_(self, out_ND: Tensor) -> int:
        per_context = self._contexts.length - self._skip
        wanted = out_ND.shape[0] // per_context
        done = 0
        while done < wanted:
            asked = min(self._sequences, wanted - done)
            tokens_ST = self._contexts.take(asked)
            if len(tokens_ST):
                x_STD = activations_of(self._model, sent(tokens_ST, self._device), None)[:, self._skip :]
                start = done * per_context
                out_ND[start : start + x_STD.shape[0] * per_context].copy_(x_STD.flatten(0, 1))
            done += len(tokens_ST)
            if len(tokens_ST) < asked:
                break
        return done * per_context

    def ids(self, start: Mapping[str, Any], rows: int) -> Tensor:
        """The token id of each of the `rows` rows behind a cursor, int64 on the CPU; the own cursor stays."""
        here = self.state_dict()
        self.load_state_dict(start)
        tokens_ST = self._contexts.take(rows // (self._contexts.length - self._skip))
        self.load_state_dict(here)
        return tokens_ST[:, self._skip :].flatten()

    def state_dict(self) -> dict[str, Any]:
        return self._contexts.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._contexts.load_state_dict(state)


class LanguageStream:
    """The stream of a language model over text; training documents or, from `held_out`, the others."""

    def __init__(
        self,
        options: LanguageOptions,
        facts: Facts,
        model: HookedModel,
        vocabulary: Vocabulary,
        *,
        seed: int,
        device: torch.device,
        held_out: bool = False,
    ) -> None:
        self._options, self._model, self._vocabulary = options, model, vocabulary
        self._seed, self._device, self._is_held_out = seed, device, held_out
        rows = options.block_rows(held_out)
        self.facts = evolve(facts, shuffle=rows)
        self._contexts = self._pool("sequences", held_out)
        self._supply = _Supply(
            model,
            self._pool("rows", held_out),
            skip=int(options.skip_first),
            sequences=options.sequences,
            device=device,
        )
        self._blocks = Blocks(
            self._supply,
            rows=rows,
            d_model=facts.d_model,
            dtype=options.torch_dtype(),
            device=device,
            seed=derive_seed(seed, "held_out" if held_out else "training"),
            lane=lane_of(device, options.overlap and not held_out),
        )
        self._counts_V: Tensor | None = None

    def _pool(self, purpose: str, held_out: bool) -> Pool:
        """Whole contexts and held-out text are asked for in small numbers: they are not worth a long look ahead."""
        most = HELD_OUT_POOL if held_out else SEQUENCE_POOL if purpose == "sequences" else self._options.pool
        seed = derive_seed(self._seed, purpose, held_out)
        return Pool(self._open(purpose, held_out), seed=seed, size=min(most, self._options.pool))

    def _open(self, purpose: str, held_out: bool, repeat: bool | None = None) -> Contexts:
        repeat = self._options.repeat if repeat is None else repeat
        seed = derive_seed(self._seed, purpose)
        return self._options.contexts(self._vocabulary, seed=seed, held_out=held_out, repeat=repeat)

    def next(self, n: int) -> Batch:
        return Batch(x_BD=self._blocks.next(n))

    def sequences(self, n: int) -> Sequences:
        tokens_ST, document_ST = self._contexts.take_marked(n)
        if len(tokens_ST) < n:
            raise SourceError(f"the text ended: {len(tokens_ST)} of {n} contexts are left (set source.repeat = true)")
        tokens_ST, document_ST = sent(tokens_ST, self._device), sent(document_ST, self._device)
        real_ST = torch.ones_like(tokens_ST, dtype=torch.bool)
        return Sequences(tokens_ST=tokens_ST, real_ST=real_ST, document_ST=document_ST, is_padded=False)

    def activations(self, sequences: Sequences) -> Raw:
        x_STD = activations_of(self._model, sequences.tokens_ST, _mask(sequences))
        # A clone made outside inference mode may be saved for a backward pass.
        return Raw(x_STD.float() if x_STD.dtype != torch.float32 else x_STD.clone())

    def logits(self, sequences: Sequences, patch: Callable[[Raw], Raw] | None = None) -> Tensor:
        """[S, T, V] in the model's dtype: `engine.language` widens a block at a time, a copy of all might not fit."""

        def patched(x_STD: Tensor) -> Tensor:
            assert patch is not None
            return patch(Raw(x_STD.float())).to(x_STD.dtype)

        wanted = None if patch is None else patched
        return self._model.logits(sequences.tokens_ST, _mask(sequences), wanted)

    def block(self) -> tuple[Raw, Tensor]:
        """All rows of the present shuffled block [N, D], in the order of the text and in the block's dtype, and the
        token id of each [N]. Takes no pass of the model of its own, and moves no cursor.
        """
        rows_ND, start = self._blocks.present()
        return Raw(rows_ND), sent(self._supply.ids(start, len(rows_ND)), self._device)

    def unembedding(self) -> Raw:
        W_VD = self._model.unembedding()
        if W_VD.shape[1] != self.facts.d_model:
            raise SourceError(
                f"the unembedding has width {W_VD.shape[1]} and {self.facts.hook} has {self.facts.d_model}: "
                "no feature here can be anchored to a token (hook the residual stream)"
            )
        return Raw(W_VD.detach().float())

    def token_counts(self) -> Tensor:
        if self._counts_V is None:
            contexts = self._open("rows", False, repeat=False)
            tokens_ST = contexts.take(max(1, COUNTED_TOKENS // contexts.length))
            counts = torch.bincount(tokens_ST.flatten(), minlength=self.facts.n_vocab)
            self._counts_V = counts.to(self._device)
        return self._counts_V

    def text(self, tokens: Tensor) -> list[str]:
        return self._vocabulary.decode(tokens)

    def tokens(self, text: str) -> Tensor:
        """As a packed context begins: behind the BOS where there is one, else behind the end of another document."""
        return self._vocabulary.document(text).to(self._device)

    def truth(self) -> Raw:
        raise SourceError("a language model has no planted directions (use the synthetic source)")

    def held_out(self) -> LanguageStream:
        return LanguageStream(
            self._options,
            self.facts,
            self._model,
            self._vocabulary,
            seed=self._seed,
            device=self._device,
            held_out=True,
        )

    def state_dict(self) -> dict[str, Any]:
        return {**under("rows", self._blocks.state_dict()), **under("sequences", self._contexts.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._blocks.load_state_dict(below("rows", state))
        self._contexts.load_state_dict(below("sequences", state))


def activations_of(model: HookedModel, tokens_ST: Tensor, real_ST: Tensor | None) -> Tensor:
    """[S, T, D] at the hook; on a CPU a few contexts at a time, so that what a block makes stays small.

    Large intermediates are handed back to the system and fetched again, cleared page by page, in every operation.
    """
    few = max(1, CPU_TOKENS // tokens_ST.shape[1]) if tokens_ST.device.type == "cpu" else len(tokens_ST)
    if len(tokens_ST) <= few:
        return model.activations(tokens_ST, real_ST)
    starts = range(0, len(tokens_ST), few)
    masks = [None if real_ST is None else real_ST[i : i + few] for i in starts]
    return torch.cat([model.activations(tokens_ST[i : i + few], mask) for i, mask in zip(starts, masks, strict=True)])


def _mask(sequences: Sequences) -> Tensor | None:
    """None where all is text: attention is faster without a mask."""
    return None if not sequences.is_padded or bool(sequences.real_ST.all()) else sequences.real_ST
