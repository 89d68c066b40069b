"""The folded dictionary does to raw activations what the whitened model does, and a directory is whole or has none."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from spalf.core.built import Activator, Metric, Ops
from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.core.values import Clock, Facts, Machine, Raw
from spalf.engine import export as exporting
from spalf.engine.export import export, fold
from spalf.errors import CheckpointError
from spalf.kernels.reference import ReferenceOps
from spalf.nn import StratifiedAutoencoder
from spalf.parts.activation import JumpReLU
from spalf.parts.whitener import Identity, SoftZca, Zca
from spalf.testing.primal_linear import FACTS, D, fitted, sample

F = 40
METRICS = {
    "soft_zca": SoftZca(),
    "low_rank": SoftZca(low_rank_above=1, variance=0.9),
    "zca": Zca(),
    "identity": Identity(),
}


def dictionary(refine: bool = False) -> StratifiedAutoencoder:
    """Random and float64, a gain away from 1, rows of both matrices away from unit norm, each bias in use."""
    activator = JumpReLU(refine=refine).build(F)
    machine = Machine(device=torch.device("cpu"), ops=cast(Ops, ReferenceOps()))
    sae = StratifiedAutoencoder(D, {"anchored": 10, "free": F - 10}, cast(Activator, activator), machine)
    draw = torch.Generator().manual_seed(3)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.5
    sae.log_gain.data.fill_(-1.3)
    return sae


def whitened(sae: StratifiedAutoencoder, metric: Metric, x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """(x_hat, z) of the trained model, in float64."""
    wide = sae.double()
    with torch.no_grad():
        code = wide.encode(metric.white(Raw(x_BD)))
        return metric.raw(wide.decode(code)), code.dense()


def folded(d: dict[str, Tensor], x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """What config.json's formula says."""
    pre_BF = x_BD @ d["W_enc"].T + d["b_enc"]
    z_BF = torch.where(pre_BF > d["threshold"], pre_BF, 0.0)
    return z_BF @ d["W_dec"] + d["b_dec"], z_BF


