"""Make the embedded language model from nothing but a Python installation.

The quickstart must run without a download, and a sparse autoencoder is only worth looking at on a model that has
learned something. So the package carries a small GPT-NeoX model of Python source code, and this script made it:

    python train.py prepare --work WORK                 # corpus, tokenizer, token files   (CPU, about two minutes)
    python train.py train   --work WORK --out RUN       # the weights                      (GPU, a few minutes)
    python train.py record  --work WORK --run RUN       # figures on the final files       (CPU, about two minutes)

The package never imports this file. It needs torch, transformers and tokenizers; the two last are imported where they
are used, so that the rules at the top (`is_corpus_file`, `is_heldout`, ...) can be loaded quickly by a test.

Shapes: N contexts, T positions, D width of the residual stream, V vocabulary.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import json
import logging
import math
import platform
import shutil
import sys
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

logger = logging.getLogger("tiny_lm")

HERE = Path(__file__).resolve().parent
CONTEXT = 256
VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"  # id 0: joins documents, and is what a generated file starts and ends with
HEAD_WIDTH = 32

Split = Literal["train", "validation", "heldout"]
Tokens = npt.NDArray[np.uint16]


# --------------------------------------------------------------------------------------------------------------- corpus

FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
SUITE_FOLDERS = frozenset({"test", "tests", "idlelib"})


def is_corpus_file(relative_path: str) -> bool:
    """Whether a file under the standard library's folder is standard library, the same on every machine.

    Left out are installed packages and the files that a build of the interpreter writes (`_sysconfigdata*`,
    `config-*`): they hold the paths of one machine.
    """
    parts = PurePosixPath(relative_path).parts
    generated = parts[-1].startswith("_sysconfigdata") or any(part.startswith("config-") for part in parts[:-1])
    return parts[-1].endswith(".py") and not generated and FOREIGN_FOLDERS.isdisjoint(parts)


def is_suite_file(relative_path: str) -> bool:
    """Whether a file belongs to a test suite or to IDLE: more text to learn from, but not what the quickstart reads."""
    return not SUITE_FOLDERS.isdisjoint(PurePosixPath(relative_path).parts)


def is_heldout(relative_path: str) -> bool:
    """Whether a file is in the held-out twentieth.

    It depends on the path alone ("json/decoder.py"), so everybody can apply it to the interpreter in front of him: no
    list of files has to be kept, and a file stays held out from one version of Python to the next.
    """
    digest = hashlib.blake2b(relative_path.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 20 == 0


def split_of(relative_path: str) -> Split:
    """The split of a file. The held-out twentieth of the test suites chooses the epoch and the hyper-parameters."""
    if not is_heldout(relative_path):
        return "train"
    return "validation" if is_suite_file(relative_path) else "heldout"


@dataclass(frozen=True)
class Document:
    """One source file: its path relative to the standard library, with slashes, and its text."""

    path: str
    text: str

    @property
    def split(self) -> Split:
        return split_of(self.path)

    @property
    def n_bytes(self) -> int:
        return len(self.text.encode())


def read_documents(stdlib: Path) -> list[Document]:
    """All corpus files that decode as UTF-8 and parse, in path order.

    What does not parse is there to be wrong: the inputs of lib2to3's and of the tokenizer's tests.
    """
    documents = []
    paths = sorted(path.relative_to(stdlib).as_posix() for path in stdlib.rglob("*.py"))
    for path in filter(is_corpus_file, paths):
        try:
            text = (stdlib / path).read_bytes().decode()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            logger.info("left out, does not parse: %s", path)
            continue
        if text.strip():
            documents.append(Document(path, text))
    return documents


def drop_near_copies(documents: Sequence[Document], threshold: float = 0.7) -> tuple[list[Document], list[str]]:
    """Drop every training file whose lines are nearly those of an evaluation file or of an earlier training file.

    The similarity is the Jaccard index of the sets of lines of at least 12 characters. Nearly all of what goes is
    `encodings`: tables of characters, of which many are copies of one another, across the border of the splits too.
    Evaluation files all stay.
    """
    ordered = sorted(documents, key=lambda document: document.split == "train")  # stable: evaluation files first
    owners: dict[str, list[int]] = {}
    lines: list[set[str]] = []
    kept: list[Document] = []
    dropped: list[str] = []
    for document in ordered:
        own = {line.strip() for line in document.text.splitlines() if len(line.strip()) >= 12}
        shared = Counter(other for line in own for other in owners.get(line, ()))
        similar = (count / len(own | lines[other]) for other, count in shared.items())
        if document.split == "train" and max(similar, default=0.0) >= threshold:
            dropped.append(document.path)
            continue
        for line in own:
            owners.setdefault(line, []).append(len(kept))
        kept.append(document)
        lines.append(own)
    return sorted(kept, key=lambda document: document.path), dropped


# ------------------------------------------------------------------------------------------------------------ tokenizer

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


def load_model(directory: Path) -> Any:
    """The model in `directory`, computing in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32, local_files_only=True)


