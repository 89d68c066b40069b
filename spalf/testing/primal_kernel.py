"""Conformance of kernels: every operation equals the oracle, values and gradients, on awkward shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from spalf.core.built import Ops
from spalf.core.values import Code, Machine, White
from spalf.errors import RunError
from spalf.kernels.reference import ReferenceOps
from spalf.nn import StratifiedAutoencoder
from spalf.parts.activation import JumpReLU
from spalf.testing.primal import close, gradients

Check = Callable[[], None]
SHAPES = ((1, 17, 1023), (7, 17, 129), (33, 12, 48))


def _integers(draw: torch.Generator, *shape: int) -> Tensor:
    """Small enough that bfloat16 holds their products' sums exactly: every precision gives the same numbers."""
    return torch.randint(-1, 2, shape, generator=draw).float()


def _exact(
    ops: Ops, rows: int, dim: int, width: int, threshold: float, refine: bool = False
) -> tuple[StratifiedAutoencoder, White, Tensor]:
    """An autoencoder of small integers, its input, and a gradient at its output; thresholds between integers."""
    draw = torch.Generator().manual_seed(rows + dim + width)
    device = _device()
    cut = width // 3
    strata = {"a": cut, "b": width - cut}
    activator = JumpReLU(bandwidth=2.0, refine=refine).build(width)
    sae = StratifiedAutoencoder(dim, strata, activator, Machine(device=device, ops=ops))
    for p in (sae.W_enc_FD, sae.W_dec_FD, sae.b_enc_F):
        p.data.copy_(_integers(draw, *p.shape))
    cast(Any, sae.activator).log_threshold_F.data.fill_(math.log(threshold))
    if refine:
        cast(Any, sae.activator).step_F.data.fill_(1 / 64)
    return sae, White(_integers(draw, rows, dim).to(device)), _integers(draw, rows, dim).to(device)


def _outcome(
    ops: Ops, shape: tuple[int, int, int], threshold: float, dense: bool, refine: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """All that encode and decode give, forward and backward, as dense tensors by name."""
    sae, white_BD, grad_BD = _exact(ops, *shape, threshold, refine)
    white_BD.requires_grad_(True)
    code: Code = sae.encode(white_BD, dense)
    hat_BD = ops.decode(code, sae)
    yield from (("z", code.dense()), ("gate", code.scatter(code.gate_BK)), ("l0", code.l0_B()), ("hat", hat_BD))
    yield "pre", torch.where(code.scatter(code.gate_BK) > 0, code.scatter(code.pre_BK), 0.0)
    here_BK = ops.correlate(code, white_BD, sae)
    yield "correlate", torch.where(code.scatter(code.gate_BK) > 0, code.scatter(here_BK), 0.0)
    here = (here_BK * code.gate_BK.detach()).sum()
    ((hat_BD * grad_BD).sum() + 2 * code.l0_B().sum() + here).backward()  # type: ignore[no-untyped-call]
    assert white_BD.grad is not None
    yield "input", white_BD.grad
    yield from gradients(sae).items()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _ops(component: Any) -> Ops | None:
    """The backend on the device at hand; None where it cannot run there, and says what to do."""
    try:
        ops: Ops = component.ops(_device())
        return ops
    except RunError as error:
        if "(" not in str(error):
            raise AssertionError(f"no remedy in: {error}") from error
        return None


def _equals_the_oracle(ops: Ops | None, dense: bool) -> None:
    if ops is None:
        return
    for shape in SHAPES:
        # few entries, none, and all of them that are positive
        for threshold in (3.5, 60.5, 0.5):
            ours, oracle = _outcome(ops, shape, threshold, dense), _outcome(ReferenceOps(), shape, threshold, True)
            for (name, a), (_, b) in zip(ours, oracle, strict=True):
                close(a, b, f"{name} at rows, dim, features {shape}, threshold {threshold}", 1e-5)


def checks(component: Any) -> list[Check]:
    """The checks of one kernel, on the device at hand; where it cannot run, that its error says why."""

    def encode_and_decode_equal_the_oracle() -> None:
        _equals_the_oracle(_ops(component), dense=False)

    def a_dense_code_on_request_equals_the_oracle() -> None:
        _equals_the_oracle(_ops(component), dense=True)

    def a_code_lists_all_that_matters() -> None:
        ops = _ops(component)
        if ops is None:
            return
        sae, white_BD, _ = _exact(ops, *SHAPES[2], 3.5)
        assert sae.encode(white_BD, dense=True).index_BK is None, "a dense code was asked for"
        code, reach_F = sae.encode(white_BD), sae.activator.reach_F()
        if code.index_BK is None or reach_F is None or bool(code.overflow):
            return
        matters_BF = sae.encode(white_BD, dense=True).pre_BK > reach_F
        listed_BF = code.scatter(torch.ones_like(code.pre_BK))
        assert bool((listed_BF <= 1).all()), "an entry is listed twice"
        assert bool((listed_BF[matters_BF] == 1).all()), "an entry above reach is not listed"

    def coactivation_equals_the_oracle() -> None:
        ops = _ops(component)
        if ops is None:
            return
        for shape in SHAPES:
            outcomes = []
            for one in (ops, ReferenceOps()):
                sae, white_BD, _ = _exact(one, *shape, 1.5)
                draw = torch.Generator(white_BD.device)
                sample_R = torch.arange(shape[0], device=white_BD.device).repeat(2)[: shape[0] + 1]
                value = one.coactivation(sae.encode(white_BD), sae, sample_R, sae.rows["b"], lambda v: 2 * v, draw)
                value.backward()  # type: ignore[no-untyped-call]
                outcomes.append((value, gradients(sae)["W_dec_FD"]))
            for a, b in zip(*outcomes, strict=True):
                close(a, b, f"coactivation at {shape}", 1e-4)

    def refined_codes_equal_the_oracle() -> None:
        ops = _ops(component)
        if ops is None:
            return
        # The step, its products and their gradients are no longer small integers.
        allowed = 2e-2 if getattr(ops, "compute", "float32") == "bfloat16" else 1e-4
        for shape in SHAPES:
            ours, oracle = (_outcome(one, shape, 3.5, False, refine=True) for one in (ops, ReferenceOps()))
            for (name, a), (_, b) in zip(ours, oracle, strict=True):
                close(a, b, f"{name} of a refined code at rows, dim, features {shape}", allowed)

    return [
        encode_and_decode_equal_the_oracle,
        a_dense_code_on_request_equals_the_oracle,
        refined_codes_equal_the_oracle,
        a_code_lists_all_that_matters,
        coactivation_equals_the_oracle,
    ]
