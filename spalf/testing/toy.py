"""A small View to call terms and constraints on: 48 features in 12 dimensions, a language model of one layer.

Shape letters as in spalf/core/values.py; A anchored features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from spalf.core.built import Autoencoder, Metric, Ops
from spalf.core.protocols import Activation
from spalf.core.state import Anchor
from spalf.core.values import Batch, Clock, Facts, Forward, Machine, Raw, Sequences, View, White
from spalf.nn import StratifiedAutoencoder

__all__ = ["ToyStream", "toy_sae", "toy_view"]

D, V, T = 12, 40, 8
ROWS = {"anchored": 16, "free": 32}
DENSITY = 0.15
SILENT = 6
"""Features, the last ones, that have not fired for 10 000 activations."""
FACTS = Facts(
    d_model=D, n_vocab=V, provides=frozenset({"activations", "tokens", "logits", "unembedding", "truth"}), context=T
)


class ToyStream:
    """A source over random tokens; its model adds embeddings of the past at the hook and reads logits off directly.

    `scale` is the unit of model space: activations grow with it, logits do not change.
    """

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        self.facts = FACTS
        self.seed, self.scale = seed, scale
        self.cursor = self.contexts = 0
        fixed = torch.Generator().manual_seed(7)
        self._embedding_VD = torch.randn(V, D, generator=fixed) * torch.logspace(0.5, -0.5, D) + 0.3
        self._unembedding_VD = torch.randn(V, D, generator=fixed)

    def _tokens(self, n: int, salt: int) -> Tensor:
        draw = torch.Generator().manual_seed(1000 * self.seed + salt)
        return torch.randint(V, (n, T), generator=draw)

    def next(self, n: int) -> Batch:
        self.cursor += 1
        tokens_ST = self._tokens(-(-n // T), 2 * self.cursor)
        x_STD = self.activations(Sequences(tokens_ST=tokens_ST, real_ST=torch.ones_like(tokens_ST, dtype=torch.bool)))
        return Batch(x_BD=Raw(x_STD.reshape(-1, D)[:n]))

    def sequences(self, n: int) -> Sequences:
        self.contexts += 1
        tokens_ST = self._tokens(n, 2 * self.contexts + 1)
        return Sequences(tokens_ST=tokens_ST, real_ST=torch.ones_like(tokens_ST, dtype=torch.bool))

    def activations(self, sequences: Sequences) -> Raw:
        own_STD = self._embedding_VD[sequences.tokens_ST]
        past_STD = own_STD.cumsum(1) / torch.arange(1, own_STD.shape[1] + 1)[:, None]
        return Raw(self.scale * (own_STD + past_STD))

    def logits(self, sequences: Sequences, patch: Callable[[Raw], Raw] | None = None) -> Tensor:
        x_STD = self.activations(sequences)
        patched_STD = x_STD if patch is None else patch(x_STD)
        return patched_STD / self.scale @ self._unembedding_VD.T

    def unembedding(self) -> Raw:
        return Raw(self._unembedding_VD)

    def token_counts(self) -> Tensor:
        return torch.arange(V, 0, -1)

    def text(self, tokens: Tensor) -> list[str]:
        return [f"t{i}" for i in tokens.tolist()]

    def tokens(self, text: str) -> Tensor:
        """One id per letter, behind a 0."""
        return torch.tensor([0, *(ord(c) % V for c in text)])

    def truth(self) -> Raw:
        return Raw(torch.nn.functional.normalize(self._embedding_VD, dim=-1))

    def held_out(self) -> ToyStream:
        return ToyStream(self.seed + 1, self.scale)

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.cursor, "contexts": self.contexts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.cursor, self.contexts = state["cursor"], state["contexts"]


def _metric(stream: ToyStream) -> Metric:
    from spalf.parts.whitener import SoftZca

    x_BD = stream.next(2048).x_BD.double()
    whitener = SoftZca()
    metric: Metric = whitener.build(FACTS)
    whitener.fit_(metric, x_BD.mean(0), torch.cov(x_BD.T, correction=0))
    return metric


def _anchor(stream: ToyStream) -> Anchor:
    ids_A = torch.arange(ROWS["anchored"])
    centred_VD = stream.unembedding() - stream.unembedding().mean(0)
    unit_AD = torch.nn.functional.normalize(centred_VD[ids_A], dim=-1)
    return Anchor(directions_AD=Raw(unit_AD), ids_A=ids_A)


def toy_sae(
    white_BD: White,
    anchors_AD: White,
    activation: Activation | None = None,
    ops: Ops | None = None,
) -> StratifiedAutoencoder:
    """48 features, 16 near whitened anchors and 32 random, thresholds calibrated on `white_BD` to a density of 0.15."""
    from spalf.kernels.reference import ReferenceOps
    from spalf.parts.activation import JumpReLU

    width = sum(ROWS.values())
    activator = (activation or JumpReLU(bandwidth=0.5)).build(width)
    machine = Machine(device=torch.device("cpu"), ops=ops or ReferenceOps())
    sae = StratifiedAutoencoder(D, ROWS, activator, machine)
    draw = torch.Generator().manual_seed(3)
    start_FD = torch.randn(width, D, generator=draw)
    start_FD[sae.rows["anchored"]] = torch.nn.functional.normalize(anchors_AD, dim=-1) + 0.05 * torch.randn(
        ROWS["anchored"], D, generator=draw
    )
    sae.W_dec_FD.data.copy_(torch.nn.functional.normalize(start_FD, dim=-1))
    sae.W_enc_FD.data.copy_(sae.W_dec_FD.data)
    activator.calibrate_(white_BD @ sae.W_enc_FD.data.T, DENSITY, slice(0, width))
    return sae


def toy_view(
    *,
    rows: int = 64,
    repeat: int = 1,
    seed: int = 0,
    scale: float = 1.0,
    progress: float = 1.0,
    dense: bool = True,
    activation: Activation | None = None,
    ops: Ops | None = None,
    sae: Autoencoder | None = None,
) -> View:
    """A View with a live graph; equal arguments give equal views.

    `rows` activations, each `repeat` times; `scale` is the unit of model space; `progress` the share of the budget
    spent; `sae` replaces the dictionary, `activation` and `ops` parts of it (jumprelu and the reference).
    """
    fixed = ToyStream(11, scale)
    metric, anchor = _metric(fixed), _anchor(fixed)
    if sae is None:
        calibration_BD = metric.white(fixed.next(512).x_BD)
        sae = toy_sae(calibration_BD, metric.white_direction(anchor.directions_AD), activation, ops)
    stream = ToyStream(seed, scale)
    batch = Batch(x_BD=Raw(stream.next(rows).x_BD.repeat(repeat, 1)))
    used = sae

    def reconstruct(x: Raw) -> Raw:
        white_BD = metric.white(Raw(x.reshape(-1, D)))
        return Raw(metric.raw(used.decode(used.encode(white_BD))).reshape(x.shape))

    white_BD = metric.white(batch.x_BD)
    code = sae.encode(white_BD, dense)
    return View(
        batch=batch,
        forward=Forward(white_BD=white_BD, code=code, white_hat_BD=sae.decode(code)),
        sae=sae,
        metric=metric,
        anchors={"anchored": anchor},
        stream=stream,
        clock=Clock(step=round(100 * progress), total=100),
        draw=torch.Generator().manual_seed(seed),
        reconstruct=reconstruct,
        silent_F=torch.where(torch.arange(sae.width) < sae.width - SILENT, 0, 10_000),
    )
