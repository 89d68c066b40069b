"""Exports of a run: what they hold of it, and what is refused before anything is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

import spalf
from spalf.core.values import Raw
from spalf.errors import ExchangeError
from spalf.exchange import formats
from spalf.exchange.saebench import SAEBenchDictionary
from spalf.exchange.verbs import export, import_dictionary


@pytest.mark.parametrize("to", ["safetensors", *formats.WRITERS])
def test_every_format_is_written(to: str, run: Path, tmp_path: Path) -> None:
    out = export(run, tmp_path / "out", to=to)
    assert not [p.name for p in out.iterdir() if p.name.startswith(".")]
    held = formats.read(out, to)
    assert (held.activation, held.width, held.about.hook) == ("jumprelu", 32, "planted")


@torch.no_grad()
def computed(run: Path, x_BD: Tensor) -> tuple[Tensor, Tensor]:
    """(z, reconstruction) as `spalf.load` has them; z in units of model space."""
    state = spalf.load(run, device="cpu").state
    code = state.sae.encode(state.metric.white(Raw(x_BD)), dense=True)
    length_F = state.sae.log_gain.exp() * state.metric.raw_direction(state.sae.W_dec_FD).norm(dim=1)
    return code.dense() * length_F, state.metric.raw(state.sae.decode(code))


def test_a_refined_run_goes_out_and_comes_back(refined_run: Path, tmp_path: Path) -> None:
    """As a folder, for SAEBench, and as a run that is measured anew and written anew: one function, in float32."""
    x_BD = 2.0 * torch.randn(512, 12, generator=torch.Generator().manual_seed(1))
    z_BF, hat_BD = computed(refined_run, x_BD)
    folder = export(refined_run, tmp_path / "out")
    read = formats.read(folder, "safetensors")
    sets = ("source={use='synthetic', d_model=12, features=24}", "evaluator.downstream_loss=false")
    again = import_dictionary(folder, tmp_path / "again", format="safetensors", sets=sets)
    twice = formats.read(export(again, tmp_path / "twice"), "safetensors")
    assert read.step_F is not None
    assert twice.step_F is not None
    torch.testing.assert_close(twice.step_F, read.step_F, rtol=1e-5, atol=0)
    named = evolve(read, about=evolve(read.about, model="toy", hook="blocks.0"))
    adapter = SAEBenchDictionary(named)
    found = {
        "file": (read.encode(x_BD), read.decode(read.encode(x_BD))),
        "SAEBench": (adapter.encode(x_BD), adapter(x_BD)),
        "import": computed(again, x_BD),
        "file again": (twice.encode(x_BD), twice.decode(twice.encode(x_BD))),
    }
    unrefined_BF = evolve(read, step_F=None).encode(x_BD)
    assert float((unrefined_BF - z_BF).abs().max() / z_BF.max()) > 1e-3
    for name, (codes_BF, other_BD) in found.items():
        assert float((codes_BF - z_BF).abs().max() / z_BF.max()) < 1e-5, name
        assert float((other_BD - hat_BD).abs().max() / hat_BD.abs().max()) < 1e-5, name


@pytest.mark.parametrize("to", formats.WRITERS)
def test_a_refined_run_is_refused_where_it_has_no_form(to: str, refined_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ExchangeError, match="preset spalf_plain"):
        export(refined_run, tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def told(run: Path, out: Path) -> dict[str, Any]:
    """What an export in SAELens' form says of its run."""
    config = json.loads((export(run, out, to="saelens") / "cfg.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = config["metadata"]["spalf"]
    return found


def test_the_run_is_told_of(run: Path, tmp_path: Path) -> None:
    found = told(run, tmp_path / "out")
    assert (found["recipe"], found["phase"], found["step"]) == ("run", "fit", 5)
    assert found["knobs"]["L0_target"] == 4
    assert found["measured"] == {}


def test_a_summary_counts_for_its_own_step_alone(run: Path, tmp_path: Path) -> None:
    summary = run / "summary.json"
    before = summary.read_text(encoding="utf-8")
    try:
        for i, (text, wanted) in enumerate(
            [('{"step": 5, "l0": 3.5}', {"l0": 3.5}), ('{"step": 6, "l0": 3.5}', {}), ("nothing", {})]
        ):
            summary.write_text(text, encoding="utf-8")
            assert told(run, tmp_path / str(i))["measured"] == wanted
    finally:
        summary.write_text(before, encoding="utf-8")


@pytest.mark.parametrize(("to", "dtype"), [("npz", "float32"), ("saelens", "int8")])
def test_what_does_not_exist_is_refused_first(to: str, dtype: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ExchangeError, match="export: there is no"):
        export(run, tmp_path / "out", to=to, dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_a_newer_export_replaces_an_older_one(run: Path, tmp_path: Path) -> None:
    for _ in range(2):
        export(run, tmp_path / "out", to="dictionary_learning")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["ae.pt", "config.json"]
