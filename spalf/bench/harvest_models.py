"""A language model of a known shape with random weights, and random text for it: for speed, where no hub is reached."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from spalf.errors import Problem, RecipeError

DOCUMENT = 1000
"""Mean tokens of a random document."""


@frozen(kw_only=True)
class Shape:
    """A GPT-NeoX model of Pythia's kind, and the block that is hooked unless another is asked for."""

    d_model: int
    layers: int
    heads: int
    hook: int
    n_vocab: int = 50_304
    context: int = 2048


SHAPES: Mapping[str, Shape] = {
    "pythia-70m": Shape(d_model=512, layers=6, heads=8, hook=3),
    "pythia-160m": Shape(d_model=768, layers=12, heads=12, hook=4),
    "pythia-1b": Shape(d_model=2048, layers=16, heads=8, hook=6),
    "pythia-1.4b": Shape(d_model=2048, layers=24, heads=16, hook=6),
}


def write(name: str, directory: Path, device: torch.device, *, tokens: int = 1 << 24) -> tuple[str, ...]:
    """Write the model (bfloat16) and `tokens` uniform ids below `directory`; the settings of a recipe that reads them.

    Raises RecipeError for a shape that is not known.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    from transformers.utils import logging

    if name not in SHAPES:
        raise RecipeError(
            [Problem("--random-model", f'"{name}" is no known shape', f"take one of {', '.join(SHAPES)}")]
        )
    shape = SHAPES[name]
    config = GPTNeoXConfig(
        hidden_size=shape.d_model,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.d_model,
        vocab_size=shape.n_vocab,
        max_position_embeddings=shape.context,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        model: Any = GPTNeoXForCausalLM(config)
        model.to(torch.bfloat16)
    bars: Any = logging
    bars.disable_progress_bar()  # the terminal belongs to the command line
    model.save_pretrained(directory / name)
    del model
    text = directory / "random.u16"
    write_tokens(text, tokens, shape.n_vocab)
    source = (
        f'use = "huggingface", model = "{directory / name}", text = "{text}", layer = {shape.hook}, '
        f"d_model = {shape.d_model}, n_vocab = {shape.n_vocab}, n_layers = {shape.layers}, "
        f'dtype = "{"bfloat16" if device.type == "cuda" else "float32"}"'
    )
    return (f"source={{ {source} }}",)


def write_tokens(path: Path, n: int, n_vocab: int) -> None:
    """`n` little-endian uint16 ids, uniform; id 0 ends a document."""
    import numpy as np

    draw = np.random.default_rng(0)
    ids = draw.integers(1, n_vocab, n, dtype=np.uint16)
    ids[draw.integers(0, n, max(2, n // DOCUMENT))] = 0
    ids.astype("<u2").tofile(path)
