"""Calculated floors of a step: what must be multiplied and moved, at given rates. Nothing here is measured.

d width of an activation, F features, B rows, k active features a row. A JumpReLU step needs the entries that are
active or in the window of the threshold's pseudo-gradient, about 2 k a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from spalf.bench.peer_steps.measure import Task


@frozen(kw_only=True)
class Rates:
    """Large and [d, d] products in TFLOP/s; device memory, last cache and Adam's traffic in TB/s."""

    name: str
    product: float
    small: float
    memory: float
    cache: float
    adam: float


DATA_SHEETS = {
    "H100": Rates(name="790 TFLOP/s, 3.0 TB/s, cache 5.5 TB/s", product=790, small=790, memory=3.0, cache=5.5, adam=3.0)
}
"""Well-run ceilings of a known chip, by a part of its name."""


def measured(found: Mapping[str, float]) -> Rates | None:
    """The rates of a run's own ceilings, None where one is missing."""
    if not {"product", "small product", "memory", "cache", "adam"} <= set(found):
        return None
    return Rates(
        name="ceilings of this run",
        product=found["product"],
        small=found["small product"],
        memory=found["memory"],
        # A small copy that is bound by its launch says nothing of the cache.
        cache=max(found["cache"], found["memory"]),
        adam=found["adam"],
    )


def rates_for(device: str, found: Mapping[str, float]) -> list[Rates]:
    """What floors are calculated at: the known chip's rates, and those of the run."""
    known = [rates for name, rates in DATA_SHEETS.items() if name in device]
    own = measured(found)
    return [*known, own] if own else known


def floors(task: Task, rates: Rates) -> dict[str, float]:
    """Milliseconds by design, each the sum of its stages."""
    return {name: sum(stages.values()) for name, stages in stages_of(task, rates).items()}


def stages_of(task: Task, rates: Rates) -> dict[str, dict[str, float]]:
    """Milliseconds by design and stage."""
    b, d, f, k = (float(n) for n in (task.batch, task.d, task.width, task.l0))
    size = 2.0 if task.device.startswith("cuda") else 4.0
    product = 2 * b * d * f / rates.product / 1e9
    whitening = 3 * 2 * b * d * d / rates.small / 1e9
    rows = b * k * d * size / 1e9  # of a matrix, gathered once per active feature
    gather, cached = rows / rates.memory, rows / rates.cache

    def adam(bytes_each: float) -> float:
        return 2 * f * d * bytes_each / rates.adam / 1e9

    whole = 28.0  # weight, gradient, two moments in float32: read, and written but for the gradient
    inner = 26.0 if size == 2 else 24.0  # no gradient in memory, and a bfloat16 copy written along
    return {
        "dense": {
            "products": 5 * product,
            "optimizer": adam(whole) + (2 * f * d * 4 / rates.memory / 1e9 if size == 2 else 0.0),
            "whitening": whitening,
        },
        "sparse": {
            "encode": product + b * f * size / rates.memory / 1e9,
            "decode and backward": 3 * gather + 3 * cached,
            "optimizer": adam(whole),
            "whitening": whitening,
        },
        "one pass": {
            "encode": product,
            "decode": cached,
            "backward and optimizer": max(4 * cached, adam(inner)),
            "whitening": whitening,
        },
    }


DESIGNS = {
    "dense": "five products, every pass over [B,F] fused into them, fused Adam",
    "sparse": "encode to memory, then active and window entries alone; fused Adam",
    "one pass": "compact lists; gradient, projection and Adam in one pass by feature, no gradient in memory",
}


def table(task: Task, device: str, found: Mapping[str, float]) -> list[dict[str, Any]]:
    """Rows of {design, rates, ms, stages} for the page."""
    return [
        {"design": design, "rates": rates.name, "ms": sum(stages.values()), "stages": stages}
        for rates in rates_for(device, found)
        for design, stages in stages_of(task, rates).items()
    ]
