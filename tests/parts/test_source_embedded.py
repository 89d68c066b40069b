"""The embedded model, run without transformers: config, ids, activations, logits and gradients are those it gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spalf.parts.source import checkpoint, embedded
from spalf.parts.source.embedded import EmbeddedModel, EmbeddedTokenizer
from spalf.parts.source.huggingface import Huggingface, ResidualModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def pair(request: pytest.FixtureRequest) -> tuple[ResidualModel, EmbeddedModel]:
    """As transformers runs it and as we do, behind block 2."""
    loaded = checkpoint.load_model("embedded", "main", request.param, CPU)
    return ResidualModel(loaded, 2), EmbeddedModel(2, request.param, CPU)


def tokens(sequences: int, positions: int) -> Tensor:
    return torch.randint(0, 4096, (sequences, positions), generator=torch.Generator().manual_seed(positions))


def padded(sequences: int, positions: int, *, left: bool) -> Tensor:
    real_ST = torch.ones(sequences, positions, dtype=torch.bool)
    real_ST[0, slice(None, positions // 2) if left else slice(positions // 2 + 1, None)] = False
    return real_ST


@pytest.mark.parametrize(("sequences", "positions"), [(4, 64), (3, 17), (2, 1)])
def test_results_are_those_of_transformers(
    pair: tuple[ResidualModel, EmbeddedModel], sequences: int, positions: int
) -> None:
    theirs, ours = pair
    tokens_ST = tokens(sequences, positions)
    for real_ST in (None, padded(sequences, positions, left=False), padded(sequences, positions, left=True)):
        real = slice(None) if real_ST is None else real_ST
        for mine, other in (
            (ours.activations(tokens_ST, real_ST), theirs.activations(tokens_ST, real_ST)),
            (ours.logits(tokens_ST, real_ST, None), theirs.logits(tokens_ST, real_ST, None)),
            (ours.logits(tokens_ST, real_ST, torch.tanh), theirs.logits(tokens_ST, real_ST, torch.tanh)),
        ):
            assert mine.dtype == other.dtype
            assert torch.equal(mine[real], other[real])
    assert torch.equal(ours.unembedding(), theirs.unembedding())


def test_gradients_flow_from_the_patch_alone(pair: tuple[ResidualModel, EmbeddedModel]) -> None:
    tokens_ST = tokens(2, 9)
    grads = []
    for model in pair:
        shift_D = torch.zeros(192, dtype=model.unembedding().dtype, requires_grad=True)
        model.logits(tokens_ST, None, lambda x_STD, shift_D=shift_D: x_STD + shift_D).float().square().mean().backward()
        grads.append(shift_D.grad)
        assert not model.logits(tokens_ST, None, None).requires_grad
    assert grads[0] is not None
    assert grads[0].any()
    assert torch.equal(grads[0], grads[1])


def test_words_are_those_of_transformers() -> None:
    ours, theirs = EmbeddedTokenizer(), checkpoint.load_tokenizer("embedded", "main")
    assert theirs is not None
    texts = ["def f(x):\n    return x  # \u00e9\u4e2d\U0001f600\n", "", "<|endoftext|> a\r\n\tb", "9" * 50]
    assert ours(texts)["input_ids"] == theirs(texts, add_special_tokens=False)["input_ids"]
    assert len(ours) == len(theirs)
    assert [ours.decode([i]) for i in range(len(ours))] == [theirs.decode([i]) for i in range(len(theirs))]
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)


def test_costs_are_those_of_the_config_as_transformers_reads_it() -> None:
    read = checkpoint.read_config(str(embedded.directory()), "main")
    assert checkpoint.costs_of_config(embedded.read_config()) == checkpoint.costs_of_config(read)
    assert embedded.read_config().eos_token_id == read.eos_token_id


def test_eager_attention_is_left_to_transformers(tmp_path: Path) -> None:
    """It is the one choice that this forward pass does not have."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text("x = 1\n" * 200, encoding="utf-8")
    named = {"text": str(tmp_path / "a.txt"), "held_out_from": str(tmp_path / "b.txt"), "dtype": "float32"}
    opened = {
        attention: Huggingface(
            model="embedded", layer=1, attention=attention, context=16, shuffle=64, pool=8, **named
        ).open(0, CPU)
        for attention in ("auto", "eager")
    }
    rows = [stream.next(32).x_BD for stream in opened.values()]
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-4)


PROGRAM = """
import sys
from spalf.cli import main
try:
    main()
finally:
    slow = {"transformers", "torch._dynamo", "torch.distributed.tensor", "scipy.optimize", "sympy"}
    assert not slow & {*sys.modules}, slow & {*sys.modules}
"""


@pytest.mark.slow
def test_a_run_on_it_starts_without_what_takes_long_to_import(tmp_path: Path) -> None:
    words = ["run", "spalf", "--out", str(tmp_path), "--stop-at", "1", "--quiet"]
    sets = (
        "name='started'",
        'source={ use = "huggingface", model = "embedded", text = "stdlib", layer = 1, pool = 64, shuffle = 4096 }',
        *("budget={ tokens = 8192, batch = 64 }", "knobs.F=256", "knobs.L0_target=8", "phase.calibrate.samples=2048"),
    )
    for one in sets:
        words += ["--set", one]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
