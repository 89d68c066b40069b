"""Linear probes: logistic regression, thresholds that maximise F1, and the latents that tell two classes apart.

Shapes: N rows, K inputs, C classes (one against the rest each), F features.
"""

from __future__ import annotations

from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.functional import softplus


@frozen(kw_only=True, eq=False)
class Probe:
    """score = x W' + b, positive where a class is the likelier; weight_CK and bias_C act on inputs as they come."""

    weight_CK: Tensor
    bias_C: Tensor

    def score(self, x_NK: Tensor) -> Tensor:
        """[N, C], float64."""
        return x_NK.double() @ self.weight_CK.T + self.bias_C


def logistic(x_NK: Tensor, y_NC: Tensor, *, l2: float = 1e-3, steps: int = 200) -> Probe:
    """C logistic regressions, fitted together by L-BFGS to mean log loss + l2/2 |w|^2 on standardised inputs.

    `y_NC` is 0 or 1. Products are taken in the inputs' precision, sums in float64. Deterministic; an input without
    variance gets weight 0.
    """
    from scipy.optimize import minimize

    x_NK, y_NC = x_NK.cpu(), y_NC.to("cpu", x_NK.dtype)
    mean_K, std_K = x_NK.mean(0), x_NK.std(0, correction=0)
    unit_K = torch.where(std_K > 0, std_K, torch.inf)
    z_NK = (x_NK - mean_K) / unit_K
    (n, k), c = z_NK.shape, y_NC.shape[1]

    def objective(flat: Any) -> tuple[float, Any]:
        w_CK1 = torch.from_numpy(flat).view(c, k + 1).to(z_NK.dtype)
        w_CK, b_C = w_CK1[:, :k], w_CK1[:, k]
        score_NC = torch.addmm(b_C, z_NK, w_CK.T)
        loss = (softplus(score_NC) - y_NC * score_NC).sum(dtype=torch.float64) / n + 0.5 * l2 * w_CK.square().sum()
        slope_NC = (score_NC.sigmoid() - y_NC) / n
        grad_CK1 = torch.cat([slope_NC.T @ z_NK + l2 * w_CK, slope_NC.sum(0)[:, None]], dim=1)
        return float(loss), grad_CK1.double().flatten().numpy()

    start = torch.zeros(c * (k + 1), dtype=torch.float64).numpy()
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": steps, "maxcor": 20})
    w_CK1 = torch.from_numpy(found.x).view(c, k + 1)
    weight_CK = w_CK1[:, :k] / unit_K.double()
    return Probe(weight_CK=weight_CK, bias_C=w_CK1[:, k] - weight_CK @ mean_K.double())


def best_f1(score_N: Tensor, true_N: Tensor) -> tuple[float, float]:
    """The largest F1 that a threshold on the score reaches, and that threshold; exact, (0, inf) without a positive."""
    order_N = score_N.argsort(descending=True)
    sorted_N, hit_N = score_N[order_N].double(), true_N[order_N].double()
    positives = float(hit_N.sum())
    if positives == 0:
        return 0.0, float("inf")
    said_N = torch.arange(1, len(hit_N) + 1, device=hit_N.device)
    f1_N = 2 * hit_N.cumsum(0) / (said_N + positives)
    # Equal scores stand on one side of any threshold.
    last_N = torch.ones_like(sorted_N, dtype=torch.bool)
    last_N[:-1] = sorted_N[1:] < sorted_N[:-1]
    at = int(torch.where(last_N, f1_N, -1.0).argmax())
    below = sorted_N[at + 1] if at + 1 < len(sorted_N) else sorted_N[at] - 1.0
    return float(f1_N[at]), float((sorted_N[at] + below) / 2)


def f1(said_N: Tensor, true_N: Tensor) -> float:
    """2 TP / (said + true); 0 where there is neither."""
    total = float(said_N.sum() + true_N.sum())
    return 2 * float((said_N & true_N).sum()) / total if total else 0.0


class Contrast:
    """Which latents tell C classes from what each is set against, from codes seen a chunk at a time."""

    def __init__(self, classes: int, width: int, device: torch.device) -> None:
        self._count_2C = torch.zeros(2, classes, dtype=torch.float64, device=device)
        self._sum_2CF = torch.zeros(2, classes, width, dtype=torch.float64, device=device)
        self._square_F = torch.zeros(width, dtype=torch.float64, device=device)
        self._total_F = torch.zeros_like(self._square_F)
        self._rows = 0

    def add(self, z_NF: Tensor, inside_NC: Tensor, outside_NC: Tensor) -> None:
        """Rows of codes, and for each class which of them (bool) are in it and which stand against it."""
        for side, member_NC in enumerate((inside_NC, outside_NC)):
            self._count_2C[side] += member_NC.double().sum(0)
            self._sum_2CF[side] += (member_NC.to(z_NF).T @ z_NF).double()
        self._rows += len(z_NF)
        self._square_F += z_NF.square().sum(0, dtype=torch.float64)
        self._total_F += z_NF.sum(0, dtype=torch.float64)

    def top(self, k: int) -> Tensor:
        """[C, k] latents with the largest |mean inside - mean outside| per standard deviation, largest first."""
        mean_2CF = self._sum_2CF / self._count_2C.clamp(min=1)[:, :, None]
        mean_F = self._total_F / max(1, self._rows)
        std_F = (self._square_F / max(1, self._rows) - mean_F.square()).clamp(min=0).sqrt()
        apart_CF = (mean_2CF[0] - mean_2CF[1]).abs() / std_F.clamp(min=1e-12)
        return apart_CF.topk(min(k, apart_CF.shape[1]), dim=1).indices
