"""Small passes of the Triton backend against plain torch in float64, with gradients.

On a CPU the kernels run in Triton's interpreter; on CUDA the same tests are compiled.
"""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from spalf.kernels import squares

affine = pytest.importorskip("spalf.kernels.affine", reason="triton is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# rows, d_model: fewer and more than a program takes, and no multiple of a block
SHAPES = [(1, 1), (5, 33), (70, 530), *([(4096, 2048), (4097, 1000)] if torch.cuda.is_available() else [])]


@pytest.fixture
def by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squares, "_passes", lambda *_: affine)


def inputs(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """v, gain, shift and the weights of a sum, float32."""
    draw = torch.Generator().manual_seed(shape[0])
    v_BD, weight_BD = (torch.randn(shape, generator=draw).to(DEVICE) for _ in range(2))
    return v_BD, torch.tensor(1.7, device=DEVICE), torch.randn(shape[1], generator=draw).to(DEVICE), weight_BD


def close(ours: Tensor, right: Tensor) -> None:
    assert ours.dtype == torch.float32
    assert ours.shape == right.shape
    assert float((ours - right).norm() / right.norm()) < 1e-5


@pytest.mark.usefixtures("by_triton")
@pytest.mark.parametrize("shape", SHAPES)
def test_an_affine_map_and_its_three_gradients(shape: tuple[int, int]) -> None:
    v_BD, gain, shift_D, weight_BD = inputs(shape)
    leaves = [t.requires_grad_(True) for t in (v_BD, gain, shift_D)]
    exact = [t.detach().double().requires_grad_(True) for t in leaves]
    ours, right = squares.affine(*leaves), exact[1] * exact[0] + exact[2]
    close(ours.detach(), right.detach())
    grads = torch.autograd.grad((ours * weight_BD).sum(), leaves)
    for grad, wanted in zip(grads, torch.autograd.grad((right * weight_BD).sum(), exact), strict=True):
        close(grad, wanted)


@pytest.mark.usefixtures("by_triton")
@pytest.mark.parametrize("shape", SHAPES)
def test_squares_and_their_gradients(shape: tuple[int, int]) -> None:
    v_BD, _, _, weight_BD = inputs(shape)
    form_DD = weight_BD.T @ weight_BD
    exact_BD = v_BD.double().requires_grad_(True)
    v_BD.requires_grad_(True)
    for ours, right in (
        (squares.sum_of_squares(v_BD), exact_BD.square().sum()),
        (squares.quadratic_form(v_BD, form_DD), ((exact_BD @ form_DD.double()) * exact_BD).sum()),
    ):
        (grad,), (wanted,) = torch.autograd.grad(0.3 * ours, v_BD), torch.autograd.grad(0.3 * right, exact_BD)
        close(grad, wanted)


def test_the_sums_of_the_backward_pass_have_one_order() -> None:
    v_BD, gain, _, weight_BD = inputs(SHAPES[2])
    one, two = (affine.backward(weight_BD, v_BD, gain) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.usefixtures("by_triton")
def test_a_part_that_is_frozen_takes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(affine, "backward", called.append)
    v_BD, gain, shift_D, _ = inputs(SHAPES[1])
    squares.affine(v_BD.requires_grad_(True), gain, shift_D).sum().backward()
    assert v_BD.grad is not None
    assert not called
    torch.testing.assert_close(v_BD.grad, gain.expand_as(v_BD))


def test_a_graph_that_is_made_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(squares, "_fits", lambda t: True)
    v_BD = torch.ones(2, 3)
    assert squares._passes(v_BD) is None
    with torch.no_grad():
        assert squares._passes(v_BD) is affine
        monkeypatch.delitem(sys.modules, affine.__name__)
        assert squares._passes(v_BD) is None  # no Triton backend was made


def test_who_computes() -> None:
    v_BD = torch.ones(2, 3, device=DEVICE)
    with torch.no_grad():
        assert (squares._passes(v_BD) is affine) == v_BD.is_cuda
        assert squares._passes(v_BD.double()) is None
        assert squares._passes(v_BD, v_BD.T) is None
        assert squares._passes(v_BD[:0]) is None
