"""A run in a notebook: few lines, and what they give agrees with the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

import spalf
from spalf.core.values import Raw
from spalf.engine import checkpoint, intervene, language
from spalf.engine.step import reconstructor
from spalf.errors import CheckpointError, RecipeError, SourceError
from spalf.loaded import Codes, Loaded
from spalf.testing import toy_plan
from spalf.testing.whole import CPU, moved, snapshot, stage_for, started

pytestmark = pytest.mark.slow  # together more than `make check` has time for

TEXT = "def f(x):\n    return x"
TOKENS = ("<|endoftext|>", "def", " f", "(", "x", "):", "\n    ", "return", " x")


@pytest.fixture(scope="module")
def run() -> Loaded:
    plan, state = stage_for(frozenset({"logits", "tokens"}))
    return Loaded(plan=plan, state=state, sequences=24)


@pytest.fixture(scope="module")
def codes(run: Loaded) -> Codes:
    return run.encode(TEXT)


@pytest.fixture(scope="module")
def usual(run: Loaded) -> int:
    """A feature that fires on about one token in twenty."""
    return int((run.firings.count_F() / run.firings.rows - 0.05).abs().argmin())


# --------------------------------------------------------------------------------------------------------- codes
def test_codes_are_the_dictionary_s(run: Loaded, codes: Codes) -> None:
    assert codes.tokens == TOKENS
    assert codes.z.is_sparse
    assert codes.z.shape == (9, run.state.sae.width)
    x_TD = run.state.stream.activations(intervene.whole(codes.ids_T[None]))[0]
    assert torch.equal(codes.x_TD, x_TD)
    with torch.no_grad():
        z_TF = run.state.sae.encode(run.state.metric.white(Raw(x_TD))).dense()
    assert torch.equal(codes.dense()[1:], z_TF[1:])
    assert not codes.dense()[0].any()


def test_codes_are_read_by_position_and_by_feature(codes: Codes) -> None:
    z_TF = codes.dense()
    assert len(codes) == 9
    for t, at in enumerate(codes):
        assert at == {f: float(z_TF[t, f]) for f in z_TF[t].nonzero()[:, 0].tolist()}
        assert list(at.values()) == sorted(at.values(), reverse=True)
    assert codes[-1] == codes[8] != {}
    feature = next(iter(codes[3]))
    assert torch.equal(codes.of(feature), z_TF[:, feature])
    assert codes.top(2)[3] == ("(", dict(list(codes[3].items())[:2]))
    assert codes.top(2)[0] == ("<|endoftext|>", {})
    with pytest.raises(IndexError):
        codes[9]


def test_codes_show_their_strongest_features(codes: Codes) -> None:
    lines = repr(codes).splitlines()
    assert len(lines) == 9
    assert lines[0].strip() == "'<|endoftext|>'"
    feature, value = next(iter(codes[6].items()))
    assert lines[6].split() == ["'\\n", "'", *lines[6].split()[2:]]
    assert f"{feature}: {value:.3g}" in lines[6]


def test_decoding_gives_the_reconstruction(run: Loaded, codes: Codes) -> None:
    with torch.no_grad():
        hat_TD = reconstructor(run.state)(codes.x_TD)
    assert torch.allclose(run.decode(codes)[1:], hat_TD[1:], atol=1e-4)
    assert torch.equal(run.decode(codes), run.decode(codes.dense().double()))
    assert not run.decode(codes).requires_grad


# ------------------------------------------------------------------------------------------------------- patching
def test_a_patch_that_changes_nothing(run: Loaded) -> None:
    told = run.patch(TEXT, lambda z: z)
    assert torch.equal(told.before_TV, told.after_TV)
    assert told.tokens == TOKENS
    assert torch.equal(told.kl_T, torch.zeros(9))
    assert torch.equal(told.change_P, torch.zeros(8))
    assert repr(told) == "9 tokens: KL 0 nats per position, loss +0 nats per token"


def test_a_patch_gets_a_row_per_token_of_the_text(run: Loaded, codes: Codes) -> None:
    seen: list[Tensor] = []

    def off(z_PF: Tensor) -> Tensor:
        seen.append(z_PF.clone())
        z_PF[2] = 0.0
        return z_PF

    told = run.patch(TEXT, off)
    assert torch.allclose(seen[0], codes.dense()[1:], atol=1e-4)
    assert (told.kl_T[:3] == 0).all(), "what comes before the third token is as it was"
    assert (told.kl_T[3:] > 0).all()
    before, after = (x.double().log_softmax(-1) for x in (told.before_TV, told.after_TV))
    assert told.kl_T.tolist() == pytest.approx((before.exp() * (before - after)).sum(-1).tolist(), abs=1e-5)
    target = codes.ids_T[1:, None]
    change_P = (before[:-1].gather(1, target) - after[:-1].gather(1, target))[:, 0]
    assert told.change_P.tolist() == pytest.approx(change_P.tolist(), abs=1e-5)


def test_a_patch_of_reconstructions_is_compared_with_reconstructions(run: Loaded) -> None:
    told = run.patch(TEXT, lambda z: z, error=False)
    assert torch.equal(told.before_TV, told.after_TV)
    assert not torch.allclose(told.before_TV, run.patch(TEXT, lambda z: z).before_TV, atol=0.1)


@pytest.mark.parametrize(("fn", "given"), [(lambda z: None, "NoneType"), (lambda z: z[1:], r"\(7, 256\)")])
def test_a_patch_that_returns_something_else_is_told_so(run: Loaded, fn: Any, given: str) -> None:
    with pytest.raises(ValueError, match=rf"fn\(z\) gave {given}, not codes of shape \(8, 256\)"):
        run.patch(TEXT, fn)


# ------------------------------------------------------------------------------------------------------- features
def test_a_feature_in_full(run: Loaded, usual: int) -> None:
    told = run.feature(usual)
    row_N, value_N = run.firings.of(usual)
    assert (told["id"], told["fired"]) == (usual, len(row_N))
    assert told["mean"] == pytest.approx(float(value_N.mean()), rel=1e-4)
    shown = repr(told).splitlines()
    assert shown[0].startswith(f"feature {usual} ({told['stratum']}): {100 * told['density']:.3g} % of tokens, mean ")
    assert shown[1].startswith(f"  fires on  {told['tokens'][0]['token']!r}")
    best = told["contexts"][0]
    peak = repr(best["tokens"][best["peak"]])[1:-1]
    assert shown[3].split()[0] == f"{float(value_N.max()):.3g}"
    assert f"[{peak}]" in shown[3]
    assert len(shown) == 3 + min(4, len(told["contexts"]))


def test_features_are_searched_and_sorted(run: Loaded) -> None:
    every = run.features()
    assert len(every) == 256
    assert [f["fired"] for f in every] == sorted((f["fired"] for f in every), reverse=True)
    assert {f["stratum"] for f in run.features(stratum="free")} == {"free"}
    found = run.features("self", sort="id")
    assert 0 < len(found) < 256
    for one in found:
        words = [w["token"] for w in (*one["tokens"], *one["promoted"], one.get("anchored", {"token": ""}))]
        contexts = ["".join(c["tokens"]) for c in one["contexts"]]
        assert any("self" in text.lower() for text in (*words, *contexts))
    for name, value, said in (("sort", "size", '"size" is no order'), ("stratum", "loose", "'loose' is no stratum")):
        with pytest.raises(RecipeError, match=said):
            run.features(**{name: value})


# ------------------------------------------------------------------------------------------------------- steering
def test_a_unit_is_the_mean_activation_where_it_fires(run: Loaded, usual: int) -> None:
    with torch.no_grad():
        x_STD = run.state.stream.activations(intervene.whole(run.state.stream.held_out().sequences(24).tokens_ST))
        z_N = intervene.encode(run.state, Raw(x_STD[:, 1:]))[..., usual].flatten()
    assert run.unit(usual) == pytest.approx(float(z_N[z_N != 0].mean()), rel=1e-4)


def test_no_strength_is_no_change(run: Loaded, usual: int) -> None:
    for temperature in (0.0, 1.0):
        told = run.steer(TEXT, feature=usual, strength=0.0, tokens=6, temperature=temperature, seed=3)
        assert told.steered == told.baseline != ""
        assert told.kl == 0.0


def test_strength_counts_units_of_the_feature(run: Loaded, usual: int) -> None:
    told = run.steer(TEXT, feature=usual, strength=-3.0, tokens=6)
    offset_D = -3.0 * run.unit(usual) * run.direction(usual)

    def push(x_STD: Raw) -> Raw:
        return Raw(torch.cat([x_STD[:, :1], x_STD[:, 1:] + offset_D], dim=1))

    stream, ids_T = run.state.stream, run.state.stream.tokens(TEXT)
    with torch.no_grad():
        kl_ST = language.kl(
            stream.logits(intervene.whole(ids_T[None])), stream.logits(intervene.whole(ids_T[None]), push)
        )
        steered_T = intervene.generate(stream, ids_T, 6, push, temperature=0.0, seed=0)
    assert told.kl == pytest.approx(float(kl_ST[0, -1]), rel=1e-3)
    assert told.kl > 0
    assert told.steered == "".join(stream.text(steered_T))
    assert told.unit == run.unit(usual)
    assert run.steer(TEXT, feature=usual, strength=-6.0, tokens=1).kl > told.kl
    for words in (f"feature {usual}, strength -3", "--- baseline\ndef f(x):", told.steered):
        assert words in repr(told)


def test_a_direction_is_what_one_unit_adds(run: Loaded, codes: Codes) -> None:
    more_TF = codes.dense()
    more_TF[:, 5] += 1.0
    assert torch.allclose(run.decode(more_TF) - run.decode(codes), run.direction(5).expand(9, -1), atol=1e-4)


# ------------------------------------------------------------------------------------------------------- ablation
def test_an_ablation_looks_where_the_feature_fires(run: Loaded, usual: int) -> None:
    told = run.ablate(usual)
    row_N, _ = run.firings.of(usual)
    assert (told.feature, told.looked_at) == (usual, 24)
    assert told.contexts == len({r // 31 for r in row_N.tolist() if r % 31 < 30})
    assert told.fires.positions == sum(r % 31 < 30 for r in row_N.tolist()), "the last position predicts nothing"
    assert told.fires.kl > told.elsewhere.kl
    every = intervene.ablate(run.state, usual, run.state.stream.held_out().sequences(24).tokens_ST, looked_at=24)
    assert every.fires.change == pytest.approx(told.fires.change, rel=1e-3)
    assert repr(told).splitlines() == [
        f"feature {usual} fires in {told.contexts} of 24 contexts; set to 0, loss changes by",
        f"  {told.fires.change:+.3g} +- {told.fires.error:.2g} nats where it fires ({told.fires.positions} tokens, "
        f"KL {told.fires.kl:.3g})",
        f"  {told.elsewhere.change:+.3g} +- {told.elsewhere.error:.2g} nats elsewhere ({told.elsewhere.positions} "
        f"tokens, KL {told.elsewhere.kl:.3g})",
    ]
    assert every.later.kl == pytest.approx(told.later.kl, rel=1e-3), "contexts without it change nothing"


def test_looking_and_changing_leave_the_state_as_it_was(run: Loaded, usual: int) -> None:
    before, stream = snapshot(run.state), run.state.stream
    run.ablate(usual)
    run.steer(TEXT, feature=usual, strength=4.0, tokens=2, temperature=1.0)
    run.patch(TEXT, torch.zeros_like)
    assert moved(before, snapshot(run.state)) == []
    assert run.state.stream is stream


# --------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("feature", [-1, 256])
def test_a_feature_that_is_not_there(run: Loaded, feature: int) -> None:
    told = rf"feature: there is no {feature} \(0 to 255\)"
    for call in (run.unit, run.feature, run.direction, run.ablate, lambda f: run.steer(TEXT, feature=f, strength=1.0)):
        with pytest.raises(RecipeError, match=told):
            call(feature)  # type: ignore[operator]


def test_a_silent_feature_has_no_unit_and_no_effect(run: Loaded) -> None:
    count_F = run.firings.count_F()
    quiet = Loaded(plan=run.plan, state=run.state, sequences=1)
    silent = int(((quiet.firings.count_F() == 0) & (count_F >= 0)).nonzero()[0])
    with pytest.raises(RecipeError, match=rf"feature: {silent} fires on none of 31 held-out tokens"):
        quiet.steer(TEXT, feature=silent, strength=1.0)
    assert quiet.ablate(silent).contexts == 0


def test_numbers_out_of_range_are_refused_together(run: Loaded) -> None:
    with pytest.raises(RecipeError) as told:
        run.steer(TEXT, feature=1, strength=float("nan"), tokens=0, temperature=-1.0)
    assert [p.path for p in told.value.problems] == ["strength", "tokens", "temperature"]


def test_a_text_longer_than_a_context(run: Loaded) -> None:
    with pytest.raises(SourceError, match=r"the text has 40 tokens, and this run read 31 at once \(cut it\)"):
        run.encode("x\n" * 20)


def test_a_run_without_a_language_model_says_so() -> None:
    plan = toy_plan()
    toy = Loaded(plan=plan, state=started(plan, 2))
    calls: list[Any] = [toy.encode, lambda t: toy.patch(t, lambda z: z), lambda t: toy.ablate(0)]
    for call in [*calls, lambda t: toy.steer(t, feature=0, strength=1.0)]:
        with pytest.raises(SourceError, match="text can be read and changed only with a language model"):
            call(TEXT)
    assert toy.direction(0).shape == (16,)
    assert repr(toy) == "toy: 64 features, fit step 2"


# -------------------------------------------------------------------------------------------------------- loading
@pytest.fixture
def saved(run: Loaded, tmp_path: Path) -> Path:
    """A run directory with one checkpoint."""
    from spalf.launch import filled_text
    from spalf.testing.whole import LANGUAGE, TOY

    recipe = tmp_path / "recipe.toml"
    recipe.write_text('extends = "spalf"\n' + TOY)
    sets = [f"{key.replace('__', '.')}={value}" for key, value in LANGUAGE.items()]
    checkpoint.save(run.plan, run.state, tmp_path / "run" / "checkpoints", filled_text(recipe, sets), {"serial": 1})
    return tmp_path / "run"


def test_a_saved_run_is_loaded_with_its_features(run: Loaded, saved: Path, usual: int) -> None:
    loaded = spalf.load(saved, device="cpu", sequences=24)
    assert repr(loaded) == repr(run) == "toy: 256 features at blocks.1.hook_resid_post of embedded, fit step 12"
    assert torch.equal(loaded.encode(TEXT).dense(), run.encode(TEXT).dense())
    assert loaded.unit(usual) == run.unit(usual)
    (saved / "checkpoints" / "spalf_fit_step12" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        spalf.load(saved, device="cpu")
    with pytest.raises(CheckpointError, match="no such directory"):
        spalf.load(saved / "nothing")


def test_a_loaded_run_is_cheap_to_vary(run: Loaded) -> None:
    assert evolve(run, sequences=5).sequences == 5
    assert run.state.device == CPU


@pytest.mark.gpu
def test_all_of_it_on_a_gpu(run: Loaded, saved: Path, usual: int) -> None:
    """The same features and effects as on the CPU, up to the rounding of another device."""
    there = spalf.load(saved, device="cuda", sequences=24)
    assert there.state.device.type == "cuda"
    assert there.unit(usual) == pytest.approx(run.unit(usual), rel=0.02)
    assert torch.allclose(there.direction(usual).cpu(), run.direction(usual), atol=1e-2)
    same = there.patch(TEXT, lambda z: z)
    assert torch.equal(same.before_TV, same.after_TV)
    assert there.steer(TEXT, feature=usual, strength=2.0, tokens=4, temperature=1.0).kl > 0
    assert there.encode(TEXT).of(usual).device.type == "cuda"
    assert there.ablate(usual).fires.kl == pytest.approx(run.ablate(usual).fires.kl, rel=0.1)
