"""Co-activation on lists, with rows in bfloat16: its value and gradient, and what the metric is asked for."""

from typing import Any

import pytest
import torch
from torch import Tensor

from spalf.core.values import White
from spalf.kernels import update

coactivation = pytest.importorskip("spalf.kernels.coactivation", reason="triton is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sampled() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lists of 7 rows of a dictionary [40, 24] in bfloat16, one row without a pair, and a symmetric map."""
    draw = torch.Generator().manual_seed(4)
    weight_FD = torch.randn(40, 24, generator=draw).bfloat16()
    index_RK = torch.stack([torch.randperm(40, generator=draw)[:9] for _ in range(7)])
    on_RK = torch.rand(7, 9, generator=draw) < 0.6
    on_RK[2] = False
    on_RK[2, 4] = True
    root_DD = torch.randn(24, 24, generator=draw)
    return weight_FD.to(DEVICE), index_RK.to(DEVICE), on_RK.to(DEVICE), (root_DD @ root_DD.T / 24).to(DEVICE)


def picked(index_RK: Tensor, on_RK: Tensor) -> Any:
    every_R = torch.arange(len(index_RK), device=DEVICE)
    return coactivation.picked(index_RK, on_RK.float(), every_R, (0, 40), 40, torch.Generator(DEVICE))


def oracle(weight_FD: Tensor, index_RK: Tensor, on_RK: Tensor, map_DD: Tensor) -> Tensor:
    """Mean squared cosine of all pairs of a row, mean over rows that have one; cosine by cosine, float64."""
    means = []
    for index_K, on_K in zip(index_RK, on_RK, strict=True):
        rows_KD = weight_FD[index_K[on_K]] @ map_DD
        k = len(rows_KD)
        pairs = [torch.cosine_similarity(rows_KD[i], rows_KD[j], dim=0) ** 2 for i in range(k) for j in range(i)]
        if pairs:
            means.append(torch.stack(pairs).mean())
    return torch.stack(means).mean()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_value_and_gradient_are_those_of_the_cosines(dtype: torch.dtype, tolerance: float) -> None:
    low_FD, index_RK, on_RK, map_DD = sampled()
    weight_FD = low_FD.float().requires_grad_(True)
    exact_FD = low_FD.double().requires_grad_(True)
    asked = []

    def direction(v: White) -> Tensor:
        asked.append(v.dtype)
        return v @ map_DD.to(v.dtype)

    ours = coactivation.coactivation(picked(index_RK, on_RK), weight_FD, low_FD.to(dtype), direction, update.Shares())
    right = oracle(exact_FD, index_RK, on_RK, map_DD.double())
    assert asked == [dtype]
    assert ours.dtype == torch.float32
    assert abs(float(ours.detach() / right.detach()) - 1) < tolerance
    (grad_FD,), (right_FD,) = torch.autograd.grad(ours, weight_FD), torch.autograd.grad(right, exact_FD)
    assert grad_FD.dtype == torch.float32
    assert float((grad_FD - right_FD).norm() / right_FD.norm()) < tolerance


def test_without_a_pair_it_is_zero_and_so_is_its_gradient() -> None:
    low_FD, index_RK, on_RK, _ = sampled()
    on_RK = on_RK & (torch.arange(9, device=DEVICE) == 3)
    weight_FD = low_FD.float().requires_grad_(True)
    pick = picked(index_RK, on_RK)
    value = coactivation.coactivation(pick, weight_FD, weight_FD.detach(), lambda v: v, update.Shares())
    assert float(value.detach()) == 0.0
    (grad_FD,) = torch.autograd.grad(value, weight_FD)
    assert not grad_FD.any()


@pytest.mark.parametrize("capacity", [1, 5, 64, 65, 200])
def test_what_is_picked_is_on_of_the_range_and_a_uniform_subset_where_there_is_more(capacity: int) -> None:
    draw, width, rows, features = torch.Generator().manual_seed(capacity), 400, 11, (30, 390)
    index_BK = torch.stack([torch.randperm(width, generator=draw)[:capacity].sort().values for _ in range(rows)])
    count_B = torch.randint(0, capacity + 1, (rows,), generator=draw)
    count_B[:2] = torch.tensor([0, capacity])
    index_BK[torch.arange(capacity) >= count_B[:, None]] = width
    gate_BK = ((torch.rand(rows, capacity, generator=draw) < 0.8) & (index_BK < width)).float()
    sample_R = torch.tensor([1, 3, 3, 0, 10] * 3)  # more than there are rows
    keys = torch.Generator(DEVICE).manual_seed(7)
    pick = coactivation.picked(index_BK.to(DEVICE), gate_BK.to(DEVICE), sample_R.to(DEVICE), features, width, keys)
    keep = min(capacity, coactivation.GRAM)
    key_RK = torch.rand((15, capacity), generator=keys.manual_seed(7), device=DEVICE).cpu()
    assert pick.index_RS.shape == (15, keep)
    for r, row in enumerate(sample_R.tolist()):
        is_on_K = (gate_BK[row] > 0) & (index_BK[row] >= features[0]) & (index_BK[row] < features[1])
        wanted_N = index_BK[row][is_on_K]
        if capacity > keep:
            wanted_N = wanted_N[key_RK[r][is_on_K].argsort(descending=True)]
        wanted_N = wanted_N[:keep]
        n = len(wanted_N)
        assert torch.equal(pick.index_RS[r].cpu(), torch.cat([wanted_N, torch.zeros(keep - n, dtype=torch.int64)]))
        assert torch.equal(pick.listed_RS[r].cpu(), torch.cat([wanted_N, torch.full((keep - n,), width)]))
        assert pick.on_RS[r].tolist() == pick.one_RS[r].tolist() == [1] * n + [0] * (keep - n)
