"""Terms: the kit's checks, and each value against its formula."""

import math
from typing import Any, cast

import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spalf.core.values import Clock, View, White
from spalf.errors import RecipeError, RunError
from spalf.parts.activation import Gated, GatedActivator, JumpReLU
from spalf.parts.kernel import TorchOps
from spalf.parts.term import (
    L0,
    L1,
    AuxK,
    Discretization,
    FrameEnergy,
    GatedAux,
    L0Quadratic,
    Mse,
    Nested,
    PreActivation,
    RelativeMse,
)
from spalf.testing import conform, toy_plan
from spalf.testing.toy import toy_view

EVERY = (L0, L1, AuxK, Discretization, FrameEnergy, GatedAux, L0Quadratic, Mse, Nested, PreActivation, RelativeMse)


@pytest.mark.parametrize("check", [check for cls in EVERY for check in conform(cls)])
def test_conforms(check) -> None:
    check()


def test_l0_is_a_ratio_and_moves_thresholds_alone() -> None:
    view = toy_view()
    value = L0(target=5).value(view)
    value.backward()
    assert float(value.detach()) == pytest.approx(int((view.forward.code.z_BK > 0).sum()) / 64 / 5)
    moved = {n for n, p in view.sae.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert moved == {"_activator.log_threshold_F"}
    gradient_F = dict(view.sae.named_parameters())["_activator.log_threshold_F"].grad
    assert gradient_F is not None
    assert bool((gradient_F <= 0).all()), "a higher threshold cannot raise the count"


def test_l1_cannot_be_lowered_by_rescaling() -> None:
    """Codes by c with decoder rows, or the gain, by 1/c: the same reconstruction, the same value."""
    view = toy_view()
    before = float(L1(target=4).value(view).detach())
    halved = evolve(view.forward.code, z_BK=view.forward.code.z_BK / 2)
    smaller = evolve(view, forward=evolve(view.forward, code=halved))
    with torch.no_grad():
        view.sae.W_dec_FD.mul_(2)
    assert float(L1(target=4).value(smaller).detach()) == pytest.approx(before, rel=1e-5)
    with torch.no_grad():
        view.sae.W_dec_FD.div_(2)
        view.sae.log_gain.fill_(math.log(2))
    assert float(L1(target=4).value(smaller).detach()) == pytest.approx(before, rel=1e-5)


def test_l1_against_a_loop() -> None:
    view = toy_view(rows=3)
    z_BF, w_FD = view.forward.code.dense().detach(), view.sae.W_dec_FD.detach()
    wanted = sum(float(z_BF[b, f] * w_FD[f].norm()) for b in range(3) for f in range(48)) / 3 / 7
    assert float(L1(target=7).value(view).detach()) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("progress", "ramp"), [(0.0, 0.0), (0.8, 0.0), (0.9, 0.5), (1.0, 1.0)])
def test_discretization_ramps(progress: float, ramp: float) -> None:
    view = toy_view()
    at = evolve(view, clock=Clock(step=round(1000 * progress), total=1000))
    full = Discretization(weight=1.0, start=0.0).value(evolve(view, clock=Clock(step=1, total=1)))
    value = Discretization(weight=3.0).value(at).detach()
    assert float(value) == pytest.approx(3 * ramp * float(full.detach()), rel=1e-5)


def test_discretization_reaches_inactive_positive_entries_alone() -> None:
    view = toy_view()
    code = view.forward.code
    (gradient_BF,) = torch.autograd.grad(Discretization().value(view), code.pre_BK)
    inside = (code.pre_BK > 0) & (code.pre_BK < view.sae.activator.threshold_F())
    assert 0 < int(inside.sum()) < inside.numel()
    assert torch.equal(gradient_BF != 0, inside)
    variance_F = code.pre_BK.detach().var(dim=0, correction=0)
    wanted = 2 * code.pre_BK.detach() * inside / variance_F / inside.numel()
    assert torch.allclose(gradient_BF, wanted, rtol=1e-4, atol=1e-9)


