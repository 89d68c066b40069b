"""The two language-model sources: the right activations on many architectures, stopped early, and honest facts."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve

from spalf.core.values import Raw, Sequences
from spalf.engine import language
from spalf.errors import SourceError
from spalf.parts.source import Huggingface, TransformerLens, checkpoint
from spalf.parts.source.contexts import Vocabulary
from spalf.parts.source.documents import Document, is_held_out
from spalf.parts.source.hooks import check_hook
from spalf.parts.source.language import LanguageStream
from spalf.testing.tiny_model import write_model, write_text, write_tokenizer

pytestmark = pytest.mark.slow  # together more than `make check` has time for

CPU = torch.device("cpu")
LAYERS = 3
COMMON = {"vocab_size": 272, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, **COMMON}
GATED = {**SIZES, "intermediate_size": 40, "num_key_value_heads": 1, "head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt_neox": {**SIZES, "intermediate_size": 64},
    "gpt2": {"n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_positions": 64, **COMMON},
    "llama": {**GATED, "tie_word_embeddings": False},
    "qwen2": {**GATED, "tie_word_embeddings": True},
    "gemma2": GATED,
    "gpt_neo": {
        "hidden_size": 16,
        "num_layers": LAYERS,
        "num_heads": 2,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local", "global"], 1]],
        **COMMON,
    },
    "bloom": {**SIZES, "n_head": 2, "n_layer": LAYERS},
    "falcon": {**SIZES, "new_decoder_architecture": False, "multi_query": True},
    "opt": {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
}
BRIDGED = ("gpt_neox", "gpt2", "llama", "qwen2")


def build(family: str, directory: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **CONFIGS[family]))
    for parameter in model.parameters():  # default weights are so small that every block is nearly the identity
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest, home: Path) -> str:
    name: str = request.param
    if not (home / name).exists():
        build(name, home / name)
    return name


@pytest.fixture(scope="module")
def text(home: Path) -> str:
    return str(write_text(home / "text.jsonl"))


@pytest.fixture(scope="module")
def neox(home: Path) -> str:
    return str(write_model(home / "written", layers=3))


def options(model: str | Path, text: str, **more: Any) -> dict[str, Any]:
    small = {"context": 12, "sequences": 3, "shuffle": 50, "dtype": "float32", "held_out": 0.25}
    return {"model": str(model), "text": text, **small, **more}


def opened(source: Huggingface | TransformerLens, seed: int = 0) -> LanguageStream:
    stream = source.open(seed, CPU)
    assert isinstance(stream, LanguageStream)
    return stream


# -------------------------------------------------------------------------------------------------- the activations
def test_the_hook_is_the_residual_stream_after_its_block(family: str, home: Path, text: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(home / family, dtype=torch.float32)
    for layer in range(LAYERS - 1):  # the last entry of hidden_states is after the final norm
        stream = opened(Huggingface(**options(home / family, text), layer=layer))
        s = stream.sequences(2)
        with torch.no_grad():
            states = model(input_ids=s.tokens_ST, output_hidden_states=True, use_cache=False).hidden_states
        assert torch.equal(stream.activations(s), states[layer + 1])
        assert not torch.allclose(stream.activations(s), states[layer], atol=1e-3), "the block changes nothing"


@pytest.mark.parametrize("before", [0, 30, 75])
def test_the_block_is_in_the_order_of_the_text_with_its_tokens(neox: str, text: str, before: int) -> None:
    """In the first block and in the second; to look at it moves no cursor."""
    source = Huggingface(**options(neox, text), layer=1)
    stream, other = opened(source), opened(source)
    for each in (stream, other):
        if before:
            each.next(before)
    x_ND, id_N = stream.block()
    assert x_ND.shape == (44, 16)  # four contexts of eleven rows
    tokens_ST = torch.cat([torch.zeros(4, 1, dtype=torch.int64), id_N.view(4, 11)], dim=1)
    for first in range(272):  # position 0 has no row, and is found by trying
        tokens_ST[0, 0] = first
        sequences = Sequences(tokens_ST=tokens_ST[:1], real_ST=torch.ones(1, 12, dtype=torch.bool))
        if torch.allclose(stream.activations(sequences)[0, 1:], x_ND[:11], atol=1e-5):
            break
    else:
        pytest.fail("no first token gives these rows")
    assert stream.state_dict() == other.state_dict()
    assert torch.equal(stream.next(60).x_BD, other.next(60).x_BD)


def test_after_the_last_block_the_final_norm_has_not_run(neox: str, text: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(neox, dtype=torch.float32)
    stream = opened(Huggingface(**options(neox, text), layer=2))
    s = stream.sequences(2)
    with torch.no_grad():
        normed = model(input_ids=s.tokens_ST, output_hidden_states=True).hidden_states[-1]
        assert torch.allclose(model.gpt_neox.final_layer_norm(stream.activations(s)), normed, atol=1e-5)
    assert not torch.allclose(stream.activations(s), normed, atol=1e-2)


def test_patched_logits_equal_those_of_the_whole_model(family: str, home: Path, text: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(home / family, dtype=torch.float32)
    stream = opened(Huggingface(**options(home / family, text), layer=1))
    s = stream.sequences(2)
    with torch.no_grad():
        wanted = model(input_ids=s.tokens_ST).logits
    assert torch.allclose(stream.logits(s), wanted, atol=1e-6)
    assert torch.allclose(stream.logits(s, lambda x: x), wanted, atol=1e-6)
    zeroed = stream.logits(s, lambda x: Raw(torch.zeros_like(x)))
    assert torch.allclose(zeroed, zeroed[:1, :1].expand_as(zeroed), atol=1e-4), "positions differ though all are zero"
    assert not torch.allclose(zeroed, wanted, atol=1e-2)


def test_nothing_runs_behind_the_hook_and_the_model_is_left_clean(neox: str, text: str) -> None:
    stream = opened(Huggingface(**options(neox, text), layer=1))
    model: Any = stream._model
    ran: list[int] = []
    blocks = checkpoint.decoder_layers(model._model)
    handles = [b.register_forward_pre_hook(lambda m, a, i=i: ran.append(i)) for i, b in enumerate(blocks)]
    s = stream.sequences(1)
    stream.activations(s)
    assert ran == [0, 1]
    stream.logits(s)
    assert ran == [0, 1, 0, 1, 2]
    for handle in handles:
        handle.remove()
    assert not any(b._forward_hooks for b in blocks), "a hook stays behind"
    assert not any(p.requires_grad for p in model._model.parameters())


def test_compiled_blocks_give_the_same_and_stop_at_the_same_hook(
    neox: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a backend that runs what was traced as it is: another one rounds in another order."""
    traced: list[str] = []

    def as_it_is(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        traced.append(module.code)
        return module.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=as_it_is))
    plain, compiled = (opened(Huggingface(**options(neox, text, layer=1, compiled=c))) for c in (False, True))
    assert torch.equal(plain.next(64).x_BD, compiled.next(64).x_BD)
    assert traced
    part = compiled.sequences(2)
    torch.testing.assert_close(compiled.logits(part, None), plain.logits(part, None))
    shifted = compiled.logits(part, lambda x_STD: x_STD + 1.0)
    torch.testing.assert_close(shifted, plain.logits(part, lambda x_STD: x_STD + 1.0))


