"""The byte-level BPE: how it is trained, and what its tokens stand for. Shapes: V vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .files import write_json

VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"  # id 0: joins documents, and is what a generated file starts and ends with

# A newline takes the indentation after it along, so that a line's depth is one token; a word or an operator takes one
# space before it; digits come in threes; a longer run of spaces stays together but leaves its last one to what follows.
PIECES = r"(?:\r?\n)+[ \t]*| ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|[^\S\r\n]+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], out: Path) -> None:
    """Train the byte-level BPE on `texts` and write it to `out` as files that AutoTokenizer loads."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=32,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCABULARY or tokenizer.token_to_id(END_OF_TEXT) != 0:
        raise RuntimeError(f"expected {VOCABULARY} tokens and {END_OF_TEXT} first, got {tokenizer.get_vocab_size()}")
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    # Written by hand: save_pretrained names a class that only the writing version of transformers knows.
    config = {
        **special,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(tokenizer.to_str(pretty=False) + "\n", encoding="utf-8")
    write_json(out / "tokenizer_config.json", config)
    write_json(out / "special_tokens_map.json", special)


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in `directory`, without any look-up beyond it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)


def token_bytes(tokenizer: Any) -> npt.NDArray[np.int64]:
    """How many bytes each token stands for; the joint between documents stands for none."""
    # A byte-level vocabulary writes each byte as one character.
    lengths = [len(token) for token in tokenizer.convert_ids_to_tokens(list(range(VOCABULARY)))]
    lengths[0] = 0
    return np.array(lengths, dtype=np.int64)
