"""What the chip reaches at a step's shapes: single operations, measured in the run whose steps they stand beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from spalf.bench.peer_steps.measure import Clock, Task, quantile

CACHED = 2**20
"""Numbers of a tensor that stays in the last cache: 4 MiB of float32."""


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
        except (torch.OutOfMemoryError, RuntimeError) as e:
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
    b, d, f, k = task.batch, task.d, task.width, task.l0
    device = torch.device(task.device)
    low = torch.bfloat16 if device.type == "cuda" else torch.float32
    size, product = torch.empty((), dtype=low).element_size(), 2.0 * b * d * f

    def normal(*shape: int, dtype: torch.dtype = low) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def multiply(m: int, n: int, p: int) -> Callable[[], Any]:
        x, y = normal(m, n), normal(p, n)
        return lambda: x @ y.T

    def wide_result() -> Callable[[], Any]:
        x, y = normal(b, d), normal(f, d)
        return lambda: torch.mm(x, y.T, out_dtype=torch.float32)

    def copy(*shape: int, dtype: torch.dtype = low) -> Callable[[], Any]:
        x, y = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)
        return lambda: y.copy_(x)

    def topk() -> Callable[[], Any]:
        x = normal(b, f)
        return lambda: torch.topk(x, k, dim=-1, sorted=False)

    def scan() -> Callable[[], Any]:
        x = normal(b, f)
        return lambda: (x > 3.0).nonzero()

    def bag() -> Callable[[], Any]:
        weight, index = normal(f, d), torch.randint(0, f, (b, k), device=device)
        z = normal(b, k)
        return lambda: torch.nn.functional.embedding_bag(index, weight, mode="sum", per_sample_weights=z)

    wide = {"encode product, float32 result": (wide_result, product, "TFLOP/s")} if low == torch.bfloat16 else {}
    return {
        "encode product [B,d] x [d,F]": (lambda: multiply(b, d, f), product, "TFLOP/s"),
        **wide,
        "decode product [B,F] x [F,d]": (lambda: multiply(b, f, d), product, "TFLOP/s"),
        "gradient product [F,B] x [B,d]": (lambda: multiply(f, b, d), product, "TFLOP/s"),
        "whitening product [B,d] x [d,d]": (lambda: multiply(b, d, d), 2.0 * b * d * d, "TFLOP/s"),
        "pass over [B,F], float32": (lambda: copy(b, f, dtype=torch.float32), 8.0 * b * f, "TB/s"),
        f"pass over [B,F], {'bfloat16' if size == 2 else 'float32'}": (lambda: copy(b, f), 2.0 * size * b * f, "TB/s"),
        "copy within the cache": (lambda: copy(CACHED, dtype=torch.float32), 8.0 * CACHED, "TB/s"),
        "torch.topk over [B,F]": (topk, size * b * f, "TB/s"),
        "compare and nonzero over [B,F]": (scan, size * b * f, "TB/s"),
        "embedding_bag decode": (bag, size * b * k * d, "TB/s"),
        "Adam, fused, both matrices": (lambda: _adam(task, True), 56.0 * f * d, "TB/s"),
        "Adam, default, both matrices": (lambda: _adam(task, False), 56.0 * f * d, "TB/s"),
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
        "cache": ("copy within the cache",),
        "adam": ("Adam, fused, both matrices",),
    }.items():
        yield from ((what, found[name]) for name in names[:1] if name in found)
        if names[0] not in found:
            yield from ((what, found[name]) for name in names[1:] if name in found)