@pytest.mark.parametrize("component", METRICS.values(), ids=METRICS.keys())
def test_the_fold_is_exact(component, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "CHUNK", 16)  # several chunks, the last one short
    x_BD, sae = sample(256), dictionary()
    metric = fitted(component, x_BD)
    out = fold(metric, sae)
    wanted, z_BF = whitened(sae, metric.double(), x_BD)  # type: ignore[attr-defined]
    got, raw_z_BF = folded(out, x_BD)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    assert torch.equal(raw_z_BF > 0, z_BF > 0)
    assert 0 < int((z_BF > 0).sum()) < z_BF.numel()
    torch.testing.assert_close(raw_z_BF, z_BF * out["scale"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(out["W_dec"].norm(dim=1), torch.ones(F, dtype=torch.float64), rtol=0, atol=1e-14)


def test_a_fold_leaves_the_model_as_it_was() -> None:
    metric, sae = fitted(SoftZca(), sample(256)), dictionary()
    before = {k: v.clone() for k, v in {**sae.state_dict(), **metric.state_dict()}.items()}
    fold(metric, sae)
    after = {**sae.state_dict(), **metric.state_dict()}
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())


def test_a_row_of_zeros_stays_zero() -> None:
    metric, sae = fitted(SoftZca(), sample(256)), dictionary()
    sae.W_dec_FD.data[7] = 0
    out = fold(metric, sae)
    assert float(out["W_dec"][7].abs().max()) == 0
    assert all(bool(torch.isfinite(tensor).all()) for tensor in out.values())


def refining(component: Any, x_BD: Tensor) -> tuple[StratifiedAutoencoder, Metric]:
    """A refined dictionary and its metric, both float64: in float32, W W^-1 is the identity to seven digits alone."""
    metric = component.build(FACTS).double()
    component.fit_(metric, x_BD.mean(0), torch.cov(x_BD.T, correction=0))
    sae = dictionary(refine=True).double()
    sae.measure_by(metric)
    return sae, metric


def refolded(d: dict[str, Tensor], x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """What config.json's formula says of a dictionary with steps."""
    hat_BD, u_BF = folded(d, x_BD)
    moved_BF = (u_BF + d["step"] * ((x_BD - hat_BD) @ d["W_dec"].T)).clamp(min=0)
    z_BF = torch.where(x_BD @ d["W_enc"].T + d["b_enc"] > d["threshold"], moved_BF, 0.0)
    return z_BF @ d["W_dec"] + d["b_dec"], z_BF


@pytest.mark.parametrize("component", METRICS.values(), ids=METRICS.keys())
def test_a_refinement_is_one_number_per_feature_in_model_space(component, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form A that errors are measured by turns into a plain product with unit rows, whatever the whitening."""
    monkeypatch.setattr(exporting, "CHUNK", 16)
    x_BD = sample(256)
    sae, metric = refining(component, x_BD)
    out = fold(metric, sae)
    wanted, z_BF = whitened(sae, metric, x_BD)
    got, raw_z_BF = refolded(out, x_BD)
    selected_BF = folded(out, x_BD)[1]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))
    wanted_BF = z_BF * out["scale"]
    torch.testing.assert_close(raw_z_BF, wanted_BF, rtol=0, atol=1e-9 * float(wanted_BF.abs().max()))
    # Steps of both signs, coefficients that moved by much, and some that were taken to 0.
    assert bool((out["step"] > 0).any())
    assert bool((out["step"] < 0).any())
    assert float((raw_z_BF - selected_BF).norm() / selected_BF.norm()) > 0.05
    assert bool(((selected_BF > 0) & (raw_z_BF == 0)).any())


def test_a_row_of_zeros_is_not_refined() -> None:
    x_BD = sample(256)
    sae, metric = refining(SoftZca(), x_BD)
    sae.W_dec_FD.data[7] = 0
    wanted, _ = whitened(sae, metric, x_BD)
    got, _ = refolded(fold(metric, sae), x_BD)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.parametrize(("name", "value"), [("k", 3), ("affine_F", (torch.ones(F), torch.ones(F)))])
def test_a_refinement_after_another_selection_is_refused(name: str, value: Any, monkeypatch: Any) -> None:
    sae, metric = refining(SoftZca(), sample(256))
    monkeypatch.setattr(sae.activator, name, (lambda: value) if name == "affine_F" else value)
    with pytest.raises(CheckpointError, match=r"refined codes are written where .* activation\.refine = false"):
        fold(metric, sae)


def test_a_refinement_by_other_weights_is_refused() -> None:
    """One number per feature says nothing of a form that is not the metric's."""
    sae, metric = refining(SoftZca(), sample(256))
    own_DD = sae.form_DD.clone()
    sae.weigh_by(own_DD + 1e-2 * own_DD.abs().amax() * torch.eye(D))
    with pytest.raises(CheckpointError, match="phase `reweigh` has measured"):
        fold(metric, sae)
    sae.weigh_by(own_DD.float().double())
    fold(metric, sae)


def plan_and_state() -> tuple[Plan, TrainingState]:
    """As much of a run as an export reads."""
    plan = SimpleNamespace(
        facts=Facts(d_model=D, hook="blocks.3", model="tiny"),
        recipe=SimpleNamespace(name="toy", activation=JumpReLU()),
    )
    state = SimpleNamespace(
        metric=fitted(SoftZca(), sample(256)), sae=dictionary(), clock=Clock(step=5, total=9, phase="fit")
    )
    return cast(Plan, plan), cast(TrainingState, state)


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 0.06)])
def test_what_is_written_acts_on_raw_activations(tmp_path: Path, dtype: str, close: float) -> None:
    plan, state = plan_and_state()
    out = export(plan, state, tmp_path / "a" / "b", dtype)
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "sae.safetensors"]
    held = load_file(out / "sae.safetensors")
    assert held["W_enc"].dtype == held["W_dec"].dtype == exporting.DTYPES[dtype]
    assert held["threshold"].dtype == held["b_enc"].dtype == torch.float32
    x_BD = sample(64)
    got, _ = folded({k: v.double() for k, v in held.items()}, x_BD)
    wanted, _ = whitened(cast(StratifiedAutoencoder, state.sae), state.metric.double(), x_BD)  # type: ignore[attr-defined]
    assert float((got - wanted).norm() / wanted.norm()) < close


