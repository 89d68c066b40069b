"""Folders as the libraries themselves write them, and what they compute; run as `python write_foreign.py OUT`.

OUT gets a folder per format with a folder per dictionary, and beside each its codes and reconstructions of x.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import common
import torch
from torch import Tensor, nn

common.stand_in("wandb")
common.stand_in("nnsight", LanguageModel=object)
from dictionary_learning import dictionary as dl  # noqa: E402
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE  # noqa: E402
from dictionary_learning.trainers.top_k import AutoEncoderTopK  # noqa: E402
from sae_lens.saes import batchtopk_sae, gated_sae, jumprelu_sae, standard_sae, topk_sae  # noqa: E402
from sae_lens.saes.sae import SAEMetadata  # noqa: E402
from sparsify import SparseCoder, SparseCoderConfig  # noqa: E402

D, F = common.D, common.F
Made = tuple[str, str, Callable[[Path], object], Callable[[Tensor], tuple[Tensor, Tensor]]]


def shaken(module: nn.Module, seed: int) -> nn.Module:
    """Every parameter random: biases in use, decoder rows of no particular length, thresholds positive."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = 0.4 * torch.randn(parameter.shape, generator=draw)
            parameter.copy_(value.abs() if "threshold" in name else value)
    return module


def inference(module: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda x_BD: (module.encode(x_BD), module.decode(module.encode(x_BD)))


def of_saelens() -> Iterator[Made]:
    shape = {"d_in": D, "d_sae": F}
    told = {
        "metadata": SAEMetadata(
            model_name="toy/model", hook_name="blocks.3.hook_resid_post", context_size=64, prepend_bos=True
        )
    }
    kinds = {
        "standard": standard_sae.StandardSAE(standard_sae.StandardSAEConfig(**shape, **told)),
        "jumprelu": jumprelu_sae.JumpReLUSAE(jumprelu_sae.JumpReLUSAEConfig(**shape, **told)),
        "jumprelu_uncentred": jumprelu_sae.JumpReLUSAE(
            jumprelu_sae.JumpReLUSAEConfig(**shape, apply_b_dec_to_input=False, **told)
        ),
        "topk": topk_sae.TopKSAE(topk_sae.TopKSAEConfig(**shape, k=6, **told)),
        "topk_rescaled": topk_sae.TopKSAE(
            topk_sae.TopKSAEConfig(**shape, k=6, rescale_acts_by_decoder_norm=True, **told)
        ),
        "gated": gated_sae.GatedSAE(gated_sae.GatedSAEConfig(**shape, **told)),
    }
    for seed, (name, sae) in enumerate(kinds.items()):
        shaken(sae, seed)
        yield "saelens", name, sae.save_model, inference(sae)
    training = batchtopk_sae.BatchTopKTrainingSAE(
        batchtopk_sae.BatchTopKTrainingSAEConfig(**shape, k=6, rescale_acts_by_decoder_norm=False, **told)
    )
    shaken(training, 99)
    training.topk_threshold.fill_(0.7)

    def above(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        pre_BF = ((x_BD - training.b_dec) @ training.W_enc + training.b_enc).relu()
        codes_BF = pre_BF * (pre_BF > training.topk_threshold)
        return codes_BF, training.decode(codes_BF)

    yield "saelens", "batchtopk_inference", training.save_inference_model, above
    yield "saelens", "batchtopk_training", training.save_model, above


def of_dictionary_learning() -> Iterator[Made]:
    kinds: dict[str, nn.Module] = {
        "AutoEncoder": dl.AutoEncoder(D, F),
        "AutoEncoderNew": dl.AutoEncoderNew(D, F),
        "GatedAutoEncoder": dl.GatedAutoEncoder(D, F),
        "JumpReluAutoEncoder": dl.JumpReluAutoEncoder(D, F),
        "AutoEncoderTopK": AutoEncoderTopK(D, F, k=6),
        "BatchTopKSAE": BatchTopKSAE(D, F, k=6),
        "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(D, F, k=6, group_sizes=[10, 30]),
    }
    for seed, (name, module) in enumerate(kinds.items()):
        shaken(module, seed)
        if hasattr(module, "threshold") and not isinstance(module.threshold, nn.Parameter):
            module.threshold.fill_(0.6)
        trainer = {"dict_class": name, "layer": 3, "lm_name": "toy/model", "activation_dim": D, "dict_size": F, "k": 6}

        def save(folder: Path, module: nn.Module = module, trainer: dict[str, object] = trainer) -> None:
            folder.mkdir(parents=True)
            torch.save(module.state_dict(), folder / "ae.pt")
            (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 64}}))

        yield "dictionary_learning", name, save, inference(module)


def of_sparsify() -> Iterator[Made]:
    # num_latents = 0: the width follows from the expansion factor, as in most published ones.
    coder = shaken(SparseCoder(D, SparseCoderConfig(expansion_factor=4, k=6)), 7)

    def both(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        top = coder.encode(x_BD)
        codes_BF = torch.zeros(len(x_BD), coder.num_latents).scatter(1, top.top_indices, top.top_acts)
        return codes_BF, coder(x_BD).sae_out

    yield "sparsify", "layers.3", coder.save_to_disk, both


@torch.no_grad()
def main(out: Path) -> None:
    x_BD = common.batch(0).float()
    common.write(out, "x", {"x": x_BD})
    for made in (of_saelens, of_dictionary_learning, of_sparsify):
        for form, name, save, both in made():
            folder = out / form / name
            folder.parent.mkdir(exist_ok=True)
            save(folder)
            codes_BF, hat_BD = both(x_BD)
            common.write(out, f"{form}-{name}", {"codes": codes_BF, "hat": hat_BD})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
