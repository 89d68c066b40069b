"""`activations`: rows that `spalf harvest` wrote to shards.

Shapes: N rows of a block, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, field
from attrs.validators import gt, lt
from torch import Tensor

from spalf.core.protocols import Stream
from spalf.core.slots import source
from spalf.core.values import Batch, Facts, Raw
from spalf.errors import SourceError
from spalf.parts.source.ahead import lane_of, put_
from spalf.parts.source.bare import Bare
from spalf.parts.source.blocks import HELD_OUT_ROWS, Blocks, derive_seed, generator
from spalf.parts.source.shards import ROWS_AT_ONCE, Manifest, Reader, read_manifest


@source("activations")
class Activations:
    """Activations that were harvested before: no model runs. Provides the unembedding where the harvest had one."""

    path: str
    """A directory with a manifest.json, as `spalf harvest` writes it."""
    shuffle: int = field(default=1 << 20, validator=gt(0))
    """Activations per shuffled block; all of them, where there are fewer."""
    held_out: float = field(default=0.05, validator=[gt(0.0), lt(1.0)])
    """Share of the rows, the last ones, kept from training where the directory has no held-out shards."""
    repeat: bool = True
    """Start over at the end, shards in another order."""
    overlap: bool = True
    """On a GPU, copy the next block there while the present one is used; takes the memory of one more block."""

    def facts(self) -> Facts:
        """From the manifest. Raises SourceError where it is missing or damaged."""
        manifest = self._manifest()
        return evolve(manifest.facts, shuffle=min(self.shuffle, manifest.rows(False, self.held_out)))

    def open(self, seed: int, device: torch.device) -> Stream:
        """Checks every shard's presence, length and header. Raises SourceError."""
        manifest = self._manifest()
        manifest.check_files()
        return ActivationsStream(self, self.facts(), manifest, seed=seed, device=device)

    def _manifest(self) -> Manifest:
        return read_manifest(Path(self.path).expanduser())


class _Supply:
    """Rows of a split's shards, whose order is a function of (seed, epoch); the cursor is (epoch, part, row)."""

    def __init__(self, manifest: Manifest, *, held_out: bool, share: float, repeat: bool, seed: int) -> None:
        self._spans = manifest.spans(held_out, share)
        if not self._spans:
            split = "held out" if held_out else "training"
            raise SourceError(f"{manifest.directory} has no {split} rows (harvest more, or change source.held_out)")
        self._reader = Reader(manifest)
        self._repeat, self._seed = repeat, seed
        self._epoch = self._part = self._row = 0

    @property
    def stride(self) -> int:
        return ROWS_AT_ONCE

    def fill_(self, out_ND: Tensor) -> int:
        done = 0
        while done < len(out_ND):
            if self._part == len(self._spans):
                if not self._repeat:
                    break
                self._epoch, self._part = self._epoch + 1, 0
            draw = generator("shards", self._seed, self._epoch)
            span = self._spans[int(torch.randperm(len(self._spans), generator=draw)[self._part])]
            first = span.start + self._row
            n = min(len(out_ND) - done, span.stop - first)
            put_(out_ND[done : done + n], self._reader.rows(span.file, first, first + n))
            done += n
            self._row += n
            if first + n == span.stop:
                self._part, self._row = self._part + 1, 0
        return done

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "part": self._part, "row": self._row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch, self._part, self._row = (int(state[k]) for k in ("epoch", "part", "row"))


class ActivationsStream(Bare):
    """Shuffled blocks of stored rows."""

    source = "activations"

    def __init__(
        self,
        options: Activations,
        facts: Facts,
        manifest: Manifest,
        *,
        seed: int,
        device: torch.device,
        held_out: bool = False,
    ) -> None:
        available = manifest.rows(held_out, options.held_out)
        rows = min(options.shuffle, available, HELD_OUT_ROWS if held_out else available)
        self.facts = evolve(facts, shuffle=rows)
        self._options, self._manifest = options, manifest
        self._seed, self._device = seed, device
        split_seed = derive_seed(seed, "held_out" if held_out else "training")
        self._blocks = Blocks(
            _Supply(manifest, held_out=held_out, share=options.held_out, repeat=options.repeat, seed=split_seed),
            rows=rows,
            d_model=facts.d_model,
            dtype=manifest.dtype,
            device=device,
            seed=split_seed,
            lane=lane_of(device, options.overlap and not held_out),
        )

    def next(self, n: int) -> Batch:
        return Batch(x_BD=self._blocks.next(n))

    def unembedding(self) -> Raw:
        return Raw(self._stored("unembedding"))

    def token_counts(self) -> Tensor:
        return self._stored("token_counts")

    def _stored(self, name: str) -> Tensor:
        if not self._manifest.unembedding:
            self._lacks("unembedding", "harvest from the residual stream of a language model")
        return self._manifest.load_unembedding()[name].to(self._device)

    def held_out(self) -> ActivationsStream:
        return ActivationsStream(
            self._options, self.facts, self._manifest, seed=self._seed, device=self._device, held_out=True
        )

    def state_dict(self) -> dict[str, Any]:
        return self._blocks.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._blocks.load_state_dict(state)
