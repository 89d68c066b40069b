"""Plain torch operations on dense codes, through autograd: the oracle of every backend.

Shape letters as in spalf/core/values.py; R sampled rows, U distinct features, N listed entries of all rows together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from attrs import define, frozen
from torch import Tensor
from torch.nn.functional import embedding, normalize

from spalf.core.protocols import Autoencoder
from spalf.core.state import Learner
from spalf.core.values import Code, White

GRAM = 256
"""Most active features of a row that its Gram matrix holds."""


class _ReducedMatmul(torch.autograd.Function):
    """a @ b and both gradients with bfloat16 operands and float32 results: thresholds are tested on accumulators."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.bfloat16(), b.bfloat16()
        ctx.save_for_backward(a, b)
        return torch.mm(a, b, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        grad = grads[0].bfloat16()
        grad_a = torch.mm(grad, b.T, out_dtype=torch.float32) if ctx.needs_input_grad[0] else None
        grad_b = torch.mm(a.T, grad, out_dtype=torch.float32) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b


def reduces(device: torch.device) -> bool:
    """Whether `matmul` can take bfloat16 operands and keep float32 results on `device`."""
    if device.type != "cuda" or "dtype" not in torch.ops.aten.mm.overloads():  # type: ignore[no-untyped-call]
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@contextmanager
def tensor_cores(compute: str) -> Iterator[None]:
    """With "bfloat16", float32 products on CUDA round their operands to 11 bits (TF32) for the block, then as before.

    What a language model hands over in bfloat16 has 8 bits: the metric's products lose less than the input had lost.
    """
    before = torch.get_float32_matmul_precision()
    if compute == "bfloat16":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def matmul(a: Tensor, b: Tensor, compute: str) -> Tensor:
    """a @ b of two matrices; `compute` "bfloat16" needs a device where `reduces` holds."""
    if compute == "bfloat16":
        out: Tensor = _ReducedMatmul.apply(a, b)  # type: ignore[no-untyped-call]
        return out
    return a @ b


def positions(row_N: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Each entry's place within its row, and the entries per row [rows]; `row_N` is ascending."""
    count_B = torch.bincount(row_N, minlength=rows)
    start_B = count_B.cumsum(0) - count_B
    return torch.arange(row_N.shape[0], device=row_N.device) - start_B[row_N], count_B


def encode(white_BD: White, sae: Autoencoder, compute: str = "float32") -> Code:
    """The dense code of whitened rows: every entry listed."""
    pre_BF = matmul(white_BD, sae.W_enc_FD.T, compute) + sae.b_enc_F
    z_BF, gate_BF = sae.activator(pre_BF)
    overflow = torch.zeros((), dtype=torch.bool, device=pre_BF.device)
    return Code(pre_BK=pre_BF, gate_BK=gate_BF, z_BK=z_BF, index_BK=None, width=sae.width, overflow=overflow)


def decode(code: Code, sae: Autoencoder, compute: str = "float32") -> White:
    """z @ W_dec [B, D], without gain and bias."""
    return White(matmul(code.dense(), sae.W_dec_FD, compute))


def correlate(code: Code, v_BD: Tensor, sae: Autoencoder, compute: str = "float32") -> Tensor:
    """v @ W_dec' [B, F] of a dense code."""
    return matmul(v_BD, sae.W_dec_FD.T, compute)


def active(code: Code, sample_R: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """(row_N, feature_N) of the active entries of the sampled rows whose feature lies in `rows`; rows ascending."""
    on_RK = code.gate_BK.detach()[sample_R] > 0
    if code.index_BK is None:
        row_N, feature_N = on_RK[:, rows].nonzero().T
        return row_N, feature_N + rows.start
    index_RK = code.index_BK[sample_R]
    row_N, entry_N = (on_RK & (index_RK >= rows.start) & (index_RK < rows.stop)).nonzero().T
    return row_N, index_RK[row_N, entry_N]


def thinned(row_N: Tensor, feature_N: Tensor, rows: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """At most GRAM entries of each row, a uniform subset: any of a row's pairs is as likely to stay as any other.

    Early in training a sampled row can hold thousands of active features, and its Gram matrix grows with their square.
    """
    if row_N.numel() == 0 or int(torch.bincount(row_N, minlength=rows).max()) <= GRAM:
        return row_N, feature_N
    order_N = torch.rand(row_N.shape, generator=draw, device=row_N.device).argsort()
    order_N = order_N[row_N[order_N].argsort(stable=True)]
    place_N, _ = positions(row_N[order_N], rows)
    kept_N = order_N[place_N < GRAM]
    return row_N[kept_N], feature_N[kept_N]


@frozen(kw_only=True, eq=False)
class CoActive:
    """Directions [U, D] of the distinct features that are on, and where each of N active entries goes.

    `which_N` names its direction, `slot_N` its place in [R * listed]; `k_R` counts the entries of a row.
    """

    rows_UD: Tensor
    which_N: Tensor
    slot_N: Tensor
    k_R: Tensor
    listed: int


def coactive(
    code: Code,
    sae: Autoencoder,
    sample_R: Tensor,
    rows: slice,
    direction: Callable[[White], Tensor],
    draw: torch.Generator,
) -> CoActive:
    """What the Gram matrices of the sampled rows are made of, with the graph to W_dec."""
    rows = slice(*rows.indices(sae.width))
    row_N, feature_N = thinned(*active(code, sample_R, rows), sample_R.shape[0], draw)
    place_N, k_R = positions(row_N, sample_R.shape[0])
    distinct_U, which_N = torch.unique(feature_N, return_inverse=True)
    # `embedding` is indexing by rows, several times as fast on a CPU.
    rows_UD = direction(White(embedding(distinct_U, sae.W_dec_FD)))
    listed = max(1, int(k_R.max())) if k_R.numel() else 1
    return CoActive(rows_UD=rows_UD, which_N=which_N, slot_N=row_N * listed + place_N, k_R=k_R, listed=listed)


def coactivation(
    code: Code,
    sae: Autoencoder,
    sample_R: Tensor,
    rows: slice,
    direction: Callable[[White], Tensor],
    draw: torch.Generator,
) -> Tensor:
    """Mean over sampled rows of the mean squared cosine between co-active features of `rows`, scalar in [0, 1].

    Per row a Gram matrix of its k active features, never F x F. Rows with k < 2 have no pair and are left out; the
    value is 0 where no row has one. The gradient reaches W_dec alone.
    """
    held = coactive(code, sae, sample_R, rows, direction, draw)
    unit_UD, k_R = normalize(held.rows_UD, dim=-1), held.k_R
    empty_PD = unit_UD.new_zeros(sample_R.shape[0] * held.listed, unit_UD.shape[-1])
    unit_PD = empty_PD.index_copy(0, held.slot_N, embedding(held.which_N, unit_UD))
    unit_RKD = unit_PD.view(sample_R.shape[0], held.listed, -1)
    cosine_RKK = unit_RKD @ unit_RKD.mT
    # ||M M'||_F^2 - k, the diagonal being 1
    squared_R = cosine_RKK.square().sum((1, 2)) - cosine_RKK.diagonal(dim1=1, dim2=2).square().sum(1)
    pairs_R = (k_R * (k_R - 1)).to(squared_R.dtype)
    return (squared_R / pairs_R.clamp(min=1)).sum() / (pairs_R > 0).sum().clamp(min=1)


def distance(sae: Autoencoder, target_AD: Tensor, rows: slice) -> Tensor:
    """||W_dec[rows] - target||_F^2, a scalar."""
    return (sae.W_dec_FD[rows] - target_AD).square().sum()


@define(kw_only=True)
class ReferenceOps:
    """The oracle as a backend: dense codes, float32, autograd throughout."""

    name: str = "reference"
    deterministic: bool = False
    bounded: bool = False

    def encode(self, white_BD: White, sae: Autoencoder, dense: bool) -> Code:
        return encode(white_BD, sae)

    def decode(self, code: Code, sae: Autoencoder) -> White:
        return decode(code, sae)

    def correlate(self, code: Code, v_BD: Tensor, sae: Autoencoder) -> Tensor:
        return correlate(code, v_BD, sae)

    def refine(self, code: Code, white_BD: White, step_F: Tensor, form_DD: Tensor, sae: Autoencoder) -> Tensor | None:
        return None

    def coactivation(
        self,
        code: Code,
        sae: Autoencoder,
        sample_R: Tensor,
        rows: slice,
        direction: Callable[[White], Tensor],
        draw: torch.Generator,
    ) -> Tensor:
        return coactivation(code, sae, sample_R, rows, direction, draw)

    def distance(self, sae: Autoencoder, target_AD: Tensor, rows: slice) -> Tensor:
        return distance(sae, target_AD, rows)

    def update(self, learner: Learner, loss: Tensor) -> bool:
        return False

    def kind(self, sae: Autoencoder) -> Hashable:
        return None

    def settle(self) -> None:
        """Nothing to do."""
