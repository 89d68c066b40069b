"""Next-token measures on logits, and where in a context an activation may be patched.

Logits stay in the model's precision; float32 copies are made a block at a time, since those of a whole batch of
contexts would not fit. Shape letters: S sequences, T positions, V vocabulary, N positions of all sequences together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spalf.core.values import Raw

# Logits held in float32 at once: 128 MiB per copy.
_BLOCK = 2**25


def _blocks(positions: int, vocabulary: int) -> list[slice]:
    step = max(1, _BLOCK // max(1, vocabulary))
    return [slice(start, min(start + step, positions)) for start in range(0, positions, step)]


def _log_softmax(logits_NV: Tensor) -> Tensor:
    wide = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return wide.log_softmax(-1)


class _KL(torch.autograd.Function):
    """sum_v p (log p - log q) per position; recomputes both softmaxes in the backward instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, original_NV: Tensor, patched_NV: Tensor) -> Tensor:
        ctx.save_for_backward(original_NV, patched_NV)
        parts = []
        for block in _blocks(*patched_NV.shape):
            log_p, log_q = _log_softmax(original_NV[block]), _log_softmax(patched_NV[block])
            parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
        return torch.cat(parts) if parts else patched_NV.new_zeros(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        original_NV, patched_NV = ctx.saved_tensors
        out_NV = torch.empty_like(patched_NV)
        for block in _blocks(*patched_NV.shape):
            # d KL / d logits of q = q - p
            difference = _log_softmax(patched_NV[block]).exp() - _log_softmax(original_NV[block]).exp()
            out_NV[block] = (difference * grads[0][block, None]).to(out_NV.dtype)
        return None, out_NV


def kl(original_STV: Tensor, patched_STV: Tensor) -> Tensor:
    """KL(original || patched) in nats at every position [S, T]; gradient to the patched logits alone."""
    vocabulary = patched_STV.shape[-1]
    value_N: Tensor = _KL.apply(  # type: ignore[no-untyped-call]
        original_STV.detach().reshape(-1, vocabulary), patched_STV.reshape(-1, vocabulary)
    )
    return value_N.reshape(patched_STV.shape[:-1])


def mean_kl(original_STV: Tensor, patched_STV: Tensor, real_ST: Tensor) -> Tensor:
    """`kl` averaged over the positions that predict a real token, a scalar."""
    real_SP = real_ST[:, 1:].to(torch.float32)
    return (kl(original_STV, patched_STV)[:, :-1] * real_SP).sum() / real_SP.sum().clamp(min=1)


def cross_entropy(logits_STV: Tensor, tokens_ST: Tensor) -> Tensor:
    """Next-token loss in nats, [S, T - 1]: entry t is the loss of predicting token t + 1 from the context up to t."""
    logits_NV = logits_STV[:, :-1].reshape(-1, logits_STV.shape[-1])
    target_N = tokens_ST[:, 1:].reshape(-1)
    parts = [
        -_log_softmax(logits_NV[block]).gather(-1, target_N[block, None])[:, 0] for block in _blocks(*logits_NV.shape)
    ]
    loss_N = torch.cat(parts) if parts else logits_NV.new_zeros(0)
    return loss_N.reshape(tokens_ST.shape[0], -1)


def patch_after_first(fn: Callable[[Raw], Raw]) -> Callable[[Raw], Raw]:
    """A patch of [S, T, D] that applies `fn` to every position but the first, which has no context and stays clean."""

    def patch(x_STD: Raw) -> Raw:
        return Raw(torch.cat([x_STD[:, :1], fn(Raw(x_STD[:, 1:])).to(x_STD.dtype)], dim=1))

    return patch
