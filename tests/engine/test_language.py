"""Measures on logits: against plain formulas, a block at a time, and with their gradient."""

import pytest
import torch
from torch.nn.functional import cross_entropy as plain_cross_entropy

from spalf.core.values import Raw
from spalf.engine import language

S, T, V = 3, 5, 11


@pytest.fixture(params=[2**25, 2 * V, 1])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Everything in one block, two positions in each, one in each."""
    monkeypatch.setattr(language, "_BLOCK", request.param)
    return int(request.param)


def logits(seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (3 * torch.randn(S, T, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def test_kl_and_its_gradient(block: int) -> None:
    original, patched = logits(1), logits(2).requires_grad_(True)
    weight_ST = torch.rand(S, T, dtype=torch.float64)
    value_ST = language.kl(original, patched)
    p, log_q = original.softmax(-1), patched.log_softmax(-1)
    plain_ST = (p * (p.log() - log_q)).sum(-1)
    assert value_ST.shape == (S, T)
    assert torch.allclose(value_ST, plain_ST, atol=1e-12)
    (ours,) = torch.autograd.grad((weight_ST * value_ST).sum(), patched)
    (plain,) = torch.autograd.grad((weight_ST * plain_ST).sum(), patched)
    assert torch.allclose(ours, plain, atol=1e-12)


def test_kl_of_equal_logits_is_zero_and_flat(block: int) -> None:
    patched = logits(1, torch.float32).requires_grad_(True)
    value_ST = language.kl(logits(1, torch.float32), patched)
    value_ST.sum().backward()
    assert not bool(value_ST.detach().any())
    assert patched.grad is not None
    assert not bool(patched.grad.any())


def test_kl_of_reduced_logits_is_float32_and_its_gradient_is_theirs() -> None:
    patched = logits(2, torch.bfloat16).requires_grad_(True)
    value_ST = language.kl(logits(1, torch.bfloat16), patched)
    value_ST.mean().backward()
    assert value_ST.dtype == torch.float32
    assert patched.grad is not None
    assert patched.grad.dtype == torch.bfloat16


def test_the_original_gets_no_gradient() -> None:
    original, patched = logits(1).requires_grad_(True), logits(2).requires_grad_(True)
    language.kl(original, patched).sum().backward()
    assert original.grad is None


def test_mean_kl_leaves_out_what_predicts_padding() -> None:
    real_ST = torch.ones(S, T, dtype=torch.bool)
    real_ST[1, 3:] = False
    kl_ST = language.kl(logits(1), logits(2))
    # positions 0 .. T-2 predict tokens 1 .. T-1; row 1 has real tokens 0, 1, 2
    kept = torch.cat([kl_ST[0, :4], kl_ST[1, :2], kl_ST[2, :4]])
    assert float(language.mean_kl(logits(1), logits(2), real_ST)) == pytest.approx(float(kept.mean()), rel=1e-6)


def test_mean_kl_of_nothing_is_zero() -> None:
    assert float(language.mean_kl(logits(1), logits(2), torch.zeros(S, T, dtype=torch.bool))) == 0.0


def test_cross_entropy(block: int) -> None:
    tokens_ST = torch.randint(V, (S, T))
    ours = language.cross_entropy(logits(1), tokens_ST)
    plain = plain_cross_entropy(logits(1)[:, :-1].reshape(-1, V), tokens_ST[:, 1:].reshape(-1), reduction="none")
    assert ours.shape == (S, T - 1)
    assert torch.allclose(ours.reshape(-1), plain, atol=1e-12)


def test_the_first_position_stays_clean() -> None:
    x_STD = Raw(torch.randn(S, T, 4))
    seen = []

    def double(x: Raw) -> Raw:
        seen.append(x.shape)
        return Raw(2.0 * x.double())

    out = language.patch_after_first(double)(x_STD)
    assert seen == [(S, T - 1, 4)]
    assert out.dtype == x_STD.dtype
    assert torch.equal(out[:, 0], x_STD[:, 0])
    assert torch.equal(out[:, 1:], 2 * x_STD[:, 1:])
