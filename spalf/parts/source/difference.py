"""`difference`: what changes in a model's activation from one text to another, z_b - z_a.

Shapes: N pairs, B rows, D d_model, C concepts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from attrs import evolve, field, frozen
from attrs.validators import gt, lt
from torch import Tensor

from spalf.core.protocols import Source, Stream
from spalf.core.slots import source
from spalf.core.values import Batch, Facts, Raw
from spalf.errors import SourceError
from spalf.parts.source.ahead import sent
from spalf.parts.source.bare import Bare
from spalf.parts.source.blocks import derive_seed, generator
from spalf.parts.source.pairs import FILE, Pairs, read_facts, read_pairs
from spalf.parts.source.texts import harvest_pairs, read_text_pairs


@source("difference")
class Difference:
    """Differences z_b - z_a of paired texts, for dictionaries of shifts (arXiv 2502.12179).

    `pairs` is a file of texts (JSON lines `{"a": ..., "b": ..., "labels": {concept: -1, 0 or 1}}`, or a .tsv or .csv
    with columns a, b and one per concept), which the source `of` reads and turns into activations when it is opened;
    or a directory with a pairs.safetensors, whose activations were harvested before.

    The held-out part has no sentence in common with training: pairs that share one, directly or by way of others, stay
    together, and the split is the same for every seed. Where pairs are labelled, the facts provide "labels": a batch's
    `truth_BN` holds the label of each row and concept (1 switched on, -1 off, 0 unchanged), in training and held out,
    and the stream's `concepts` names the columns.
    """

    pairs: str
    """A file of paired texts, or a directory with a pairs.safetensors."""
    of: Source | None = None
    """The language source that reads the texts; a directory needs none, and one lends it its unembedding."""
    position: Literal["last", "mean"] = "last"
    """A text's activation: of its last token, or the mean over its tokens."""
    sequences: int = field(default=64, validator=gt(0))
    """Texts of one length per model pass."""
    held_out: float = field(default=0.1, validator=[gt(0.0), lt(1.0)])
    """Share of the pairs kept from training."""
    repeat: bool = True
    """Start over at the end, pairs in another order; the held-out part always does."""

    def facts(self) -> Facts:
        """From the pairs' sentences and labels, and the inner source's facts. Raises SourceError."""
        base, sentences = self._base(), self._sentences()
        held_N = held_out_pairs(sentences, self.held_out)
        labels = {"labels"} if sentences.is_labelled else set()
        return evolve(
            base,
            provides=frozenset({"activations"} | ({"unembedding"} & base.provides) | labels),
            bytes_per_activation=4 * base.d_model,
            flops_to_hook=0.0,  # once, when it is opened, however long the run
            flops_full=0.0,
            shuffle=int((~held_N).sum()),
        )

    def open(self, seed: int, device: torch.device) -> Stream:
        """Reads the pairs, through the model where they are texts. Raises SourceError."""
        facts = self.facts()
        inner = None if self.of is None else self.of.open(seed, device)
        if self._is_harvested():
            pairs = read_pairs(self._path())
        else:
            assert inner is not None, "facts() asks for the inner source"
            texts = read_text_pairs(self._path())
            pairs = harvest_pairs(inner, texts, position=self.position, sequences=self.sequences)
        held_N = held_out_pairs(Sentences.of(pairs), self.held_out)
        rows = {held: Rows.of(pairs, (held_N == held).nonzero()[:, 0], device) for held in (False, True)}
        return DifferenceStream(self, facts, rows, pairs.concepts, inner, seed=seed, device=device)

    def _path(self) -> Path:
        return Path(self.pairs).expanduser()

    def _is_harvested(self) -> bool:
        return self._path().is_dir()

    def _sentences(self) -> Sentences:
        if self._is_harvested():
            return Sentences.of(read_pairs(self._path()))
        texts = read_text_pairs(self._path())
        return Sentences(a_N=texts.a_N, b_N=texts.b_N, is_labelled=bool(texts.concepts))

    def _base(self) -> Facts:
        """Facts of the model. Raises SourceError where no language model is named, or another one."""
        if self._is_harvested():
            facts = read_facts(self._path() / FILE)
            return facts if self.of is None else _same(facts, self.of.facts(), self._path())
        if self.of is None:
            raise SourceError(
                f"{self.pairs} is no directory, and texts need a model (name a language source in source.of, such as "
                f"huggingface, or give a directory with a {FILE})"
            )
        facts = self.of.facts()
        if "tokens" not in facts.provides:
            raise SourceError("source.of reads no text (use huggingface or transformer_lens)")
        return facts


def _same(facts: Facts, inner: Facts, path: Path) -> Facts:
    """The inner source's facts. Raises SourceError where the pairs were harvested from another place."""
    for name in ("d_model", "hook", "model"):
        mine, other = getattr(facts, name), getattr(inner, name)
        if mine != other:
            raise SourceError(
                f"{path} was harvested at {name} {mine!r}, source.of has {other!r} (leave source.of out, or mend it)"
            )
    return inner


# ----------------------------------------------------------------------------------------------------------- the split
@frozen(kw_only=True, eq=False)
class Sentences:
    """Ids of the sentences at both ends of each pair [N], and whether pairs are labelled."""

    a_N: Tensor
    b_N: Tensor
    is_labelled: bool

    @classmethod
    def of(cls, pairs: Pairs) -> Sentences:
        return cls(a_N=pairs.sentence_a_N, b_N=pairs.sentence_b_N, is_labelled=bool(pairs.concepts))


