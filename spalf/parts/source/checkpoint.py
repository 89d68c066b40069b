"""A pretrained model's directory: its config and the costs that follow, its weights, its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import nn

from spalf.errors import SourceError
from spalf.parts.source import embedded

# Families whose feed-forward block is two matrices; all later ones gate theirs with a third.
UNGATED = frozenset(
    {
        "bloom",
        "codegen",
        "falcon",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "mpt",
        "opt",
        "phi",
        "starcoder2",
    }
)
EMPTY_TOKENIZER = 16  # a directory without tokenizer files loads as one with a handful of special tokens, silently


def locate(model: str) -> tuple[str, bool]:
    """What `from_pretrained` takes, and whether it is a local directory; "embedded" is the model of this package."""
    if model == embedded.NAME:
        return str(embedded.directory()), True
    path = Path(model).expanduser()
    return (str(path), True) if path.is_dir() else (model, False)


def read_config(model: str, revision: str) -> Any | None:
    """The config from a local directory or the local hub cache, never from the network; None where there is none.

    Raises SourceError where a local directory holds none that transformers can read.
    """
    if model == embedded.NAME:
        return embedded.read_config()
    from transformers import AutoConfig

    name, is_local = locate(model)
    try:
        return AutoConfig.from_pretrained(name, revision=None if is_local else revision, local_files_only=True)
    except (OSError, ValueError, KeyError) as e:
        if is_local:
            raise SourceError(f'model "{model}": no usable config.json in {name}: {e}') from e
        return None


def fetch_config(model: str, revision: str) -> Any:
    """The config, from the hub where it is not here. Raises SourceError where there is none to be had."""
    if model == embedded.NAME:
        return embedded.read_config()
    from transformers import AutoConfig

    name, is_local = locate(model)
    try:
        return AutoConfig.from_pretrained(name, revision=None if is_local else revision, local_files_only=is_local)
    except (OSError, ValueError, KeyError) as e:
        raise SourceError(f'model "{model}" cannot be loaded: {e}') from e


@frozen(kw_only=True)
class Costs:
    """What a config says about a language model. Parameters are counted without biases and norms.

    per_layer    = d * (heads + 2 kv_heads) * d_head + heads * d_head * d  +  (2 or 3) * d * d_mlp
    n_parameters = n_layers * per_layer + (1 if tied else 2) * n_vocab * d
    A mixture of experts is counted with the experts that one token uses.
    """

    d_model: int
    n_vocab: int
    n_layers: int
    n_parameters: int
    per_layer: int
    d_mlp: int
    max_context: int = 0
    """Positions the model has; 0: not known, or no limit."""

    def flops(self, layers: int, context: int, unembed: bool) -> float:
        """FLOPs per token of the first `layers` blocks: 2 per parameter, and causal attention.

        Attention: q k' and the weighted sum take 2 * d each per pair of positions; a token sees T / 2 on average.
        """
        attention = 2 * context * self.d_model
        return float(layers * (2 * self.per_layer + attention) + (2 * self.n_vocab * self.d_model if unembed else 0))


def _first(config: Any, *names: str) -> int:
    return next((int(v) for n in names if isinstance(v := getattr(config, n, None), int) and v > 0), 0)


def costs_of_config(config: Any) -> Costs:
    """Counted from a transformers config."""
    text = config.get_text_config()
    d = _first(text, "hidden_size")
    heads = _first(text, "num_attention_heads") or 1
    kv_heads = _first(text, "num_key_value_heads", "num_kv_heads") or heads
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        kv_heads = 1  # falcon and gpt_bigcode
    d_head = _first(text, "head_dim") or d // heads
    d_mlp = _first(text, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * d
    experts = _first(text, "num_experts_per_tok") or 1
    matrices = 2 if text.model_type in UNGATED else 3
    n_layers, n_vocab = _first(text, "num_hidden_layers"), _first(text, "vocab_size")
    per_layer = d * (heads + 2 * kv_heads) * d_head + heads * d_head * d + experts * matrices * d * d_mlp
    tied = 1 if getattr(config, "tie_word_embeddings", False) else 2
    n_parameters = n_layers * per_layer + tied * n_vocab * d
    return Costs(
        d_model=d,
        n_vocab=n_vocab,
        n_layers=n_layers,
        n_parameters=n_parameters,
        per_layer=per_layer,
        d_mlp=d_mlp,
        max_context=_first(text, "max_position_embeddings"),
    )


def costs_as_stated(d_model: int, n_vocab: int, n_layers: int) -> Costs:
    """From stated options alone: per_layer = 12 d^2, the classical block. No layers stated: FLOPs stay 0."""
    per_layer = 12 * d_model * d_model if n_layers else 0
    n_parameters = n_layers * per_layer + 2 * n_vocab * d_model if n_layers else 0
    return Costs(
        d_model=d_model, n_vocab=n_vocab, n_layers=n_layers, n_parameters=n_parameters, per_layer=per_layer, d_mlp=0
    )


def load_model(
    model: str, revision: str, dtype: torch.dtype, device: torch.device, attention: str | None = None
) -> nn.Module:
    """The causal language model, frozen and in evaluation mode. Raises SourceError where it cannot be had.

    `attention` None is the architecture's own default (sdpa for most; some, such as gemma2, are right only with eager).
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    name, is_local = locate(model)
    extra = {} if is_local else {"revision": revision}
    if attention is not None:
        extra["attn_implementation"] = attention
    bars: Any = logging
    showed_bars = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()  # the terminal belongs to the command line
    try:
        loaded = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, local_files_only=is_local, **extra)
    except (OSError, ValueError, KeyError) as e:
        raise SourceError(f'model "{model}" cannot be loaded: {e}') from e
    finally:
        if showed_bars:
            bars.enable_progress_bar()
    module: nn.Module = loaded
    module.train(False)
    return module.requires_grad_(False).to(device)


def load_tokenizer(model: str, revision: str) -> Any | None:
    """The model's tokenizer, or None where it comes without one."""
    from transformers import AutoTokenizer

    name, is_local = locate(model)
    extra = {} if is_local else {"revision": revision}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=is_local, **extra)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return tokenizer if len(tokenizer) >= EMPTY_TOKENIZER else None


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's blocks: the one top-level list of modules that is as long as the config says.

    Raises SourceError that lists what was found instead.
    """
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    config: Any = model.config
    n = config.get_text_config().num_hidden_layers
    lists = {k: m for k, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and "." not in k}
    fitting = [m for m in lists.values() if len(m) == n]
    if len(fitting) != 1:
        found = ", ".join(f"{k} ({len(m)})" for k, m in lists.items()) or "none"
        raise SourceError(
            f"{type(model).__name__}: expected one list of {n} decoder blocks, found lists of modules: {found} "
            "(use the transformer_lens source for this architecture)"
        )
    return fitting[0]


def same(name: str, stated: int, found: int) -> None:
    """Raises SourceError where an option states another number than the model has; 0 states nothing."""
    if stated and stated != found:
        raise SourceError(f"source.{name} = {stated}, but the model has {found} (correct it or leave it out)")


def spread(layers: int, context: int, costs: Costs) -> tuple[float, float]:
    """FLOPs per token to the end of block `layers - 1`, and of the whole model; 0 where the layers are unknown."""
    if not costs.n_layers:
        return 0.0, 0.0
    return costs.flops(min(layers, costs.n_layers), context, False), costs.flops(costs.n_layers, context, True)
