"""Folders that spalf writes, read by the libraries themselves; folders that they write, read by spalf.

Activations are real ones, of the embedded model. Shape letters as in spalf/core/values.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spalf import evaluation, launch
from spalf.core.values import Raw
from spalf.exchange import formats
from spalf.exchange.saelens import VERSION
from spalf.exchange.verbs import export, import_dictionary

ROOT = Path(__file__).resolve().parents[2]
RUNS = {
    "jumprelu": ("jumprelu", "soft_zca"),
    "jumprelu_identity": ("jumprelu", "identity"),
    "relu": ("relu_l1", "soft_zca"),
    "topk": ("topk", "soft_zca"),
    "topk_identity": ("topk", "identity"),
    "batch_topk": ("batch_topk", "soft_zca"),
    "gated": ("gated", "soft_zca"),
}
"""Preset and whitener of each run that every format holds."""
REFINED = {"refined": ("jumprelu", "soft_zca"), "refined_identity": ("jumprelu", "identity")}
"""Runs with refined codes, which spalf's own form alone holds."""
FORMS = ("safetensors", "saelens", "dictionary_learning")
PLACES = [*((form, name) for form in FORMS for name in RUNS), *(("safetensors", name) for name in REFINED)]
SETTINGS = (
    "knobs={F=160, L0_target=8, lr=3e-3}",
    "budget={tokens=25600, batch=256}",
    "phase.calibrate.samples=4096",
    "evaluator.downstream_loss=false",
)
RISING = {"relu_l1": "term.l1.warmup=0", "gated": "term.l1.warmup=0", "jumprelu": "term.l0.warmup=0"}
CLOSE = 1e-5
"""Largest difference over the largest value, float32 against float64."""
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(once: Callable[..., Path]) -> Path:
    """Activations of the embedded model on spalf's own source."""

    def make(out: Path) -> None:
        text = ROOT / "spalf" / "**" / "*.py"
        sets = (f"source.text='{text}'", "source.pool=64", "source.shuffle=4096")
        launch.harvest(ROOT / "recipes" / "quickstart.toml", out / "held", sets=sets, tokens=8192, device="cpu")

    return once("shards", make) / "held"


@pytest.fixture(scope="module")
def runs(once: Callable[..., Path], shards: Path) -> Path:
    """A few steps of each activation, whitened and not."""

    def make(out: Path) -> None:
        for name, (preset, whitener) in (RUNS | REFINED).items():
            own = (f"name={name}", f"whitener={whitener}", f"source={{use='activations', path='{shards}'}}")
            rising = (RISING[preset],) if preset in RISING else ()
            refine = ("activation.refine=true",) if name in REFINED else ()
            launch.run(preset, sets=(*own, *SETTINGS, *rising, *refine), out=out, device="cpu", stop_at=20)

    return once("runs", make)


@pytest.fixture(scope="module")
def exports(once: Callable[..., Path], runs: Path, shards: Path) -> Path:
    """Every run in every format, and the activations to read."""

    def make(out: Path) -> None:
        held = load_file(next(iter(sorted(shards.glob("held_out-*.safetensors")))))
        save_file({"x": held["activations"][:384].float().contiguous()}, out / "x.safetensors")
        for form, name in PLACES:
            export(runs / name, out / form / name, to=form)

    return once("exports", make)


@pytest.fixture(scope="module")
def told(run_peer: Callable[..., Path], exports: Path) -> Path:
    """What the libraries make of them."""
    return run_peer("read_exports.py", exports)


