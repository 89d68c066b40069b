"""Selection by order: the k largest entries of each row, or the B k largest of a batch."""

from __future__ import annotations

import torch
from attrs import field
from attrs.validators import gt, le
from torch import Tensor, nn

from spalf.core.protocols import Activator
from spalf.core.slots import activation, from_knob
from spalf.core.values import Code
from spalf.parts.activation.entries import upper_quantiles, wide


def _kept(pre_BK: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """(z, gate) of the entries at `place`, along the last axis, that are positive; ReLU after the selection."""
    with torch.no_grad():
        chosen_BK = torch.zeros_like(pre_BK).scatter_(-1, place, 1.0)
        gate_BK = chosen_BK * (pre_BK > 0)
    return pre_BK * gate_BK, gate_BK


class TopKActivator(nn.Module, Activator):
    """z = p where p is positive and among the k largest of its row; ties are broken, never kept."""

    zero_F: Tensor

    def __init__(self, width: int, options: TopK) -> None:
        super().__init__()
        self.pre_bias = options.pre_bias
        self.k = min(options.k, width)
        self.register_buffer("zero_F", torch.zeros(width), persistent=False)

    def forward(self, pre_BK: Tensor, index_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(z_BK, gate_BK) in at least float32. The gradient passes the kept entries; the gate has none."""
        pre_BK = wide(pre_BK)
        return _kept(pre_BK, pre_BK.topk(min(self.k, pre_BK.shape[-1]), dim=-1, sorted=False).indices)

    def calibrate_(self, pre_BC: Tensor, density: float, rows: slice) -> None:
        """The density is k / F whatever the pre-activations are."""

    def reach_F(self) -> None:
        """Dense only: which entries matter depends on the others of their row."""

    def threshold_F(self) -> Tensor:
        """Zeros [F]: the selection is by order."""
        return self.zero_F


@activation("topk")
class TopK:
    """The k largest pre-activations of each row, then ReLU (arXiv 2406.04093); k at inference too.

    A row has fewer than k active features where fewer of its entries are positive. `pre_bias`: encode y - b_dec.
    """

    k: int = from_knob("L0_target", validator=gt(0))
    pre_bias: bool = False

    def build(self, width: int) -> Activator:
        return TopKActivator(width, self)


class BatchTopKActivator(nn.Module, Activator):
    """In training the B k largest entries of a batch's ReLU; at inference the entries above one learned threshold.

    Buffers: threshold, the running mean of the smallest kept entry, and seen, the batches that have gone into it.
    """

    threshold: Tensor
    seen: Tensor

    def __init__(self, width: int, options: BatchTopK) -> None:
        super().__init__()
        self.pre_bias = options.pre_bias
        self._per_row, self._width, self._rate = options.k, width, options.rate
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, pre_BK: Tensor, index_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(z_BK, gate_BK) in at least float32. The gradient passes the kept entries; the gate has none."""
        pre_BK = wide(pre_BK)
        if not self.training:
            gate_BK = (pre_BK.detach() > self.threshold).to(pre_BK.dtype)
            return pre_BK * gate_BK, gate_BK
        flat_N = pre_BK.reshape(-1)
        n = min(self._per_row * pre_BK.shape[0], flat_N.shape[0])
        z_N, gate_N = _kept(flat_N, flat_N.topk(n, sorted=False).indices)
        return z_N.view_as(pre_BK), gate_N.view_as(pre_BK)

    @torch.no_grad()
    def calibrate_(self, pre_BC: Tensor, density: float, rows: slice) -> None:
        """The threshold that the sample's own selection would have: its upper quantile, averaged over the chunks."""
        found = upper_quantiles(pre_BC.reshape(-1, 1), density)[0].clamp(min=0)
        share = (rows.stop - rows.start) / rows.stop
        self.threshold.lerp_(found.to(self.threshold), share)
        self.seen.zero_()

    @torch.no_grad()
    def observe_(self, code: Code) -> None:
        """threshold <- (1 - w) threshold + w m, m the smallest kept entry, w = max(rate, 1 / batches so far).

        The mean of the first 1 / rate batches, then an exponential one: it starts at the first measured value, where
        an average that starts at 0 stays biased low. A batch without an active entry says nothing.
        """
        least = torch.where(code.gate_BK > 0, code.z_BK, torch.inf).amin()
        is_known = least.isfinite()
        self.seen += is_known.to(self.seen)
        weight = (1 / self.seen.clamp(min=1)).clamp(min=self._rate)
        moved = torch.lerp(self.threshold, least.to(self.threshold), weight)
        self.threshold.copy_(torch.where(is_known, moved, self.threshold))

    def reach_F(self) -> Tensor | None:
        """The threshold at inference; None in training, where the batch decides which entries matter."""
        return None if self.training else self.threshold_F()

    def threshold_F(self) -> Tensor:
        """The one threshold, [F]."""
        return self.threshold.expand(self._width)


@activation("batch_topk")
class BatchTopK:
    """k active features per row on average over a training batch, one threshold at inference (arXiv 2412.06410).

    The threshold is an average of the smallest kept entry, of weight `rate` per step; a measured L0 at inference
    differs from k a little, because that is the edge of each batch and not the edge of their union. `pre_bias`: encode
    y - b_dec.
    """

    k: int = from_knob("L0_target", validator=gt(0))
    rate: float = field(default=0.01, validator=[gt(0.0), le(1.0)])
    pre_bias: bool = False

    def build(self, width: int) -> Activator:
        return BatchTopKActivator(width, self)
