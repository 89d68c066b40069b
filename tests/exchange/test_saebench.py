"""The interface that SAEBench expects, attribute by attribute; tests/peers runs its core evaluation on it."""

import json

import pytest
import torch
from attrs import evolve

from spalf.errors import ExchangeError
from spalf.exchange import saelens
from spalf.exchange.dictionary import About
from spalf.exchange.saebench import SAEBenchDictionary, load

KINDS = ["relu", "jumprelu", "refined", "topk", "gated"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("centred", [False, True])
def test_it_reconstructs_what_the_dictionary_does(kind, centred, make, x_BD) -> None:
    one = make(kind, centred=centred)
    adapter = SAEBenchDictionary(one)
    z_BF = one.encode(x_BD)
    codes_BF = adapter.encode(x_BD.float())
    assert torch.equal(codes_BF > 0, z_BF > 0)
    assert (adapter.step_F is not None) == (kind == "refined")
    torch.testing.assert_close(adapter(x_BD.float()).double(), one.decode(z_BF), rtol=0, atol=1e-4)
    lengths_F = one.W_dec_FD.norm(dim=1)
    torch.testing.assert_close(codes_BF.double(), z_BF * lengths_F, rtol=0, atol=1e-4)
    torch.testing.assert_close(adapter.W_dec.norm(dim=1), torch.ones(20), rtol=0, atol=1e-6)


def test_it_keeps_leading_axes(make, x_BD) -> None:
    adapter = SAEBenchDictionary(make("topk"))
    x_STD = x_BD.float().reshape(8, 8, 6)
    assert adapter.encode(x_STD).shape == (8, 8, 20)
    torch.testing.assert_close(adapter(x_STD).reshape(64, 6), adapter(x_BD.float()))


def test_it_has_what_is_read_of_it(make) -> None:
    adapter = SAEBenchDictionary(make("jumprelu"))
    assert (adapter.W_enc.shape, adapter.W_dec.shape) == ((6, 20), (20, 6))
    assert (adapter.b_enc.shape, adapter.b_dec.shape) == ((20,), (6,))
    assert (adapter.device, adapter.dtype) == (torch.device("cpu"), torch.float32)
    cfg = adapter.cfg
    assert (cfg.model_name, cfg.hook_name, cfg.hook_layer) == ("toy/model", "blocks.3.hook_resid_post", 3)
    assert (cfg.d_in, cfg.d_sae, cfg.architecture, cfg.hook_head_index) == (6, 20, "jumprelu", None)
    assert (cfg.context_size, cfg.prepend_bos, cfg.normalize_activations) == (64, True, "none")
    cfg.metadata = object()  # as SAEBench does, and what is no JSON stays out
    cfg.architecture_str = "jumprelu"
    assert json.loads(json.dumps(cfg.to_dict()))["architecture_str"] == "jumprelu"


def test_it_changes_dtype_with_its_config(make, x_BD) -> None:
    adapter = SAEBenchDictionary(make("relu")).to(dtype=torch.bfloat16)
    assert (adapter.dtype, adapter.cfg.dtype) == (torch.bfloat16, "bfloat16")
    assert adapter(x_BD).dtype == torch.bfloat16


@pytest.mark.parametrize("about", [About(hook="blocks.1.hook_resid_post"), About(model="m", hook="planted")])
def test_a_dictionary_of_nowhere_is_refused(about, make) -> None:
    with pytest.raises(ExchangeError, match="SAEBench needs a model and a block"):
        SAEBenchDictionary(evolve(make("relu"), about=about))


def test_it_is_made_from_a_folder(make, tmp_path) -> None:
    folder = saelens.write(make("relu"), tmp_path / "out", torch.float32)
    adapter = load(folder, format="saelens", training_tokens=7)
    assert (adapter.cfg.d_sae, adapter.cfg.training_tokens) == (20, 7)
