"""One training step of SAELens 6.54.12 against ours: same weights, same batch, same loss and gradients.

Where SAELens does what a publication does not, an option of ours repeats it here, and the test says which and why it is
not the default.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# SAELens' auxiliary term for dead latents: pre-activations as they are, not over the error's power, and scaled down
# where few are dead. arXiv 2406.04093 rectifies and normalises.
AUX = ("term.aux_k.weight=1", "term.aux_k.rectify=false", "term.aux_k.normalise=false", "term.aux_k.few=true")
SUM = ("term.mse.reduce=sum", "stratum.free.unit_norm=false")  # no row is held at unit norm
L1 = ("term.l1.weight=0.3", "term.l1.warmup=0")
JUMP = ("stratum.free.unit_norm=false", "term.l0.weight=0.2", "term.l0.warmup=0")
# It penalises every row's own L0 by c 2 (l0 - t)^2 / t, which is c 2 t (l0 / t - 1)^2; c = 0.2, t = 6.
QUADRATIC = "term.l0={use='l0_quadratic', each=true, target=6, weight=2.4}"
NESTED = ("term.nested={sizes=[0.25, 0.5, 1.0], reduce='sum'}", "stratum.free.unit_norm=false")

CASES = {
    "standard": ("relu_l1", L1),
    "topk": ("topk", (*SUM, *AUX)),
    "topk_dead": ("topk", (*SUM, *AUX)),
    "batchtopk": ("batch_topk", (*SUM, *AUX)),
    "jumprelu": ("jumprelu", JUMP),
    "jumprelu_pre_act": (
        "jumprelu",
        (*JUMP, "phase.fit.terms=['mse', 'l0', 'pre_activation']", "term.pre_activation.weight=0.01"),
    ),
    "jumprelu_quadratic": ("jumprelu", (*JUMP[:1], QUADRATIC)),
    "matryoshka": ("matryoshka", (*NESTED, *AUX)),
}
BANDWIDTH = {name: 0.2 for name in CASES if name.startswith("jumprelu")}


@pytest.fixture(scope="module")
def steps(run_peer: Callable[..., Path]) -> Path:
    return run_peer("saelens_steps.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name, steps, take_step, compare, load_reference) -> None:
    reference = load_reference(steps, name)
    preset, sets = CASES[name]
    compare(take_step(preset, sets, reference, bandwidth=BANDWIDTH.get(name, 0.0)), reference)


@pytest.mark.slow
def test_a_coefficient_warms_up(steps, take_step, compare, load_reference) -> None:
    reference = load_reference(steps, "standard_warm_up")  # four of ten steps
    compare(take_step("relu_l1", ("term.l1.weight=0.3", "term.l1.warmup=10"), reference, at=4), reference)


GATED = ("stratum.free.unit_norm=false", *L1)


@pytest.mark.slow
def test_gated_has_the_leak_of_its_auxiliary_term(steps, take_step, compare, load_reference) -> None:
    """Its third term sends gradients to decoder and b_dec, which arXiv 2404.16014 holds still there."""
    reference = load_reference(steps, "gated")
    leaking = take_step("gated", (*GATED, "term.gated_aux.frozen=false"), reference)
    compare(leaking, reference)
    sound = take_step("gated", GATED, reference)
    assert torch.equal(sound.loss, leaking.loss)
    for name, ours in sound.grads.items():
        differs = not torch.allclose(ours, leaking.grads[name], rtol=1e-9, atol=0)
        assert differs == (name in ("W_dec_FD", "b_dec_D", "log_gain")), name


@pytest.mark.slow
def test_a_threshold_that_starts_at_zero_stays_low(steps, take_step, load_reference) -> None:
    """Its running threshold starts at 0 and is 1 % of what it should be after a step; ours is the measured value."""
    reference = load_reference(steps, "batchtopk")
    least = reference["codes"][reference["codes"] > 0].min()
    torch.testing.assert_close(reference["topk_threshold"], 0.01 * least, rtol=1e-9, atol=0)
    step = take_step("batch_topk", SUM, reference)
    code = step.state.sae.train().encode(step.state.metric.white(reference["x"]))
    step.state.sae.activator.observe_(code)
    torch.testing.assert_close(step.state.sae.activator.threshold_F()[0], least, rtol=1e-9, atol=0)


ADAM = ("knobs.lr=1e-3", "optimizer.max_norm=1", "optimizer.schedule=constant")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["standard", "topk", "topk_dead", "batchtopk", "matryoshka"])
def test_the_parameters_after_the_step(name, steps, take_step, load_reference) -> None:
    """Clipping and Adam too. JumpReLU is left out: it trains thresholds, ours their logarithms."""
    reference = load_reference(steps, name)
    preset, sets = CASES[name]
    step = take_step(preset, (*sets, *ADAM), reference)
    step.advance()
    for ours, theirs in (("W_enc_FD", "W_enc"), ("W_dec_FD", "W_dec"), ("b_enc_F", "b_enc"), ("b_dec_D", "b_dec")):
        after = dict(step.state.sae.named_parameters())[ours].detach()
        moved = reference[f"after.{theirs}"] - reference[f"weight.{theirs}"]
        assert float(moved.abs().max()) > 0
        torch.testing.assert_close(after - reference[f"weight.{theirs}"], moved, rtol=1e-6, atol=1e-12)
