"""Constraints: the kit's checks, each value against its formula, budgets, and what refuses to be satisfied."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

from spalf.core.protocols import Constraint
from spalf.core.recipe import Plan
from spalf.core.values import Raw, Sequences, View, White
from spalf.engine.language import kl, patch_after_first
from spalf.errors import RecipeError, RunError
from spalf.parts.activation import BatchTopK, Gated, ReLU, TopK
from spalf.parts.constraint import Causal, CausalBlend, Drift, Faithfulness, L0Rate, L1Rate, Orthogonality
from spalf.parts.constraint.dictionary import _pairs_B
from spalf.parts.kernel import TorchOps
from spalf.testing import conform
from spalf.testing.primal import checks
from spalf.testing.toy import FACTS, ToyStream, toy_view

CLASSES = (Causal, CausalBlend, Drift, Faithfulness, L0Rate, L1Rate, Orthogonality)
SPACES = pytest.mark.parametrize("space", ["raw", "white"])


@pytest.mark.parametrize("check", [check for cls in CLASSES for check in conform(cls)])
def test_conforms(check) -> None:
    check()


@pytest.mark.parametrize(
    "check",
    [
        *checks(Faithfulness, Faithfulness(r2=0.9, space="white")),
        *checks(Orthogonality, Orthogonality(stratum="free", space="white")),
        *checks(Causal, Causal(recovered=0.9)),
        *checks(CausalBlend, CausalBlend(r2=0.9, live=True, space="white")),
        *checks(L1Rate, L1Rate(target=2.5)),
    ],
)
def test_conforms_with_other_options(check) -> None:
    check()


def number(value: Tensor) -> float:
    return float(value.detach())


def plan(**rows: int) -> Plan:
    """As much of a plan as a derived row reads."""
    recipe = type("Recipe", (), {"constraint": {}, "phases": ()})
    made: Plan = type("Plan", (), {"rows": rows, "facts": FACTS, "recipe": recipe})()
    return made


@pytest.mark.parametrize(
    ("part", "value", "formula"),
    [
        (Faithfulness(r2=0.75), None, "(1 - 0.75) * tr S"),
        (Faithfulness(r2=0.75, space="white"), None, "(1 - 0.75) * sum l / (l + alpha)"),
        (Drift(within=0.2), 0.04 * 16, "within^2 * anchored rows"),
        (Orthogonality(slack=2.0), 2 * 3 / 12, "slack * 3 / d_model"),
        (Causal(share=0.5), None, "0.5 * KL on entering"),
        (L0Rate(target=7), 7.0, "target"),
        (L1Rate(target=2.5), 2.5, "target"),
        (L1Rate(share=0.25), None, "0.25 * the value on entering"),
        (Causal(recovered=0.9), None, "(1 - 0.9) * KL of mean ablation"),
    ],
)
def test_derived_budgets(part: Constraint, value: float | None, formula: str) -> None:
    """What `spalf compile` prints is what the run then measures."""
    (row,) = part.derive(plan(anchored=16, free=32))  # type: ignore[attr-defined]
    assert (row.path, row.formula) == ("budget", formula)
    assert row.value == (None if value is None else pytest.approx(value))
    if value is not None:
        assert number(part.budget(toy_view())) == pytest.approx(value)


@pytest.mark.parametrize("part", [Drift(), Orthogonality(stratum="anchored")])
def test_a_recipe_without_the_stratum_is_refused(part: Drift | Orthogonality) -> None:
    with pytest.raises(RecipeError, match=r"anchored.*name one of free"):
        part.derive(plan(free=48))


# ---------------------------------------------------------------------------------------------------- faithfulness
def test_faithfulness_measures_model_space() -> None:
    view = toy_view()
    x_BD, hat_BD = view.batch.x_BD, view.reconstruct(view.batch.x_BD).detach()
    assert number(Faithfulness(r2=0.9).value(view)) == pytest.approx(
        float((x_BD - hat_BD).square().sum(1).mean()), rel=1e-4
    )


@SPACES
def test_predicting_the_mean_explains_nothing(space: str) -> None:
    """x_hat = mean costs the whole variance of its space, so g = value / budget - 1 is 1 / (1 - r2) - 1."""
    view = toy_view(rows=20000)
    mean = evolve(view, forward=evolve(view.forward, white_hat_BD=White(torch.zeros_like(view.forward.white_BD))))
    part = Faithfulness(r2=0.75, space=space)
    assert number(part.value(mean) / part.budget(mean)) == pytest.approx(4.0, rel=0.05)


# ----------------------------------------------------------------------------------------------------------- drift
def test_drift_is_zero_on_the_anchors_and_at_its_budget_at_their_tolerance() -> None:
    view = toy_view()
    part = Drift(within=0.2)
    anchors_AD = view.metric.white_direction(view.anchors["anchored"].directions_AD)
    unit_AD = anchors_AD / anchors_AD.norm(dim=1, keepdim=True)
    rows = view.sae.rows["anchored"]
    with torch.no_grad():
        view.sae.W_dec_FD[rows] = unit_AD
        assert float(part.value(view)) == pytest.approx(0.0, abs=1e-10)
        # every row away by 0.2, in any direction
        away_AD = torch.nn.functional.normalize(torch.randn(unit_AD.shape), dim=-1)
        view.sae.W_dec_FD[rows] = unit_AD + 0.2 * away_AD
        assert float(part.value(view) / part.budget(view)) == pytest.approx(1.0, rel=1e-5)


def test_drift_does_not_weigh_anchors_by_their_length() -> None:
    view = toy_view()
    anchor = view.anchors["anchored"]
    longer = evolve(anchor, directions_AD=Raw(anchor.directions_AD * torch.linspace(1, 50, 16)[:, None]))
    scaled = evolve(view, anchors={"anchored": longer})
    assert number(Drift().value(scaled)) == pytest.approx(number(Drift().value(view)), rel=1e-5)


def test_drift_moves_its_stratum_alone() -> None:
    view = toy_view()
    Drift().value(view).backward()
    gradient_FD = view.sae.W_dec_FD.grad
    assert gradient_FD is not None
    assert bool(gradient_FD[:16].any())
    assert not bool(gradient_FD[16:].any())


def test_drift_names_the_strata_with_anchors() -> None:
    with pytest.raises(RunError, match="anchored has"):
        Drift(stratum="free").value(toy_view())


# --------------------------------------------------------------------------------------------------- orthogonality
def pair_weighted(view: View, rows: slice, direction: Callable[[White], Tensor]) -> float:
    """The mean squared cosine over all pairs of the batch, one pair at a time."""
    w_FD = torch.nn.functional.normalize(direction(White(view.sae.W_dec_FD.detach())), dim=-1)
    total = count = 0.0
    for gate_F in view.forward.code.gate_BK.detach():
        on = [f for f in range(rows.start, rows.stop) if gate_F[f] > 0]
        total += sum(float(w_FD[i] @ w_FD[j]) ** 2 for i in on for j in on if i != j)
        count += len(on) * (len(on) - 1)
    return total / count


@SPACES
@pytest.mark.parametrize("stratum", ["", "free"])
def test_the_sampler_is_unbiased_over_400_draws(space: str, stratum: str) -> None:
    """Few rows per draw, so that a wrong weight shows; features drawn with replacement are off by a factor of 3."""
    view = toy_view()
    part = Orthogonality(sample=4, space=space, stratum=stratum)
    direction = view.metric.raw_direction if space == "raw" else lambda v: v
    wanted = pair_weighted(view, view.sae.rows[stratum] if stratum else slice(0, 48), direction)
    with torch.no_grad():
        draws = torch.tensor([float(part.value(view)) for _ in range(400)])
    error = float(draws.std()) / 20
    assert abs(float(draws.mean()) - wanted) < 4 * error
    assert error < 0.05 * wanted, "too noisy to tell"


def test_rows_are_drawn_by_their_pairs() -> None:
    """One row of ten parallel features among 63 rows of two orthogonal ones: 90 of 216 pairs have cosine 1."""
    view = toy_view()
    gate_BF = torch.zeros(64, 48)
    gate_BF[0, :10] = 1
    gate_BF[1:, 20:22] = 1
    with torch.no_grad():
        view.sae.W_dec_FD[:10] = torch.eye(12)[0]
        view.sae.W_dec_FD[20:22] = torch.eye(12)[:2]
    crafted = evolve(view, forward=evolve(view.forward, code=evolve(view.forward.code, gate_BK=gate_BF)))
    value = number(Orthogonality(sample=20_000, space="white").value(crafted))
    assert value == pytest.approx(90 / 216, abs=0.015)


def test_orthogonality_at_random_directions_is_a_third_of_its_budget() -> None:
    """The budget is 3 / d, random directions have a mean squared cosine of 1 / d."""
    view = toy_view()
    with torch.no_grad():
        view.sae.W_dec_FD.normal_()
    part = Orthogonality(sample=4000, space="white")
    assert number(part.value(view) / part.budget(view)) == pytest.approx(1 / 3, rel=0.1)
    assert number(Orthogonality(slack=2.0).budget(view)) == pytest.approx(6 / 12)


def test_orthogonality_of_a_batch_without_pairs_is_zero() -> None:
    view = toy_view()
    silent = evolve(view.forward.code, gate_BK=torch.zeros_like(view.forward.code.gate_BK))
    value = Orthogonality().value(evolve(view, forward=evolve(view.forward, code=silent)))
    value.backward()
    assert number(value) == 0.0


def test_pairs_of_a_list_are_those_of_the_dense_code() -> None:
    dense, listed = toy_view().forward.code, toy_view(dense=False, ops=TorchOps(code="compact")).forward.code
    assert listed.index_BK is not None
    for rows in (slice(0, 48), slice(0, 16), slice(16, 48)):
        assert torch.equal(_pairs_B(dense, rows), _pairs_B(listed, rows))
        assert int(_pairs_B(dense, rows).max()) > 0


def test_orthogonality_names_the_strata() -> None:
    with pytest.raises(RunError, match="anchored, free"):
        Orthogonality(stratum="fre").value(toy_view())


# ---------------------------------------------------------------------------------------------------------- causal
class Counting(ToyStream):
    """Counts the contexts that were asked for."""

    asked = 0

    def sequences(self, n: int) -> Sequences:
        self.asked += n
        return super().sequences(n)


def test_causal_is_the_mean_kl_of_the_patched_model() -> None:
    view = toy_view()
    value = number(Causal(sequences=3).value(view))
    stream = ToyStream(0)
    sequences = stream.sequences(3)
    with torch.no_grad():
        patched = stream.logits(sequences, patch_after_first(view.reconstruct))
        plain = kl(stream.logits(sequences), patched)[:, :-1]
    assert value == pytest.approx(float(plain.mean()), rel=1e-5)
    assert not bool(plain[:, 0].any()), "the first position was patched"


def test_causal_reaches_encoder_decoder_and_thresholds() -> None:
    view = toy_view()
    Causal().value(view).backward()
    reached = {n for n, p in view.sae.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached == {n for n, _ in view.sae.named_parameters()}


def test_a_perfect_reconstruction_costs_nothing_and_the_mean_costs_all() -> None:
    view = toy_view()
    part = Causal(recovered=0.6, calibration=32, sequences=32)
    perfect = evolve(view, stream=ToyStream(0), reconstruct=lambda x: x)
    assert number(part.value(perfect)) == pytest.approx(0.0, abs=1e-6)

    def mean(x: Raw) -> Raw:
        return Raw(view.metric.raw(White(torch.zeros(12))).expand_as(x))

    ablated = evolve(view, stream=ToyStream(0), reconstruct=mean)
    budget = number(part.budget(evolve(view, stream=ToyStream(0))))
    assert number(part.value(ablated)) == pytest.approx(budget / 0.4, rel=1e-4)


def test_the_default_budget_is_a_share_of_the_kl_on_entering() -> None:
    view, stream = toy_view(), Counting(0)
    part = Causal(share=0.5, sequences=4, calibration=10)
    budget = number(part.budget(evolve(view, stream=stream)))
    assert stream.asked == 10
    fresh = evolve(view, stream=ToyStream(0))
    kls = [number(Causal(sequences=n).value(fresh)) for n in (4, 4, 2)]
    assert budget == pytest.approx(0.5 * (4 * kls[0] + 4 * kls[1] + 2 * kls[2]) / 10, rel=1e-5)


# ---------------------------------------------------------------------------------------------------- causal_blend
@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("error", [1e-3, 0.1, 0.5])
def test_the_blend_is_never_satisfied(live: bool, error: float) -> None:
    """However good the reconstruction, far inside the error budget and at any KL, g = e / (2 tau) > 0."""
    view = toy_view(rows=256)
    x_BD = view.batch.x_BD
    tau = 0.1 * float(view.metric.variance("raw"))
    noise = math.sqrt(error * tau / 12)

    def nearly(x: Raw) -> Raw:
        return Raw(x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))

    hat_BD = view.metric.white(nearly(x_BD))
    good = evolve(view, forward=evolve(view.forward, white_hat_BD=hat_BD), reconstruct=nearly)
    assert number(Faithfulness(r2=0.9).value(good) / Faithfulness(r2=0.9).budget(good)) < 1
    part = CausalBlend(r2=0.9, live=live)
    g = number(part.value(good) / part.budget(good)) - 1
    assert g > 0
    assert g == pytest.approx(error / 2, rel=0.2, abs=2e-6)


def test_the_published_blend_has_no_causal_gradient() -> None:
    """Its gradient is half of faithfulness's; with `live` it is not."""

    def gradient(part: CausalBlend | Faithfulness) -> Tensor:
        view = toy_view()
        (part.value(view) / part.budget(view)).backward()
        assert view.sae.W_dec_FD.grad is not None
        return view.sae.W_dec_FD.grad

    faithful = gradient(Faithfulness(r2=0.9))
    assert torch.allclose(gradient(CausalBlend(r2=0.9)), faithful / 2, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(gradient(CausalBlend(r2=0.9, live=True)), faithful / 2, rtol=0.05)


def test_l0_rate_counts_and_moves_thresholds_alone() -> None:
    view = toy_view()
    part = L0Rate(target=5)
    value = part.value(view)
    assert number(value) == pytest.approx(int((view.forward.code.z_BK > 0).sum()) / 64)
    value.backward()
    moved = {n for n, p in view.sae.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert moved == {"_activator.log_threshold_F"}


@pytest.mark.parametrize("activation", [ReLU(), Gated(), TopK(k=3), BatchTopK(k=3)])
def test_an_activation_whose_count_has_no_gradient_cannot_meet_l0_rate(activation: Any) -> None:
    """No graph is what the engine takes for a dead constraint, at the first step."""
    assert not L0Rate(target=5).value(toy_view(activation=activation)).requires_grad


def test_l1_rate_weighs_with_what_a_code_adds() -> None:
    """In a list as in a dense code; long rows or a large gain make no code cheap."""
    view = toy_view(rows=5)
    z_BF, w_FD = view.forward.code.dense().detach(), view.sae.W_dec_FD.detach()
    wanted = sum(float(z_BF[b, f] * w_FD[f].norm()) for b in range(5) for f in range(48)) / 5
    assert number(L1Rate().value(view)) == pytest.approx(wanted, rel=1e-5)
    listed = toy_view(rows=5, dense=False, ops=TorchOps(code="compact"))
    assert listed.forward.code.index_BK is not None
    assert number(L1Rate().value(listed)) == pytest.approx(wanted, rel=1e-5)
    with torch.no_grad():
        view.sae.log_gain.fill_(math.log(3))
        view.sae.W_dec_FD.mul_(2)
    assert number(L1Rate().value(view)) == pytest.approx(6 * wanted, rel=1e-5)


def test_l1_rate_without_a_target_asks_for_a_share_of_what_it_finds() -> None:
    view = toy_view()
    assert number(L1Rate(share=0.25).budget(view)) == pytest.approx(0.25 * number(L1Rate().value(view)))
    assert number(L1Rate(target=2.5).budget(view)) == 2.5
