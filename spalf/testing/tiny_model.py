"""A tiny language model, tokenizer and text on disk, made without downloading anything."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def _byte_letters() -> list[str]:
    """The letters that a byte-level tokenizer writes the 256 bytes with."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    letter = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    return [letter[b] for b in range(256)]


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer of 257 ids in `directory`; id 0 is <|endoftext|>."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocabulary = {"<|endoftext|>": 0} | {letter: i for i, letter in enumerate(_byte_letters(), 1)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": 0, "content": "<|endoftext|>", "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        ],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    special = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}), encoding="utf-8"
    )


def write_model(directory: Path, *, d_model: int = 16, layers: int = 2, heads: int = 2, n_vocab: int = 272) -> Path:
    """A GPT-NeoX model with random weights and a byte-level tokenizer, as `from_pretrained` wants them."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "hidden_size": d_model,
        "intermediate_size": 4 * d_model,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": n_vocab,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    draw = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "gpt_neox.embed_in.weight": (n_vocab, d_model),
        "embed_out.weight": (n_vocab, d_model),
    }
    for i in range(layers):
        block = f"gpt_neox.layers.{i}"
        for name, outer, inner in (
            ("attention.query_key_value", 3 * d_model, d_model),
            ("attention.dense", d_model, d_model),
            ("mlp.dense_h_to_4h", 4 * d_model, d_model),
            ("mlp.dense_4h_to_h", d_model, 4 * d_model),
        ):
            shapes |= {f"{block}.{name}.weight": (outer, inner), f"{block}.{name}.bias": (outer,)}
    weights = {k: 0.3 * torch.randn(shape, generator=draw) for k, shape in shapes.items()}
    norms = [f"gpt_neox.layers.{i}.{n}" for i in range(layers) for n in ("input_layernorm", "post_attention_layernorm")]
    for norm in (*norms, "gpt_neox.final_layer_norm"):
        weights |= {f"{norm}.weight": torch.ones(d_model), f"{norm}.bias": torch.zeros(d_model)}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(directory)
    return directory


def write_text(path: Path, documents: int = 80) -> Path:
    """Documents of 10 to 60 letters, all different, one a line of jsonl."""
    draw = torch.Generator().manual_seed(1)
    rows = []
    for i in range(documents):
        n = int(torch.randint(10, 60, (), generator=draw))
        letters = torch.randint(97, 123, (n,), generator=draw).tolist()
        rows.append(json.dumps({"text": f"{i} " + "".join(map(chr, letters))}))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path