@torch.no_grad()
def truth(run: Path, x_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, the raw length of one unit of each, reconstruction) of the trained model, float64."""
    _, _, state = launch.closed(run)
    assert isinstance(state.sae, nn.Module)
    assert isinstance(state.metric, nn.Module)
    sae, metric = state.sae.double().eval(), state.metric.double()
    code = sae.encode(metric.white(Raw(x_BD.double())), dense=True)
    length_F = sae.log_gain.exp() * metric.raw_direction(sae.W_dec_FD).norm(dim=1)
    return code.dense(), length_F, metric.raw(sae.decode(code))


def far(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(("form", "name"), PLACES)
def test_an_export_computes_what_the_run_computes(form: str, name: str, told: Path, exports: Path, runs: Path) -> None:
    x_BD = load_file(exports / "x.safetensors")["x"]
    z_BF, length_F, hat_BD = truth(runs / name, x_BD)
    theirs = load_file(told / f"{form}-{name}.safetensors")
    assert torch.equal(theirs["codes"] > 0, z_BF > 0)
    assert 1 < float((z_BF > 0).sum(1).double().mean()) < 120
    assert far(theirs["hat"], hat_BD) < CLOSE
    written = formats.read(exports / form / name, form)
    own_F = torch.ones_like(length_F) if form == "safetensors" else written.W_dec_FD.norm(dim=1)
    assert far(theirs["codes"] * own_F, z_BF * length_F) < CLOSE
    if "folded_hat" in theirs:
        assert far(theirs["folded_hat"], hat_BD) < CLOSE
    assert (written.step_F is not None) == (name in REFINED)


ARCHITECTURES = {"jumprelu": "jumprelu", "relu": "standard", "batch_topk": "jumprelu", "topk": "topk", "gated": "gated"}
CLASSES = {
    "jumprelu": "JumpReluAutoEncoder",
    "relu": "AutoEncoder",
    "batch_topk": "JumpReluAutoEncoder",
    "topk": "AutoEncoderTopK",
    "gated": "GatedAutoEncoder",
}


@pytest.mark.parametrize("name", RUNS)
def test_an_export_says_what_it_is(name: str, told: Path, exports: Path) -> None:
    kind = name.removesuffix("_identity")
    said = json.loads((told / "told.json").read_text(encoding="utf-8"))
    theirs = said["saelens"][name]
    assert theirs["architecture"] == ARCHITECTURES[kind]
    assert (theirs["hook_name"], theirs["model_name"]) == ("blocks.2.hook_resid_post", "embedded")
    assert theirs["spalf"]["recipe"] == name
    assert theirs["spalf"]["knobs"]["L0_target"] == 8
    assert len(theirs["spalf"]["recipe_sha256"]) == 64
    config = json.loads((exports / "saelens" / name / "cfg.json").read_text(encoding="utf-8"))
    assert config["metadata"]["sae_lens_version"] == VERSION
    theirs = said["dictionary_learning"][name]
    assert theirs["class"] == CLASSES[kind]
    assert theirs["trainer"]["layer"] == 2


@pytest.mark.parametrize("name", RUNS)
def test_rows_have_unit_norm_unless_the_order_needs_their_lengths(name: str, exports: Path) -> None:
    for form in ("saelens", "dictionary_learning"):
        length_F = formats.read(exports / form / name, form).W_dec_FD.norm(dim=1)
        is_unit = bool(((length_F - 1).abs() < 1e-6).all())
        assert is_unit == (name != "topk"), form


@pytest.mark.parametrize("name", ["jumprelu", "refined", "topk", "gated"])
def test_the_whole_core_evaluation_of_saebench_runs(name: str, told: Path, exports: Path) -> None:
    """On a random model: the numbers are those of the dictionary's own formula on what that model gives."""
    said = json.loads((told / "told.json").read_text(encoding="utf-8"))["safetensors"][name]
    theirs = load_file(told / f"safetensors-{name}.safetensors")
    dictionary = formats.read(exports / "safetensors" / name, "safetensors")
    x_BD = theirs["x_of_model"].double()
    z_BF = dictionary.encode(x_BD)
    hat_BD = dictionary.decode(z_BF)
    metrics = said["metrics"]
    assert metrics["sparsity"]["l0"] == pytest.approx(float((z_BF > 0).sum(1).double().mean()), rel=1e-5)
    cosine_B = torch.nn.functional.cosine_similarity(hat_BD, x_BD, dim=1)
    assert metrics["reconstruction_quality"]["cossim"] == pytest.approx(float(cosine_B.mean()), rel=1e-4)
    assert metrics["shrinkage"]["l2_norm_out"] == pytest.approx(float(hat_BD.norm(dim=1).mean()), rel=1e-4)
    assert far(theirs["density"], (z_BF > 0).double().mean(0)) < 1e-6
    assert said["config"]["hook_layer"] == 2
    # Its explained variance is not compared: it squares E[x^2] where the squared mean belongs.
    assert {"model_behavior_preservation", "model_performance_preservation"} <= metrics.keys()


