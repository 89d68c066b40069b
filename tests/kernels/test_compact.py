"""Lists equal dense codes: values and every gradient, on awkward shapes and on rows with nothing or everything."""

import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spalf.core.values import Code, Machine, White
from spalf.kernels import compact, layout, reference
from spalf.kernels.layout import places
from spalf.nn import StratifiedAutoencoder
from spalf.parts.activation import JumpReLU, JumpReLUMoreau

DOUBLE = torch.float64


def built(cls: type, rows: int, dim: int, width: int, theta: float, eps: float) -> tuple[StratifiedAutoencoder, White]:
    """Random weights in float64; the first row's pre-activations are all far below, the second's all far above."""
    machine = Machine(device=torch.device("cpu"), ops=reference.ReferenceOps())
    sae = StratifiedAutoencoder(dim, {"a": width}, cls().build(width), machine).double()
    draw = torch.Generator().manual_seed(rows * 31 + dim * 7 + width)
    for p in sae.parameters():
        p.data.copy_(torch.randn(p.shape, generator=draw, dtype=DOUBLE))
    activator = sae.activator
    assert isinstance(activator, torch.nn.Module)
    activator.log_threshold_F.data.copy_(torch.tensor(theta).log() + 0.1 * activator.log_threshold_F.data)
    activator.bandwidth_F.fill_(eps)
    white_BD = torch.randn(rows, dim, generator=draw, dtype=DOUBLE)
    sae.W_enc_FD.data[:, 0] = 1.0
    white_BD[0, 0] = -1e3
    white_BD[1:2, 0] = 1e3
    return sae, White(white_BD.requires_grad_(True))


def gradients(sae: StratifiedAutoencoder, white_BD: White, code: Code, hat_BD: White) -> list[Tensor]:
    """Of a loss that reaches z, the gate and the listed pre-activations."""
    weight_BD = torch.linspace(-1, 2, hat_BD.numel(), dtype=DOUBLE).reshape(hat_BD.shape)
    inside = code.pre_BK * (code.gate_BK.detach() > 0)
    loss = (weight_BD * hat_BD).sum() + (code.l0_B() ** 2).sum() + 0.1 * (inside**2).sum()
    wanted = [white_BD, sae.W_enc_FD, sae.b_enc_F, sae.W_dec_FD, *sae.activator.parameters()]  # type: ignore[attr-defined]
    return list(torch.autograd.grad(loss, wanted))


@given(
    shape=st.sampled_from([(1, 1, 1), (1, 17, 1023), (2, 5, 7), (3, 4, 64), (9, 17, 33), (130, 3, 5)]),
    theta=st.sampled_from([0.05, 1.0, 3.0, 20.0]),
    eps=st.sampled_from([0.01, 1.0, 8.0]),
    cls=st.sampled_from([JumpReLU, JumpReLUMoreau]),
)
def test_equals_the_dense_code(shape: tuple[int, int, int], theta: float, eps: float, cls: type) -> None:
    sae, white_BD = built(cls, *shape, theta, eps)
    dense = reference.encode(white_BD, sae)
    ours = compact.encode(white_BD, sae)
    assert ours is not None
    hat_BD, dense_hat_BD = compact.decode(ours, sae), reference.decode(dense, sae)
    for a, b in (
        (ours.dense(), dense.dense()),
        (ours.scatter(ours.gate_BK), dense.gate_BK),
        (hat_BD, dense_hat_BD),
        (ours.fired_F(), dense.fired_F()),
    ):
        assert torch.allclose(a.double(), b.double(), rtol=1e-12, atol=1e-9)
    pairs = zip(gradients(sae, white_BD, ours, hat_BD), gradients(sae, white_BD, dense, dense_hat_BD), strict=True)
    for a, b in pairs:
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-9 * float(b.abs().max() + 1))