def test_config_says_what_it_is(tmp_path: Path) -> None:
    config = json.loads((export(*plan_and_state(), tmp_path) / "config.json").read_text())
    assert {
        k: config[k] for k in ("d_model", "F", "hook", "model", "activation", "recipe", "phase", "step", "dtype")
    } == {
        "d_model": D,
        "F": F,
        "hook": "blocks.3",
        "model": "tiny",
        "activation": "jumprelu",
        "recipe": "toy",
        "phase": "fit",
        "step": 5,
        "dtype": "float32",
    }
    assert config["format"] == exporting.FORMAT
    assert config["strata"] == {"anchored": [0, 10], "free": [10, F]}
    assert "torch" in config["versions"]


def test_steps_have_a_format_of_their_own(tmp_path: Path) -> None:
    """An older reader would leave them out without a word."""
    plan, state = plan_and_state()
    state.sae = refined = dictionary(refine=True)
    refined.measure_by(state.metric)
    out = export(plan, state, tmp_path)
    config = json.loads((out / "config.json").read_text())
    assert (config["format"], config["formula"]) == (exporting.REFINED_FORMAT, exporting.FORMULA_REFINED)
    with safe_open(out / "sae.safetensors", "pt") as held:
        assert held.metadata() == {"format": exporting.REFINED_FORMAT}
        assert held.get_tensor("step").dtype == torch.float32


def test_steps_of_zero_leave_a_plain_dictionary(tmp_path: Path) -> None:
    """Byte for byte: the refinement that training starts with is none."""
    plan, state = plan_and_state()
    plain = export(plan, state, tmp_path / "plain")
    state.sae = dictionary(refine=True)
    cast(Any, state.sae.activator).step_F.data.zero_()
    refined = export(plan, state, tmp_path / "refined")
    for name in ("sae.safetensors", "config.json"):
        assert (refined / name).read_bytes() == (plain / name).read_bytes()
    assert json.loads((plain / "config.json").read_text())["format"] == "spalf.dictionary.1"


def test_an_export_replaces_an_older_one_and_nothing_else(tmp_path: Path) -> None:
    plan, state = plan_and_state()
    (tmp_path / "notes.txt").write_text("mine")
    export(plan, state, tmp_path)
    state.sae.b_dec_D.data += 1
    export(plan, state, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "notes.txt", "sae.safetensors"]
    torch.testing.assert_close(
        load_file(tmp_path / "sae.safetensors")["b_dec"], fold(state.metric, state.sae, torch.float32)["b_dec"]
    )


def test_a_cut_export_has_no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, state = plan_and_state()
    export(plan, state, tmp_path)
    replace = Path.replace

    def cut(self: Path, target: Path) -> Path:
        if target.name == "sae.safetensors":
            raise OSError("no space left")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", cut)
    with pytest.raises(OSError, match="no space left"):
        export(plan, state, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_what_cannot_be_exported_is_named(tmp_path: Path) -> None:
    plan, state = plan_and_state()
    with pytest.raises(CheckpointError, match="use float32, bfloat16"):
        export(plan, state, tmp_path, "int8")
    state.sae.W_enc_FD.data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="not finite: W_enc"):
        export(plan, state, tmp_path)
    assert list(tmp_path.iterdir()) == []
