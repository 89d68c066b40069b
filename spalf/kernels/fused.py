"""The Triton backend: lists of a fixed length per row, sparse decode and backward, gradient and Adam in one pass.

No [B, F] tensor, no [F, D] gradient, and in a training step nothing that waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from spalf.core.protocols import Autoencoder
from spalf.core.state import Learner
from spalf.core.values import Code, White, per_feature
from spalf.kernels import affine as affine  # kernels/squares.py takes its passes from here
from spalf.kernels import coactivation, jump, lists, reference, refine, update
from spalf.kernels.capacity import STEP, TOTAL_STEP, Capacity, rounded

# Listed entries per row, as a share of the features, above which dense products are faster than gathers: on average,
# and of the longest list, whose length all lists have in memory.
_SPARSE, _LONGEST = 1 / 12, 1 / 4


class _Pre(torch.autograd.Function):
    """Pre-activations that are already computed, at listed entries, with the gradient of y W_enc' + b_enc."""

    @staticmethod
    def forward(
        ctx: Any,
        white_BD: Tensor,
        weight_FD: Tensor,
        bias_F: Tensor,
        found: lists.Lists,
        low_BD: Tensor,
        low_FD: Tensor,
        shares: Any,
    ) -> Tensor:
        ctx.save_for_backward(white_BD, weight_FD)
        ctx.found, ctx.low_BD, ctx.low_FD, ctx.shares = found, low_BD, low_FD, shares
        return found.pre_BK.view_as(found.pre_BK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        white_BD, weight_FD = ctx.saved_tensors
        found, grad_BK, width = ctx.found, grads[0].contiguous(), weight_FD.shape[0]
        grad_white = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_white = lists.gather_sum(found.index_BK, grad_BK, found.count_B, ctx.low_FD)
        if ctx.shares.open:
            share = ctx.shares.of(found)
            share.force_BK, share.white_BD = grad_BK, ctx.low_BD
            share.overflow = found.overflow
        else:
            grad_weight = lists.by_feature(found, grad_BK, white_BD, width)
            grad_bias = per_feature(grad_BK, found.index_BK, width)
        return grad_white, grad_weight, grad_bias, None, None, None, None


class _Decode(torch.autograd.Function):
    """z W_dec over listed entries; the gradient at z reaches every listed entry, those with z = 0 included."""

    @staticmethod
    def forward(ctx: Any, z_BK: Tensor, weight_FD: Tensor, found: lists.Lists, low_FD: Tensor, shares: Any) -> Tensor:
        ctx.save_for_backward(z_BK, weight_FD)
        ctx.found, ctx.low_FD, ctx.shares = found, low_FD, shares
        return lists.gather_sum(found.index_BK, z_BK, found.count_B, low_FD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z_BK, weight_FD = ctx.saved_tensors
        found, grad_BD = ctx.found, grads[0].contiguous()
        grad_z = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_z = lists.gather_dots(found.index_BK, found.count_B, grad_BD, ctx.low_FD).sum()
        if ctx.shares.open:
            ctx.shares.add(found, z_BK, grad_BD)
        else:
            grad_weight = lists.by_feature(found, z_BK, grad_BD, weight_FD.shape[0])
        return grad_z, grad_weight, None, None, None


class _Correlate(torch.autograd.Function):
    """<v_b, w> over listed entries, 0 at padding; grad v = sum_k g w, and the rows get g v."""

    @staticmethod
    def forward(ctx: Any, v_BD: Tensor, weight_FD: Tensor, found: lists.Lists, low_FD: Tensor, shares: Any) -> Tensor:
        ctx.save_for_backward(v_BD, weight_FD)
        ctx.found, ctx.low_FD, ctx.shares = found, low_FD, shares
        return lists.gather_dots(found.index_BK, found.count_B, v_BD, low_FD).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v_BD, weight_FD = ctx.saved_tensors
        found, grad_BK = ctx.found, grads[0].contiguous()
        grad_v = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_v = lists.gather_sum(found.index_BK, grad_BK, found.count_B, ctx.low_FD)
        if ctx.shares.open:
            ctx.shares.add(found, grad_BK, v_BD)
        else:
            grad_weight = lists.by_feature(found, grad_BK, v_BD, weight_FD.shape[0])
        return grad_v, grad_weight, None, None, None


def _trains(sae: Autoencoder) -> bool:
    return torch.is_grad_enabled() and bool(getattr(sae, "training", False))


@define(kw_only=True, eq=False)
class FusedOps:
    """Triton kernels on lists. `compute`: "bfloat16" operands with float32 results, or "float32"."""

    name: str = "triton"
    compute: str = "bfloat16"
    bounded: bool = True
    moments: torch.dtype = torch.float32
    """In which the two matrices' moments are kept: float32, or rounded at random, bfloat16 or int8."""
    replay: bool = True
    """Whether a step may be recorded."""
    deterministic: bool = False
    """Whether every sum has one order."""
    _capacity: Capacity = field(factory=Capacity)
    _shares: update.Shares = field(factory=update.Shares)
    _shadows: dict[str, tuple[int, int, Tensor]] = field(factory=dict)
    _sphere_F: Tensor | None = None
    _last: lists.Lists | None = None
    _rows: int = 0

    def _low(self, name: str, weight: Tensor) -> Tensor:
        """The weights in the precision of products; the bfloat16 copy is kept until somebody else writes to them."""
        if self.compute == "float32":
            return weight.detach()
        address, version, copy = self._shadows.get(name, (0, -1, weight))
        if (address, version) != (weight.data_ptr(), weight._version):
            copy = weight.detach().bfloat16()
            self._shadows[name] = (weight.data_ptr(), weight._version, copy)
        return copy

    def _scan(self, white_BD: Tensor, sae: Autoencoder, reach_F: Tensor) -> lists.Lists | None:
        """Lists, or None where they would be too long. Outside training they are measured first, hence never cut."""
        trains = _trains(sae)
        with torch.no_grad():
            return self._found(white_BD, sae, reach_F, trains)

    def _found(self, white_BD: Tensor, sae: Autoencoder, reach_F: Tensor, trains: bool) -> lists.Lists | None:
        weight_FD, bias_F = self._low("W_enc_FD", sae.W_enc_FD), sae.b_enc_F.detach()
        rows, capacity = white_BD.shape[0], self._capacity
        if trains:
            self._rows = rows
        if trains and capacity.row.limit:
            if not self._is_short(sae):
                return None
            limits = capacity.row.limit, capacity.total.limit
            found = lists.scan(white_BD, weight_FD, bias_F, reach_F, limits[0], self.compute, limits[1])
            capacity.watch(found.count_B)
            return found
        most = int(_LONGEST * sae.width)
        limit = min(capacity.row.limit or 8 * STEP, rounded(most))
        while True:
            found = lists.scan(white_BD, weight_FD, bias_F, reach_F, limit, self.compute)
            longest, listed = (int(n) for n in (found.count_B.amax(), found.count_B.sum())) if rows else (0, 0)
            if longest > most or listed > _SPARSE * sae.width * rows:
                return None
            if longest <= limit:
                if trains:
                    capacity.take_note(longest, listed)
                return found
            limit = rounded(1.25 * longest)

    def _is_short(self, sae: Autoencoder) -> bool:
        """Whether lists within the limits are worth it, in a training step."""
        few = self._capacity.total.limit <= max(TOTAL_STEP, int(1.25 * _SPARSE * sae.width) * self._rows)
        return few and 0 < self._capacity.row.limit <= rounded(_LONGEST * sae.width)

    def _lists_of(self, code: Code) -> lists.Lists:
        """The lists of a compact code: those that it was made of, or anew where somebody else has made it."""
        assert code.index_BK is not None
        last = self._last
        if last is not None and last.index_BK is code.index_BK:
            return last
        count_B = (code.index_BK < code.width).sum(1, dtype=torch.int32)
        total = code.index_BK.numel()
        return lists.Lists(index_BK=code.index_BK, pre_BK=code.pre_BK.detach(), count_B=count_B, total=total)

    def encode(self, white_BD: White, sae: Autoencoder, dense: bool) -> Code:
        """Compact, but dense on request, for an activator without a reach, and where lists would be too long."""
        reach_F = None if dense else sae.activator.reach_F()
        if reach_F is None:
            return reference.encode(white_BD, sae, self.compute)
        # Rounded once: for the products of the scan, and for the rows' gradient.
        low_BD = white_BD.detach().bfloat16() if self.compute == "bfloat16" else white_BD.detach()
        found = self._scan(low_BD, sae, reach_F)
        if found is None:
            code = reference.encode(white_BD, sae, self.compute)
            if _trains(sae):
                self._capacity.watch((code.pre_BK.detach() > reach_F).sum(1))
            return code
        pre_BK: Tensor = _Pre.apply(  # type: ignore[no-untyped-call]
            white_BD, sae.W_enc_FD, sae.b_enc_F, found, low_BD, self._low("W_enc_FD", sae.W_enc_FD), self._shares
        )
        self._last = found
        plain, fired_F = sae.activator.rectangle_F(), None
        if plain is None:
            z_BK, gate_BK = sae.activator(pre_BK, found.index_BK)
        else:
            z_BK, gate_BK, fired_F = jump.jump(pre_BK, found, *plain, in_order=self.deterministic)
        return Code(
            pre_BK=pre_BK,
            gate_BK=gate_BK,
            z_BK=z_BK,
            index_BK=found.index_BK,
            width=sae.width,
            overflow=found.overflow,
            counted_F=fired_F,
        )

    def decode(self, code: Code, sae: Autoencoder) -> White:
        if code.index_BK is None:
            return reference.decode(code, sae, self.compute)
        out: Tensor = _Decode.apply(  # type: ignore[no-untyped-call]
            code.z_BK, sae.W_dec_FD, self._lists_of(code), self._low("W_dec_FD", sae.W_dec_FD), self._shares
        )
        return White(out)

    def correlate(self, code: Code, v_BD: Tensor, sae: Autoencoder) -> Tensor:
        if code.index_BK is None:
            return reference.correlate(code, v_BD, sae, self.compute)
        out: Tensor = _Correlate.apply(  # type: ignore[no-untyped-call]
            v_BD, sae.W_dec_FD, self._lists_of(code), self._low("W_dec_FD", sae.W_dec_FD), self._shares
        )
        return out

    def refine(self, code: Code, white_BD: White, step_F: Tensor, form_DD: Tensor, sae: Autoencoder) -> Tensor | None:
        if code.index_BK is None:
            return None
        low_FD, found = self._low("W_dec_FD", sae.W_dec_FD), self._lists_of(code)
        held = refine.Held(found=found, low_FD=low_FD, shares=self._shares, in_order=self.deterministic)
        return refine.refined(code, white_BD, step_F, form_DD, sae, held)

    def coactivation(
        self,
        code: Code,
        sae: Autoencoder,
        sample_R: Tensor,
        rows: slice,
        direction: Callable[[White], Tensor],
        draw: torch.Generator,
    ) -> Tensor:
        if code.index_BK is None:
            return reference.coactivation(code, sae, sample_R, rows, direction, draw)
        start, stop, _ = rows.indices(sae.width)
        gate_BK = code.gate_BK.detach()
        pick = coactivation.picked(code.index_BK, gate_BK, sample_R, (start, stop), sae.width, draw)
        low_FD = self._low("W_dec_FD", sae.W_dec_FD)
        return coactivation.coactivation(pick, sae.W_dec_FD, low_FD, direction, self._shares)

    def distance(self, sae: Autoencoder, target_AD: Tensor, rows: slice) -> Tensor:
        return coactivation.distance(sae.W_dec_FD, target_AD, rows, self._shares)

    def update(self, learner: Learner, loss: Tensor) -> bool:
        """Backward and the whole step, where the optimizer is plain Adam and the strata are free or on the sphere."""
        if not update.fits(learner):
            return False
        self._shares.open = True
        try:
            loss.backward()  # type: ignore[no-untyped-call]
        except BaseException:
            self._shares.take()  # of half a pass: another step must not add them
            self._shares.away = None
            raise
        finally:
            self._shares.open = False
        shares, pull = self._shares.take()
        if self._sphere_F is None:
            self._sphere_F = update.sphere_of(learner)
        sae = learner.sae
        precision = update.Precision(moments=self.moments)
        if self.compute == "bfloat16":
            low = {"dec": self._low("W_dec_FD", sae.W_dec_FD), "enc": self._low("W_enc_FD", sae.W_enc_FD)}
            precision = update.Precision(**low, moments=self.moments)
        with torch.no_grad():
            update.update_(learner, shares, pull, self._sphere_F, precision)
        return True

    def kind(self, sae: Autoencoder) -> Hashable:
        """The lists' lengths, and which writing of the matrices the copies in low precision are of."""
        if not self.replay or not self._is_short(sae):
            return None
        return (
            self._capacity.row.limit,
            self._capacity.total.limit,
            *((w.data_ptr(), w._version) for w in (sae.W_enc_FD, sae.W_dec_FD)),
        )

    def settle(self) -> None:
        self._capacity.settle()
