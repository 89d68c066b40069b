"""What the model is compared with, and what its residual stream carries. Shapes: N contexts, T positions, D width."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .model import mean_loss
from .tokenizer import VOCABULARY

Baseline = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], npt.NDArray[np.float64]]


def unigram(stream: npt.NDArray[np.int64]) -> Baseline:
    """Log-probability of each token by its frequency in `stream`, half a count added to every token."""
    counts = np.bincount(stream, minlength=VOCABULARY) + 0.5
    log_p = np.log(counts / counts.sum())
    return lambda previous, token: log_p[token]


def bigram(stream: npt.NDArray[np.int64]) -> Baseline:
    """Log-probability of each token after the one before it: interpolated modified Kneser-Ney, fitted on `stream`.

    Discounts for counts of 1, 2 and at least 3 by Chen and Goodman's closed forms; the lower order is the share of
    distinct predecessors, half a count added, so nothing has probability zero.
    """
    pairs, counts = np.unique(stream[:-1] * VOCABULARY + stream[1:], return_counts=True)
    first, second = np.divmod(pairs, VOCABULARY)
    n1, n2, n3, n4 = (float((counts == k).sum()) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    discount = discounts[np.minimum(counts, 3)]
    seen = np.bincount(first, weights=counts, minlength=VOCABULARY)
    left_over = np.bincount(first, weights=discount, minlength=VOCABULARY)
    continuation = np.bincount(second, minlength=VOCABULARY) + 0.5
    continuation = continuation / continuation.sum()

    def log_p(previous: npt.NDArray[np.int64], token: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        wanted = previous * VOCABULARY + token
        place = np.minimum(np.searchsorted(pairs, wanted), pairs.size - 1)
        direct = np.where(pairs[place] == wanted, counts[place] - discount[place], 0.0)
        total = seen[previous]
        known = total > 0
        total = np.where(known, total, 1.0)
        back_off = np.where(known, left_over[previous] / total, 1.0)
        return np.asarray(np.log(direct / total + back_off * continuation[token]), dtype=np.float64)

    return log_p


@torch.no_grad()
def residual_stream(model: Any, contexts: Tensor, clean: float) -> list[dict[str, float]]:
    """What the residual stream after each layer carries: the loss without it, and the shape of its covariance.

    Position 0 is left clean and out of all statistics: a model parks its attention there, on a vector unlike others.
    """
    report = []
    for index, layer in enumerate(model.gpt_neox.layers):
        taken: list[Tensor] = []

        def take(module: Any, args: Any, output: Any, taken: list[Tensor] = taken) -> None:
            taken.append(output[0] if isinstance(output, tuple) else output)

        handle = layer.register_forward_hook(take)
        try:
            mean_loss(model, contexts)
        finally:
            handle.remove()
        everywhere = torch.cat(taken).double()
        rows = everywhere[:, 1:].flatten(0, 1)
        mean = rows.mean(0)
        centred = rows - mean
        spectrum = torch.linalg.eigvalsh(centred.T @ centred / rows.shape[0]).flip(0)
        norms = centred.norm(dim=1)

        def replace(module: Any, args: Any, output: Any, mean: Tensor = mean) -> Any:
            value = output[0] if isinstance(output, tuple) else output
            value = torch.cat([value[:, :1], mean.to(value.dtype).expand_as(value[:, 1:])], dim=1)
            return (value, *output[1:]) if isinstance(output, tuple) else value

        handle = layer.register_forward_hook(replace)
        try:
            ablated = mean_loss(model, contexts)
        finally:
            handle.remove()
        share = spectrum.cumsum(0) / spectrum.sum()
        report.append(
            {
                "layer": index,
                "mean_ablation_loss": round(ablated, 4),
                "mean_ablation_loss_minus_clean": round(ablated - clean, 4),
                "covariance_condition_number": float(f"{(spectrum[0] / spectrum[-1]).item():.4g}"),
                "share_of_variance_of_first_direction": round(share[0].item(), 4),
                "directions_for_99_percent_of_variance": int((share < 0.99).sum().item()) + 1,
                "norm_of_mean": round(mean.norm().item(), 3),
                "mean_centred_norm": round(norms.mean().item(), 3),
                "largest_over_median_centred_norm": round((norms.max() / norms.median()).item(), 3),
                "mean_norm_at_position_0": round(everywhere[:, 0].norm(dim=1).mean().item(), 3),
            }
        )
    return report
