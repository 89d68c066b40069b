"""What is asked of a training step, and its timing: the same loop for every library, ours included.

Shape letters: B rows, D width of an activation.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

BATCHES = 10
"""Batches that rotate: more than any cache holds, and never constants."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A shape and how to time it. `precision`: "fp32", "tf32", or "bf16" as each library's own autocast does it."""

    d: int
    width: int
    l0: int
    batch: int
    device: str
    precision: str = "fp32"
    steps: int = 20
    warmup: int = 5
    threads: int = 0
    lr: float = 1e-6
    seed: int = 0


class Subject(Protocol):
    """A trainer whose step is timed: everything that it does per batch, with the waits for the device that it makes."""

    version: str
    note: str

    def step(self, x_BD: Tensor) -> Tensor | float | None:
        """One whole training step; the loss."""

    def l0(self) -> float:
        """Active features a row, as realised in the last step."""

    def parameters(self) -> Iterable[Tensor]:
        """What training should move."""


def settle(task: Task) -> None:
    """The process's threads and precision of products."""
    if task.threads:
        torch.set_num_threads(task.threads)
    torch.set_float32_matmul_precision("highest" if task.precision == "fp32" else "high")


def activations(task: Task, rows: int = 0, part: int = 0) -> list[Tensor]:
    """BATCHES batches [B, D] of B = `rows`, or the task's: up to 64 strong directions on top of noise.

    The mean square is 1 per coordinate. Other values of `part` draw other rows of the same distribution.
    """
    device, strong, rows = torch.device(task.device), min(64, task.d), rows or task.batch

    def drawn(seed: int, *shapes: tuple[int, int]) -> list[Tensor]:
        draw = torch.Generator(device).manual_seed(seed)
        return [torch.randn(*shape, generator=draw, device=device) for shape in shapes]

    basis = drawn(task.seed, (strong, task.d))[0] / strong**0.5
    out = []
    for i in range(BATCHES):
        noise_BD, weight_BS = drawn(task.seed + 1 + part * BATCHES + i, (rows, task.d), (rows, strong))
        out.append((noise_BD + weight_BS @ basis) / 2**0.5)
    return out


def threshold(pre_BF: Tensor, l0: int) -> float:
    """The number that `l0` entries a row exceed on average."""
    entries = pre_BF.float().flatten()
    return float(entries.topk(max(1, min(entries.numel() - 1, l0 * pre_BF.shape[0]))).values[-1])


@dataclass
class Clock:
    """Milliseconds of blocks: on CUDA between events on the stream, on a CPU by the process's own clock."""

    cuda: bool

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize()

    def time(self, act: Callable[[], Any]) -> tuple[float, float, float]:
        """(device, wall, process) milliseconds of one call, which starts on an idle device and is waited for."""
        self.wait()
        wall, process = time.perf_counter(), time.process_time()
        if self.cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            act()
            end.record()
            self.wait()
        else:
            act()
        wall_ms, process_ms = 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - process)
        return (begin.elapsed_time(end) if self.cuda else process_ms), wall_ms, process_ms

    def stream(self, act: Callable[[], Any], n: int) -> tuple[float, float]:
        """(whole, host) milliseconds of each of `n` calls that nobody waits for in between."""
        self.wait()
        begin = time.perf_counter()
        for _ in range(n):
            act()
        host = time.perf_counter() - begin
        self.wait()
        return 1e3 * (time.perf_counter() - begin) / n, 1e3 * host / n


def quantile(values: Sequence[float], q: float) -> float:
    """The nearest order statistic."""
    return sorted(values)[round(q * (len(values) - 1))]


def measure(make: Callable[[], Subject], task: Task, batches: Sequence[Tensor]) -> dict[str, Any]:
    """Make a subject, warm it up, time its steps. Numbers as JSON holds them; raises what the subject raises."""
    clock = Clock(cuda=torch.device(task.device).type == "cuda")
    base = _freed(clock)
    subject = make()
    at = 0
    losses: list[Tensor | float | None] = []

    def step() -> None:
        nonlocal at
        losses.append(subject.step(batches[at % len(batches)]))
        at += 1

    moved = _probe(subject.parameters())
    for _ in range(task.warmup):
        step()
    memory = _state(clock, base)
    with _uncollected():
        times = [clock.time(step) for _ in range(task.steps)]
        streaming, host = clock.stream(step, task.steps)
    row: dict[str, Any] = {"status": "ok", "version": subject.version, "note": subject.note}
    row.update(_figures(times, clock.cuda, task))
    row.update(ms_streaming=streaming, ms_host=host, **_peak(clock, base, memory))
    known = [float(loss) for loss in losses if loss is not None]
    row.update(
        loss_first=known[0] if known else None,
        loss_last=known[-1] if known else None,
        finite=all(math.isfinite(loss) for loss in known),
        moved=moved(),
        l0=float(subject.l0()),
    )
    return row


def attempt(make: Callable[[], Subject], task: Task, batches: Sequence[Tensor]) -> dict[str, Any]:
    """`measure`, or why there is nothing to measure: {"status": "missing" | "memory" | "failed", "reason": ...}."""
    try:
        return measure(make, task, batches)
    except ImportError as e:
        return {"status": "missing", "reason": f"not installed: {e}"}
    except torch.OutOfMemoryError as e:
        return {"status": "memory", "reason": "out of memory: " + str(e).splitlines()[0]}
    except Exception as e:
        return {"status": "failed", "reason": f"{type(e).__name__}: {' '.join(str(e).split())[:240]}"}


def _figures(times: Sequence[tuple[float, float, float]], cuda: bool, task: Task) -> dict[str, Any]:
    """On a CPU process time where one thread works, else wall time, which is what more threads are there to save."""
    device, wall, process = (list(column) for column in zip(*times, strict=True))
    one = torch.get_num_threads() == 1
    judged = device if cuda or one else wall
    middle = statistics.median(judged)
    return {
        "clock": "events" if cuda else "process" if one else "wall",
        "ms": middle,
        "ms_mean": statistics.fmean(judged),
        "ms_p10": quantile(judged, 0.1),
        "ms_p90": quantile(judged, 0.9),
        "ms_wall": statistics.median(wall),
        "ms_process": statistics.median(process),
        "per_second": 1e3 * task.batch / middle,
    }


def _probe(parameters: Iterable[Tensor]) -> Callable[[], bool]:
    """Whether the largest parameter differs from what it is now, by a sample of its entries."""
    largest = max(parameters, key=lambda p: p.numel())
    every = max(1, largest.numel() // 65536)

    def sample() -> Tensor:
        return largest.detach().flatten()[::every]

    before = sample().clone()
    return lambda: bool((sample() != before).any())


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector, as `timeit` does: when it runs depends on what the process did before."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _freed(clock: Clock) -> int:
    """Bytes that are in use before a subject is made."""
    gc.collect()
    if not clock.cuda:
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def _state(clock: Clock, base: int) -> int:
    """Bytes that stay between steps; the peak is counted anew from here."""
    clock.wait()
    if not clock.cuda:
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() - base


def _peak(clock: Clock, base: int, state: int) -> dict[str, Any]:
    """Memory of a GPU; a CPU's process holds the interpreter and its libraries too, which says nothing of a step."""
    if not clock.cuda:
        return {}
    return {"peak_mib": (torch.cuda.max_memory_allocated() - base) / 2**20, "state_mib": state / 2**20}
