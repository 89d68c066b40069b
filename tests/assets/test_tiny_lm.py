"""The embedded language model is what its record says: small, lossless on text, and a model of Python."""

import importlib.util
import json
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import spalf

TINY_LM = Path(spalf.__file__).parent / "assets" / "tiny_lm"
AWKWARD = [
    "",
    "\n",
    "  \n\tx = 1  \n\n\n",
    "if a:\r\n\treturn  b   # c\r\n",
    "x     = {1234567: 'é→🐍\u200b'}\f\v\\\n",
    " leading and trailing ",
    "def f(self, *args, **kwargs) -> None:\n    '''doc'''\n        ...\n",
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script that made the model, for its rules of what is corpus and what is held out."""
    spec = importlib.util.spec_from_file_location("tiny_lm_script", TINY_LM / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((TINY_LM / "training.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def tokenizer(script: ModuleType) -> Any:
    return script.load_tokenizer(TINY_LM)


@pytest.fixture(scope="module")
def texts(script: ModuleType) -> list[str]:
    """The held-out files of the interpreter that runs this, whatever its version."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py"))
    chosen = [p for p in paths if script.is_corpus_file(p) and script.split_of(p) == "heldout"]
    assert chosen
    return [(root / p).read_bytes().decode() for p in chosen]


def test_it_beats_unigram_and_bigram_on_files_it_has_not_seen(
    script: ModuleType, record: dict[str, Any], tokenizer: Any, texts: list[str]
) -> None:
    documents = [np.array(tokenizer.encode(t), dtype=np.uint16) for t in texts]
    contexts = torch.from_numpy(script.pack(documents).astype(np.int64))
    spread = contexts[:: max(1, len(contexts) // 24)]
    loss = script.mean_loss(script.load_model(TINY_LM), spread)
    nats = record["heldout"]["nats_per_token"]
    assert loss < nats["bigram"] < nats["unigram"]
    assert loss == pytest.approx(nats["model"], abs=0.4)  # a sample of the contexts, perhaps of another version


def test_tokenizer_gives_text_back(tokenizer: Any, texts: list[str]) -> None:
    for text in [*AWKWARD, *texts]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_adds_nothing_and_keeps_indentation_whole(tokenizer: Any) -> None:
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert len(tokenizer) == 4096
    assert [tokenizer.decode([i]) for i in tokenizer.encode("if x:\n        return self")] == [
        "if",
        " x",
        ":",
        "\n        ",
        "return",
        " self",
    ]


def test_it_is_small(record: dict[str, Any]) -> None:
    assert sum(p.stat().st_size for p in TINY_LM.iterdir() if p.is_file()) < 8_000_000
    assert record["training"]["parameters"] * 2 < (TINY_LM / "model.safetensors").stat().st_size


def test_split_rule_depends_on_the_path_alone(script: ModuleType, record: dict[str, Any]) -> None:
    assert all(script.split_of(p) == "heldout" for p in record["corpus"]["heldout_paths"])
    assert script.split_of("argparse.py") == "heldout"
    assert script.split_of("json/decoder.py") == "train"
    assert not script.is_corpus_file("site-packages/numpy/core.py")
    assert not script.is_corpus_file("_sysconfigdata__linux.py")


def test_record_names_no_machine(record: dict[str, Any]) -> None:
    text = json.dumps(record)
    assert not any(word in text for word in ("/root", "/home", "/work", "/tmp", str(Path.home())))
