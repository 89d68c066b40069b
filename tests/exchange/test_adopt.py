"""A foreign dictionary becomes a run, or nothing at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import tomli
import torch
from attrs import evolve

import spalf
from spalf import launch
from spalf.core.values import Raw, White
from spalf.errors import ExchangeError, RecipeError
from spalf.exchange import saelens
from spalf.exchange.adopt import adopt, table_of
from spalf.exchange.verbs import import_dictionary
from spalf.parts.source.synthetic import Synthetic

SOURCE = ("source={use='synthetic', d_model=6, features=8}", "evaluator.downstream_loss=false")


@pytest.fixture
def folder(make, tmp_path: Path) -> Path:
    return saelens.write(make("jumprelu"), tmp_path / "sae", torch.float32)


def test_a_run_directory_is_made(folder: Path, tmp_path: Path) -> None:
    out = import_dictionary(folder, tmp_path / "runs" / "mine", format="saelens", sets=SOURCE)
    assert sorted(p.name for p in out.iterdir()) == ["checkpoints", "plan.json", "recipe.toml"]
    assert [p.name for p in out.parent.iterdir()] == ["mine"]
    recipe = tomli.loads((out / "recipe.toml").read_text(encoding="utf-8"))
    assert (recipe["name"], recipe["knobs"]["F"], recipe["whitener"]["use"]) == ("mine", 20, "identity")
    assert recipe["stratum"]["free"]["unit_norm"] is False
    metadata = json.loads(next(out.glob("checkpoints/*/metadata.json")).read_text(encoding="utf-8"))
    assert metadata["imported"]["format"] == "saelens"
    assert metadata["imported"]["model"] == "toy/model"
    assert metadata["step"] == 0


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "gated"])
@pytest.mark.parametrize("centred", [False, True])
def test_it_computes_what_it_computed(kind: str, centred: bool, make, x_BD, tmp_path: Path) -> None:
    one = make(kind, centred=centred)
    folder = saelens.write(one, tmp_path / "sae", torch.float32)
    run = import_dictionary(folder, tmp_path / "run", format="saelens", sets=SOURCE)
    _, _, state = launch.closed(run)
    with torch.no_grad():
        code = state.sae.encode(state.metric.white(x_BD.float()), dense=True)
        hat_BD = state.metric.raw(state.sae.decode(code))
    z_BF = one.encode(x_BD)
    assert torch.equal(code.dense() > 0, z_BF > 0)
    torch.testing.assert_close(code.dense().double(), z_BF, rtol=0, atol=1e-5)
    torch.testing.assert_close(hat_BD.double(), one.decode(z_BF), rtol=0, atol=1e-4)


def test_a_refinement_is_poured_in_whatever_the_whitening(make, x_BD, tmp_path: Path) -> None:
    """Steps are relative to the trace of the metric's form and to the gain: both differ from one here."""
    one = make("refined", centred=True)
    arguments: dict[str, Any] = {"format": "mine", "recipe": "", "tokens": 4096, "device": torch.device("cpu")}
    for whitener in ("identity", "soft_zca", "zca"):
        sets = (*SOURCE, f"whitener={whitener}")
        run = adopt(one, tmp_path / whitener, sets=sets, **arguments)
        _, _, state = launch.closed(run)
        with torch.no_grad():
            code = state.sae.encode(state.metric.white(Raw(x_BD.float())), dense=True)
        z_BF = one.encode(x_BD)
        torch.testing.assert_close(code.dense().double(), z_BF, rtol=0, atol=1e-5 * float(z_BF.max()))


def test_an_activation_that_cannot_hold_it_is_refused(make, tmp_path: Path) -> None:
    sets = (*SOURCE, "activation.refine=false")
    with pytest.raises(ExchangeError, match="the recipe's activation has no step_F"):
        adopt(
            make("refined"),
            tmp_path / "run",
            format="mine",
            recipe="",
            sets=sets,
            tokens=0,
            device=torch.device("cpu"),
        )
    assert not (tmp_path / "run").exists()


def test_it_can_be_loaded_and_measured(folder: Path, tmp_path: Path) -> None:
    """The stream stands at its start, and a feature that never fires counts as dead."""
    run = import_dictionary(folder, tmp_path / "run", format="saelens", sets=SOURCE)
    assert launch.load(run, device="cpu").state.clock.step == 0
    scalars = spalf.evaluate(run, suites=["dictionary"], device="cpu")["dictionary"]
    assert 0 < scalars["l0"] < 20


def test_a_threshold_of_zero_is_a_relu(make, x_BD, tmp_path: Path) -> None:
    """Thresholds are kept as logarithms: zero is the least number that has one."""
    one = make("jumprelu")
    one.threshold_F.zero_()
    folder = saelens.write(one, tmp_path / "sae", torch.float32)
    run = import_dictionary(folder, tmp_path / "run", format="saelens", sets=SOURCE)
    _, _, state = launch.closed(run)
    code = state.sae.encode(state.metric.white(x_BD.float()), dense=True)
    assert torch.equal(code.dense() > 0, one.encode(x_BD) > 0)


def test_the_file_says_where_activations_come_from(make) -> None:
    source = table_of(make("relu"), "run", "", ())["source"]
    told = {"model": "toy/model", "layer": 3, "context": 64, "bos": True, "dataset": "toy/text"}
    assert source == {"use": "huggingface", **told}