def test_training_rows_leave_out_position_0(neox: str, text: str) -> None:
    with_first = Huggingface(**options(neox, text, shuffle=12, skip_first=False), layer=0)
    without = evolve(with_first, skip_first=True)
    assert (with_first.facts().shuffle, without.facts().shuffle) == (12, 11), "blocks are whole contexts"
    stream = opened(with_first)
    context_ST = stream._supply._contexts.take(1)
    x_TD = stream._model.activations(context_ST, None)[0]
    assert torch.equal(_sorted(opened(with_first).next(12).x_BD), _sorted(x_TD))
    assert torch.equal(_sorted(opened(without).next(11).x_BD), _sorted(x_TD[1:]))


def _sorted(x_BD: torch.Tensor) -> torch.Tensor:
    """Rows in the order of their first coordinate: a block without its shuffle."""
    return x_BD[x_BD[:, 0].argsort()]


def test_bfloat16_rows_come_out_in_float32_near_the_exact_ones(neox: str, text: str) -> None:
    exact = opened(Huggingface(**options(neox, text), layer=1)).next(40).x_BD
    coarse = opened(Huggingface(**options(neox, text, dtype="bfloat16"), layer=1)).next(40).x_BD
    assert coarse.dtype == torch.float32
    assert torch.equal(coarse, coarse.bfloat16().float())
    assert float((coarse - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("family", BRIDGED, indirect=True)
def test_the_bridge_gives_what_the_plain_hook_gives(family: str, home: Path, text: str) -> None:
    for layer in (0, LAYERS - 1):
        plain = opened(Huggingface(**options(home / family, text), layer=layer))
        bridge = opened(TransformerLens(**options(home / family, text), hook=f"blocks.{layer}.hook_resid_post"))
        assert bridge.facts == plain.facts
        assert torch.allclose(plain.next(70).x_BD, bridge.next(70).x_BD, atol=1e-5, rtol=1e-5)
        s = plain.sequences(2)
        assert torch.equal(s.tokens_ST, bridge.sequences(2).tokens_ST)
        for patch in (None, lambda x: Raw(0.5 * x)):
            assert torch.allclose(plain.logits(s, patch), bridge.logits(s, patch), atol=2e-5, rtol=1e-4)
        assert torch.allclose(plain.unembedding(), bridge.unembedding(), atol=1e-6)
        assert plain.state_dict() == bridge.state_dict()


def test_other_hooks_of_the_bridge(neox: str, text: str) -> None:
    plain = opened(Huggingface(**options(neox, text), layer=0))
    s = plain.sequences(2)
    before = opened(TransformerLens(**options(neox, text), hook="blocks.1.hook_resid_pre"))
    assert torch.allclose(before.activations(s), plain.activations(s), atol=1e-5)
    assert before.facts.flops_to_hook == 2 * plain.facts.flops_to_hook
    heads = opened(TransformerLens(**options(neox, text), hook="blocks.1.attn.hook_z", d_model=16))
    assert heads.activations(s).shape == (2, 12, 16)
    assert torch.allclose(heads.logits(s, lambda x: x), plain.logits(s), atol=1e-5)
    inner = opened(TransformerLens(**options(neox, text), hook="blocks.1.mlp.hook_post", d_model=64))
    assert inner.next(5).x_BD.shape == (5, 64)
    with pytest.raises(SourceError, match=r"width 16 .*has 64.*no feature here can be anchored"):
        inner.unembedding()


@pytest.mark.parametrize(
    ("hook", "d_model", "message"),
    [
        ("blocks.3.hook_resid_post", 0, "has blocks 0 to 2"),
        ("blocks.1.hook_nowhere", 16, r'no hook "blocks.1.hook_nowhere"'),
        ("blocks.1.hook_resid_mid", 0, r'the model has no hook "blocks.1.hook_resid_mid"'),  # its block is parallel
        ("blocks.1.mlp.hook_post", 0, r"width at hook .* \(state source.d_model\)"),
        ("blocks.1.mlp.hook_post", 48, "d_model = 48, but the model has 64"),
        ("blocks.1.hook_resid_post", 48, "d_model = 48, but the model has 16"),
    ],
)
def test_a_wrong_hook_is_refused_when_opened(neox: str, text: str, hook: str, d_model: int, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        TransformerLens(**options(neox, text), hook=hook, d_model=d_model).open(0, CPU)


# --------------------------------------------------------------------------------------------------------- the facts
def test_parameters_are_estimated_from_the_config(family: str, home: Path, text: str) -> None:
    from transformers import AutoModelForCausalLM

    facts = Huggingface(**options(home / family, text), layer=1).facts()
    model = AutoModelForCausalLM.from_pretrained(home / family)
    matrices = {id(p): p for n, p in model.named_parameters() if p.ndim == 2 and "position" not in n and "wpe" not in n}
    assert facts.n_parameters == sum(p.numel() for p in matrices.values())
    assert (facts.d_model, facts.n_vocab) == (16, 272)
    # 2 FLOPs per parameter of a block, and causal attention: 2 * context * d
    blocks = [p for n, p in model.named_parameters() if id(p) in matrices and p.shape[0] != 272]
    per_block = sum(p.numel() for p in blocks) / LAYERS
    assert facts.flops_to_hook == pytest.approx(2 * (2 * per_block + 2 * 12 * 16))
    assert facts.flops_full == pytest.approx(3 * (2 * per_block + 2 * 12 * 16) + 2 * 272 * 16)


def test_facts_read_the_config_and_no_weight(neox: str, text: str, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(neox) / name, tmp_path / name)
    facts = Huggingface(**options(tmp_path, text), layer=1).facts()
    assert facts == evolve(Huggingface(**options(neox, text), layer=1).facts(), model=str(tmp_path))
    assert facts.hook == "blocks.1.hook_resid_post"
    assert facts.bytes_per_activation == 4 * 16
    with pytest.raises(SourceError, match="cannot be loaded"):
        Huggingface(**options(tmp_path, text), layer=1).open(0, CPU)


def test_stated_facts_do_without_a_config_and_without_a_network(text: str) -> None:
    source = Huggingface(**options("nobody/nothing", text, d_model=32, n_vocab=100), layer=1)
    facts = source.facts()
    assert (facts.d_model, facts.n_vocab, facts.n_parameters, facts.flops_full) == (32, 100, 0, 0.0)
    known = evolve(source, n_layers=4).facts()
    assert known.n_parameters == 4 * 12 * 32 * 32 + 2 * 100 * 32
    assert known.flops_to_hook == 2 * (2 * 12 * 32 * 32 + 2 * 12 * 32)
    with pytest.raises(SourceError, match=r"blocks 0 to 3"):
        evolve(source, n_layers=4, layer=4).facts()
    with pytest.raises(SourceError, match=r"state source.d_model and source.n_vocab"):
        evolve(source, d_model=0).facts()


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"d_model": 17}, "source.d_model = 17, but the model has 16"),
        ({"n_vocab": 5}, "source.n_vocab = 5, but the model has 272"),
        ({"n_layers": 9}, "source.n_layers = 9, but the model has 3"),
        ({"layer": 3}, r"source.layer = 3, but model .* has blocks 0 to 2"),
    ],
)
def test_stated_facts_that_contradict_the_config_are_refused(
    neox: str, text: str, stated: dict[str, int], message: str
) -> None:
    source = Huggingface(**{**options(neox, text), "layer": 0, **stated})
    with pytest.raises(SourceError, match=message):
        source.open(0, CPU)


