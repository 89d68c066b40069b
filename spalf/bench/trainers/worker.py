"""A process in the peers' environment: trains one dictionary on the batches of a ring. `main` takes an order's file."""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from pathlib import Path

import torch

from spalf.bench.trainers import ring
from spalf.bench.trainers.leash import on_a_leash
from spalf.bench.trainers.order import Order, read

TOLD = "told.json"
"""Written beside the weights once they are whole."""


def main(path: str) -> int:
    """0, and the weights and told.json in the order's directory; 1 and one line of why at the end of stderr."""
    on_a_leash()
    order = read(Path(path))
    try:
        told = work(order)
    except Exception as e:  # whatever a library raises is the reason that its job failed
        sys.stderr.write(f"\n{type(e).__name__}: {' '.join(str(e).split())}\n")
        return 1
    (Path(order.out) / TOLD).write_text(json.dumps(told), encoding="utf-8")
    return 0


def work(order: Order) -> dict[str, object]:
    """Train one dictionary. Raises RuntimeError where another version is installed than was asked for."""
    library = import_module(f"spalf.bench.trainers.{order.library}")
    version = library.version()
    if order.version not in ("", version):
        raise RuntimeError(f"{order.library} is {version} here, and the suite's numbers are of {order.version}")
    torch.manual_seed(order.seed)
    ring_SBD = ring.opened(Path(order.ring), order.slots, order.batch, order.d_model)
    start = time.perf_counter()
    library.train(order, ring.batches(ring_SBD, order.ready, order.freed, torch.device(order.device)), Path(order.out))
    seconds = round(time.perf_counter() - start, 3)
    return {"versions": {order.library: version, "torch": str(torch.__version__)}, "seconds": seconds}
