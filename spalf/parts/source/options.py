"""The options that the two language-model sources share, and the facts that follow from them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast, dataclass_transform

import attrs
import torch
from attrs import field
from attrs.validators import ge, gt, in_, lt

from spalf.core.values import Facts
from spalf.errors import SourceError
from spalf.parts.source import checkpoint
from spalf.parts.source.blocks import HELD_OUT_ROWS, derive_seed
from spalf.parts.source.contexts import REMEMBERED, Contexts, Vocabulary
from spalf.parts.source.documents import Documents, Keep, exactly_one, is_held_out, open_documents

C = TypeVar("C")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def options(cls: type[C]) -> type[C]:
    """Frozen, keyword-only options that components inherit; carries no label."""
    return attrs.frozen(kw_only=True)(cls)


@options
class LanguageOptions:
    """Options of every source with a language model and text behind it."""

    model: str
    """Hub name, local directory, or "embedded": the small model of Python source that spalf carries."""
    revision: str = "main"
    """Branch, tag or commit of a hub model."""
    text: str = ""
    """Paths, globs or directories of text, jsonl, parquet or token files, with commas between; or "stdlib"."""
    dataset: str = ""
    """Hub name of a dataset, streamed; either this or `text`."""
    config: str = ""
    """The dataset's configuration, where it has several."""
    split: str = "train"
    """The dataset's split."""
    column: str = "text"
    """Where rows of a dataset, of jsonl or of parquet hold their text."""
    held_out: float = field(default=0.05, validator=[gt(0.0), lt(1.0)])
    """Share of documents kept from training, one in round(1 / held_out), chosen by a hash of the document."""
    held_out_from: str = ""
    """Another `text`, or another split of `dataset`, for held-out documents; then training sees all of its own."""
    repeat: bool = True
    """Start over when the text ends, in another order where the text is local."""
    context: int = field(default=128, validator=gt(1))
    """Tokens per sequence."""
    sequences: int = field(default=256, validator=gt(0))
    """Sequences per model pass."""
    pool: int = field(default=1024, validator=gt(0))
    """Contexts read ahead and shuffled before the model sees them; more where documents are few and long."""
    shuffle: int = field(default=1 << 20, validator=gt(0))
    """Activations per shuffled block, rounded down to whole contexts."""
    bos: bool = False
    """Begin each context with the tokenizer's BOS."""
    skip_first: bool = True
    """Leave position 0 out of training: it has no context, and models park attention there."""
    overlap: bool = True
    """On a GPU, harvest the next block on a stream of its own while the present one is used, some passes at a time;
    takes the memory of one more block and changes no number."""
    dtype: str = field(default="bfloat16", validator=in_(("bfloat16", "float16", "float32")))
    """Of the model and of the shuffled block; batches are float32."""
    d_model: int = field(default=0, validator=ge(0))
    """Stated width, for compiling without the model's config; checked against it when there is one. 0: not stated."""
    n_vocab: int = field(default=0, validator=ge(0))
    """Stated vocabulary, likewise."""
    n_layers: int = field(default=0, validator=ge(0))
    """Stated number of blocks, likewise; without it costs are unknown."""

    def torch_dtype(self) -> torch.dtype:
        return cast(torch.dtype, getattr(torch, self.dtype))

    def block_rows(self, held_out: bool = False) -> int:
        """`shuffle` rounded down to whole contexts, and at least one; at most 65,536 where held out."""
        per_context = self.context - self.skip_first
        rows = min(self.shuffle, HELD_OUT_ROWS) if held_out else self.shuffle
        return max(1, rows // per_context) * per_context

    def one_in(self) -> int:
        """One document in this many is held out."""
        return max(2, round(1 / self.held_out))

    def check_text(self) -> None:
        """What the options alone say about the text; opens no file. Raises SourceError at a contradiction."""
        exactly_one(self.text, self.dataset)
        if self.held_out_from and self.held_out_from == (self.split if self.dataset else self.text):
            raise SourceError(f'source.held_out_from = "{self.held_out_from}" is the training text (name another)')

    def costs(self) -> checkpoint.Costs:
        """From the config where there is one, else as stated. Raises SourceError where they differ or neither is."""
        self.check_text()
        config = checkpoint.read_config(self.model, self.revision)
        if config is not None:
            costs = checkpoint.costs_of_config(config)
            checkpoint.same("n_vocab", self.n_vocab, costs.n_vocab)
            checkpoint.same("n_layers", self.n_layers, costs.n_layers)
            if costs.max_context and self.context > costs.max_context:
                raise SourceError(
                    f'source.context = {self.context}, but model "{self.model}" has {costs.max_context} positions '
                    "(lower source.context)"
                )
            return costs
        if not (self.d_model and self.n_vocab):
            raise SourceError(
                f'model "{self.model}": neither a local directory nor in the hub cache, so its width is unknown '
                f"(state source.d_model and source.n_vocab, or fetch it first: hf download {self.model} config.json)"
            )
        return checkpoint.costs_as_stated(self.d_model, self.n_vocab, self.n_layers)

    def base_facts(self, costs: checkpoint.Costs, *, hook: str, width: int, layers: int) -> Facts:
        """Facts at a hook of `width` that the first `layers` blocks lead to."""
        to_hook, full = checkpoint.spread(layers, self.context, costs)
        return Facts(
            d_model=width,
            n_vocab=costs.n_vocab,
            provides=frozenset({"activations", "tokens", "logits", "unembedding"}),
            hook=hook,
            model=self.model,
            context=self.context,
            n_parameters=costs.n_parameters,
            flops_to_hook=to_hook,
            flops_full=full,
            bytes_per_activation=width * self.torch_dtype().itemsize,
            shuffle=self.block_rows(),
        )

    def tokenizer(self) -> Any | None:
        """The model's tokenizer, or None where it comes without one."""
        return checkpoint.load_tokenizer(self.model, self.revision)

    def vocabulary(self, size: int) -> Vocabulary:
        """Tokenizer and special ids. Raises SourceError where packing needs an id that the model does not have."""
        config = checkpoint.fetch_config(self.model, self.revision)
        tokenizer = self.tokenizer()
        end = getattr(tokenizer, "eos_token_id", None)
        if end is None:
            end = config.get_text_config().eos_token_id
            end = end[0] if isinstance(end, list) else end
        if end is None:
            raise SourceError(f'model "{self.model}" names no end-of-text token (set eos_token_id in its config.json)')
        begin = getattr(tokenizer, "bos_token_id", None) if self.bos else None
        if self.bos and begin is None:
            raise SourceError(f'model "{self.model}" has no BOS token (set source.bos = false)')
        return Vocabulary(tokenizer=tokenizer, size=size, end_of_text=end, begin=begin)

    def prepare(self, read_facts: Callable[[], Facts], seed: int) -> tuple[Facts, Vocabulary]:
        """All that can be wrong without the weights, before they are loaded. Raises SourceError."""
        vocabulary = self.vocabulary(read_facts().n_vocab)
        # The config is in the cache by now: a stated fact that it contradicts is refused here at the latest.
        facts = read_facts()
        self.readable(vocabulary, seed)
        return facts, vocabulary

    def documents(self, seed: int, end_of_text: int, held_out: bool) -> tuple[Documents, Keep]:
        """Documents in this seed's order, and which of them belong to the split."""
        other = self.held_out_from if held_out else ""
        documents = open_documents(
            text=(other or self.text) if self.text else "",
            dataset=self.dataset,
            config=self.config,
            split=other if other and self.dataset else self.split,
            column=self.column,
            seed=seed,
            end_of_text=end_of_text,
        )
        if self.held_out_from:
            return documents, lambda key: True
        one_in = self.one_in()
        return documents, lambda key: is_held_out(key, one_in) == held_out

    def contexts(self, vocabulary: Vocabulary, *, seed: int, held_out: bool, repeat: bool) -> Contexts:
        """A split's contexts from the start, in this seed's order."""
        documents, keep = self.documents(seed, vocabulary.end_of_text, held_out)
        return Contexts(documents, vocabulary, length=self.context, keep=keep, repeat=repeat)

    def reading(self, vocabulary: Vocabulary, seed: int) -> AbstractContextManager[None]:
        """A block in which the first pool of local text is tokenised on the side: to be spent on loading the model."""
        if not self.text or vocabulary.tokenizer is None:
            return nullcontext()
        documents, keep = self.documents(derive_seed(seed, "rows"), vocabulary.end_of_text, held_out=False)
        wanted = (d for d in documents.read(0, 0, 0) if keep(d.key))
        return vocabulary.encoding(wanted, min(self.pool * self.context, REMEMBERED))

    def readable(self, vocabulary: Vocabulary, seed: int) -> None:
        """Reads the first context of both splits, and little more. Raises SourceError where a split has none."""
        for held_out in (False, True):
            split = "held-out" if held_out else "training"
            try:
                contexts = self.contexts(vocabulary, seed=derive_seed(seed, "rows"), held_out=held_out, repeat=False)
                found = len(contexts.take(1))
            except SourceError as e:
                raise SourceError(f"{split} text: {e}") from e
            if not found:
                name = (held_out and self.held_out_from) or self.text or self.dataset
                raise SourceError(
                    f'{split} text "{name}" has fewer than source.context = {self.context} tokens '
                    "(lower source.context, or give it more text)"
                )
