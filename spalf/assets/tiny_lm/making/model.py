"""The model: made from nothing, loaded, asked for its loss. Shapes: N contexts, T positions, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .tokenizer import VOCABULARY
from .tokens import CONTEXT

HEAD_WIDTH = 32


@dataclass(frozen=True)
class Settings:
    """The hyper-parameters of a training run."""

    layers: int
    width: int
    dropout: float
    lr: float
    weight_decay: float
    batch: int
    epochs: float
    warmup: int
    seed: int
    max_seconds: float
    library_weight: int
    compile: bool


def make_model(settings: Settings) -> Any:
    """A fresh GPT-NeoX model."""
    import transformers

    config_class: Any = transformers.GPTNeoXConfig  # its types leave out what it takes over from older configs
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.width // HEAD_WIDTH,
        intermediate_size=4 * settings.width,
        max_position_embeddings=CONTEXT,
        rotary_pct=0.25,
        hidden_dropout=settings.dropout,
        attention_dropout=settings.dropout,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPTNeoXForCausalLM(config)


def load_model(directory: Path) -> Any:
    """The model in `directory`, computing in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32, local_files_only=True)


def losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Nats per predicted token, [N, T - 1]."""
    wanted = ids[:, 1:]
    # Rows, not [N, V, T]: with the classes in the last axis this is several times faster.
    rows = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted.flatten(), reduction="none")
    return rows.view_as(wanted)


@torch.no_grad()
def mean_loss(model: Any, contexts: Tensor, batch: int = 32) -> float:
    """Mean nats per token over contexts, each token seen from its own context only."""
    model.eval()
    total = 0.0
    for ids in torch.split(contexts, batch):
        total += losses(model(input_ids=ids, use_cache=False).logits, ids).double().sum().item()
    return total / (contexts.shape[0] * (contexts.shape[1] - 1))
