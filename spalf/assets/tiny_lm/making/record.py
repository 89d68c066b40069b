"""The record of a run: figures of the very files that ship, and what the model writes."""

from __future__ import annotations

import datetime
import json
import logging
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .figures import Baseline, bigram, residual_stream, unigram
from .files import versions, write_json
from .model import load_model, mean_loss
from .tokenizer import END_OF_TEXT, PIECES, VOCABULARY, load_tokenizer, token_bytes
from .tokens import Tokens, pack, read_tokens

logger = logging.getLogger("tiny_lm")

RULE = "*.py of the standard library, without installed and build-generated files, that decodes as UTF-8 and parses"
SPLIT = (
    "int.from_bytes(blake2b(path relative to the standard library, digest_size=8).digest(), 'big') "
    "% 20 == 0: 'heldout' outside the folders test, tests, idlelib, 'validation' inside; all else is 'train'"
)


@dataclass(frozen=True)
class Judge:
    """What documents are measured by: the model, the baselines, and how many bytes each token stands for."""

    model: Any
    baselines: Mapping[str, Baseline]
    lengths: npt.NDArray[np.int64]

    def __call__(self, documents: Sequence[Tokens]) -> tuple[Tensor, dict[str, Any]]:
        """The contexts [N, T] of documents, and losses over them."""
        contexts = pack(documents).astype(np.int64)
        previous, token = contexts[:, :-1].reshape(-1), contexts[:, 1:].reshape(-1)
        ids = torch.from_numpy(contexts)
        nats = {"model": mean_loss(self.model, ids)}
        nats |= {name: float(-log_p(previous, token).mean()) for name, log_p in self.baselines.items()}
        n_bytes = self.lengths[token].sum()
        per_byte = token.size / n_bytes / math.log(2)
        table: dict[str, Any] = {"predicted_tokens": int(token.size), "bytes": int(n_bytes)}
        table["nats_per_token"] = {name: round(value, 4) for name, value in nats.items()}
        table["bits_per_byte"] = {name: round(value * per_byte, 4) for name, value in nats.items()}
        return ids, table


def record(work: Path, run: Path, out: Path) -> None:
    """Copy a run's weights beside the tokenizer in `out`, measure those very files, and write `training.json`."""
    import tokenizers
    import transformers

    for name in ("model.safetensors", "config.json", "generation_config.json"):
        shutil.copyfile(run / name, out / name)
    log: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    corpus: dict[str, Any] = json.loads((work / "corpus.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(out)
    model = load_model(out)

    stream = pack(read_tokens(work, "train")).reshape(-1).astype(np.int64)
    baselines = {"unigram": unigram(stream), "bigram": bigram(stream)}
    evaluate = Judge(model=model, baselines=baselines, lengths=token_bytes(tokenizer))
    heldout = read_tokens(work, "heldout")
    paths: list[str] = corpus["heldout_paths"]
    without_tables = [doc for doc, path in zip(heldout, paths, strict=True) if not path.startswith("encodings/")]
    ids, table = evaluate(heldout)
    logger.info("held out: %s", table)
    document = {
        "what": "a GPT-NeoX language model of Python source code, trained from random weights by train.py beside this",
        "date": datetime.date.today().isoformat(),
        "commands": [
            "python train.py prepare --work WORK",
            f"python train.py train --work WORK --out RUN {as_options(log)}",
            "python train.py record --work WORK --run RUN",
        ],
        "corpus": {**corpus, "rule": RULE, "split": SPLIT},
        "tokenizer": {
            "kind": "byte-level BPE, trained on the 'train' files only, lossless on every file of the corpus",
            "vocabulary": VOCABULARY,
            "pieces": PIECES,
            "id_0": END_OF_TEXT,
            "bytes_per_token": round(table["bytes"] / table["predicted_tokens"], 3),
        },
        "training": {key: value for key, value in log.items() if key != "history"},
        "history": log["history"],
        "heldout": {
            "protocol": "documents in path order joined by id 0, cut into contexts of 256; each token but a context's "
            "first is predicted from those before it in its context; the shipped bf16 weights in fp32 on a CPU",
            "baselines": "fitted on the 'train' tokens, on exactly the same predicted tokens: unigram, half a count "
            "added; bigram by interpolated modified Kneser-Ney",
            **table,
            "without_encodings": evaluate(without_tables)[1],
            "validation_files": evaluate(read_tokens(work, "validation"))[1],
        },
        "residual_stream": {
            "protocol": "the output of gpt_neox.layers[layer] on the held-out contexts, position 0 clean and not "
            "counted; ablation puts the mean over these tokens in its place",
            "clean_loss": table["nats_per_token"]["model"],
            "layers": residual_stream(model, ids, mean_loss(model, ids)),
        },
        "recorded_with": versions(transformers, tokenizers),
    }
    write_json(out / "training.json", document)


def as_options(log: Mapping[str, Any]) -> str:
    """The options that repeat a run: its epochs in place of the time limit that may have ended it."""
    settings = {**log["settings"], "epochs": log["epochs"]}
    names = ("layers", "width", "dropout", "lr", "weight_decay", "batch", "epochs", "warmup", "seed", "library_weight")
    options = [f"--{name.replace('_', '-')} {settings[name]}" for name in names]
    return " ".join([*options, "--compile"] if settings["compile"] else options)


def sample(directory: Path, prompts: Sequence[str], tokens: int = 120) -> None:
    """Write what the model makes of each prompt: the quickest check that it has learned Python."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(directory)
    model: Any = load_model(directory)
    for prompt in prompts:
        ids = tokenizer(END_OF_TEXT + prompt, return_tensors="pt").input_ids
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=0.7,
            top_p=0.95,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
        sys.stdout.write(tokenizer.decode(made[0], skip_special_tokens=True) + "\n" + "-" * 80 + "\n")
