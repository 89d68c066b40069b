"""One training step of dictionary_learning 0.1.0 against ours: same weights, same batch, same loss and gradients.

Where it does what a publication does not, an option of ours repeats it here, and the test says which and why it is not
the default.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

L1 = ("term.l1.weight=0.3", "term.l1.warmup=0")
UNIT = "stratum.free.unit_norm=true"
SUM = "term.mse.reduce=sum"
THIRD = 1 / 3
# It averages the prefixes' errors twice, by weights that sum to 1 and by a mean: each counts 1 / G^2. arXiv 2503.17547
# sums them, which is our default.
TWICE = f"term.nested={{sizes=[0.25, 0.5, 1.0], weights=[{THIRD}, {THIRD}, {THIRD}], average=true, reduce='sum'}}"
# It counts active features on z, not on p, where the lower half of the window is never seen (`post`).
QUADRATIC = "term.l0={use='l0_quadratic', target=6, weight=0.7}"

CASES = {
    "standard": ("relu_l1", (*L1, UNIT, "term.l1.by_norm=false")),
    "standard_april": ("relu_l1", L1),
    "topk": ("topk", (SUM,)),
    "batchtopk": ("batch_topk", (SUM,)),
    "gated": ("gated", (*L1, "term.l1.by_norm=false")),
    "jumprelu": ("jumprelu", (QUADRATIC, "activation.pre_bias=false", "activation.post=true")),
    "matryoshka": ("matryoshka", (TWICE,)),
}
CLOSE = {"topk": 1e-6, "batchtopk": 1e-6, "matryoshka": 1e-6, "jumprelu": 1e-6}
"""These compute a part in float32, whatever they are given: the auxiliary term, and the count of active features."""


@pytest.fixture(scope="module")
def steps(run_peer: Callable[..., Path]) -> Path:
    return run_peer("dictionary_learning_steps.py")


def bandwidth(name: str) -> float:
    return 0.2 if name == "jumprelu" else 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name, steps, take_step, compare, load_reference) -> None:
    reference = load_reference(steps, name)
    preset, sets = CASES[name]
    step = take_step(preset, sets, reference, bandwidth=bandwidth(name))
    compare(step, reference, CLOSE.get(name, 1e-9))


@pytest.mark.slow
def test_a_coefficient_warms_up(steps, take_step, compare, load_reference) -> None:
    reference = load_reference(steps, "standard_warm_up")  # three of ten steps
    sets = (UNIT, "term.l1.weight=0.3", "term.l1.warmup=10", "term.l1.by_norm=false")
    compare(take_step("relu_l1", sets, reference, at=3), reference)


@pytest.mark.slow
def test_a_count_on_codes_presses_less(steps, take_step, load_reference) -> None:
    """Half of the window is out of its sight: the count's pull on thresholds is about half of what it should be."""
    reference = load_reference(steps, "jumprelu")
    sets = (QUADRATIC, "phase.fit.terms=['l0']", "activation.pre_bias=false")
    gradients = [
        take_step("jumprelu", (*sets, f"activation.post={post}"), reference, bandwidth=0.2).grads[
            "_activator.log_threshold_F"
        ]
        for post in ("true", "false")
    ]
    fault, sound = (float(gradient.abs().sum()) for gradient in gradients)
    assert 0.25 < fault / sound < 0.75


@pytest.mark.slow
def test_an_auxiliary_term_weighs_more_beside_a_double_mean(steps, take_step, load_reference) -> None:
    """The same 1/32 beside errors of 1 / G^2 each: G^2 = 9 times as much as beside the published sum."""
    reference = load_reference(steps, "matryoshka")
    twice = take_step("matryoshka", (TWICE,), reference).terms
    summed = take_step("matryoshka", ("term.nested={sizes=[0.25, 0.5, 1.0], reduce='sum'}",), reference).terms
    assert float(twice["aux_k"]) == float(summed["aux_k"]) > 0
    assert float(summed["nested"] / twice["nested"]) == pytest.approx(9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_the_threshold_after_a_first_batch(name, steps, take_step, load_reference) -> None:
    """Both begin at the first measured value: of a batch its smallest code; of rows, where we have none, their mean."""
    reference = load_reference(steps, name)
    codes_BF = reference["codes"]
    least_B = codes_BF.where(codes_BF > 0, torch.inf).amin(1)
    wanted = least_B.mean() if name == "topk" else least_B.min()
    torch.testing.assert_close(reference["topk_threshold"].double(), wanted, rtol=1e-6, atol=0)
    if name == "batchtopk":
        step = take_step("batch_topk", (SUM,), reference)
        code = step.state.sae.train().encode(step.state.metric.white(reference["x"]))
        step.state.sae.activator.observe_(code)
        torch.testing.assert_close(step.state.sae.activator.threshold_F()[0], wanted, rtol=1e-9, atol=0)


ADAM = ("knobs.lr=1e-3", "optimizer.schedule=constant")
CLIPPED = (*ADAM, "optimizer.max_norm=1")
AFTER = {
    "standard": ADAM,
    "standard_april": CLIPPED,
    "topk": CLIPPED,
    "batchtopk": CLIPPED,
    "gated": ADAM,
    "matryoshka": CLIPPED,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AFTER)
def test_the_parameters_after_the_step(name, steps, take_step, load_reference) -> None:
    """The decoder's projections, clipping and Adam too. JumpReLU is left out: ours trains logarithms of thresholds.

    Where trainers differ in float32 parts, and by 1e-6 in a divisor of the projection, the first step of Adam is as
    sensitive as 1 / (|gradient| + eps).
    """
    reference = load_reference(steps, name)
    preset, sets = CASES[name]
    step = take_step(preset, (*sets, *AFTER[name]), reference)
    step.advance()
    own = dict(step.state.sae.named_parameters())
    for ours, theirs in (("W_enc_FD", "W_enc"), ("W_dec_FD", "W_dec"), ("b_dec_D", "b_dec")):
        moved = reference[f"after.{theirs}"] - reference[f"weight.{theirs}"]
        assert float(moved.abs().max()) > 1e-4
        found = own[ours].detach() - reference[f"weight.{theirs}"]
        atol = 1e-6 if name in CLOSE else 1e-11
        torch.testing.assert_close(found, moved, rtol=1e-4 if name in CLOSE else 1e-8, atol=atol)