def token_bytes(tokenizer: Any) -> npt.NDArray[np.int64]:
    """How many bytes each token stands for; the joint between documents stands for none."""
    # A byte-level vocabulary writes each byte as one character.
    lengths = [len(token) for token in tokenizer.convert_ids_to_tokens(list(range(VOCABULARY)))]
    lengths[0] = 0
    return np.array(lengths, dtype=np.int64)


# -------------------------------------------------------------------------------------------------------------- prepare


def prepare(stdlib: Path, work: Path, out: Path) -> None:
    """Corpus, tokenizer and token files: `out` gets the tokenizer, `work` the tokens and `corpus.json`."""
    documents, dropped = drop_near_copies(read_documents(stdlib))
    logger.info("%d files kept, %d near copies dropped from training", len(documents), len(dropped))
    train_tokenizer((document.text for document in documents if document.split == "train"), out)
    tokenizer = load_tokenizer(out)
    work.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {
        "source": f"the standard library of CPython {platform.python_version()}",
        "files": {},
        "near_copies_dropped_from_training": {
            "files": len(dropped),
            "in_encodings": sum(path.startswith("encodings/") for path in dropped),
            "elsewhere": [path for path in dropped if not path.startswith("encodings/")],
        },
    }
    splits: tuple[Split, ...] = ("train", "validation", "heldout")
    for split in splits:
        chosen = [document for document in documents if document.split == split]
        pieces = [tokenizer.encode(document.text, add_special_tokens=False) for document in chosen]
        for document, ids in zip(chosen, pieces, strict=True):
            if tokenizer.decode(ids) != document.text:
                raise RuntimeError(f"the tokenizer does not give {document.path} back")
        tokens = np.concatenate([np.array(ids, dtype=np.uint16) for ids in pieces])
        ends = np.cumsum([len(ids) for ids in pieces])
        suite = np.array([is_suite_file(document.path) for document in chosen])
        np.savez(work / f"{split}.npz", tokens=tokens, ends=ends, suite=suite)
        facts["files"][split] = {
            "files": len(chosen),
            "bytes": sum(document.n_bytes for document in chosen),
            "tokens": int(tokens.size),
            "tokens_of_test_suites": sum(len(ids) for ids, of_suite in zip(pieces, suite, strict=True) if of_suite),
        }
        if split == "heldout":
            facts["heldout_paths"] = [document.path for document in chosen]
        logger.info("%s: %s", split, facts["files"][split])
    write_json(work / "corpus.json", facts)


def read_tokens(work: Path, split: Split, library_weight: int = 1) -> list[Tokens]:
    """The documents of a split, each an array of ids; those of no test suite come `library_weight` times."""
    with np.load(work / f"{split}.npz") as file:
        documents = np.split(file["tokens"], file["ends"][:-1])
        library = [document for document, suite in zip(documents, file["suite"], strict=True) if not suite]
    return documents + library * (library_weight - 1)