def test_a_gradient_at_padding_goes_nowhere() -> None:
    sae, white_BD = built(JumpReLU, 9, 17, 33, 1.0, 1.0)
    ours = compact.encode(white_BD, sae)
    assert ours is not None
    assert ours.index_BK is not None
    listed_BK = ours.index_BK < 33
    assert not listed_BK.all()
    wanted = [white_BD, sae.W_enc_FD, sae.b_enc_F]
    compact.decode(ours, sae)
    found = torch.autograd.grad(ours.pre_BK.sum(), wanted, retain_graph=True)
    right = torch.autograd.grad((ours.pre_BK * listed_BK).sum(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_no_row_has_a_gradient_too() -> None:
    sae, white_BD = built(JumpReLU, 3, 4, 33, 1.0, 1.0)
    ours = compact.encode(White(white_BD[:0]), sae)
    assert ours is not None
    loss = compact.decode(ours, sae).sum() + ours.l0_B().sum() + ours.pre_BK.sum()
    loss.backward()
    assert sae.W_enc_FD.grad is not None
    assert not sae.W_enc_FD.grad.any()


def test_counts_by_row_are_of_the_code_that_is_asked() -> None:
    sae, white_BD = built(JumpReLU, 9, 17, 33, 1.0, 1.0)
    ours = compact.encode(white_BD, sae)
    assert ours is not None
    compact.decode(ours, sae)
    half_BK = ours.gate_BK.detach().clone()
    half_BK[:4] = 0.0
    other = evolve(ours, gate_BK=half_BK)
    wanted_B = other.scatter(half_BK)[:, 3:20].sum(1)
    assert torch.equal(compact.per_row(other, slice(3, 20)), wanted_B)


def test_what_surely_exceeds_the_limit_is_not_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, white_BD = built(JumpReLU, 64, 17, 33, 0.05, 8.0)
    monkeypatch.setattr(compact.screen, "pays", lambda *_: True)
    monkeypatch.setattr(compact.screen, "candidates", lambda block_CD, *_: torch.arange(block_CD.shape[0] * 33))
    monkeypatch.setattr(layout.Layout, "dots", lambda *_: pytest.fail("computed"))
    assert compact.encode(white_BD, sae, limit=33 / 2 - 1) is None


@given(theta=st.sampled_from([0.05, 1.0, 3.0]), block=st.sampled_from([1, 64 * 33, 2**23]))
def test_lists_hold_what_is_above_reach_in_order(theta: float, block: int) -> None:
    """Whatever the rows that are scanned at a time."""
    sae, white_BD = built(JumpReLU, 150, 4, 33, theta, 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact, "_BLOCK", block)
        code = compact.encode(white_BD, sae)
    assert code is not None
    assert code.index_BK is not None
    pre_BF = reference.encode(white_BD, sae).pre_BK
    above_BF = pre_BF > sae.activator.reach_F()
    assert code.index_BK.shape[1] == int(above_BF.sum(1).max())
    for b in range(150):
        wanted = above_BF[b].nonzero()[:, 0]
        n = len(wanted)
        assert code.index_BK[b, :n].tolist() == wanted.tolist()
        assert torch.allclose(code.pre_BK[b, :n], pre_BF[b, wanted], rtol=1e-12)
        assert set(code.index_BK[b, n:].tolist()) <= {33}
        assert not bool(torch.cat([code.z_BK[b, n:], code.gate_BK[b, n:], code.pre_BK[b, n:]]).any())


def test_no_rows() -> None:
    sae, _ = built(JumpReLU, 2, 4, 9, 1.0, 0.5)
    code = compact.encode(White(torch.zeros(0, 4, dtype=DOUBLE)), sae)
    assert code is not None
    assert compact.decode(code, sae).shape == (0, 4)


def test_gives_up_where_lists_are_long() -> None:
    sae, white_BD = built(JumpReLU, 64, 4, 33, 0.05, 0.5)
    found = compact.encode(white_BD, sae)
    assert found is not None
    assert found.index_BK is not None
    per_row = float((found.index_BK < 33).sum()) / 64
    assert compact.encode(white_BD, sae, limit=per_row + 0.1) is not None
    assert compact.encode(white_BD, sae, limit=per_row - 0.1) is None


def test_an_input_without_graph_gets_no_gradient() -> None:
    sae, white_BD = built(JumpReLU, 8, 4, 33, 1.0, 0.5)
    plain = White(white_BD.detach())
    code = compact.encode(plain, sae)
    assert code is not None
    compact.decode(code, sae).sum().backward()
    assert plain.grad is None
    assert sae.W_enc_FD.grad is not None


def test_nan_is_not_lost() -> None:
    """A diverged run has to see it: a NaN gradient at one entry reaches the encoder."""
    sae, white_BD = built(JumpReLU, 8, 4, 33, 1.0, 0.5)
    code = compact.encode(White(white_BD.detach()), sae)
    assert code is not None
    (compact.decode(code, sae) * torch.nan).sum().backward()
    assert sae.W_enc_FD.grad is not None
    assert bool(sae.W_enc_FD.grad.isnan().any())


def test_nothing_dense_is_kept_for_the_backward() -> None:
    """No tensor of rows x features survives the forward: 1 GiB each at 4096 x 65536."""
    sae, white_BD = built(JumpReLU, 128, 4, 257, 4.0, 0.1)
    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        code = compact.encode(White(white_BD[2:].detach()), sae)
        assert code is not None
        compact.decode(code, sae)
    assert sizes
    assert max(sizes) < 126 * 257


def test_lists_that_encode_did_not_make_are_read() -> None:
    sae, white_BD = built(JumpReLU, 9, 17, 33, 1.0, 1.0)
    found = []
    for is_foreign in (False, True):
        code = compact.encode(white_BD, sae)
        assert code is not None
        assert code.index_BK is not None
        if is_foreign:
            code = evolve(code, index_BK=code.index_BK.clone())
        hat_BD = compact.decode(code, sae)
        found.append([hat_BD, *gradients(sae, white_BD, code, hat_BD)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@given(shape=st.sampled_from([(1, 8), (3, 5), (64, 64), (7, 16), (2, 4)]), share=st.sampled_from([0.0, 0.02, 0.5, 1.0]))
def test_a_mask_is_searched_whole(shape: tuple[int, int], share: float) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < share
    assert torch.equal(places(mask), mask.reshape(-1).nonzero()[:, 0])


@pytest.mark.parametrize("rows", [slice(0, 33), slice(5, 20)])
@pytest.mark.parametrize("is_decoded", [True, False])
def test_active_features_of_a_row_are_counted_within_a_stratum(rows: slice, is_decoded: bool) -> None:
    sae, white_BD = built(JumpReLU, 9, 17, 33, 1.0, 1.0)
    code = compact.encode(white_BD, sae)
    assert code is not None
    if is_decoded:
        compact.decode(code, sae)
    wanted_B = reference.encode(white_BD, sae).gate_BK.detach()[:, rows].sum(1)
    assert torch.equal(compact.per_row(code, rows), wanted_B)
    assert bool(wanted_B.any())


def test_a_slope_that_pushes_reaches_entries_that_are_off() -> None:
    """Of these the encoder's gradient may not be left out, though their code is 0."""
    sae, white_BD = built(JumpReLU, 9, 17, 33, 1.0, 1.0)
    dense, ours = reference.encode(white_BD, sae), compact.encode(white_BD, sae)
    assert ours is not None
    compact.decode(ours, sae)
    assert ours.index_BK is not None
    off_BK = (ours.index_BK < 33) & (ours.gate_BK.detach() == 0)
    (found_FD,) = torch.autograd.grad((ours.pre_BK * off_BK).sum(), sae.W_enc_FD)
    (wanted_FD,) = torch.autograd.grad((dense.pre_BK * ours.scatter(off_BK.double())).sum(), sae.W_enc_FD)
    assert bool(off_BK.any())
    torch.testing.assert_close(found_FD, wanted_FD)


@pytest.mark.parametrize("width", [40, (1 << 16) + 40])
def test_entries_are_sorted_by_feature(width: int) -> None:
    """By two ways, of which one has room for 16 bits alone."""
    feature_N = torch.randint(width - 40, width, (500,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(layout._order(feature_N, width), feature_N.argsort(stable=True))
