"""What the chip reaches at a step's shapes: single operations, measured in the run whose steps they stand beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from spalf.bench.peer_steps.measure import Clock, Task, quantile

CACHED = {"cuda": 2**22, "cpu": 2**17}
"""float32 numbers of a tensor that stays in a large cache, with its copy: 16 MiB on a GPU, 512 KiB on a CPU."""
COPIES = 10
"""Of these in one call: a single one is over before a clock has started."""


def ceilings(task: Task, steps: int = 20) -> list[dict[str, Any]]:
    """Rows of {name, ms, rate, unit}; the rate counts what the operation has to multiply or move, once.

    One that does not fit into memory is a row with a reason.
    """
    clock = Clock(cuda=torch.device(task.device).type == "cuda")
    rows = []
    for name, (make, work, unit) in _operations(task).items():
        try:
            ms = _median(clock, make(), steps)
            rows.append({"name": name, "ms": ms, "rate": work / ms / 1e9, "unit": unit})
        except (RuntimeError, TypeError) as e:
            rows.append({"name": name, "ms": None, "reason": str(e).splitlines()[0][:200]})
        if clock.cuda:
            torch.cuda.empty_cache()
    return rows


def _median(clock: Clock, act: Callable[[], Any], steps: int) -> float:
    for _ in range(3):
        act()
    return quantile([clock.time(act)[0] for _ in range(steps)], 0.5)


Operation = tuple[Callable[[], Callable[[], Any]], float, str]


def _operations(task: Task) -> dict[str, Operation]:
    """name -> (what makes the call, FLOP or bytes of it, unit of the rate). Nothing is allocated before it is made."""
    f, d = task.width, task.d
    return {
        **_products(task),
        **_moves(task),
        "Adam, fused, both matrices": (lambda: _adam(task, True), 56.0 * f * d, "TB/s"),
        "Adam, default, both matrices": (lambda: _adam(task, False), 56.0 * f * d, "TB/s"),
    }


def _normal(task: Task, *shape: int, wide: bool = False) -> Tensor:
    """In the precision of products: bfloat16 on a GPU; or float32."""
    is_low = task.device.startswith("cuda") and not wide
    return torch.randn(*shape, device=task.device, dtype=torch.bfloat16 if is_low else torch.float32)


def _products(task: Task) -> dict[str, Operation]:
    b, d, f = task.batch, task.d, task.width
    flop = 2.0 * b * d * f

    def encode() -> Callable[[], Any]:
        x, weight = _normal(task, b, d), _normal(task, f, d)
        return lambda: x @ weight.T

    def wide_encode() -> Callable[[], Any]:
        x, weight = _normal(task, b, d), _normal(task, f, d)
        return lambda: torch.mm(x, weight.T, out_dtype=torch.float32)

    def decode() -> Callable[[], Any]:
        z, weight = _normal(task, b, f), _normal(task, f, d)
        return lambda: z @ weight

    def gradient() -> Callable[[], Any]:
        z, x = _normal(task, b, f), _normal(task, b, d)
        return lambda: z.T @ x

    def whiten() -> Callable[[], Any]:
        x, metric = _normal(task, b, d), _normal(task, d, d)
        return lambda: x @ metric

    wide: dict[str, Operation] = {}
    if task.device.startswith("cuda"):
        wide = {"encode product, float32 result": (wide_encode, flop, "TFLOP/s")}
    return {
        "encode product [B,d] x [d,F]": (encode, flop, "TFLOP/s"),
        **wide,
        "decode product [B,F] x [F,d]": (decode, flop, "TFLOP/s"),
        "gradient product [F,B] x [B,d]": (gradient, flop, "TFLOP/s"),
        "whitening product [B,d] x [d,d]": (whiten, 2.0 * b * d * d, "TFLOP/s"),
    }


def _moves(task: Task) -> dict[str, Operation]:
    b, d, f, k = task.batch, task.d, task.width, task.l0
    size = 2.0 if task.device.startswith("cuda") else 4.0
    cached_bytes = 8.0 * COPIES * CACHED[torch.device(task.device).type]

    def copy(*shape: int, wide: bool) -> Callable[[], Any]:
        x, y = _normal(task, *shape, wide=wide), _normal(task, *shape, wide=wide)
        return lambda: y.copy_(x)

    def cached() -> Callable[[], Any]:
        act = copy(CACHED[torch.device(task.device).type], wide=True)
        return lambda: [act() for _ in range(COPIES)]

    def topk() -> Callable[[], Any]:
        x = _normal(task, b, f)
        return lambda: torch.topk(x, k, dim=-1, sorted=False)

    def scan() -> Callable[[], Any]:
        x = _normal(task, b, f)
        return lambda: (x > 3.0).nonzero()

    def bag() -> Callable[[], Any]:
        weight, index = _normal(task, f, d), torch.randint(0, f, (b, k), device=task.device)
        z = _normal(task, b, k)
        return lambda: torch.nn.functional.embedding_bag(index, weight, mode="sum", per_sample_weights=z)

    low: dict[str, Operation] = {}
    if size == 2:
        low = {"pass over [B,F], bfloat16": (lambda: copy(b, f, wide=False), 4.0 * b * f, "TB/s")}
    return {
        "pass over [B,F], float32": (lambda: copy(b, f, wide=True), 8.0 * b * f, "TB/s"),
        **low,
        "copies within the cache": (cached, cached_bytes, "TB/s"),
        "torch.topk over [B,F]": (topk, size * b * f, "TB/s"),
        "compare and nonzero over [B,F]": (scan, size * b * f, "TB/s"),
        "embedding_bag decode": (bag, size * b * k * d, "TB/s"),
    }


def _adam(task: Task, fused: bool) -> Callable[[], Any]:
    """torch's own step on two [F, d] matrices: 28 bytes a weight at least (weight, gradient, two moments)."""
    parameters = [torch.nn.Parameter(torch.randn(task.width, task.d, device=task.device)) for _ in range(2)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    return torch.optim.Adam(parameters, lr=1e-4, fused=fused).step


def rates(rows: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """(what, rate) of the ceilings that floors are calculated from; those that were not measured are left out."""
    found = {r["name"]: r["rate"] for r in rows if r.get("ms")}
    for what, names in {
        "product": ("encode product, float32 result", "encode product [B,d] x [d,F]"),
        "small product": ("whitening product [B,d] x [d,d]",),
        "memory": ("pass over [B,F], float32",),
        "cache": ("copies within the cache",),
        "adam": ("Adam, fused, both matrices",),
    }.items():
        yield from ((what, found[name]) for name in names[:1] if name in found)
        if names[0] not in found:
            yield from ((what, found[name]) for name in names[1:] if name in found)