def test_an_unreadable_config_is_named(text: str, tmp_path: Path) -> None:
    for content in ("{", "{}"):
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
        with pytest.raises(SourceError, match=r"no usable config.json"):
            Huggingface(**options(tmp_path, text), layer=0).facts()


def test_a_model_without_one_list_of_blocks_lists_what_was_found() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
            self.config = type("C", (), {"get_text_config": lambda s: s, "num_hidden_layers": 4})()

    with pytest.raises(SourceError, match=r"one list of 4 decoder blocks, found lists of modules: towers \(1\)"):
        checkpoint.decoder_layers(Odd())


# ----------------------------------------------------------------------------------------------------- text and splits
@pytest.fixture
def bare(neox: str, tmp_path: Path) -> Path:
    """The model without its tokenizer's files."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(neox) / name, tmp_path / name)
    return tmp_path


def test_a_directory_without_a_tokenizer_is_not_read_with_an_empty_one(bare: Path, text: str) -> None:
    with pytest.raises(SourceError, match="no tokenizer"):
        Huggingface(**options(bare, text), layer=0).open(0, CPU)


def test_token_files_need_no_tokenizer(bare: Path, tmp_path: Path) -> None:
    ids = torch.randint(1, 272, (4000,), generator=torch.Generator().manual_seed(0)).numpy()
    ids[::37] = 0
    ids.astype("<u2").tofile(tmp_path / "text.u16")
    stream = opened(Huggingface(**options(bare, str(tmp_path / "text.u16")), layer=0))
    assert stream.next(30).x_BD.shape == (30, 16)
    assert stream.text(torch.tensor([5, 271])) == ["<5>", "<271>"]
    assert int(stream.token_counts()[0]) > 0
    with pytest.raises(SourceError, match="the model has no tokenizer"):
        stream.tokens("")


def written(stream: LanguageStream, epoch: int = 0) -> set[bytes]:
    """Keys of the documents that a stream reads in one epoch."""
    contexts: Any = stream._supply._contexts._contexts
    return {d.key for d in contexts._documents.read(epoch, 0, 0) if contexts._keep(d.key)}


def test_held_out_documents_are_never_trained_on(neox: str, text: str) -> None:
    stream = opened(Huggingface(**options(neox, text), layer=0))
    training, held = written(stream), written(stream.held_out())
    texts = {json.loads(line)["text"].encode() for line in Path(text).read_text(encoding="utf-8").splitlines()}
    assert training & held == set()
    assert training | held == texts
    assert held == {t for t in texts if is_held_out(t, 4)}
    for epoch in (1, 2):
        assert written(stream, epoch) == training


def test_held_out_may_come_from_elsewhere(neox: str, text: str, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "another document altogether"}\n', encoding="utf-8")
    source = Huggingface(**options(neox, text, held_out_from=str(other)), layer=0)
    stream = opened(source)
    assert len(written(stream)) == 80, "training has all of its own"
    assert written(stream.held_out()) == {b"another document altogether"}
    with pytest.raises(SourceError, match="is the training text"):
        evolve(source, held_out_from=text).facts()


def test_a_held_out_block_is_small(neox: str, text: str) -> None:
    stream = opened(Huggingface(**options(neox, text, shuffle=1 << 20), layer=0))
    assert stream.facts.shuffle == (1 << 20) // 11 * 11
    assert stream.held_out().facts.shuffle == (1 << 16) // 11 * 11


def test_stdlib_splits_by_the_rule_of_the_embedded_model(neox: str) -> None:
    stream = opened(Huggingface(**options(neox, "stdlib", held_out=0.05), layer=0))
    training, held = written(stream), written(stream.held_out())
    assert all(is_held_out(k, 20) for k in held)
    assert not any(is_held_out(k, 20) for k in training)
    assert b"json/decoder.py" in training | held
    assert stream.next(20).x_BD.shape == (20, 16)


def test_text_that_ends_says_so(neox: str, text: str) -> None:
    stream = opened(Huggingface(**options(neox, text, repeat=False), layer=0))
    with pytest.raises(SourceError, match="no more rows"):
        stream.next(10**5)
    with pytest.raises(SourceError, match=r"the text ended: \d+ of 9999 contexts"):
        stream.sequences(9999)


def test_sequences_and_words(neox: str, text: str) -> None:
    stream = opened(Huggingface(**options(neox, text), layer=0))
    s = stream.sequences(30)
    texts = [json.loads(line)["text"] for line in Path(text).read_text(encoding="utf-8").splitlines()]
    found = []
    for tokens_T in s.tokens_ST:
        pieces = [p for p in "".join(stream.text(tokens_T)).split("<|endoftext|>") if p]
        homes = [[i for i, t in enumerate(texts) if p in t] for p in pieces]
        assert all(homes), "every piece of a context is read exactly"
        found.append(homes[0][0])
    assert found != sorted(found), "contexts are served shuffled, not in reading order"
    assert stream.text(torch.tensor([0, 270])) == ["<|endoftext|>", "<270>"]
    with_bos = opened(Huggingface(**options(neox, text, bos=True), layer=0)).sequences(4)
    assert with_bos.tokens_ST[:, 0].tolist() == [0, 0, 0, 0]


def test_a_text_begins_behind_what_a_document_begins_behind(neox: str, text: str) -> None:
    stream = opened(Huggingface(**options(neox, text), layer=0))
    tokens_T = stream.tokens("de f\n")
    assert tokens_T.dtype == torch.int64
    assert stream.text(tokens_T) == ["<|endoftext|>", "d", "e", " ", "f", "\n"]
    assert stream.tokens("").tolist() == [0]

    def tokenizer(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) - 96 for c in one] for one in texts]}

    assert Vocabulary(tokenizer=tokenizer, size=9, end_of_text=7, begin=None).document("abc").tolist() == [7, 1, 2, 3]
    assert Vocabulary(tokenizer=tokenizer, size=9, end_of_text=7, begin=8).document("abc").tolist() == [8, 1, 2, 3]


def test_the_library_behind_a_tokenizer_gives_what_the_tokenizer_gives(neox: str, tmp_path: Path) -> None:
    """Also after someone has padded and cut with it."""
    texts = ["ab <|endoftext|> c", "", "x" * 50]
    documents = [Document(part=0, index=i, key=b"", content=text) for i, text in enumerate(texts)]
    for directory in ("embedded", neox):
        tokenizer = checkpoint.load_tokenizer(directory, "main")
        assert tokenizer is not None
        expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
        tokenizer.pad_token = tokenizer.eos_token
        tokenizer(texts, padding="max_length", truncation=True, max_length=7)
        vocabulary = Vocabulary(tokenizer=tokenizer, size=4096, end_of_text=0, begin=None)
        assert [ids.tolist() for ids in vocabulary.encode(documents)] == expected


def test_a_tokenizer_with_a_way_of_its_own_is_asked_itself(neox: str) -> None:
    tokenizer = checkpoint.load_tokenizer(neox, "main")

    class Upper(type(tokenizer)):  # type: ignore[misc]
        def _encode_plus(self, text: list[str], **more: Any) -> Any:
            return super()._encode_plus([one.upper() for one in text], **more)

    own = Upper.from_pretrained(neox)
    [ids] = Vocabulary(tokenizer=own, size=4096, end_of_text=0, begin=None).encode(
        [Document(part=0, index=0, key=b"", content="abc")]
    )
    assert own.decode(ids) == "ABC"


def test_token_counts_are_of_the_training_text(neox: str, text: str) -> None:
    stream = opened(Huggingface(**options(neox, text), layer=0))
    counts_V = stream.token_counts()
    assert torch.equal(counts_V, stream.held_out().token_counts())
    letters = b"".join(written(stream))
    word = stream._vocabulary.tokenizer("e", add_special_tokens=False)["input_ids"][0]
    # the last context, if it is not whole, is not counted
    assert abs(int(counts_V[word]) - letters.count(b"e")) <= 12
    assert abs(int(counts_V.sum()) - len(letters) - len(written(stream))) <= 12
    assert np.isclose(float(counts_V[257:].sum()), 0.0)


def test_a_resumed_pool_goes_on_in_the_middle_and_over_its_end(neox: str, text: str) -> None:
    source = Huggingface(**options(neox, text), layer=0)
    one, two = opened(source), opened(source)
    one.sequences(1024 - 3)
    two.load_state_dict(one.state_dict())
    for n in (2, 5, 1):
        assert torch.equal(one.sequences(n).tokens_ST, two.sequences(n).tokens_ST)


def test_a_cursor_of_another_pool_is_gone_to_while_one_is_in_hand(neox: str, text: str) -> None:
    source = Huggingface(**options(neox, text, pool=16), layer=0)
    one = opened(source)
    one.sequences(5)
    cursor = one.state_dict()
    wanted = one.sequences(20).tokens_ST  # into the next pool, which is in hand from here on
    one.load_state_dict(cursor)
    assert torch.equal(one.sequences(20).tokens_ST, wanted)
    one.load_state_dict(cursor)
    one.sequences(3)
    cursor = one.state_dict()
    wanted = one.sequences(2).tokens_ST
    one.load_state_dict(cursor)  # of the pool in hand
    assert torch.equal(one.sequences(2).tokens_ST, wanted)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r'training text: text "\S+a.txt" has no document'),
        ("a.txt", b"x" * 500, r"text: .*set held_out_from, or split the file"),
        ("a.u16", b"abc", r"training text: \S+a.u16 cannot be read"),
        ("a.u16", b"", r"training text: \S+a.u16 cannot be read"),
        ("a.u16", b"\xff\x0f" * 40, "training text: token id 4095 in the text, but the model knows 272"),
        ("a.jsonl", b'{"body": "x"}\n', "training text: .*no text"),
        ("none/*.txt", None, r"training text: text \S+ matches no file"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused_before_the_weights_are_loaded(
    neox: str, tmp_path: Path, name: str, content: bytes | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    loaded: list[object] = []
    monkeypatch.setattr(checkpoint, "load_model", lambda *args: loaded.append(args))
    for source in (
        Huggingface(**options(neox, str(tmp_path / name)), layer=0),
        TransformerLens(**options(neox, str(tmp_path / name)), hook="blocks.0.hook_out"),
    ):
        source.facts()  # compiles: the paths of a recipe need not exist where it is looked at
        with pytest.raises(SourceError, match=message):
            source.open(0, CPU)
    assert not loaded


@pytest.mark.parametrize("short", ["training", "held-out"])
def test_a_split_shorter_than_one_context_is_refused_at_once(neox: str, text: str, tmp_path: Path, short: str) -> None:
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    tiny = str(tmp_path / "a.txt")
    own, other = (tiny, text) if short == "training" else (text, tiny)
    source = Huggingface(**options(neox, own, held_out_from=other, pool=1 << 20), layer=0)
    with pytest.raises(SourceError, match=rf'{short} text "\S+a.txt" has fewer than source.context = 12 tokens'):
        source.open(0, CPU)


def test_a_large_pool_over_a_short_text_is_one_epoch(neox: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text of nearly four contexts, not more", encoding="utf-8")
    source = Huggingface(**options(neox, str(tmp_path / "a.txt"), held_out_from=text, pool=1 << 30), layer=0)
    one, two = opened(source), opened(source)
    assert one.next(100).x_BD.shape == (100, 16)
    one.sequences(6)
    two.load_state_dict(one.state_dict())
    assert one.state_dict()["sequences.start.epoch"] >= 1
    assert torch.equal(one.sequences(9).tokens_ST, two.sequences(9).tokens_ST)
    assert torch.equal(one.next(60).x_BD, two.next(60).x_BD)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"text": ""}, "either text or a dataset, and neither is set"),
        ({"dataset": "x"}, "either text or a dataset, and both are set"),
        ({"text": "", "dataset": "x", "held_out_from": "train"}, 'held_out_from = "train" is the training text'),
        ({"context": 65}, "source.context = 65, but model .* has 64 positions"),
    ],
)
def test_contradictory_options_do_not_compile(neox: str, text: str, changed: dict[str, Any], message: str) -> None:
    source = Huggingface(**{**options(neox, text), **changed}, layer=0)
    with pytest.raises(SourceError, match=message):
        source.facts()


def test_every_position_of_the_model_may_be_used(neox: str, text: str) -> None:
    assert Huggingface(**options(neox, text, context=64), layer=0).facts().context == 64


def test_logits_stay_in_the_models_precision(neox: str, text: str) -> None:
    stream = opened(Huggingface(**options(neox, text, dtype="bfloat16"), layer=0))
    seen = []

    def keep(x: Raw) -> Raw:
        seen.append(x.dtype)
        return x

    s = stream.sequences(2)
    assert stream.logits(s).dtype == stream.logits(s, keep).dtype == torch.bfloat16
    assert seen == [torch.float32]
    exact = opened(Huggingface(**options(neox, text), layer=0)).logits(s)
    loss, wanted = (language.cross_entropy(x, s.tokens_ST) for x in (stream.logits(s), exact))
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, wanted, atol=0.1)


# ------------------------------------------------------------------------------------------------- names of the bridge
@pytest.mark.parametrize("family", BRIDGED, indirect=True)
def test_the_grammar_knows_every_hook_with_a_row_per_token(family: str, home: Path, text: str) -> None:
    stream = opened(TransformerLens(**options(home / family, text), hook="blocks.0.hook_out"))
    model: Any = stream._model
    other = ("hook_pattern", "hook_attn_scores", "hook_cos", "hook_sin", "hook_unembed")
    for name in model._bridge.hook_dict:
        if name.rsplit(".", 1)[-1] in other or name.startswith(("unembed", "rotary_emb")):
            with pytest.raises(SourceError, match="no hook"):
                check_hook(name)
        else:
            check_hook(name)


@pytest.mark.parametrize(
    ("hook", "nearest"),
    [
        ("blocks.1.hook_resid_pots", "blocks.1.hook_resid_post"),
        ("blocks.1.mlp.hook_pots", "blocks.1.mlp.hook_post"),
        ("block.0.hook_out", "blocks.0.hook_out"),
        ("ln_final.hook_nrmalized", "ln_final.hook_normalized"),
    ],
)
def test_a_misspelt_hook_does_not_compile(neox: str, text: str, hook: str, nearest: str) -> None:
    with pytest.raises(SourceError, match=rf'no hook "{hook}" .*\(nearest: .*{nearest}'):
        TransformerLens(**options(neox, text), hook=hook, d_model=16).facts()
