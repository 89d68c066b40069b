"""Adam's step of the parameters that are vectors, all of equal betas in two launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from attrs import frozen
from torch import Tensor

from spalf.kernels import passes

_BLOCK = 1024


@frozen(eq=False)
class Vector:
    """A parameter that has a gradient, its group of the optimizer, and what torch's Adam keeps of it."""

    parameter: Tensor
    group: Mapping[str, Any]
    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def step_(vectors: Sequence[Vector], skip: Tensor) -> None:
    """One step each by Adam (arXiv 1412.6980), a step counted; on the device a no-op where `skip` is not 0.

    All is float32 and, but for gradients, contiguous. Rates may be tensors on the device.
    """
    alike: dict[tuple[float, float, float], list[Vector]] = {}
    for one in vectors:
        if one.parameter.numel():
            alike.setdefault((*one.group["betas"], one.group["eps"]), []).append(one)
    for (beta1, beta2, eps), ones in alike.items():
        steps, weights = tuple(one.step for one in ones), tuple(one.parameter.detach() for one in ones)
        hyper_N7 = torch.empty((len(ones), 7), device=skip.device)
        passes.count_steps[(len(ones),)](
            steps, tuple(_rate(one) for one in ones), skip, hyper_N7, BETA1=beta1, BETA2=beta2, EPS=eps
        )
        sizes = tuple(w.numel() for w in weights)
        passes.adam_vectors[(triton.cdiv(max(sizes), _BLOCK), len(ones))](
            weights,
            tuple(_gradient(one) for one in ones),
            tuple(one.exp_avg for one in ones),
            tuple(one.exp_avg_sq for one in ones),
            sizes,
            hyper_N7,
            skip,
            BETA1=beta1,
            BETA2=beta2,
            EPS=eps,
            BLOCK=_BLOCK,
        )


def _rate(one: Vector) -> Tensor:
    rate = one.group["lr"]
    # Filled there: a copy from the host would wait.
    return rate if isinstance(rate, Tensor) else torch.full((), rate, device=one.parameter.device)


def _gradient(one: Vector) -> Tensor:
    assert one.parameter.grad is not None
    return one.parameter.grad.contiguous()
