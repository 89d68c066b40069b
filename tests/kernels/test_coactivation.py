"""Co-activation on lists, with rows in bfloat16: its value and gradient, and what the metric is asked for."""

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

    draw = torch.Generator(DEVICE)
    ours = coactivation.coactivation(index_RK, on_RK, weight_FD, low_FD.to(dtype), direction, draw, update.Shares())
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
    draw = torch.Generator(DEVICE)
    value = coactivation.coactivation(
        index_RK, on_RK, weight_FD, weight_FD.detach(), lambda v: v, draw, update.Shares()
    )
    assert float(value.detach()) == 0.0
    (grad_FD,) = torch.autograd.grad(value, weight_FD)
    assert not grad_FD.any()
