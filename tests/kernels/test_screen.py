"""Screening misses no entry, whatever is rounded, and offers few that are none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spalf.core.values import Machine, White
from spalf.kernels import compact, reference, screen
from spalf.nn import StratifiedAutoencoder
from spalf.parts.activation import JumpReLU


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    shape=st.sampled_from([(1, 1, 8), (7, 5, 64), (33, 192, 256), (3, 700, 40)]),
    scale=st.sampled_from([1e-4, 1.0, 300.0]),
    bound=st.sampled_from([-2.0, 0.0, 0.5, 2.0]),
    seed=st.integers(0, 1000),
)
def test_no_entry_above_the_bound_is_missed(shape: tuple[int, int, int], scale: float, bound: float, seed: int) -> None:
    """Bounds are put a hair below entries themselves, where rounding decides; rows differ in length by decades."""
    rows, dim, width = shape
    x_CD = scale * drawn(seed, rows, dim) * 10 ** drawn(seed + 1, rows, 1)
    weight_FD = drawn(seed + 2, width, dim)
    exact_CF = x_CD.double() @ weight_FD.double().T
    least_F = exact_CF[seed % rows].float() - 1e-6 * x_CD[seed % rows].norm()
    least_F[::2] = bound * scale
    found_N = screen.candidates(x_CD, weight_FD, least_F)
    above_N = (exact_CF > least_F.double()).reshape(-1).nonzero()[:, 0]
    assert torch.equal(found_N, found_N.unique())
    assert bool(torch.isin(above_N, found_N).all())


def test_few_are_offered_that_are_none() -> None:
    """At 2 standard deviations and d = 192 the margin is an eighth of one at most."""
    x_CD, weight_FD = drawn(0, 256, 192), torch.nn.functional.normalize(drawn(1, 512, 192), dim=1)
    found = screen.candidates(x_CD, weight_FD, torch.full((512,), 2.0)).numel()
    wider = int((x_CD @ weight_FD.T > 2.0 - 0.17).sum())
    assert int((x_CD @ weight_FD.T > 2.0).sum()) <= found <= wider


def test_a_screened_code_is_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same lists in blocks of rows, and values up to the order of a sum."""
    monkeypatch.setattr(compact, "_BLOCK", 64 * 100)
    sae = StratifiedAutoencoder(
        24, {"a": 100}, JumpReLU().build(100), Machine(device=torch.device("cpu"), ops=reference.ReferenceOps())
    )
    for i, p in enumerate(sae.parameters()):
        p.data.copy_(0.3 * drawn(i, *p.shape))
    white_BD = White(drawn(99, 150, 24))
    codes = []
    for is_screened in (False, True):
        monkeypatch.setattr(screen, "pays", lambda *_, answer=is_screened: answer)
        codes.append(compact.encode(white_BD, sae))
    plain, screened = codes
    assert plain is not None
    assert screened is not None
    assert torch.equal(plain.index_BK, screened.index_BK)  # type: ignore[arg-type]
    assert bool((plain.index_BK != 100).any())
    torch.testing.assert_close(screened.pre_BK, plain.pre_BK, rtol=1e-5, atol=1e-6)


def test_only_large_products_of_float32_are_screened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "_multiplies_bfloat16", lambda: True)
    large_CD, weight_FD = torch.empty(1 << 10, 1 << 8), torch.empty(1 << 8, 1 << 8)
    assert screen.pays(large_CD, weight_FD)
    assert not screen.pays(large_CD[:-1], weight_FD)
    assert not screen.pays(large_CD.double(), weight_FD.double())
    assert not screen.pays(torch.empty(1 << 10, 4096), torch.empty(1 << 8, 4096))
    monkeypatch.setattr(screen, "_multiplies_bfloat16", lambda: False)
    assert not screen.pays(large_CD, weight_FD)
