"""The oracle itself: co-activation against every pair in turn, its gradient, its sampler, and matrix products."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from spalf.core.values import Code, Machine, White
from spalf.kernels import coherence, reference
from spalf.nn import StratifiedAutoencoder
from spalf.parts.activation import JumpReLU

B, D, F = 40, 9, 30
ALL = slice(0, F)


def same(v: White) -> Tensor:
    return v


def stretched(v: White) -> Tensor:
    """A change of coordinates that moves angles."""
    return v * torch.linspace(0.2, 3, D, dtype=v.dtype)


def sae() -> StratifiedAutoencoder:
    machine = Machine(device=torch.device("cpu"), ops=reference.ReferenceOps())
    built = StratifiedAutoencoder(D, {"a": 10, "b": F - 10}, JumpReLU().build(F), machine).double()
    torch.nn.init.normal_(built.W_dec_FD)
    return built


def code(density: float = 0.2, empty: int = 3, single: int = 3) -> Code:
    """Random gates; the first rows have no active feature, the next ones a single one."""
    gate_BF = (torch.rand(B, F) < density).double()
    gate_BF[: empty + single] = 0
    gate_BF[empty : empty + single, 4] = 1
    overflow = torch.zeros((), dtype=torch.bool)
    return Code(pre_BK=gate_BF, gate_BK=gate_BF, z_BK=gate_BF, index_BK=None, width=F, overflow=overflow)


def listed(dense: Code, extra: int = 3) -> Code:
    """The same code as lists, in a random order, with inactive entries and padding between the active ones."""
    index_BK = torch.full((B, F + 1), F)
    gate_BK = torch.zeros(B, F + 1, dtype=torch.float64)
    for b, gate_F in enumerate(dense.gate_BK):
        on = gate_F.nonzero()[:, 0].tolist()
        off = (gate_F == 0).nonzero()[:extra, 0].tolist()
        entries = [*on, *off]
        places = torch.randperm(F + 1)[: len(entries)]
        index_BK[b, places] = torch.tensor(entries, dtype=torch.int64)
        gate_BK[b, places] = torch.tensor([1.0] * len(on) + [0.0] * len(off), dtype=torch.float64)
    return Code(pre_BK=gate_BK, gate_BK=gate_BK, z_BK=gate_BK, index_BK=index_BK, width=F, overflow=dense.overflow)


def by_pairs(gate_BF: Tensor, w_FD: Tensor, rows: slice) -> tuple[list[Tensor], list[int]]:
    """Per row, the sum of squared cosines over ordered pairs of active features, and the number of pairs."""
    sums, counts = [], []
    for gate_F in gate_BF:
        on = [f for f in range(rows.start, rows.stop) if gate_F[f] > 0]
        pairs = [(i, j) for i in on for j in on if i != j]
        cosine = torch.nn.functional.cosine_similarity
        sums.append(sum((cosine(w_FD[i], w_FD[j], dim=0) ** 2 for i, j in pairs), w_FD.new_zeros(())))
        counts.append(len(pairs))
    return sums, counts


@pytest.mark.parametrize("rows", [ALL, slice(0, 10), slice(10, F)])
@pytest.mark.parametrize("direction", [same, stretched])
@pytest.mark.parametrize("form", [lambda c: c, listed])
@pytest.mark.parametrize("by", [reference, coherence])
def test_coactivation_against_every_pair(
    rows: slice, direction: Callable[[White], Tensor], form: Callable[[Code], Code], by: ModuleType
) -> None:
    built, dense = sae(), code()
    sample_R = torch.tensor([*range(B), 7, 7, 0])
    ours = by.coactivation(form(dense), built, sample_R, rows, direction, torch.Generator())
    (gradient,) = torch.autograd.grad(ours, built.W_dec_FD)
    sums, counts = by_pairs(dense.gate_BK[sample_R], direction(White(built.W_dec_FD)), rows)
    means = [s / n for s, n in zip(sums, counts, strict=True) if n]
    plain = torch.stack(means).mean()
    assert float((ours - plain).detach()) == pytest.approx(0.0, abs=1e-12)
    (wanted,) = torch.autograd.grad(plain, built.W_dec_FD)
    assert torch.allclose(gradient, wanted, atol=1e-12)


@pytest.mark.parametrize("by", [reference, coherence])
def test_coactivation_gradient_is_the_derived_one(by: ModuleType) -> None:
    """dJ_b / dM_b = 4 (M M' - I) M / (k (k - 1)), chained through the normalisation of the rows."""
    built, dense = sae(), code()
    sample_R = torch.tensor([20])
    value = by.coactivation(dense, built, sample_R, ALL, same, torch.Generator())
    value.backward()
    on = dense.gate_BK[20].nonzero()[:, 0]
    w_KD = built.W_dec_FD.detach()[on]
    norm_K1 = w_KD.norm(dim=1, keepdim=True)
    m_KD = w_KD / norm_K1
    k = len(on)
    g_KD = 4 * (m_KD @ m_KD.T - torch.eye(k, dtype=torch.float64)) @ m_KD / (k * (k - 1))
    wanted = (g_KD - m_KD * (m_KD * g_KD).sum(1, keepdim=True)) / norm_K1
    assert built.W_dec_FD.grad is not None
    assert torch.allclose(built.W_dec_FD.grad[on], wanted, atol=1e-12)


@pytest.mark.parametrize("form", [lambda c: c, listed])
@pytest.mark.parametrize("by", [reference, coherence])
def test_rows_without_a_pair_give_zero_and_keep_a_graph(form: Callable[[Code], Code], by: ModuleType) -> None:
    built = sae()
    value = by.coactivation(form(code()), built, torch.arange(6), ALL, same, torch.Generator())
    value.backward()
    assert float(value.detach()) == 0.0
    assert built.W_dec_FD.grad is not None
    assert not bool(built.W_dec_FD.grad.any())


def test_positions_count_within_each_row() -> None:
    place_N, count_B = reference.positions(torch.tensor([0, 0, 2, 2, 2, 4]), 6)
    assert place_N.tolist() == [0, 1, 0, 1, 2, 0]
    assert count_B.tolist() == [2, 0, 3, 0, 1, 0]


def test_a_cpu_does_not_reduce() -> None:
    assert not reference.reduces(torch.device("cpu"))


@pytest.mark.gpu
def test_reduced_products_keep_float32_results() -> None:
    """Operands rounded to bfloat16, sums and gradients in float32: equal to the product of the rounded operands."""
    a, b = (torch.randn(n, m, device="cuda", requires_grad=True) for n, m in ((64, 256), (256, 128)))
    grad = torch.randn(64, 128, device="cuda")
    out = reference.matmul(a, b, "bfloat16")
    out.backward(grad)
    ra, rb, rg = (x.detach().bfloat16().double() for x in (a, b, grad))
    for ours, wanted in ((out.detach(), ra @ rb), (a.grad, rg @ rb.T), (b.grad, ra.T @ rg)):
        assert ours is not None
        assert ours.dtype == torch.float32
        assert torch.allclose(ours.double(), wanted, rtol=1e-5, atol=1e-4)


def test_thinning_is_uniform_and_keeps_short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair of a long row stays equally often, so the mean over pairs is not biased."""
    monkeypatch.setattr(reference, "GRAM", 3)
    row_N = torch.tensor([0] * 6 + [1] * 2 + [3] * 3)
    feature_N = torch.arange(11)
    draw = torch.Generator().manual_seed(0)
    together = torch.zeros(6, 6)
    for _ in range(4000):
        rows, features = reference.thinned(row_N, feature_N, 4, draw)
        assert rows.tolist() == [0, 0, 0, 1, 1, 3, 3, 3]
        assert sorted(features[3:].tolist()) == [6, 7, 8, 9, 10]
        kept = features[:3]
        together[kept[:, None], kept] += 1
    share = together[~torch.eye(6, dtype=torch.bool)] / 4000
    assert torch.allclose(share, torch.full_like(share, 3 * 2 / (6 * 5)), atol=0.03)


def test_products_are_as_before_after_a_block() -> None:
    before = torch.get_float32_matmul_precision()
    with reference.tensor_cores("bfloat16"):
        assert torch.get_float32_matmul_precision() == "high"
    with reference.tensor_cores("float32"):
        assert torch.get_float32_matmul_precision() == before
    assert torch.get_float32_matmul_precision() == before


def test_the_closed_gradient_is_that_of_finite_differences() -> None:
    rows_UD = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    which_N, slot_N = torch.tensor([0, 1, 2, 1, 4, 3]), torch.tensor([0, 1, 2, 3, 4, 6])  # rows of 3, 2 and 1 features
    k_R = torch.tensor([3, 2, 1])
    assert torch.autograd.gradcheck(lambda x: coherence._Coherence.apply(x, which_N, slot_N, k_R, 3), rows_UD)
