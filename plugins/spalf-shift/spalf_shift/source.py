"""Source `endpoints`: the activations at both ends of harvested pairs, for dictionaries that see no difference.

Shapes: N pairs, R rows, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any, NoReturn, cast

import torch
from attrs import evolve, field
from attrs.validators import gt, lt
from torch import Tensor

from spalf import Batch, Facts, Pairs, Raw, Sequences, SourceError, Stream, read_pairs, source
from spalf_shift.split import by_sentence


@source("endpoints")
class Endpoints:
    """The activations of a `pairs` directory, each sentence's once, in a shuffled order that is a function of the seed.

    What the same data is to a dictionary that is not told which sentences belong together: the control for training on
    differences. The held-out part has other sentences than training's.
    """

    pairs: str
    """A directory with a pairs.safetensors, as `spalf shift harvest` writes it."""
    held_out: float = field(default=0.05, validator=[gt(0.0), lt(1.0)])
    """Share of the pairs whose sentences are kept from training."""

    def facts(self) -> Facts:
        """From the file. Raises SourceError where it is missing or damaged."""
        return evolve(read_pairs(self.pairs).facts, provides=frozenset({"activations"}))

    def open(self, seed: int, device: torch.device) -> Stream:
        """Reads the pairs. Raises SourceError where they cannot be split."""
        pairs = read_pairs(self.pairs)
        training, held = by_sentence(pairs, (1 - self.held_out, self.held_out), seed=0)
        facts = self.facts()
        rows = {False: ends(training), True: ends(held)}
        return cast(Stream, EndpointsStream(facts, rows, seed=seed, device=device, held=False))


def ends(pairs: Pairs) -> Tensor:
    """Both ends of the pairs [R, D], one row per sentence, by rising id."""
    ids_N = torch.cat([pairs.sentence_a_N, pairs.sentence_b_N])
    x_ND = torch.cat([pairs.a_ND, pairs.b_ND])
    order = torch.sort(ids_N, stable=True).indices
    first = torch.ones(len(order), dtype=torch.bool)
    first[1:] = ids_N[order][1:] != ids_N[order][:-1]
    return x_ND[order[first]]


class EndpointsStream:
    """Rows of one part, epoch after epoch; the cursor is (epoch, row)."""

    def __init__(
        self, facts: Facts, rows: Mapping[bool, Tensor], *, seed: int, device: torch.device, held: bool
    ) -> None:
        self.facts = facts
        self._rows, self._seed, self._device, self._held = rows, seed, device, held
        self._epoch = self._row = 0

    def next(self, n: int) -> Batch:
        """The next `n` rows, float32."""
        mine_RD, parts = self._rows[self._held], []
        while n > 0:
            order = torch.randperm(len(mine_RD), generator=self._generator())
            part = mine_RD[order[self._row : self._row + n]]
            parts.append(part)
            n -= len(part)
            self._row += len(part)
            if self._row == len(mine_RD):
                self._epoch, self._row = self._epoch + 1, 0
        return Batch(x_BD=Raw(torch.cat(parts).to(self._device)))

    def _generator(self) -> torch.Generator:
        name = f"endpoints {self._seed} {self._held} {self._epoch}".encode()
        return torch.Generator().manual_seed(int.from_bytes(blake2b(name, digest_size=8).digest(), "big") >> 1)

    def held_out(self) -> EndpointsStream:
        """The other sentences, from their start."""
        return EndpointsStream(self.facts, self._rows, seed=self._seed, device=self._device, held=True)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "row": self._row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch, self._row = int(state["epoch"]), int(state["row"])

    def _lacks(self, what: str) -> NoReturn:
        raise SourceError(f'source "endpoints" has no {what} (use huggingface or transformer_lens)')

    def sequences(self, n: int) -> Sequences:
        self._lacks("text")

    def activations(self, sequences: Sequences) -> Raw:
        self._lacks("language model")

    def logits(self, sequences: Sequences, patch: Callable[[Raw], Raw] | None = None) -> Tensor:
        self._lacks("language model")

    def unembedding(self) -> Raw:
        self._lacks("unembedding")

    def token_counts(self) -> Tensor:
        self._lacks("text")

    def text(self, tokens: Tensor) -> list[str]:
        self._lacks("tokenizer")

    def tokens(self, text: str) -> Tensor:
        self._lacks("tokenizer")

    def truth(self) -> Raw:
        self._lacks("planted directions")
