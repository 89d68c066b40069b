"""One function in several forms."""

import pytest
import torch
from attrs import evolve

from spalf import launch
from spalf.errors import ExchangeError
from spalf.exchange.dictionary import About, of_state

KINDS = ["relu", "jumprelu", "refined", "topk", "gated"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centred", [False, True])
def test_where_the_encoder_reads_from_changes_nothing(kind, centred, make, x_BD) -> None:
    one = make(kind, centred=centred)
    other = one.recentred(not centred)
    assert other.centred is not centred
    z_BF = one.encode(x_BD)
    assert 0 < int((z_BF > 0).sum()) < z_BF.numel()
    torch.testing.assert_close(other.encode(x_BD), z_BF, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(other.decode(z_BF), one.decode(z_BF), rtol=0, atol=0)
    assert one.recentred(centred) is one


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centred", [False, True])
def test_rounding_acts_on_what_is_left_of_the_mean(kind, centred, make) -> None:
    """Far from the origin, at b_dec, a rounded encoder says what the exact one says."""
    one = make(kind, centred=centred)
    one = evolve(one, b_dec_D=one.b_dec_D + 1000)
    exact = one if centred else evolve(one, b_enc_F=one.b_enc_F - one.W_enc_FD @ one.b_dec_D)
    near = exact.rounded(torch.float32)
    for name, tensor in near.tensors().items():
        assert torch.equal(tensor, tensor.float().double()), name
    x_BD = exact.b_dec_D + torch.randn(64, 6, dtype=torch.float64)
    found, wanted = near.encode(x_BD), exact.encode(x_BD)
    # A float32 step of a bias of this size is 1e-4. Entries at a threshold may go either way.
    assert float(((found - wanted).abs() < 1e-3).double().mean()) > 0.99
    coarse = evolve(exact, W_enc_FD=exact.W_enc_FD.to(torch.bfloat16).double())
    careless, careful = (float((d.encode(x_BD) - wanted).abs().mean()) for d in (coarse, exact.rounded(torch.bfloat16)))
    assert careful < (0.02 if centred else 0.05 * careless)


def test_a_refinement_is_a_step_down_the_error(make, x_BD) -> None:
    """By autograd: the error's gradient in z at the selected codes, half a step of it, on what is on."""
    one = make("refined")
    plain_BF = evolve(one, step_F=None).encode(x_BD).requires_grad_(True)
    (slope_BF,) = torch.autograd.grad((x_BD - one.decode(plain_BF)).square().sum(), plain_BF)
    moved_BF = (plain_BF - one.step_F * slope_BF / 2).clamp(min=0)
    z_BF = one.encode(x_BD)
    torch.testing.assert_close(z_BF, torch.where(plain_BF > 0, moved_BF, 0.0), rtol=0, atol=1e-12)
    assert not torch.allclose(z_BF, plain_BF, atol=1e-3)


def test_the_top_k_are_k(make, x_BD) -> None:
    z_BF = make("topk").encode(x_BD)
    assert int((z_BF > 0).sum(1).max()) == 4
    assert bool((z_BF >= 0).all())


@pytest.mark.parametrize(
    ("hook", "layer"),
    [("blocks.12.hook_resid_post", 12), ("model.layers.3", 3), ("transformer.h.0", 0), ("planted", None), ("", None)],
)
def test_the_layer_of_a_hook(hook: str, layer: int | None) -> None:
    assert About(hook=hook).layer == layer


def test_negative_thresholds_are_counted(make) -> None:
    one = make("jumprelu")
    one.refuse_negative_thresholds("SAELens")
    bad = evolve(one, threshold_F=one.threshold_F.clone().index_fill(0, torch.tensor([2, 5]), -0.1))
    with pytest.raises(ExchangeError, match="2 of 20 thresholds are negative, and SAELens rectifies"):
        bad.refuse_negative_thresholds("SAELens")


def test_numbers_that_are_not_finite_are_not_exported(run) -> None:
    _, plan, state = launch.closed(run)
    state.sae.b_dec_D.data[0] = torch.nan
    with pytest.raises(ExchangeError, match=r"not finite: .*b_dec"):
        of_state(plan, state, About())