def test_a_text_replaces_the_dataset_of_the_file(make) -> None:
    source = table_of(make("relu"), "run", "", ("source.text=stdlib",))["source"]
    assert source["text"] == "stdlib"
    assert "dataset" not in source


def test_another_hook_needs_another_source(make) -> None:
    one = make("relu")
    one = evolve(one, about=evolve(one.about, hook="blocks.3.hook_mlp_out"))
    assert table_of(one, "run", "", ())["source"]["hook"] == "blocks.3.hook_mlp_out"


def test_a_recipe_gives_its_source_alone(make, tmp_path: Path) -> None:
    recipe = tmp_path / "other.toml"
    recipe.write_text('name = "other"\nsource = { use = "synthetic", d_model = 6 }\n', encoding="utf-8")
    table = table_of(make("relu"), "run", str(recipe), ("source.features=8",))
    assert (table["name"], table["source"]) == ("run", {"use": "synthetic", "d_model": 6, "features": 8})


def test_a_width_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    sets = ("source={use='synthetic', d_model=7}", "evaluator.downstream_loss=false")
    with pytest.raises(ExchangeError, match="of 6 dimensions, and the source gives 7"):
        import_dictionary(folder, tmp_path / "run", format="saelens", sets=sets)
    assert not (tmp_path / "run").exists()


def test_a_source_that_is_not_said_is_asked_for(make, tmp_path: Path) -> None:
    from spalf.exchange.dictionary import About

    folder = saelens.write(make("relu", about=About()), tmp_path / "sae", torch.float32)
    with pytest.raises(RecipeError, match="source"):
        import_dictionary(folder, tmp_path / "run", format="saelens")
    assert [p.name for p in tmp_path.iterdir()] == ["sae"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_nothing_is_overwritten(kind: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    if kind == "file":
        out.write_text("mine", encoding="utf-8")
    else:
        out.mkdir()
        (out / "notes").write_text("mine", encoding="utf-8")
    with pytest.raises(ExchangeError, match=r"run: exists already"):
        import_dictionary(folder, out, format="saelens", sets=SOURCE)
    assert (out if kind == "file" else out / "notes").read_text(encoding="utf-8") == "mine"


def test_an_empty_directory_is_used(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert (import_dictionary(folder, tmp_path / "run", format="saelens", sets=SOURCE) / "plan.json").is_file()


def test_mean_and_scale_are_those_of_the_source(folder: Path, tmp_path: Path) -> None:
    """What R2 and losses under ablation are measured against."""
    run = import_dictionary(folder, tmp_path / "run", format="saelens", sets=SOURCE, tokens=8192)
    plan, state = launch.load(run, device="cpu").plan, launch.closed(run)[2]
    x_BD = plan.recipe.source.open(1, torch.device("cpu")).next(8192).x_BD
    mean_D = state.metric.raw(White(torch.zeros(6)))
    torch.testing.assert_close(mean_D, x_BD.mean(0), rtol=0, atol=0.2)
    torch.testing.assert_close(state.metric.variance("raw"), x_BD.var(0).sum(), rtol=0.05, atol=0)
    assert state.measured["calibrate.tokens"] >= 8192


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "gated"])
@pytest.mark.parametrize("centred", [False, True])
def test_without_a_look_at_the_source(
    kind: str, centred: bool, make, x_BD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is opened, and the run computes the same."""
    one = make(kind, centred=centred)
    folder = saelens.write(one, tmp_path / "sae", torch.float32)
    with monkeypatch.context() as closed:
        closed.setattr(Synthetic, "open", None)
        run = import_dictionary(folder, tmp_path / "run", format="saelens", sets=SOURCE, tokens=0)
    _, _, state = launch.closed(run)
    code = state.sae.encode(state.metric.white(x_BD.float()), dense=True)
    torch.testing.assert_close(code.dense().double(), one.encode(x_BD), rtol=0, atol=1e-5)
    assert launch.load(run, device="cpu").state.metric.variance("raw") == 6


@pytest.mark.slow
def test_with_a_language_model_it_can_be_looked_at(make, tmp_path: Path) -> None:
    """Features, a report and the model's loss, on the embedded model."""
    draw = torch.Generator().manual_seed(0)
    W_FD = torch.nn.functional.normalize(torch.randn(64, 192, generator=draw, dtype=torch.float64), dim=1)
    one = evolve(make("topk"), W_enc_FD=W_FD, W_dec_FD=W_FD, b_enc_F=W_FD[:, 0], b_dec_D=torch.zeros(192).double())
    folder = saelens.write(one, tmp_path / "sae", torch.float32)
    text = Path(spalf.__file__).parent / "**" / "*.py"
    source = f"source={{use='huggingface', model='embedded', layer=2, context=64, pool=64, text='{text}'}}"
    sets = (source, "source.shuffle=8192", "source.sequences=16", "evaluator.downstream_loss.sequences=4")
    run = import_dictionary(folder, tmp_path / "run", format="saelens", sets=sets, tokens=2048, device="cpu")
    scores = spalf.evaluate(run, suites=["downstream_loss"], device="cpu")["downstream_loss"]
    assert scores["ce_clean"] < scores["ce_patched"]
    assert scores["ce_mean_ablated"] != scores["ce_zero_ablated"]
    assert spalf.write_report(run, features=8, tokens=512, device="cpu").stat().st_size > 10_000
