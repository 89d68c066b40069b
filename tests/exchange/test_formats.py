"""What is written is read back; what cannot be read is refused by name, and nothing in a file is run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spalf.errors import ExchangeError
from spalf.exchange import dictionary_learning, formats, saelens, sparsify
from spalf.exchange.verbs import export

KINDS = ["relu", "jumprelu", "topk", "gated"]


@pytest.mark.parametrize("form", formats.WRITERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centred", [False, True])
def test_there_and_back(form: str, kind: str, centred: bool, make, x_BD, tmp_path: Path) -> None:
    one = make(kind, centred=centred)
    back = formats.read(formats.WRITERS[form](one, tmp_path / "out", torch.float32), form)
    assert (back.activation, back.k, back.width) == (kind, one.k, 20)
    z_BF = one.encode(x_BD)
    assert torch.equal(back.encode(x_BD) > 0, z_BF > 0)
    torch.testing.assert_close(back.encode(x_BD), z_BF, rtol=0, atol=1e-5)
    torch.testing.assert_close(back.decode(z_BF), one.decode(z_BF), rtol=1e-5, atol=1e-5)
    assert (back.about.model, back.about.hook, back.about.context) == ("toy/model", "blocks.3.hook_resid_post", 64)


@pytest.mark.parametrize("form", formats.WRITERS)
def test_refined_codes_are_refused_with_the_remedy(form: str, make, tmp_path: Path) -> None:
    """Without the refinement the same features would be on, with other values: a mistake that nothing shows."""
    with pytest.raises(
        ExchangeError, match=r"refined after their selection, and .*preset spalf_plain, or .*safetensors"
    ):
        formats.WRITERS[form](make("refined"), tmp_path / "out", torch.float32)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", formats.WRITERS)
def test_half_precision_is_smaller_and_near(form: str, make, x_BD, tmp_path: Path) -> None:
    one = make("relu")
    sizes = {}
    for name in ("float32", "bfloat16"):
        out = formats.WRITERS[form](one, tmp_path / name, getattr(torch, name))
        sizes[name] = max(p.stat().st_size for p in out.iterdir())
        back = formats.read(out, form)
        torch.testing.assert_close(back.decode(back.encode(x_BD)), one.decode(one.encode(x_BD)), rtol=0.05, atol=0.5)
    assert sizes["bfloat16"] < sizes["float32"]


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExchangeError, match=r'no format "npz" \(use safetensors, saelens'):
        formats.read(tmp_path, "npz")


# ------------------------------------------------------------------------------------------------------- SAELens
@pytest.fixture
def folder(make, tmp_path: Path) -> Callable[..., Path]:
    """A folder in SAELens' form, with changes to its config and tensors; None takes a key away."""

    def written(
        kind: str, config: dict[str, Any] | None = None, tensors: dict[str, Tensor | None] | None = None
    ) -> Path:
        out = saelens.write(make(kind), tmp_path / "saelens", torch.float32)
        told = json.loads((out / "cfg.json").read_text(encoding="utf-8")) | (config or {})
        (out / "cfg.json").write_text(json.dumps({k: v for k, v in told.items() if v is not None}), encoding="utf-8")
        held: dict[str, Any] = {**load_file(out / "sae_weights.safetensors"), **(tensors or {})}
        save_file({k: v for k, v in held.items() if v is not None}, out / "sae_weights.safetensors")
        return out

    return written


def test_saelens_gets_the_names_it_looks_for(folder) -> None:
    config = json.loads((folder("topk") / "cfg.json").read_text(encoding="utf-8"))
    assert (config["architecture"], config["k"], config["rescale_acts_by_decoder_norm"]) == ("topk", 4, False)
    assert (config["d_in"], config["d_sae"], config["dtype"]) == (6, 20, "float32")
    assert config["metadata"]["sae_lens_version"] == saelens.VERSION
    assert (config["metadata"]["hook_layer"], config["metadata"]["prepend_bos"]) == (3, True)