@pytest.fixture(scope="module")
def foreign(run_peer: Callable[..., Path]) -> Path:
    return run_peer("write_foreign.py")


FOREIGN = (
    *(f"saelens/{n}" for n in ("standard", "jumprelu", "jumprelu_uncentred", "topk", "topk_rescaled", "gated")),
    *("saelens/batchtopk_inference", "saelens/batchtopk_training"),
    *(f"dictionary_learning/{n}" for n in ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder")),
    *(f"dictionary_learning/{n}" for n in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")),
    "sparsify/layers.3",
)


@pytest.mark.parametrize("place", FOREIGN)
def test_an_import_computes_what_the_library_computes(place: str, foreign: Path, tmp_path: Path) -> None:
    form, name = place.split("/")
    x_BD = load_file(foreign / "x.safetensors")["x"]
    theirs = load_file(foreign / f"{form}-{name}.safetensors")
    dictionary = formats.read(foreign / place, form)
    assert dictionary.about.hook == "blocks.3.hook_resid_post"
    codes_BF = dictionary.encode(x_BD)
    assert torch.equal(codes_BF > 0, theirs["codes"] > 0)
    assert far(theirs["codes"], codes_BF) < CLOSE
    assert far(theirs["hat"], dictionary.decode(codes_BF)) < CLOSE
    source = "source={use='synthetic', d_model=12}"
    run = import_dictionary(
        foreign / place, tmp_path / "run", format=form, sets=(source, "evaluator.downstream_loss=false")
    )
    z_BF, _, hat_BD = truth(run, x_BD)
    assert torch.equal(z_BF > 0, theirs["codes"] > 0)
    assert far(theirs["codes"], z_BF) < CLOSE
    assert far(theirs["hat"], hat_BD) < CLOSE


@pytest.mark.parametrize(("form", "name"), PLACES)
def test_there_and_back(form: str, name: str, exports: Path, runs: Path, shards: Path, tmp_path: Path) -> None:
    """A run, exported and imported, is a run with the same codes and reconstructions, and can be measured."""
    x_BD = load_file(exports / "x.safetensors")["x"]
    z_BF, length_F, hat_BD = truth(runs / name, x_BD)
    sets = (f"source={{use='activations', path='{shards}'}}", "evaluator.downstream_loss=false")
    again = import_dictionary(exports / form / name, tmp_path / "again", format=form, sets=sets)
    back_BF, back_F, back_BD = truth(again, x_BD)
    assert torch.equal(back_BF > 0, z_BF > 0)
    assert far(back_BF * back_F, z_BF * length_F) < CLOSE
    assert far(back_BD, hat_BD) < CLOSE


def test_an_imported_run_can_be_measured_and_exported(exports: Path, shards: Path, tmp_path: Path) -> None:
    sets: tuple[str, ...] = (f"source={{use='activations', path='{shards}'}}", "evaluator.downstream_loss=false")
    run = import_dictionary(exports / "saelens" / "topk", tmp_path / "run", format="saelens", sets=sets)
    scalars: dict[str, Any] = evaluation.evaluate(run, suites=["dictionary"], device="cpu")["dictionary"]
    assert scalars["l0"] == pytest.approx(8.0, abs=1e-3)
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "plan.json", "recipe.toml"]
    out = export(run, tmp_path / "out", to="dictionary_learning")
    assert formats.read(out, "dictionary_learning").k == 8
