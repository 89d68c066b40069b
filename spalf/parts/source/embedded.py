"""The language model that spalf carries, without transformers, whose import takes longer than this model's first block.

The forward pass takes the steps of `GPTNeoXForCausalLM` with its default attention, in their order: results agree with
those of transformers to the last bit.

Shapes: S sequences, T positions, D width, H heads, E width of a head, R of it rotated, V vocabulary.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from attrs import fields, frozen
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

NAME = "embedded"


def directory() -> Path:
    """Where the model's files are, laid out as `from_pretrained` reads them."""
    return Path(str(resources.files("spalf") / "assets" / "tiny_lm"))


@frozen(kw_only=True)
class EmbeddedConfig:
    """What is read of config.json, by its names there."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    layer_norm_eps: float
    tie_word_embeddings: bool
    eos_token_id: int
    rope_parameters: Mapping[str, Any]

    def get_text_config(self) -> EmbeddedConfig:
        """Itself, as a config of transformers that has no other parts."""
        return self


@functools.cache
def read_config() -> EmbeddedConfig:
    """The model's config.json."""
    found = json.loads((directory() / "config.json").read_text(encoding="utf-8"))
    return EmbeddedConfig(**{f.name: found[f.name] for f in fields(EmbeddedConfig)})


class EmbeddedTokenizer:
    """The model's tokenizer, with as much of a transformers tokenizer as a vocabulary asks for."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(directory() / "tokenizer.json"))
        self.bos_token_id = self.eos_token_id = read_config().eos_token_id

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def __call__(self, texts: Sequence[str], **options: Any) -> dict[str, list[list[int]]]:
        """Ids of each text under "input_ids", never with special tokens."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return {"input_ids": [one.ids for one in encoded]}

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))


class EmbeddedModel:
    """The embedded model, frozen, hooked after block `layer`."""

    def __init__(self, layer: int, dtype: torch.dtype, device: torch.device) -> None:
        self._config, self._hooked, self._dtype = read_config(), layer, dtype
        found = load_file(directory() / "model.safetensors")
        self._weights = {name: w.to(device=device, dtype=dtype) for name, w in found.items()}
        rope = self._config.rope_parameters
        width = self._config.hidden_size // self._config.num_attention_heads
        rotated = int(width * rope["partial_rotary_factor"])
        self._scale = width**-0.5
        power = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
        self._frequency = (1.0 / rope["rope_theta"] ** power).to(device)

    def activations(self, tokens_ST: Tensor, real_ST: Tensor | None) -> Tensor:
        """[S, T, D] after the hooked block; nothing behind it runs. Without graph."""
        with torch.inference_mode():
            return self._through(range(self._hooked + 1), self._embed(tokens_ST), real_ST)

    def logits(self, tokens_ST: Tensor, real_ST: Tensor | None, patch: Callable[[Tensor], Tensor] | None) -> Tensor:
        """[S, T, V]; a graph begins where `patch` brings one in."""
        behind = self._hooked + 1
        x_STD = self._through(range(behind), self._embed(tokens_ST), real_ST)
        if patch is not None:
            x_STD = patch(x_STD)
        x_STD = self._through(range(behind, self._config.num_hidden_layers), x_STD, real_ST)
        return linear(self._norm("gpt_neox.final_layer_norm", x_STD), self.unembedding())

    def unembedding(self) -> Tensor:
        """[V, D]."""
        return self._weights["embed_out.weight"]

    # ------------------------------------------------------------------------------------------------ inside
    def _embed(self, tokens_ST: Tensor) -> Tensor:
        return torch.nn.functional.embedding(tokens_ST, self._weights["gpt_neox.embed_in.weight"])

    def _through(self, blocks: range, x_STD: Tensor, real_ST: Tensor | None) -> Tensor:
        cos_TR, sin_TR = self._angles(x_STD.shape[1])
        seen_STT = None if real_ST is None else _seen(real_ST)
        for at in blocks:
            block = f"gpt_neox.layers.{at}"
            attended_STD = self._attend(
                f"{block}.attention", self._norm(f"{block}.input_layernorm", x_STD), cos_TR, sin_TR, seen_STT
            )
            hidden = gelu(
                self._linear(f"{block}.mlp.dense_h_to_4h", self._norm(f"{block}.post_attention_layernorm", x_STD))
            )
            x_STD = self._linear(f"{block}.mlp.dense_4h_to_h", hidden) + attended_STD + x_STD
        return x_STD

    def _attend(self, at: str, x_STD: Tensor, cos_TR: Tensor, sin_TR: Tensor, seen_STT: Tensor | None) -> Tensor:
        S, T, D = x_STD.shape
        qkv_STH3E = self._linear(f"{at}.query_key_value", x_STD).view(S, T, self._config.num_attention_heads, -1)
        q_SHTE, k_SHTE, v_SHTE = qkv_STH3E.transpose(1, 2).chunk(3, dim=-1)
        out_SHTE = scaled_dot_product_attention(
            _rotated(q_SHTE, cos_TR, sin_TR),
            _rotated(k_SHTE, cos_TR, sin_TR),
            v_SHTE,
            attn_mask=None if seen_STT is None else seen_STT[:, None],
            is_causal=seen_STT is None and T > 1,
            scale=self._scale,
        )
        return self._linear(f"{at}.dense", out_SHTE.transpose(1, 2).reshape(S, T, D))

    def _angles(self, positions: int) -> tuple[Tensor, Tensor]:
        at_T = torch.arange(positions, device=self._frequency.device)
        half = at_T[:, None].float() * self._frequency
        angle_TR = torch.cat((half, half), dim=-1)
        return angle_TR.cos().to(self._dtype), angle_TR.sin().to(self._dtype)

    def _norm(self, name: str, x_STD: Tensor) -> Tensor:
        weight_D, bias_D = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return layer_norm(x_STD, weight_D.shape, weight_D, bias_D, self._config.layer_norm_eps)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])


def _seen(real_ST: Tensor) -> Tensor:
    """[S, T, T]: which positions each may look at, none that is padding and none behind it."""
    T = real_ST.shape[1]
    past_TT = torch.ones(T, T, dtype=torch.bool, device=real_ST.device).tril()
    return past_TT & real_ST.bool()[:, None, :]


def _rotated(x_SHTE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Queries or keys with the first R of each head's numbers turned by their position's angles."""
    R = cos_TR.shape[-1]
    turned, rest = x_SHTE[..., :R], x_SHTE[..., R:]
    swapped = torch.cat((-turned[..., R // 2 :], turned[..., : R // 2]), dim=-1)
    return torch.cat((turned * cos_TR + swapped * sin_TR, rest), dim=-1)
