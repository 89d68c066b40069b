"""Changing a feature: the difference reaches the model, and nothing else; effects equal those worked out by hand.

The toy model adds nothing behind its hook, so logits there are x / scale U' and a change stays at its position.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

from spalf import plugins
from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.core.values import Raw, Sequences
from spalf.engine import intervene
from spalf.engine.build import build
from spalf.engine.step import reconstructor
from spalf.testing import toy_plan
from spalf.testing.toy import ToyStream
from spalf.testing.whole import CPU, stage_for

KNOWN = plugins.registry()


def shipped(slot: str) -> list[str]:
    return [ref.use for ref in KNOWN if ref.slot == slot and KNOWN.origin(ref).startswith("spalf ")]


def toy_state(stream: Any, **sets: str) -> tuple[Plan, TrainingState]:
    """Random rows with a gain and biases, thresholds calibrated; nothing is trained."""
    plan = toy_plan(source='{ use = "synthetic", d_model = 12, features = 32 }', **sets)
    plan = evolve(plan, facts=stream.facts)
    state = build(plan, CPU, stream)
    draw = torch.Generator().manual_seed(0)
    x_BD = stream.next(2048).x_BD.double()
    plan.recipe.whitener.fit_(state.metric, x_BD.mean(0), torch.cov(x_BD.T, correction=0))
    for p in state.sae.named_parameters():
        if p[0] in {"W_enc_FD", "W_dec_FD"}:
            p[1].data.copy_(torch.nn.functional.normalize(torch.randn(p[1].shape, generator=draw), dim=-1))
    state.sae.b_dec_D.data.fill_(0.1)
    state.sae.log_gain.data.fill_(-0.5)
    pre_BF = state.metric.white(Raw(x_BD.float())) @ state.sae.W_enc_FD.data.T
    state.sae.activator.calibrate_(pre_BF, 0.1, slice(0, state.sae.width))
    return plan, state


@pytest.fixture(scope="module")
def toy() -> tuple[Plan, TrainingState]:
    return toy_state(ToyStream())


@pytest.fixture(scope="module")
def embedded() -> tuple[Plan, TrainingState]:
    return stage_for(frozenset({"logits", "tokens"}))


def busiest(state: TrainingState, x: Raw) -> int:
    """The feature that fires on most rows."""
    z = intervene.encode(state, x).reshape(-1, state.sae.width)
    return int((z != 0).sum(0).argmax())


@pytest.mark.parametrize("whitener", shipped("whitener"))
@pytest.mark.parametrize("activation", shipped("activation"))
@torch.no_grad()
def test_a_change_is_its_feature_s_difference_and_the_error_stays(whitener: str, activation: str) -> None:
    _, state = toy_state(ToyStream(), whitener=f'"{whitener}"', activation=f'"{activation}"')
    x = state.stream.activations(state.stream.sequences(4))
    f, z = busiest(state, x), intervene.encode(state, x)
    on = z[..., f] != 0
    assert 0 < on.sum() < on.numel()

    def off(z: Tensor) -> Tensor:
        return z.index_fill(-1, torch.tensor(f), 0.0)

    after = intervene.edited(state, off, error=True)(x, z)
    by_hand = x.double() - z[..., f, None].double() * intervene.direction(state, f).double()
    assert torch.allclose(after.double(), by_hand, atol=1e-5 * float(x.abs().max()))
    assert torch.equal(after[~on], x[~on]), "where it does not fire, every bit stays"
    kept = after - intervene.decode(state, off(z))
    assert torch.allclose(kept, x - intervene.decode(state, z), atol=1e-5 * float(x.abs().max())), "the error stays"
    assert torch.allclose(intervene.decode(state, z), reconstructor(state)(x), atol=1e-5 * float(x.abs().max()))


@torch.no_grad()
def test_without_the_error_the_model_reads_reconstructions(toy: tuple[Plan, TrainingState]) -> None:
    _, state = toy
    x = state.stream.activations(state.stream.sequences(2))
    z = intervene.encode(state, x)
    hat = reconstructor(state)(x)
    assert torch.allclose(intervene.edited(state, lambda z: z, error=False)(x, z), hat, atol=1e-5)
    d_D = intervene.direction(state, 3)
    assert torch.allclose(intervene.added(state, 3, 2.5, error=False)(x, z), hat + 2.5 * d_D, atol=1e-5)
    assert torch.allclose(intervene.added(state, 3, 2.5, error=True)(x, z), x + 2.5 * d_D, atol=1e-5)
    base = intervene.unchanged(state, error=False)
    assert base is not None
    assert torch.allclose(base(x)[:, 1:], hat[:, 1:], atol=1e-5)
    assert torch.equal(base(x)[:, 0], x[:, 0])
    assert intervene.unchanged(state, error=True) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_codes_left_alone_leave_every_bit_of_the_logits(dtype: str, embedded: tuple[Plan, TrainingState]) -> None:
    plan, state = embedded
    source = evolve(plan.recipe.source, dtype=dtype)  # type: ignore[misc]
    stream = source.open(0, CPU)
    some = stream.sequences(2)
    before = stream.logits(some)
    assert str(before.dtype) == f"torch.{dtype}"
    same = intervene.patch(state, intervene.edited(state, lambda z: z, error=True))
    assert torch.equal(stream.logits(some, same), before)
    off = intervene.patch(state, intervene.edited(state, torch.zeros_like, error=True))
    changed = stream.logits(some, off)
    assert torch.equal(changed[:, 0], before[:, 0]), "position 0 is never changed"
    assert not torch.equal(changed[:, 1], before[:, 1])


# ----------------------------------------------------------------------------------------------------- generation
@torch.no_grad()
def test_greedy_text_is_what_transformers_writes(embedded: tuple[Plan, TrainingState]) -> None:
    from transformers import AutoModelForCausalLM

    from spalf.parts.source.checkpoint import locate

    _, state = embedded
    ids_T = state.stream.tokens("def main(")
    model = AutoModelForCausalLM.from_pretrained(locate("embedded")[0], dtype=torch.float32)
    theirs = model.generate(
        ids_T[None], attention_mask=torch.ones_like(ids_T[None]), max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    ours = intervene.generate(state.stream, ids_T, 12, None, temperature=0.0, seed=0)
    assert ours.tolist() == theirs[0, len(ids_T) :].tolist()


@torch.no_grad()
def test_samples_are_a_function_of_the_seed_and_follow_the_temperature(toy: tuple[Plan, TrainingState]) -> None:
    stream = toy[1].stream
    ids_T = stream.tokens("ab")

    def write(temperature: float, seed: int) -> list[int]:
        return intervene.generate(stream, ids_T, 30, None, temperature=temperature, seed=seed).tolist()

    assert write(5.0, 1) == write(5.0, 1) != write(5.0, 2)
    assert write(1e-4, 1) == write(0.0, 9), "cold samples are the likeliest tokens"
    one = [intervene.generate(stream, ids_T, 1, None, temperature=20.0, seed=s).item() for s in range(400)]
    p_V = (stream.logits(intervene.whole(ids_T[None]))[0, -1] / 20.0).softmax(-1)
    found_V = torch.bincount(torch.tensor(one), minlength=len(p_V)) / 400
    assert float((found_V - p_V).abs().sum()) < 0.4, "a wrong temperature is further off than chance"


def test_the_model_reads_at_most_a_context(toy: tuple[Plan, TrainingState]) -> None:
    class Watched(ToyStream):
        lengths: list[int] = []  # noqa: RUF012

        def logits(self, sequences: Sequences, patch: Any = None) -> Tensor:
            self.lengths.append(sequences.tokens_ST.shape[1])
            return super().logits(sequences, patch)

    stream = Watched()
    out = intervene.generate(stream, stream.tokens("abcd"), 7, None, temperature=0.0, seed=0)
    assert (out.shape, stream.lengths) == ((7,), [5, 6, 7, 8, 8, 8, 8])


# ------------------------------------------------------------------------------------------------------- ablation
@torch.no_grad()
def test_an_ablation_by_hand(toy: tuple[Plan, TrainingState]) -> None:
    """Each position on its own: logits are linear in the activation."""
    _, state = toy
    tokens_ST = state.stream.sequences(20).tokens_ST
    x = state.stream.activations(intervene.whole(tokens_ST))
    f = busiest(state, x[:, 1:])
    z_ST = intervene.encode(state, x)[..., f]
    z_ST[:, 0] = 0
    told = intervene.ablate(state, f, tokens_ST, looked_at=20)
    assert (told.feature, told.looked_at) == (f, 20)
    before = (x @ state.stream.unembedding().T).double().log_softmax(-1)[:, :-1]
    after = (x - z_ST[..., None] * intervene.direction(state, f)) @ state.stream.unembedding().T
    after = after.double().log_softmax(-1)[:, :-1]
    loss = -before.gather(-1, tokens_ST[:, 1:, None])[..., 0]
    change = -after.gather(-1, tokens_ST[:, 1:, None])[..., 0] - loss
    kl = (before.exp() * (before - after)).sum(-1)
    on = z_ST[:, :-1] != 0
    assert told.contexts == int(on.any(1).sum())
    assert told.fires.positions == int(on.sum()) > 10
    assert told.fires.loss == pytest.approx(float(loss[on].mean()), rel=1e-4)
    assert told.fires.change == pytest.approx(float(change[on].mean()), rel=1e-3, abs=1e-5)
    assert told.fires.kl == pytest.approx(float(kl[on].mean()), rel=1e-3)
    assert told.elsewhere.positions == int((~on).sum())
    assert (told.elsewhere.change, told.elsewhere.kl, told.elsewhere.error) == (0.0, 0.0, 0.0)


@torch.no_grad()
def test_only_attention_carries_an_ablation_on_and_only_forward(embedded: tuple[Plan, TrainingState]) -> None:
    _, state = embedded
    tokens_ST = state.stream.held_out().sequences(12).tokens_ST
    x = state.stream.activations(intervene.whole(tokens_ST))
    density_F = (intervene.encode(state, Raw(x[:, 1:])) != 0).double().mean((0, 1))
    f = int((density_F - 0.05).abs().argmin())
    told = intervene.ablate(state, f, tokens_ST, looked_at=12)
    assert told.fires.kl > 10 * told.later.kl > 0
    assert told.elsewhere.kl * told.elsewhere.positions == pytest.approx(told.later.kl * told.later.positions, rel=1e-9)
    assert told.elsewhere.positions > told.later.positions > 0
    alone = intervene.ablate(state, f, tokens_ST, looked_at=12, error=False)
    assert alone.fires.positions == told.fires.positions
    assert alone.fires.loss > told.fires.loss, "both sides read reconstructions then"


def test_the_standard_error_is_over_contexts() -> None:
    """Ten equal positions of a context say as much as one: contexts at 1 and 3 have a mean of 2 +- 1."""
    change_SP = torch.tensor([[1.0] * 10, [3.0] * 10, [50.0] * 10], dtype=torch.float64)
    at_SP = torch.tensor([[True] * 10, [True] * 10, [False] * 10])
    told = intervene._effect(change_SP, change_SP, change_SP, at_SP)
    assert (told.positions, told.change, told.kl, told.loss) == (20, 2.0, 2.0, 2.0)
    assert told.error == pytest.approx(1.0)
    one = intervene._effect(change_SP, change_SP, change_SP, at_SP & torch.tensor([[True], [False], [False]]))
    assert (one.change, math.isnan(one.error)) == (1.0, True)


def test_what_never_fires_has_no_effect_to_measure(toy: tuple[Plan, TrainingState]) -> None:
    told = intervene.ablate(toy[1], 0, torch.zeros(0, 8, dtype=torch.int64), looked_at=5)
    assert (told.contexts, told.fires.positions, told.elsewhere.positions) == (0, 0, 0)
    assert math.isnan(told.fires.change)


@torch.no_grad()
def test_contexts_in_many_passes_are_contexts_in_one(
    toy: tuple[Plan, TrainingState], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, state = toy
    tokens_ST = state.stream.sequences(11).tokens_ST
    f = busiest(state, state.stream.activations(intervene.whole(tokens_ST)))
    whole = intervene.ablate(state, f, tokens_ST, looked_at=11)
    monkeypatch.setattr(intervene, "SEQUENCES", 3)
    parts = intervene.ablate(state, f, tokens_ST, looked_at=11)
    assert parts.fires.positions == whole.fires.positions
    assert parts.fires.change == pytest.approx(whole.fires.change, rel=1e-4)
    assert parts.fires.error == pytest.approx(whole.fires.error, rel=1e-3)