def test_discretization_refuses_a_list() -> None:
    with pytest.raises(RunError, match="dense code"):
        Discretization().value(toy_view(dense=False, ops=TorchOps(code="compact"), activation=JumpReLU()))


def test_frame_energy_is_zero_for_a_tight_frame() -> None:
    view = toy_view()
    with torch.no_grad():
        view.sae.W_dec_FD[view.sae.rows["free"]] = torch.linalg.qr(torch.randn(32, 12)).Q
    assert float(FrameEnergy().value(view).detach()) == pytest.approx(0.0, abs=1e-9)


@given(seed=st.integers(0, 20))
def test_frame_energy_has_the_published_gradient(seed: int) -> None:
    """(4 / t) (Phi - (<Phi, A> / t) I) D with A = DD', t = tr A, Phi = A / t - I / d; scaled by weight / d."""
    view = toy_view()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        view.sae.W_dec_FD.copy_(torch.randn(48, 12, generator=draw))
    FrameEnergy(weight=0.3).value(view).backward()
    d_DA = view.sae.W_dec_FD.detach()[16:].double().T
    a_DD, eye = d_DA @ d_DA.T, torch.eye(12, dtype=torch.float64)
    t = a_DD.trace()
    phi = a_DD / t - eye / 12
    wanted = 0.3 / 12 * 4 / t * (phi - (phi * a_DD).sum() / t * eye) @ d_DA
    found = view.sae.W_dec_FD.grad
    assert found is not None
    assert not bool(found[:16].any())
    assert torch.allclose(found[16:].T.double(), wanted, rtol=1e-3, atol=1e-7)


def test_frame_energy_names_the_strata_it_does_not_find() -> None:
    with pytest.raises(RunError, match="anchored, free"):
        FrameEnergy(stratum="fre").value(toy_view())


# ------------------------------------------------------------------------------------------- weights and warm-up
@pytest.mark.parametrize(
    ("term", "plain"), [(L0, L0(target=3)), (L1, L1(target=3)), (L0Quadratic, L0Quadratic(target=3))]
)
def test_the_weight_rises_from_zero(term: type, plain: Any) -> None:
    view = toy_view()
    whole = float(plain.value(view).detach())
    for step, share in ((0, 0.0), (25, 0.25), (100, 1.0), (500, 1.0)):
        at = evolve(view, clock=Clock(step=step, total=1000))
        value = term(target=3, weight=2.5, warmup=100).value(at)
        assert float(value.detach()) == pytest.approx(2.5 * share * whole)
        assert value.requires_grad


@pytest.mark.parametrize("use", ["l0", "l1", "l0_quadratic"])
def test_a_weight_that_is_never_reached_is_refused(use: str) -> None:
    options = {f"term__{use}": "{ warmup = 100 }", "phase__fit__terms": f'["{use}"]'}
    with pytest.raises(RecipeError, match=rf"term.{use}.warmup: is 100 steps, of 100 in all"):
        toy_plan(**options)
    assert toy_plan(**{**options, f"term__{use}": "{ warmup = 99 }"}).terms == (use,)


def test_l0_quadratic_over_the_batch_and_per_row() -> None:
    view = toy_view()
    l0_B = view.forward.code.l0_B().detach()
    over_batch, each = (float(L0Quadratic(target=5, each=e).value(view).detach()) for e in (False, True))
    assert over_batch == pytest.approx((float(l0_B.mean()) / 5 - 1) ** 2, rel=1e-5)
    assert each == pytest.approx(float(((l0_B / 5 - 1) ** 2).mean()), rel=1e-5)
    assert each > over_batch


