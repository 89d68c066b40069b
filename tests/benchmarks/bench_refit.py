"""How much error better coefficients on a run's own support would leave: least squares, and single steps towards it.

    python tests/benchmarks/bench_refit.py runs/quickstart [--rows 1208] [--device cpu]

The features that the encoder has chosen on held-out rows stay; their coefficients are solved for in model space. Prints
the squared error that is left, as a share of the trained dictionary's: after least squares, and after Jacobi steps.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

from spalf import launch
from spalf.core.state import TrainingState
from spalf.core.values import Raw, White
from spalf.engine import checkpoint
from spalf.engine.build import build

STEPS = (0.25, 0.5, 0.75, 1.0)


@torch.no_grad()
def refit(state: TrainingState, x_BD: Raw) -> Tensor:
    """Squared errors summed over rows [2 + len(STEPS)]: as trained, least squares, each step; float64."""
    sae, metric = state.sae, state.metric
    code = sae.encode(metric.white(x_BD))
    rows_FD = metric.raw_direction(White(sae.log_gain.exp() * sae.W_dec_FD)).double()
    target_BD = (x_BD - metric.raw(White(sae.b_dec_D[None]))).double()
    z_BF, on_BF = code.dense().double(), code.scatter(code.gate_BK) > 0
    out = torch.zeros(2 + len(STEPS), dtype=torch.float64, device=x_BD.device)
    for target_D, z_F, on_F in zip(target_BD, z_BF, on_BF, strict=True):
        rows_KD = rows_FD[on_F]
        error_D = target_D - z_F[on_F] @ rows_KD
        exact_K = torch.linalg.lstsq(rows_KD.T, target_D[:, None]).solution[:, 0] if len(rows_KD) else z_F[:0]
        step_K = rows_KD @ error_D / rows_KD.square().sum(1)
        left = [error_D, target_D - exact_K @ rows_KD, *(error_D - s * step_K @ rows_KD for s in STEPS)]
        out += torch.stack([e_D.square().sum() for e_D in left])
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--rows", type=int, default=1208)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    at, plan, _ = launch.plan_at(options.run, None, ())
    state = build(plan, launch.device_of(options.device))
    checkpoint.load(at, plan, state)
    trained, *others = refit(state, state.stream.held_out().next(options.rows).x_BD).tolist()
    for name, value in zip(("least squares", *(f"one step of {s:g}" for s in STEPS)), others, strict=True):
        sys.stdout.write(f"{name:16}{value / trained:8.3f}\n")


if __name__ == "__main__":
    main()