def pack(documents: Sequence[Tokens], start: int = 0) -> Tokens:
    """Documents joined by id 0 and cut into contexts [N, T] from `start` on; the incomplete last context goes."""
    joint = np.zeros(1, dtype=np.uint16)
    stream = np.concatenate([piece for document in documents for piece in (document, joint)])[start:]
    return stream[: stream.size // CONTEXT * CONTEXT].reshape(-1, CONTEXT)


# ---------------------------------------------------------------------------------------------------------------- train


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


def batches(documents: Sequence[Tokens], batch: int, device: torch.device, seed: int) -> Iterator[Tensor]:
    """Endless batches of contexts: each epoch joins the documents in a new order, cuts elsewhere, shuffles the cuts."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(documents))
        contexts = pack([documents[i] for i in order], start=int(rng.integers(CONTEXT)))
        rng.shuffle(contexts)
        ids = torch.from_numpy(contexts.astype(np.int32)).to(device)
        for first in range(0, len(ids) - batch + 1, batch):
            yield ids[first : first + batch].long()


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


def rate_at(step: int, progress: float, settings: Settings) -> float:
    """The learning rate: a cosine to zero over the run, `progress` from 0 to 1, under a linear warm-up in steps."""
    return settings.lr * min(1.0, (step + 1) / settings.warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train(work: Path, out: Path, settings: Settings) -> None:
    """Train, keep the weights of the best validation loss, and write them in bf16 with `run.json`, the run's log.

    A run ends after `epochs` or `max_seconds`, whichever comes first, and the schedule follows whichever is nearer to
    its end. The log tells how many epochs it was: `--epochs` of that number repeats the run elsewhere.
    """
    import transformers

    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    documents = read_tokens(work, "train", settings.library_weight)
    validation = torch.from_numpy(pack(read_tokens(work, "validation")).astype(np.int64)).to(device)
    per_epoch = (sum(map(len, documents)) + len(documents)) // CONTEXT // settings.batch
    total = max(1, round(settings.epochs * per_epoch))

    model = make_model(settings).to(device)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=device.type == "cuda")

    def objective(ids: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        return losses(logits, ids).mean()

    if settings.compile:
        objective = torch.compile(objective)
    history: list[dict[str, float]] = []
    best: tuple[float, int, dict[str, Tensor]] = (math.inf, 0, {})
    since: list[Tensor] = []
    stream = batches(documents, settings.batch, device, settings.seed)
    began = time.monotonic()
    step, progress = 0, 0.0
    while progress < 1:
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, progress, settings)
        loss = objective(next(stream))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        since.append(loss.detach())
        step += 1
        if step == 1:
            began = time.monotonic()  # compilation is not the run's time
        if step % 50 == 0 and device.type == "cuda":
            torch.cuda.synchronize()  # the clock below must not run behind the queue
        progress = max(step / total, (time.monotonic() - began) / settings.max_seconds)
        if progress >= min(1.0, (len(history) + 1) / 20):
            with torch.autocast(device.type, dtype=torch.bfloat16):
                score = mean_loss(model, validation)
            mean = torch.stack(since).mean().item()
            history.append({"step": step, "train": round(mean, 4), "validation": round(score, 4)})
            since.clear()
            logger.info("%s, %.0f s", history[-1], time.monotonic() - began)
            if score < best[0]:
                best = (score, step, {name: value.detach().cpu().clone() for name, value in model.state_dict().items()})

    model.load_state_dict(best[2])
    model.config.hidden_dropout = model.config.attention_dropout = 0.0  # was for training; see run.json
    model.to(device="cpu", dtype=torch.bfloat16).save_pretrained(out)
    run = {
        "settings": {
            **vars(settings),
            "max_seconds": settings.max_seconds if math.isfinite(settings.max_seconds) else None,
            "optimizer": "AdamW, betas (0.9, 0.95), no weight decay on vectors, gradient norm clipped at 1",
            "schedule": f"a cosine to zero under a linear warm-up of {settings.warmup} steps",
            "library_weight_means": "files outside the test suites come that many times in an epoch",
            "precision": "fp32 weights, bf16 autocast; saved in bf16",
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step,
        "tokens_seen": step * settings.batch * CONTEXT,
        "epochs": round(step / per_epoch, 3),
        "best_step": best[1],
        "seconds": round(time.monotonic() - began, 1),
        "machine": f"one {torch.cuda.get_device_name()}" if device.type == "cuda" else "a CPU",
        "versions": versions(transformers),
        "history": history,
    }
    write_json(out / "run.json", run)


# --------------------------------------------------------------------------------------------------------------- record

Baseline = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], npt.NDArray[np.float64]]


def unigram(stream: npt.NDArray[np.int64]) -> Baseline:
    """Log-probability of each token by its frequency in `stream`, half a count added to every token."""
    counts = np.bincount(stream, minlength=VOCABULARY) + 0.5
    log_p = np.log(counts / counts.sum())
    return lambda previous, token: log_p[token]


def bigram(stream: npt.NDArray[np.int64]) -> Baseline:
    """Log-probability of each token after the one before it: interpolated modified Kneser-Ney, fitted on `stream`.

    Discounts for counts of 1, 2 and at least 3 by Chen and Goodman's closed forms; the lower order is the share of
    distinct predecessors, half a count added, so nothing has probability zero.
    """
    pairs, counts = np.unique(stream[:-1] * VOCABULARY + stream[1:], return_counts=True)
    first, second = np.divmod(pairs, VOCABULARY)
    n1, n2, n3, n4 = (float((counts == k).sum()) for k in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    discount = discounts[np.minimum(counts, 3)]
    seen = np.bincount(first, weights=counts, minlength=VOCABULARY)
    left_over = np.bincount(first, weights=discount, minlength=VOCABULARY)
    continuation = np.bincount(second, minlength=VOCABULARY) + 0.5
    continuation = continuation / continuation.sum()

    def log_p(previous: npt.NDArray[np.int64], token: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        wanted = previous * VOCABULARY + token
        place = np.minimum(np.searchsorted(pairs, wanted), pairs.size - 1)
        direct = np.where(pairs[place] == wanted, counts[place] - discount[place], 0.0)
        total = seen[previous]
        known = total > 0
        total = np.where(known, total, 1.0)
        back_off = np.where(known, left_over[previous] / total, 1.0)
        return np.asarray(np.log(direct / total + back_off * continuation[token]), dtype=np.float64)

    return log_p


@torch.no_grad()
def residual_stream(model: Any, contexts: Tensor, clean: float) -> list[dict[str, float]]:
    """What the residual stream after each layer carries: the loss without it, and the shape of its covariance.

    Position 0 is left clean and out of all statistics: a model parks its attention there, on a vector unlike others.
    """
    report = []
    for index, layer in enumerate(model.gpt_neox.layers):
        taken: list[Tensor] = []

        def take(module: Any, args: Any, output: Any, taken: list[Tensor] = taken) -> None:
            taken.append(output[0] if isinstance(output, tuple) else output)

        handle = layer.register_forward_hook(take)
        try:
            mean_loss(model, contexts)
        finally:
            handle.remove()
        everywhere = torch.cat(taken).double()
        rows = everywhere[:, 1:].flatten(0, 1)
        mean = rows.mean(0)
        centred = rows - mean
        spectrum = torch.linalg.eigvalsh(centred.T @ centred / rows.shape[0]).flip(0)
        norms = centred.norm(dim=1)

        def replace(module: Any, args: Any, output: Any, mean: Tensor = mean) -> Any:
            value = output[0] if isinstance(output, tuple) else output
            value = torch.cat([value[:, :1], mean.to(value.dtype).expand_as(value[:, 1:])], dim=1)
            return (value, *output[1:]) if isinstance(output, tuple) else value

        handle = layer.register_forward_hook(replace)
        try:
            ablated = mean_loss(model, contexts)
        finally:
            handle.remove()
        share = spectrum.cumsum(0) / spectrum.sum()
        report.append(
            {
                "layer": index,
                "mean_ablation_loss": round(ablated, 4),
                "mean_ablation_loss_minus_clean": round(ablated - clean, 4),
                "covariance_condition_number": float(f"{(spectrum[0] / spectrum[-1]).item():.4g}"),
                "share_of_variance_of_first_direction": round(share[0].item(), 4),
                "directions_for_99_percent_of_variance": int((share < 0.99).sum().item()) + 1,
                "norm_of_mean": round(mean.norm().item(), 3),
                "mean_centred_norm": round(norms.mean().item(), 3),
                "largest_over_median_centred_norm": round((norms.max() / norms.median()).item(), 3),
                "mean_norm_at_position_0": round(everywhere[:, 0].norm(dim=1).mean().item(), 3),
            }
        )
    return report


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
    lengths = token_bytes(tokenizer)

    stream = pack(read_tokens(work, "train")).reshape(-1).astype(np.int64)
    baselines = {"unigram": unigram(stream), "bigram": bigram(stream)}

    def evaluate(documents: Sequence[Tokens]) -> tuple[Tensor, dict[str, Any]]:
        contexts = pack(documents).astype(np.int64)
        previous, token = contexts[:, :-1].reshape(-1), contexts[:, 1:].reshape(-1)
        ids = torch.from_numpy(contexts)
        nats = {"model": mean_loss(model, ids)}
        nats |= {name: float(-log_p(previous, token).mean()) for name, log_p in baselines.items()}
        per_byte = token.size / lengths[token].sum() / math.log(2)
        table: dict[str, Any] = {"predicted_tokens": int(token.size), "bytes": int(lengths[token].sum())}
        table["nats_per_token"] = {name: round(value, 4) for name, value in nats.items()}
        table["bits_per_byte"] = {name: round(value * per_byte, 4) for name, value in nats.items()}
        return ids, table

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
        "corpus": {
            **corpus,
            "rule": "*.py of the standard library, without installed and build-generated files, that decodes as UTF-8 "
            "and parses",
            "split": "int.from_bytes(blake2b(path relative to the standard library, digest_size=8).digest(), 'big') "
            "% 20 == 0: 'heldout' outside the folders test, tests, idlelib, 'validation' inside; all else is 'train'",
        },
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


# ----------------------------------------------------------------------------------------------------------------- main


def write_json(path: Path, value: Any) -> None:
    """Write `value` to be read by people too."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def versions(*modules: Any) -> dict[str, str]:
    """What the numbers were made with."""
    used = {module.__name__: str(module.__version__) for module in (torch, *modules)}
    return {"python": platform.python_version(), **used}


def as_options(log: Mapping[str, Any]) -> str:
    """The options that repeat a run: its epochs in place of the time limit that may have ended it."""
    settings = {**log["settings"], "epochs": log["epochs"]}
    names = ("layers", "width", "dropout", "lr", "weight_decay", "batch", "epochs", "warmup", "seed", "library_weight")
    options = [f"--{name.replace('_', '-')} {settings[name]}" for name in names]
    return " ".join([*options, "--compile"] if settings["compile"] else options)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the embedded language model.")
    commands = parser.add_subparsers(dest="command", required=True)
    work = argparse.ArgumentParser(add_help=False)
    work.add_argument("--work", type=Path, required=True, help="folder of the token files")

    one = commands.add_parser("prepare", parents=[work], help="corpus, tokenizer, token files")
    stdlib = Path(sysconfig.get_path("stdlib"))
    one.add_argument("--stdlib", type=Path, default=stdlib, help="default: that of this interpreter")
    one.add_argument("--out", type=Path, default=HERE, help="where the tokenizer goes (default: beside this script)")

    two = commands.add_parser("train", parents=[work], help="the weights")
    two.add_argument("--out", type=Path, required=True, help="where the weights and run.json go")
    two.add_argument("--layers", type=int, default=4)
    two.add_argument("--width", type=int, default=192)
    two.add_argument("--dropout", type=float, default=0.1)
    two.add_argument("--lr", type=float, default=3e-3)
    two.add_argument("--weight-decay", type=float, default=0.1)
    two.add_argument("--batch", type=int, default=128, help="contexts a step")
    two.add_argument("--epochs", type=float, default=30.0)
    two.add_argument("--warmup", type=int, default=200)
    two.add_argument("--seed", type=int, default=0)
    two.add_argument("--library-weight", type=int, default=2, help="copies of a file outside the test suites an epoch")
    two.add_argument("--compile", action="store_true", help="torch.compile the objective")
    two.add_argument("--max-seconds", type=float, default=math.inf, help="shorten the run to this time")

    three = commands.add_parser("record", parents=[work], help="figures on the final files")
    three.add_argument("--run", type=Path, required=True, help="what train wrote")
    three.add_argument("--out", type=Path, default=HERE, help="where the tokenizer is and the weights go")

    four = commands.add_parser("sample", help="look at what the model writes")
    four.add_argument("--model", type=Path, default=HERE)
    four.add_argument("prompts", nargs="*", default=["import os\n\ndef ", "class ", "for i in "])

    options = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    command = options.pop("command")
    if command == "prepare":
        prepare(options["stdlib"], options["work"], options["out"])
    elif command == "train":
        folder, out = options.pop("work"), options.pop("out")
        train(folder, out, Settings(**options))
    elif command == "record":
        record(options["work"], options["run"], options["out"])
    else:
        sample(options["model"], options["prompts"])


if __name__ == "__main__":
    main()
