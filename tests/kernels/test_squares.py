"""Sums of squares: their values and gradients are autograd's."""

import torch

from spalf.kernels.squares import affine, quadratic_form, sum_of_squares


def test_values_and_gradients_are_those_of_autograd() -> None:
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True)

    v, shift, gain, root = random(5, 3), random(3), random(), random(3, 3).detach()
    form = root @ root.T
    torch.testing.assert_close(sum_of_squares(v), v.square().sum())
    torch.testing.assert_close(quadratic_form(v, form), (v @ root).square().sum())
    torch.testing.assert_close(affine(v, gain, shift), gain * v + shift)
    assert torch.autograd.gradcheck(sum_of_squares, (v,))
    assert torch.autograd.gradcheck(lambda x: quadratic_form(x, form), (v,))
    assert torch.autograd.gradcheck(affine, (v, gain, shift))
    assert torch.autograd.gradgradcheck(affine, (v, gain, shift))


def test_a_frozen_gain_takes_no_gradient() -> None:
    v = torch.ones(2, 3, requires_grad=True)
    affine(v, torch.tensor(2.0), torch.zeros(3)).sum().backward()
    assert v.grad is not None
    assert v.grad.tolist() == [[2.0] * 3] * 2
