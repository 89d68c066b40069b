"""Values per entry of a code, dense or listed. Shape letters as in spalf/core/values.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """At least float32: bfloat16 is coarser than a window is wide."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def listed(value_F: Tensor, index_BK: Tensor | None, padding: float) -> Tensor:
    """`value_F` per entry: [F] for a dense code, [B, K] for a compact one, `padding` at index F."""
    if index_BK is None:
        return value_F
    padded = torch.cat([value_F, value_F.new_full((1,), padding)])
    if index_BK.is_cuda:
        return padded[index_BK]
    # The same numbers, several times as fast on a CPU.
    return padded.index_select(0, index_BK.reshape(-1)).view(index_BK.shape)


def order_statistics(x_CB: Tensor, places: Sequence[int]) -> list[Tensor]:
    """The smallest number of each row [C], the second smallest, ...: those of `places`, counted from 1."""
    if x_CB.device.type != "cpu":
        return [x_CB.kthvalue(k, dim=1).values for k in places]
    # The same numbers, at less than half the time for two of them.
    ordered_CB = torch.from_numpy(np.partition(x_CB.numpy(), [k - 1 for k in places], axis=1))
    return [ordered_CB[:, k - 1].clone() for k in places]


def upper_quantiles(pre_BC: Tensor, density: float) -> Tensor:
    """Per column a number that a share `density` of its entries exceeds, at least one and at most all but one, [C].

    It lies between two order statistics. Raises ValueError at fewer than two rows.
    """
    pre_CB = wide(pre_BC).T.contiguous()
    n = pre_CB.shape[1]
    if n < 2:
        raise ValueError(f"activation: {n} rows cannot calibrate a threshold (give at least 2)")
    k = min(max(1, round(density * n)), n - 1)
    top_CK = pre_CB.topk(k + 1, dim=1).values
    return (top_CK[:, k - 1] + top_CK[:, k]) / 2
