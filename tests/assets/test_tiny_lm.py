"""The embedded language model is what its record says: small, lossless on text, and a model of Python."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import spalf
from spalf.assets.tiny_lm.making.corpus import is_corpus_file, split_of
from spalf.assets.tiny_lm.making.model import load_model, mean_loss
from spalf.assets.tiny_lm.making.tokenizer import load_tokenizer
from spalf.assets.tiny_lm.making.tokens import pack

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
def record() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((TINY_LM / "training.json").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TINY_LM)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """The held-out files of the interpreter that runs this, whatever its version."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.py"))
    chosen = [p for p in paths if is_corpus_file(p) and split_of(p) == "heldout"]
    assert chosen
    return [(root / p).read_bytes().decode() for p in chosen]


def test_it_beats_unigram_and_bigram_on_files_it_has_not_seen(
    record: dict[str, Any], tokenizer: Any, texts: list[str]
) -> None:
    documents = [np.array(tokenizer.encode(t), dtype=np.uint16) for t in texts]
    contexts = torch.from_numpy(pack(documents).astype(np.int64))
    spread = contexts[:: max(1, len(contexts) // 24)]
    loss = mean_loss(load_model(TINY_LM), spread)
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


def test_split_rule_depends_on_the_path_alone(record: dict[str, Any]) -> None:
    assert all(split_of(p) == "heldout" for p in record["corpus"]["heldout_paths"])
    assert split_of("argparse.py") == "heldout"
    assert split_of("json/decoder.py") == "train"
    assert not is_corpus_file("site-packages/numpy/core.py")
    assert not is_corpus_file("_sysconfigdata__linux.py")


def test_record_names_no_machine(record: dict[str, Any]) -> None:
    text = json.dumps(record)
    assert not any(word in text for word in ("/root", "/home", "/work", "/tmp", str(Path.home())))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prepare", "train", "record", "sample"])
def test_the_script_stands_alone(name: str) -> None:
    """The commands of the README are run from the folder itself: its modules import nothing of spalf."""
    words = [sys.executable, "-W", "ignore", "train.py", name, "--help"]
    done = subprocess.run(words, cwd=TINY_LM, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"train.py {name}" in done.stdout


def test_the_scripts_modules_import_nothing_of_spalf() -> None:
    files = [TINY_LM / "train.py", *sorted((TINY_LM / "making").glob("*.py"))]
    assert len(files) > 5
    assert [f.name for f in files if "spalf" in f.read_text(encoding="utf-8")] == []
