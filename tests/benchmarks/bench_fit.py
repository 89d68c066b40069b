"""A whole step of the preset's phase `fit`, its three constraints and controllers included, by backend.

    python tests/benchmarks/bench_fit.py --shape 2048,65536,64 --kernels triton,torch --sample 64 [--profile]

Random activations of a spread spectrum, a quarter of the rows anchored, a rate so low that L0 stays where calibration
put it. Prints milliseconds a step over 60 steps without synchronisation, the host's share of them (launching alone),
and peak memory; with --profile also the GPU's time by kernel.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from spalf import plugins
from spalf.assembly import compile as compiler
from spalf.assembly import toml
from spalf.core.tree import to
from spalf.core.values import Batch, Facts, Raw
from spalf.engine.build import build
from spalf.kernels.reference import tensor_cores
from spalf.parts.source.bare import Bare

RECIPE = """
extends = "spalf"
name = "bench"
knobs = {{ F = {f}, L0_target = {l0}, R2_target = 0.9, lr = 1e-5 }}
budget = {{ tokens = 100_000_000, batch = {batch} }}
kernel = "{kernel}"
activation.start = 1.0
phase.calibrate.samples = {samples}
constraint.orthogonality.sample = {sample}
source = {{ use = "huggingface", model = "none", layer = 1, text = "none" }}
"""


class Pool(Bare):
    """Ten batches of Gaussian activations, over and over, and an unembedding of Gaussian rows."""

    source = "pool"

    def __init__(self, facts: Facts, batch: int, device: torch.device) -> None:
        self.facts, self._at = facts, 0
        draw = torch.Generator(device).manual_seed(0)
        d = facts.d_model
        scale_D = torch.logspace(1.5, -1, d, device=device)
        basis_DD = torch.randn(d, d, generator=draw, device=device) / d**0.5
        self._x_ND = (torch.randn(10 * batch, d, generator=draw, device=device) * scale_D) @ basis_DD + 0.5
        self._unembedding_VD = torch.randn(facts.n_vocab, d, generator=draw, device=device)

    def next(self, n: int) -> Batch:
        self._at = self._at if self._at + n <= len(self._x_ND) else 0
        self._at += n
        return Batch(x_BD=Raw(self._x_ND[self._at - n : self._at]))

    def unembedding(self) -> Raw:
        return Raw(self._unembedding_VD)

    def token_counts(self) -> torch.Tensor:
        return torch.ones(self.facts.n_vocab, dtype=torch.int64)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def profiled(step: Any, steps: int = 5) -> None:
    """The GPU's time by kernel, largest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    rows = [
        (e.device_time_total / steps, e.count / steps, e.key)
        for e in seen.key_averages()
        if e.device_time_total > 0 and str(e.device_type).endswith("CUDA") and "Optimizer.step" not in e.key
    ]
    sys.stdout.write(f"  GPU busy {sum(us for us, _, _ in rows) / 1e3:.2f} ms a step\n")
    for us, count, name in sorted(rows, reverse=True)[:70]:
        sys.stdout.write(f"  {us:9.1f} us {count:5.1f} x {name[:150]}\n")


def measure(d: int, f: int, l0: int, kernel: str, options: argparse.Namespace, device: torch.device) -> None:
    vocabulary = min(50_304, f // 4)
    provides = frozenset({"activations", "tokens", "logits", "unembedding"})
    facts = Facts(d_model=d, n_vocab=vocabulary, provides=provides, hook="x", model="x", context=128)
    text = RECIPE.format(f=f, l0=l0, kernel=kernel, batch=options.batch, sample=options.sample, samples=20 * d)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.toml"
        path.write_text(text)
        plan = compiler.compile(toml.read(path, ()), plugins.load()[1], facts)
    state = build(plan, device, stream=Pool(facts, options.batch, device))  # type: ignore[arg-type]
    for name in ("calibrate", "fit"):
        phase = plan.recipe.phase[name]
        if state.clock.phase != name:
            state.clock = state.clock.next_phase(name)
        state.phase = to(phase.init(plan), device)
        phase.enter(plan, state)
        while name == "calibrate" and not phase.done(plan, state):
            phase.step(plan, state)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tensor_cores(getattr(state.sae.machine.ops, "compute", "float32")):
        for _ in range(20 if device.type == "cuda" else 2):
            reading = phase.step(plan, state)
        wait(device)
        begin = time.perf_counter()
        for _ in range(options.steps):
            reading = phase.step(plan, state)
        host = time.perf_counter() - begin
        wait(device)
        whole = time.perf_counter() - begin
        peak = f", peak {torch.cuda.max_memory_allocated() >> 20} MiB" if device.type == "cuda" else ""
        sys.stdout.write(
            f"d {d} F {f} L0 {l0} batch {options.batch} {kernel:7}{1e3 * whole / options.steps:8.2f} ms a step, host "
            f"{1e3 * host / options.steps:.2f}, L0 now {float(reading.values['l0']):.1f}{peak}\n"
        )
        if options.profile and device.type == "cuda":
            profiled(lambda: phase.step(plan, state))
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    is_cuda = torch.cuda.is_available()
    parser.add_argument("--shape", action="append", help="d_model,F,L0; several times for several shapes")
    parser.add_argument("--kernels", default="triton,torch" if is_cuda else "torch")
    parser.add_argument("--batch", type=int, default=4096 if is_cuda else 512)
    parser.add_argument("--sample", type=int, default=256, help="rows that `orthogonality` samples")
    parser.add_argument("--steps", type=int, default=60 if is_cuda else 10)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if is_cuda else "cpu")
    name = torch.cuda.get_device_name() if is_cuda else f"CPU, {torch.get_num_threads()} thread(s)"
    sys.stdout.write(f"{name}, torch {torch.__version__}\n")
    for shape in options.shape or (["2048,65536,64", "512,16384,40"] if is_cuda else ["192,2048,20"]):
        d, f, l0 = (int(n) for n in shape.split(","))
        for kernel in options.kernels.split(","):
            measure(d, f, l0, kernel, options, device)


if __name__ == "__main__":
    main()