def test_a_top_k_of_an_older_version_is_one(folder) -> None:
    """Older files call it "standard", with the activation beside it: read as a ReLU, it would be dense."""
    older = {"architecture": None, "k": None, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    read = saelens.read(folder("topk", {**older, "metadata": None, "hook_point": "blocks.1.hook_mlp_out"}))
    assert (read.activation, read.k, read.about.hook) == ("topk", 3, "blocks.1.hook_mlp_out")


def test_logarithms_of_thresholds_are_read(folder) -> None:
    held = load_file(folder("jumprelu") / "sae_weights.safetensors")["threshold"]
    read = saelens.read(folder("jumprelu", tensors={"threshold": None, "log_threshold": held.log()}))
    assert read.threshold_F is not None
    torch.testing.assert_close(read.threshold_F, held.double(), rtol=1e-6, atol=0)


REFUSED = {
    "architecture": ({"architecture": "temporal"}, 'architecture is "temporal"'),
    "transcoder": ({"d_out": 9}, "this is a transcoder"),
    "normalised": ({"normalize_activations": "layer_norm"}, 'normalize_activations is "layer_norm"'),
    "finetuned": ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor is set"),
    "activation": ({"activation_fn": "tanh-relu"}, 'activation_fn is "tanh-relu"'),
}


@pytest.mark.parametrize("why", REFUSED)
def test_saelens_features_that_spalf_lacks_are_refused(why: str, folder) -> None:
    config, said = REFUSED[why]
    with pytest.raises(ExchangeError, match=said):
        saelens.read(folder("relu", config))


def test_every_misfit_of_the_tensors_is_named(folder) -> None:
    bad = {
        "b_enc": None,
        "extra": torch.zeros(2),
        "b_dec": torch.zeros(5),
        "W_dec": torch.full((20, 6), torch.inf),
    }
    with pytest.raises(ExchangeError) as e:
        saelens.read(folder("relu", tensors=bad))
    for said in ("b_enc is missing", "extra is not known", "b_dec has shape (5,), not (6,)", "W_dec is not finite"):
        assert said in str(e.value)


def test_a_bad_k_is_refused(folder) -> None:
    with pytest.raises(ExchangeError, match=r"k is 0\.5, not a positive whole number"):
        saelens.read(folder("topk", {"k": 0.5}))


@pytest.mark.parametrize(
    ("content", "said"), [(None, "no such file"), ("{", "cannot be read"), ("[]", "holds a list, not a table")]
)
@pytest.mark.parametrize("form", formats.READERS)
def test_a_config_that_is_none(form: str, content: str | None, said: str, tmp_path: Path) -> None:
    for name in ("cfg.json", "config.json"):
        if content is not None:
            (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ExchangeError, match=said):
        formats.read(tmp_path, form)


def test_weights_that_are_none(folder) -> None:
    out = folder("relu")
    (out / "sae_weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(ExchangeError, match=r"sae_weights.safetensors: cannot be read"):
        saelens.read(out)
    (out / "sae_weights.safetensors").unlink()
    with pytest.raises(ExchangeError, match=r"sae_weights.safetensors: no such file"):
        saelens.read(out)


# ------------------------------------------------------------------------------------------- dictionary_learning
def test_a_pickle_is_never_run(make, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    out = dictionary_learning.write(make("relu"), tmp_path / "dl", torch.float32)
    torch.save({"encoder.weight": Bomb()}, out / "ae.pt")
    with pytest.raises(ExchangeError, match="is no plain table of tensors"):
        dictionary_learning.read(out)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "has no table trainer"),
        ({"trainer": {"dict_class": "IdentityDict"}}, 'trainer.dict_class is "IdentityDict"'),
    ],
)
def test_unknown_classes_are_refused(config: dict[str, Any], said: str, make, tmp_path: Path) -> None:
    out = dictionary_learning.write(make("relu"), tmp_path / "dl", torch.float32)
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ExchangeError, match=said):
        dictionary_learning.read(out)


def test_a_threshold_that_was_never_measured_is_refused(make, tmp_path: Path) -> None:
    """BatchTopK without one has no code at inference: its loader would let everything through."""
    out = dictionary_learning.write(make("topk"), tmp_path / "dl", torch.float32)
    (out / "config.json").write_text(json.dumps({"trainer": {"dict_class": "BatchTopKSAE"}}), encoding="utf-8")
    with pytest.raises(ExchangeError, match="holds no measured threshold"):
        dictionary_learning.read(out)


# ------------------------------------------------------------------------------------------------------ sparsify
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"transcode": True}, "transcode is set"),
        ({"skip_connection": True}, "skip_connection is set"),
        ({"activation": "groupmax"}, 'activation is "groupmax"'),
        ({"k": None}, "k is None"),
    ],
)
def test_sparsify_features_that_spalf_lacks_are_refused(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    held = {"encoder.weight": torch.ones(8, 3), "encoder.bias": torch.ones(8), "W_dec": torch.ones(8, 3)}
    save_file({**held, "b_dec": torch.ones(3)}, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"k": 2, "d_in": 3, **config}), encoding="utf-8")
    with pytest.raises(ExchangeError, match=said):
        sparsify.read(tmp_path)


# ---------------------------------------------------------------------------------------------------- spalf's own
def test_another_version_of_our_own_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"format": "spalf.dictionary.9"}', encoding="utf-8")
    with pytest.raises(ExchangeError, match=r"format is 'spalf.dictionary.9'"):
        formats.read(tmp_path, "safetensors")


@pytest.fixture
def refined_folder(refined_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """Our own form of a refined run, with changes to its config and tensors; None takes a tensor away."""

    def written(config: dict[str, Any] | None = None, tensors: dict[str, Tensor | None] | None = None) -> Path:
        out = export(refined_run, tmp_path / "refined")
        told = json.loads((out / "config.json").read_text(encoding="utf-8")) | (config or {})
        (out / "config.json").write_text(json.dumps(told), encoding="utf-8")
        held: dict[str, Any] = {**load_file(out / "sae.safetensors"), **(tensors or {})}
        save_file({k: v for k, v in held.items() if v is not None}, out / "sae.safetensors")
        return out

    return written


def test_steps_are_read(refined_folder) -> None:
    found = formats.read(refined_folder(), "safetensors")
    assert found.activation == "jumprelu"
    assert found.step_F is not None
    assert float(found.step_F.abs().min()) > 0


def test_steps_of_zero_are_none(refined_folder) -> None:
    assert formats.read(refined_folder(tensors={"step": torch.zeros(32)}), "safetensors").step_F is None


def test_steps_over_thresholds_of_zero_stay(refined_folder) -> None:
    """Such a dictionary is no ReLU."""
    found = formats.read(refined_folder(tensors={"threshold": torch.zeros(32)}), "safetensors")
    assert found.activation == "jumprelu"
    assert found.step_F is not None


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({"format": "spalf.dictionary.1"}, {}, "step is not known"),
        ({}, {"step": None}, "step is missing"),
        ({}, {"step": torch.zeros(31)}, r"step has shape \(31,\), not \(32,\)"),
        ({}, {"threshold": -torch.ones(32)}, "has steps with k or with thresholds below 0"),
        ({"k": 3}, {"threshold": torch.zeros(32)}, "has steps with k or with thresholds below 0"),
    ],
)
def test_steps_that_do_not_belong(config: Any, tensors: Any, said: str, refined_folder) -> None:
    with pytest.raises(ExchangeError, match=said):
        formats.read(refined_folder(config, tensors), "safetensors")
