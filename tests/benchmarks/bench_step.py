"""Dense against compact codes on a CPU: forward and backward of one faithfulness step, and peak memory.

    python tests/benchmarks/bench_step.py [--threads 1]

Prints one line per shape: median milliseconds of process time over the steps, and their ratio. Random data; thresholds
at the quantile that gives the stated L0.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time

import torch

from spalf.core.values import Machine, White
from spalf.nn import StratifiedAutoencoder
from spalf.parts.activation import JumpReLU
from spalf.parts.kernel import Torch

SHAPES = ((512, 192, 2048, 20), (1024, 192, 4096, 25), (1024, 512, 8192, 40))


def step_ms(code: str, b: int, d: int, f: int, l0: int, steps: int = 9) -> float:
    """Median process milliseconds of encode, decode, squared error and backward."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    machine = Machine(device=device, ops=Torch(compute="float32", code=code).ops(device))
    sae = StratifiedAutoencoder(d, {"free": f}, JumpReLU().build(f), machine)
    rows_FD = torch.nn.functional.normalize(torch.randn(f, d), dim=1)
    sae.W_enc_FD.data.copy_(rows_FD)
    sae.W_dec_FD.data.copy_(rows_FD)
    sample_BD = torch.randn(2048, d)
    for begin in range(0, f, 1024):
        rows = slice(begin, begin + 1024)
        sae.activator.calibrate_(sample_BD @ rows_FD[rows].T, l0 / f, rows)
    times = []
    for _ in range(steps):
        white_BD = White(torch.randn(b, d))
        begin_s = time.process_time()
        loss = (white_BD - sae.decode(sae.encode(white_BD))).square().sum(1).mean()
        loss.backward()
        times.append(1e3 * (time.process_time() - begin_s))
        sae.zero_grad(set_to_none=True)
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    sys.stdout.write(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {platform.processor()}\n")
    for shape in SHAPES:
        dense, compact = step_ms("dense", *shape), step_ms("compact", *shape)
        name = "B {} d {} F {} L0 {}".format(*shape)
        sys.stdout.write(f"{name:28} dense {dense:8.1f} ms   compact {compact:8.1f} ms   ratio {dense / compact:.1f}\n")


if __name__ == "__main__":
    main()
