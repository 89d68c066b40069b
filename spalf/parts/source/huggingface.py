"""`huggingface`: the residual stream of a transformers model, by a plain forward hook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from attrs import field
from attrs.validators import ge, in_
from torch import Tensor, nn

from spalf.core.protocols import Stream
from spalf.core.slots import source
from spalf.core.values import Facts
from spalf.errors import SourceError
from spalf.parts.source import checkpoint, embedded
from spalf.parts.source.contexts import Vocabulary
from spalf.parts.source.language import HookedModel, LanguageStream
from spalf.parts.source.options import LanguageOptions


class _Stop(Exception):
    """Raised by the hook: nothing behind it needs to run."""


def _stream_of(output: Any) -> Tensor:
    """A block returns the residual stream, or a tuple that begins with it (gpt_neo, bloom, falcon)."""
    x_STD: Tensor = output[0] if isinstance(output, tuple) else output
    return x_STD


@contextmanager
def _unpacked() -> Iterator[None]:
    """Inside, transformers takes it that positions run through each row, as they do where none are given.

    It would look for a row with several sequences in it (`find_packed_sequence_indices`), and wait for the device to
    answer: once a pass, in which the host could have queued training steps.
    """
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    before = getattr(masking_utils, name, None)
    if before is None:  # another release, which does not look
        yield
        return
    setattr(masking_utils, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, before)


class ResidualModel:
    """A transformers model, hooked after one decoder block."""

    def __init__(self, model: nn.Module, layer: int, compiled: bool = False) -> None:
        self._model: Any = model
        blocks = checkpoint.decoder_layers(model)
        self._block = blocks[layer]
        for block in blocks[: layer + 1] if compiled else ():
            # The forward alone: the hook that ends the pass stays outside of what is compiled.
            block.forward = torch.compile(block.forward)

    def activations(self, tokens_ST: Tensor, real_ST: Tensor | None) -> Tensor:
        """[S, T, D] after the block; what is behind it, final norm and unembedding included, does not run."""
        found: list[Tensor] = []

        def take(module: nn.Module, args: Any, output: Any) -> None:
            found.append(_stream_of(output))
            raise _Stop

        handle = self._block.register_forward_hook(take)
        try:
            with torch.inference_mode(), _unpacked():
                self._model(input_ids=tokens_ST, attention_mask=real_ST, use_cache=False)
        except _Stop:
            pass
        finally:
            handle.remove()
        return found[0]

    def logits(self, tokens_ST: Tensor, real_ST: Tensor | None, patch: Callable[[Tensor], Tensor] | None) -> Tensor:
        """[S, T, V]; the model is frozen, so a graph begins where `patch` brings one in."""

        def replace(module: nn.Module, args: Any, output: Any) -> Any:
            assert patch is not None
            x_STD = patch(_stream_of(output))
            return (x_STD, *output[1:]) if isinstance(output, tuple) else x_STD

        handle = self._block.register_forward_hook(replace) if patch is not None else None
        try:
            with _unpacked():
                logits_STV: Tensor = self._model(input_ids=tokens_ST, attention_mask=real_ST, use_cache=False).logits
        finally:
            if handle is not None:
                handle.remove()
        return logits_STV

    def unembedding(self) -> Tensor:
        """[V, D]."""
        weight_VD: Tensor = self._model.get_output_embeddings().weight
        return weight_VD


@source("huggingface")
class Huggingface(LanguageOptions):
    """The residual stream after decoder block `layer` of a transformers model, over text.

    Hook name `blocks.{layer}.hook_resid_post`. The model stops at the hook unless logits are wanted.
    """

    layer: int = field(validator=ge(0))
    """Decoder block, counted from 0; the hook is behind it."""
    attention: str = field(default="auto", validator=in_(("auto", "sdpa", "eager")))
    """How attention is computed: auto is what transformers chooses for the architecture, sdpa for nearly all."""

    compiled: bool = False
    """Blocks up to the hook run through torch.compile: fewer bytes move, last bits change, first passes take long."""

    def facts(self) -> Facts:
        """From config.json, or from d_model, n_vocab and n_layers as stated. Raises SourceError with a remedy."""
        costs = self.costs()
        checkpoint.same("d_model", self.d_model, costs.d_model)
        if costs.n_layers and self.layer >= costs.n_layers:
            raise SourceError(
                f'source.layer = {self.layer}, but model "{self.model}" has blocks 0 to {costs.n_layers - 1}'
            )
        hook = f"blocks.{self.layer}.hook_resid_post"
        return self.base_facts(costs, hook=hook, width=costs.d_model, layers=self.layer + 1)

    def open(self, seed: int, device: torch.device) -> Stream:
        """Reads a context of both splits, then loads the model. Raises SourceError where it or the text is unusable."""
        facts, vocabulary = self.prepare(self.facts, seed)
        model = self._model(vocabulary, seed, device)
        return LanguageStream(self, facts, model, vocabulary, seed=seed, device=device)

    def tokenizer(self) -> Any | None:
        """The model's tokenizer, or None where it comes without one."""
        return embedded.EmbeddedTokenizer() if self.model == embedded.NAME else super().tokenizer()

    def _model(self, vocabulary: Vocabulary, seed: int, device: torch.device) -> HookedModel:
        dtype = self.torch_dtype()
        if self.model == embedded.NAME and self.attention != "eager" and not self.compiled:
            return embedded.EmbeddedModel(self.layer, dtype, device)
        attention = None if self.attention == "auto" else self.attention
        with self.reading(vocabulary, seed):
            loaded = checkpoint.load_model(self.model, self.revision, dtype, device, attention)
        return ResidualModel(loaded, self.layer, self.compiled)
