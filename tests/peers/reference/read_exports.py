"""What the real libraries make of the folders that `spalf export` wrote; run as `python read_exports.py OUT EXPORTS`.

EXPORTS holds x.safetensors and a folder per format with a folder per dictionary. OUT gets codes and reconstructions of
each, what each file says of itself, and what SAEBench's core evaluation finds of the ones in spalf's own form.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import common
import torch
from safetensors.torch import load_file
from torch import Tensor

common.stand_in("wandb")
common.stand_in("nnsight", LanguageModel=object)
from dictionary_learning.utils import load_dictionary  # noqa: E402
from sae_bench.evals.core.eval_config import CoreEvalConfig  # noqa: E402
from sae_bench.evals.core.main import run_evals  # noqa: E402
from sae_bench.sae_bench_utils.general_utils import load_and_format_sae  # noqa: E402
from sae_lens import SAE  # noqa: E402
from transformer_lens import HookedTransformer, HookedTransformerConfig  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from spalf.exchange import saebench  # noqa: E402


def of_saelens(folder: Path, x_BD: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    sae = SAE.load_from_disk(folder)
    out = {"codes": sae.encode(x_BD), "hat": sae(x_BD)}
    told = {
        "class": type(sae).__name__,
        "architecture": sae.cfg.architecture(),
        "hook_name": sae.cfg.metadata.hook_name,
        "model_name": sae.cfg.metadata.model_name,
        "context_size": sae.cfg.metadata.context_size,
        "prepend_bos": sae.cfg.metadata.prepend_bos,
        "spalf": sae.cfg.metadata.spalf,
    }
    if told["architecture"] != "topk":  # which refuses, as it would change the order
        sae.fold_W_dec_norm()
        out["folded_hat"] = sae(x_BD)
    return out, told


def of_dictionary_learning(folder: Path, x_BD: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    dictionary, config = load_dictionary(str(folder), "cpu")
    told = {"class": type(dictionary).__name__, "trainer": config["trainer"], "spalf": config["spalf"]}
    return {"codes": dictionary.encode(x_BD), "hat": dictionary(x_BD)}, told


class Tokens:
    """As much of SAELens' ActivationsStore as the evaluation asks for: random tokens."""

    context_size, store_batch_size_prompts = 16, 4

    def __init__(self, n_vocab: int) -> None:
        self.n_vocab = n_vocab

    def get_batch_tokens(self, n: int) -> Tensor:
        draw = torch.Generator().manual_seed(0)
        return torch.randint(self.n_vocab, (n, self.context_size), generator=draw)

    def reset_input_dataset(self) -> None: ...


def of_saebench(folder: Path, x_BD: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """SAEBench's whole core evaluation, on a random model of the right width: it needs no download."""
    adapter = saebench.load(folder)
    out = {"codes": adapter.encode(x_BD), "hat": adapter(x_BD)}
    found = load_and_format_sae("spalf", adapter, "cpu")
    assert found is not None
    sae = found[1]
    torch.manual_seed(0)
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=sae.cfg.hook_layer + 1, d_model=sae.cfg.d_in, n_ctx=16, d_head=32, d_vocab=50, act_fn="gelu"
        )
    )
    options = CoreEvalConfig(
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        batch_size_prompts=4,
    )
    tokens = Tokens(50)
    metrics, per_feature = run_evals(sae, tokens, model, options)
    _, cache = model.run_with_cache(tokens.get_batch_tokens(4), names_filter=[sae.cfg.hook_name])
    out["x_of_model"] = cache[sae.cfg.hook_name].flatten(0, 1)
    out["density"] = torch.tensor(per_feature["feature_density"])
    return out, {"class": type(sae).__name__, "metrics": metrics, "config": sae.cfg.to_dict()}


READERS = {"saelens": of_saelens, "dictionary_learning": of_dictionary_learning, "safetensors": of_saebench}


@torch.no_grad()
def main(out: Path, exports: Path) -> None:
    x_BD = load_file(exports / "x.safetensors")["x"]
    told: dict[str, dict[str, Any]] = {}
    for form, read in READERS.items():
        for folder in sorted((exports / form).iterdir()):
            tensors, said = read(folder, x_BD)
            common.write(out, f"{form}-{folder.name}", tensors)
            told.setdefault(form, {})[folder.name] = said
    (out / "told.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
