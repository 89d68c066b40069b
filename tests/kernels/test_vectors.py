"""Adam's step of vectors in Triton against torch's own, from the same state and back to it."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

update = pytest.importorskip("spalf.kernels.update", reason="triton is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(), (3,), (1025,), (2, 7), (5,)]
BETAS = [(0.9, 0.999), (0.9, 0.999), (0.9, 0.999), (0.0, 0.99), (0.9, 0.999)]
IDLE = 4
"""Which parameter has no gradient."""


def optimizer(
    rates_on_device: bool = False, dtype: torch.dtype = torch.float32, fused: bool = True
) -> torch.optim.Adam:
    draw = torch.Generator().manual_seed(1)
    groups = [
        {"params": [torch.nn.Parameter(torch.randn(shape, generator=draw).to(DEVICE, dtype))], "betas": betas}
        for shape, betas in zip(SHAPES, BETAS, strict=True)
    ]
    made = torch.optim.Adam(groups, lr=1e-2, fused=fused)
    for i, group in enumerate(made.param_groups):
        group["lr"] *= 1 + i
        if rates_on_device:
            group["lr"] = torch.tensor(group["lr"], device=DEVICE)
    return made


def parameters(made: torch.optim.Adam) -> list[torch.nn.Parameter]:
    return [group["params"][0] for group in made.param_groups]


def give(made: torch.optim.Adam, step: int, strided: bool = False) -> None:
    """Gradients over many orders of magnitude; with `strided` one is not contiguous."""
    draw = torch.Generator().manual_seed(10 + step)
    for i, p in enumerate(parameters(made)):
        grad = torch.randn(p.shape[::-1], generator=draw) * 10.0 ** torch.randint(-6, 3, p.shape[::-1], generator=draw)
        grad = grad.to(p).permute(tuple(range(p.ndim))[::-1])
        p.grad = None if i == IDLE else grad if strided else grad.contiguous()


def ours_(made: torch.optim.Adam, skip: float = 0.0) -> None:
    update._others(SimpleNamespace(optimizer=made), torch.tensor(skip, device=DEVICE))


def told(made: torch.optim.Adam) -> dict[str, Tensor]:
    state = {f"{i}.{k}": v.cpu() for i, p in enumerate(parameters(made)) for k, v in made.state[p].items()}
    return {**{str(i): p.detach().clone().cpu() for i, p in enumerate(parameters(made))}, **state}


@pytest.mark.parametrize("rates_on_device", [False, True])
def test_steps_and_state_are_torch_s(rates_on_device: bool) -> None:
    ours, exact = optimizer(rates_on_device), optimizer(dtype=torch.float64, fused=False)
    for step in range(3):
        for made in (ours, exact):
            give(made, step, strided=True)
        ours_(ours)
        exact.step()
    right = told(exact)
    assert told(ours).keys() == right.keys()
    assert not ours.state[parameters(ours)[IDLE]]
    for name, value in told(ours).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), right[name].double(), rtol=1e-5, atol=1e-6, msg=name)


def test_either_continues_from_the_other_s_state() -> None:
    ours, plain = optimizer(), optimizer()
    for step, (first, second) in enumerate([(True, False), (False, True)] * 2):
        for made, by_us in ((ours, first), (plain, second)):
            give(made, step)
            ours_(made) if by_us else made.step()
    right = told(plain)
    # On CUDA torch takes 1 - beta2 in float32, 1.3e-5 beside the number it stands for.
    rtol = 4e-5 if DEVICE.type == "cuda" else 1e-5
    for name, value in told(ours).items():
        torch.testing.assert_close(value, right[name], rtol=rtol, atol=1e-6, msg=name)


def test_a_step_that_is_skipped_changes_nothing() -> None:
    made = optimizer()
    give(made, 0)
    ours_(made)
    before = {name: value.clone() for name, value in told(made).items()}
    give(made, 1)
    ours_(made, skip=1.0)
    assert all(torch.equal(value, before[name]) for name, value in told(made).items())
    ours_(made)
    assert float(made.state[parameters(made)[0]]["step"]) == 2
    assert not torch.equal(told(made)["2"], before["2"])


def test_a_first_step_is_the_rate() -> None:
    made = optimizer()
    before = told(made)
    for p in parameters(made):
        p.grad = torch.full_like(p, -math.pi)
    ours_(made)
    for i, group in enumerate(made.param_groups):
        moved = told(made)[str(i)] - before[str(i)]
        torch.testing.assert_close(moved, torch.full_like(moved, float(group["lr"])), rtol=1e-4, atol=1e-6)