def test_l0_quadratic_pulls_from_both_sides_and_not_at_the_target() -> None:
    view = toy_view()
    l0 = float(view.forward.code.l0_B().detach().mean())
    threshold = dict(view.sae.named_parameters())["_activator.log_threshold_F"]
    signs = []
    for target in (l0 / 2, l0, 2 * l0):
        # a target is whole in a recipe; the sides of it are what is tested here
        (gradient_F,) = torch.autograd.grad(
            L0Quadratic(target=1).value(scaled(view, 1 / target)), threshold, retain_graph=True
        )
        signs.append(float(gradient_F.sum()))
    assert signs[0] < 0 < signs[2]
    assert abs(signs[1]) < 1e-4 * signs[2]


def scaled(view: View, factor: float) -> View:
    """The view with every gate times a factor: L0 in another unit."""
    code = evolve(view.forward.code, gate_BK=view.forward.code.gate_BK * factor)
    return evolve(view, forward=evolve(view.forward, code=code))


def test_l1_of_the_gate() -> None:
    view = toy_view(activation=Gated())
    activator = cast(GatedActivator, view.sae.activator)
    pi_BF = view.forward.code.pre_BK + activator.b_gate_F
    wanted = (pi_BF.relu() * view.sae.W_dec_FD.norm(dim=1)).sum(1).mean() / 4
    assert float(L1(target=4, of="gate").value(view).detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    L1(target=4, of="gate").value(view).backward()
    assert activator.b_gate_F.grad is not None
    assert activator.b_mag_F.grad is None


@pytest.mark.parametrize("term", [L1(target=4, of="gate"), GatedAux()])
def test_what_reads_a_gate_wants_one(term: Any) -> None:
    with pytest.raises(RunError, match="this activation has none"):
        term.value(toy_view())
    for use, complaint in (("jumprelu", "reads the gate"), ("gated", None)):
        settings = {"term__l1": '{ use = "l1", of = "gate" }', "term__gated_aux": "{}"}
        terms = '["l1", "gated_aux"]'
        options = {"activation": f'{{ use = "{use}" }}', "phase__fit__terms": terms, **settings}
        if complaint is None:
            assert toy_plan(**options).terms == ("gated_aux", "l1")
        else:
            with pytest.raises(RecipeError, match=complaint) as caught:
                toy_plan(**options)
            assert [p.path for p in caught.value.problems] == ["term.l1", "term.gated_aux"]


# ------------------------------------------------------------------------------------------------------- reconstruction
def errors(view: View) -> Tensor:
    return (view.forward.white_BD - view.forward.white_hat_BD).detach()


def test_mse_sums_over_dimensions_or_averages() -> None:
    view = toy_view()
    wanted = float(errors(view).square().sum(1).mean())
    assert float(Mse().value(view).detach()) == pytest.approx(wanted, rel=1e-5)
    assert float(Mse(weight=3.0, reduce="mean").value(view).detach()) == pytest.approx(3 * wanted / 12, rel=1e-5)


@pytest.mark.parametrize("space", ["raw", "white"])
def test_relative_mse_is_a_share_of_variance(space: str) -> None:
    view = toy_view()
    to = view.metric.raw_direction if space == "raw" else lambda v: v
    power = float(to(White(errors(view))).square().sum(1).mean())
    own = to(White(view.forward.white_BD - view.forward.white_BD.mean(0))).square().sum(1).mean()
    data, batch = (float(RelativeMse(space=space, over=o).value(view).detach()) for o in ("data", "batch"))
    assert data == pytest.approx(power / float(view.metric.variance(space)), rel=1e-5)
    assert batch == pytest.approx(power / float(own), rel=1e-5)


def test_relative_mse_of_nothing_is_one() -> None:
    """A reconstruction by the mean explains nothing: the value is 1, whatever the space."""
    view = toy_view(rows=4096)
    blank = evolve(view, forward=evolve(view.forward, white_hat_BD=torch.zeros_like(view.forward.white_BD)))
    for space in ("raw", "white"):
        assert float(RelativeMse(space=space).value(blank)) == pytest.approx(1.0, rel=0.1)


def test_nested_against_decoding_each_prefix() -> None:
    view = toy_view()
    sae, code = view.sae, view.forward.code
    with torch.no_grad():
        sae.b_dec_D.add_(0.3)
        sae.log_gain.add_(0.2)
    view = evolve(view, forward=evolve(view.forward, white_hat_BD=sae.decode(code)))
    z_BF, y_BD = code.dense().detach(), view.forward.white_BD
    parts = []
    for end in (12, 24, 48):
        hat_BD = sae.log_gain.exp() * z_BF[:, :end] @ sae.W_dec_FD[:end] + sae.b_dec_D
        parts.append(float((y_BD - hat_BD).detach().square().sum(1).mean()))
    sizes = (0.25, 0.5, 1.0)
    assert float(Nested(sizes=sizes).value(view).detach()) == pytest.approx(sum(parts), rel=1e-5)
    weighted = Nested(sizes=sizes, weights=(1.0, 2.0, 4.0), average=True).value(view)
    assert float(weighted.detach()) == pytest.approx((parts[0] + 2 * parts[1] + 4 * parts[2]) / 3, rel=1e-5)
    mean = float(Nested(sizes=sizes, reduce="mean").value(view).detach())
    assert mean == pytest.approx(sum(parts) / 12, rel=1e-5)
    assert float(Nested(sizes=(1.0,)).value(view).detach()) == pytest.approx(
        float(Mse().value(view).detach()), rel=1e-6
    )


@pytest.mark.parametrize("sizes", [(), (0.0, 1.0), (0.5, 0.5, 1.0), (0.25, 0.5), (0.5, 0.25, 1.0), (0.5, 1.5)])
def test_sizes_rise_to_one(sizes: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must rise from above 0 to 1"):
        Nested(sizes=sizes)


@pytest.mark.parametrize(
    ("option", "complaint"),
    [("sizes = [0.01, 1.0]", "come to 0, 64"), ("sizes = [0.5, 0.501, 1.0]", "32, 32"), ("weights = [1.0]", "has 1")],
)
def test_nested_is_checked_before_a_run(option: str, complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        toy_plan(term__nested=f"{{ {option} }}", phase__fit__terms='["l0", "nested"]')


def test_gated_aux_reconstructs_from_the_gate_and_leaves_the_decoder_alone() -> None:
    view = toy_view(activation=Gated())
    activator = cast(GatedActivator, view.sae.activator)
    with torch.no_grad():
        view.sae.b_dec_D.add_(0.2)
    pi_BF = (view.forward.code.pre_BK + activator.b_gate_F).relu()
    wanted = (view.forward.white_BD - pi_BF @ view.sae.W_dec_FD - view.sae.b_dec_D).square().sum(1).mean()
    for frozen in (True, False):
        view.sae.W_dec_FD.grad = view.sae.b_dec_D.grad = view.sae.log_gain.grad = None
        value = GatedAux(frozen=frozen).value(view)
        assert float(value.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
        value.backward(retain_graph=True)
        held = (view.sae.W_dec_FD.grad, view.sae.b_dec_D.grad, view.sae.log_gain.grad)
        assert [g is None for g in held] == [frozen] * 3
    assert activator.b_gate_F.grad is not None


# ------------------------------------------------------------------------------------------------------ dead features
def test_aux_k_against_a_loop() -> None:
    """The two most active of the last three features try to explain what the rest has left over."""
    view = toy_view(rows=16)
    view = evolve(view, silent_F=torch.where(torch.arange(48) < 45, 0, 1001))
    sae, pre_BF, e_BD = view.sae, view.forward.code.pre_BK.detach(), errors(view)
    total = 0.0
    for b in range(16):
        order = sorted(range(45, 48), key=lambda f: -float(pre_BF[b, f]))[:2]
        hat_D = sum(pre_BF[b, f].clamp(min=0) * sae.W_dec_FD[f].detach() for f in order)
        total += float((e_BD[b] - hat_D).square().sum()) / 16
    power = float((e_BD - e_BD.mean(0)).square().sum(1).mean())
    value = AuxK(weight=0.5, k=2, window=1000).value(view)
    assert float(value.detach()) == pytest.approx(0.5 * total / power, rel=1e-4)
    plain = AuxK(k=6, window=1000, normalise=False)
    whole, few = (float(part.value(view).detach()) for part in (plain, evolve(plain, few=True)))
    assert few == pytest.approx(whole * 3 / 6, rel=1e-6)
    value.backward()
    moved_F = sae.W_enc_FD.grad.any(dim=1) | sae.W_dec_FD.grad.any(dim=1)
    assert bool(moved_F[45:].any())
    assert not bool(moved_F[:45].any()), "a feature that is alive has a gradient: the error is not held still"
    assert sae.b_dec_D.grad is None or not bool(sae.b_dec_D.grad.any())


def test_aux_k_takes_pre_activations_as_they_are_where_asked() -> None:
    view = toy_view(rows=8)
    with torch.no_grad():
        view.sae.b_enc_F.fill_(-100.0)
    view = toy_view(rows=8, sae=view.sae)
    error = float(errors(view).square().sum(1).mean())
    part = AuxK(weight=1.0, window=1000, normalise=False)
    assert float(part.value(view).detach()) == pytest.approx(error, rel=1e-5)
    assert float(evolve(part, rectify=False).value(view).detach()) > 2 * error


def test_without_a_dead_feature_or_an_error_the_term_is_zero_and_finite() -> None:
    view = toy_view()
    none = evolve(view, silent_F=torch.zeros(48, dtype=torch.int64))
    for part in (AuxK(window=1000), PreActivation(window=1000)):
        value = part.value(none)
        assert float(value.detach()) == 0.0
        assert value.requires_grad
    exact = evolve(view, forward=evolve(view.forward, white_hat_BD=view.forward.white_BD))
    with torch.no_grad():
        view.sae.W_dec_FD.zero_()
    value = AuxK(window=1000).value(exact)
    value.backward()
    assert float(value.detach()) == 0.0
    assert all(bool(p.grad.isfinite().all()) for _, p in view.sae.named_parameters() if p.grad is not None)


def test_a_plan_settles_what_dead_means() -> None:
    plan = toy_plan(term__aux_k="{}", term__pre_activation="{}", phase__fit__terms='["l0", "aux_k", "pre_activation"]')
    aux, pull = plan.recipe.term["aux_k"], plan.recipe.term["pre_activation"]
    assert isinstance(aux, AuxK)
    assert isinstance(pull, PreActivation)
    assert (aux.k, aux.window, pull.window) == (8, 2560, 2560)
    assert {row.path: row.value for row in plan.derived if row.path.startswith("term.")} == {
        "term.aux_k.k": 8,
        "term.aux_k.window": 2560,
        "term.pre_activation.window": 2560,
    }


def test_pre_activation_against_its_formula() -> None:
    view = toy_view()
    theta_F, length_F = view.sae.activator.threshold_F(), view.sae.W_dec_FD.norm(dim=1)
    short_BF = (theta_F - view.forward.code.pre_BK).relu() * length_F
    for part, rows in (
        (PreActivation(weight=2.0, window=1000), slice(42, 48)),
        (PreActivation(weight=2.0, alive=True), slice(48)),
    ):
        value = part.value(view)
        assert float(value.detach()) == pytest.approx(2 * float(short_BF.detach()[:, rows].sum(1).mean()), rel=1e-5)
    value.backward()
    assert dict(view.sae.named_parameters())["_activator.log_threshold_F"].grad is not None


@pytest.mark.parametrize("part", [AuxK(window=1000), PreActivation(window=1000)])
def test_dead_features_are_not_in_a_list(part: Any) -> None:
    with pytest.raises(RunError, match="dense code"):
        part.value(toy_view(dense=False, ops=TorchOps(code="compact"), activation=JumpReLU()))
