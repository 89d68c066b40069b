"""Sums by feature: the two ways to them, and the gradient of reading one value per entry."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from spalf.core.values import per_entry, per_feature, sorted_sums


@given(seed=st.integers(0, 2**31), rows=st.integers(0, 7), width=st.integers(1, 9))
def test_sums_in_order_are_those_by_atomics(seed: int, rows: int, width: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    index_BK = torch.randint(0, width + 1, (rows, 5), generator=draw)
    value_BK = torch.randn(rows, 5, generator=draw, dtype=torch.float64)
    ordered_F = sorted_sums(value_BK.reshape(-1), index_BK.reshape(-1), width)
    torch.testing.assert_close(ordered_F, per_feature(value_BK, index_BK, width))


def test_one_value_per_entry_gives_its_gradient_back_by_feature() -> None:
    index_BK = torch.tensor([[2, 0, 4], [2, 4, 4]])  # 4 is padding
    value_F = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64, requires_grad=True)
    listed_BK = per_entry(value_F, index_BK)
    assert listed_BK.tolist() == [[3.0, 1.0, 0.0], [3.0, 0.0, 0.0]]
    (listed_BK * torch.tensor([[1.0, 10.0, 100.0], [1000.0, 7.0, 7.0]])).sum().backward()
    assert value_F.grad is not None
    assert value_F.grad.tolist() == [10.0, 0.0, 1001.0, 0.0]
    assert per_entry(value_F, None) is value_F