def held_out_pairs(sentences: Sentences, share: float) -> Tensor:
    """Which pairs [N] are held out: about a `share`, in whole groups of pairs that share a sentence.

    Groups are taken in an order that a hash of their first sentence's id fixes, each that still fits. Raises
    SourceError where none does, or nothing would be left for training.
    """
    group_N = groups(sentences)
    n, count = len(group_N), int(group_N.max()) + 1 if len(group_N) else 0
    first_G = torch.full((count,), torch.iinfo(torch.int64).max)
    first_G.scatter_reduce_(0, group_N, torch.minimum(sentences.a_N, sentences.b_N), "amin")
    size_G = torch.bincount(group_N, minlength=count).tolist()
    room = max(1, round(share * n))
    is_held_G = torch.zeros(count, dtype=torch.bool)
    for g in sorted(range(count), key=lambda g: derive_seed("pairs", int(first_G[g]))):
        if size_G[g] <= room:
            is_held_G[g] = True
            room -= size_G[g]
    held_N: Tensor = is_held_G[group_N]
    if not bool(held_N.any()) or bool(held_N.all()):
        raise SourceError(
            f"none of {n} pairs can be held out at source.held_out = {share:g}: sets of pairs without a sentence in "
            f"common are {count}, the smallest of {min(size_G, default=0)} (raise it, or give pairs of other sentences)"
        )
    return held_N


def groups(sentences: Sentences) -> Tensor:
    """A group per pair, int64 [N]: pairs that share a sentence, directly or by way of others, are in one."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    n = len(sentences.a_N)
    _, at = torch.unique(torch.cat([sentences.a_N, sentences.b_N]), return_inverse=True)
    size = int(at.max()) + 1 if n else 0
    edges = coo_matrix((torch.ones(n).numpy(), (at[:n].numpy(), at[n:].numpy())), shape=(size, size))
    _, group = connected_components(edges, directed=False)
    return torch.from_numpy(group).to(torch.int64)[at[:n]]


# ---------------------------------------------------------------------------------------------------------- the stream
@frozen(kw_only=True, eq=False)
class Rows:
    """Differences [N, D] of one part, and their labels [N, C] where there are any, on the stream's device."""

    delta_ND: Tensor
    labels_NC: Tensor | None

    @classmethod
    def of(cls, pairs: Pairs, index_N: Tensor, device: torch.device) -> Rows:
        """Those of the pairs at `index_N`."""
        labels_NC = None if pairs.labels_NC is None else pairs.labels_NC[index_N].to(device, torch.float32)
        return cls(delta_ND=(pairs.b_ND[index_N] - pairs.a_ND[index_N]).to(device), labels_NC=labels_NC)


class DifferenceStream(Bare):
    """Rows of one part, in an order that is a function of (seed, epoch); the cursor is (epoch, row)."""

    source = "difference"

    def __init__(
        self,
        options: Difference,
        facts: Facts,
        rows: Mapping[bool, Rows],
        concepts: tuple[str, ...],
        inner: Stream | None,
        *,
        seed: int,
        device: torch.device,
        held_out: bool = False,
    ) -> None:
        self.facts, self.concepts = facts, concepts
        self._options, self._parts, self._inner = options, rows, inner
        self._seed, self._device, self._held_out = seed, device, held_out
        self._rows = rows[held_out]
        self._epoch = self._row = 0

    def next(self, n: int) -> Batch:
        """The next `n` differences; without `repeat` raises SourceError where training has had them all."""
        pieces, total = [], len(self._rows.delta_ND)
        while n > 0:
            if self._epoch and not (self._options.repeat or self._held_out):
                raise SourceError(f"all {total} pairs are used up (set source.repeat = true, or lower budget.tokens)")
            draw = generator("pairs", self._seed, self._held_out, self._epoch)
            piece_N = torch.randperm(total, generator=draw)[self._row : self._row + n]
            pieces.append(piece_N)
            n -= len(piece_N)
            self._row += len(piece_N)
            if self._row == total:
                self._epoch, self._row = self._epoch + 1, 0
        index_B = sent(torch.cat(pieces), self._device)
        labels_NC = self._rows.labels_NC
        return Batch(x_BD=Raw(self._rows.delta_ND[index_B]), truth_BN=None if labels_NC is None else labels_NC[index_B])

    def unembedding(self) -> Raw:
        return super().unembedding() if self._inner is None else self._inner.unembedding()

    def token_counts(self) -> Tensor:
        return super().token_counts() if self._inner is None else self._inner.token_counts()

    def text(self, tokens: Tensor) -> list[str]:
        return super().text(tokens) if self._inner is None else self._inner.text(tokens)

    def tokens(self, text: str) -> Tensor:
        return super().tokens(text) if self._inner is None else self._inner.tokens(text)

    def held_out(self) -> DifferenceStream:
        return DifferenceStream(
            self._options,
            self.facts,
            self._parts,
            self.concepts,
            self._inner,
            seed=self._seed,
            device=self._device,
            held_out=True,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "row": self._row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch, self._row = int(state["epoch"]), int(state["row"])
