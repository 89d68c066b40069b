"""Lists against plain torch, on shapes that end within a block and a part of it. Interpreted on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

lists = pytest.importorskip("spalf.kernels.lists", reason="triton is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = 5
MIXED = [0.0, -1.0, float("inf"), float("nan"), -float("inf"), 3.0]


def problem(width: int, above: float) -> tuple[Tensor, Tensor, Tensor]:
    """(pre-activations without bias [B, F], bias [F], reach [F]), on grids so that sums are exact."""
    draw = torch.Generator().manual_seed(width)
    product_BF = (64 * torch.randn(ROWS, width, generator=draw)).round() / 64
    product_BF[0] = -8.0
    product_BF[1, :6] = torch.tensor(MIXED)[:width]
    bias_F = (64 * torch.randn(width, generator=draw)).round() / 64
    reach_F = torch.full((width,), (round(64 * above) + 0.5) / 64)
    reach_F[width // 2] = float("inf")
    return tuple(x.to(DEVICE) for x in (product_BF, bias_F, reach_F))  # type: ignore[return-value]


def scanned(product_BF: Tensor, bias_F: Tensor, reach_F: Tensor, capacity: int, monkeypatch: Any) -> Any:
    """The lists of these products: the inputs are their numbers of rows."""
    width = bias_F.shape[0]
    parts = iter(product_BF.split(lists.COLUMNS, dim=1))
    monkeypatch.setattr(lists, "matmul", lambda *_: next(parts).contiguous())
    nothing_BD = torch.zeros(ROWS, 1, device=DEVICE)
    return lists.scan(nothing_BD, torch.zeros(width, 1, device=DEVICE), bias_F, reach_F, capacity)


@pytest.mark.parametrize("width", [6, 33, 150])
@pytest.mark.parametrize("part", [16, 64])
@pytest.mark.parametrize("above", [2.5, -9.0])
def test_lists_hold_what_exceeds_its_reach_in_order(
    width: int, part: int, above: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "COLUMNS", 64)
    monkeypatch.setattr(lists, "PART", part)
    product_BF, bias_F, reach_F = problem(width, above)
    capacity = width // 3 + 1
    found = scanned(product_BF, bias_F, reach_F, capacity, monkeypatch)
    pre_BF = product_BF + bias_F
    for b in range(ROWS):
        wanted = (pre_BF[b] > reach_F).nonzero()[:, 0]
        assert int(found.count_B[b]) == len(wanted)
        n = min(len(wanted), capacity)
        assert found.index_BK[b].tolist() == [*wanted[:n].tolist(), *[width] * (capacity - n)]
        assert torch.equal(found.pre_BK[b, :n], pre_BF[b, wanted[:n]])
        assert not bool(found.pre_BK[b, n:].any())


def test_a_part_is_never_smaller_than_a_word_has_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lists, "COLUMNS", 128)
    monkeypatch.setattr(lists, "PART", 1)
    product_BF, bias_F, reach_F = problem(150, 1.0)
    found = scanned(product_BF, bias_F, reach_F, 150, monkeypatch)
    assert torch.equal(found.count_B, (product_BF + bias_F > reach_F).sum(1, dtype=torch.int32))


@pytest.mark.parametrize(("dots", "sums"), [((16, 2), (16, 8)), ((64, 8), (64, 2))])
def test_gathers_are_products_over_the_listed_entries(
    dots: tuple[int, int], sums: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a program's slice and its entries at once; beyond a list there are zeros."""
    (rows, capacity, dim, width), draw = (4, 7, 24, 30), torch.Generator().manual_seed(0)
    for name, value in zip(("DOTS_SLICE", "DOTS_K", "SUM_SLICE", "SUM_K"), (*dots, *sums), strict=True):
        monkeypatch.setattr(lists, name, value)
    count_B = torch.tensor([0, 3, 7, 20], dtype=torch.int32)
    listed_BK = torch.arange(capacity) < count_B[:, None]
    index_BK = torch.where(listed_BK, torch.randint(0, width, (rows, capacity), generator=draw), width)
    z_BK = torch.rand(rows, capacity, generator=draw) * listed_BK
    grad_BD, weight_FD = torch.randn(rows, dim, generator=draw), torch.randn(width, dim, generator=draw)
    index, z, count, grad, weight = (x.to(DEVICE) for x in (index_BK, z_BK, count_B, grad_BD, weight_FD))
    rows_BKD = weight_FD[index_BK.clamp(max=width - 1)] * listed_BK[..., None]
    torch.testing.assert_close(lists.gather_sum(index, z, count, weight).cpu(), (z_BK[..., None] * rows_BKD).sum(1))
    wanted_BK = (rows_BKD * grad_BD[:, None]).sum(2)
    found_BK = lists.gather_dots(index, count, grad, weight).sum().cpu()
    torch.testing.assert_close(found_BK, wanted_BK)
    assert not bool(found_BK[~listed_BK].any())
    only_BK = (torch.rand(rows, capacity, generator=draw) < 0.5) * listed_BK.float()
    some = lists.gather_dots(index, count, grad, weight, only_BK.to(DEVICE))
    torch.testing.assert_close(some.sum(z).cpu(), wanted_BK * only_BK + z_BK)
