"""`difference`: rows are z_b - z_a of the pairs in the file, no sentence is in two parts, and labels stay in place.

Shapes as in spalf/parts/source/difference.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spalf.assembly.convert import Converter
from spalf.core.protocols import Source
from spalf.core.values import Batch, Facts, Sequences
from spalf.errors import SourceError
from spalf.parts.source import Difference, Huggingface
from spalf.parts.source.difference import DifferenceStream, Sentences, groups, held_out_pairs
from spalf.parts.source.language import LanguageStream
from spalf.parts.source.pairs import Pairs, write_pairs
from spalf.parts.source.texts import read_text_pairs
from spalf.plugins import registry
from spalf.testing import toy_plan
from spalf.testing.tiny_model import write_model, write_text
from spalf.testing.whole import started

pytestmark = pytest.mark.slow  # together more than `make check` has time for

CPU = torch.device("cpu")
TEXTS = [
    {"a": f"the cat number {i} sat", "b": f"the cats number {i} sit", "labels": {"plural": 1, "past": -1}}
    for i in range(10)
] + [{"a": f"a dog {i}", "b": f"dogs {i} and {i}", "labels": {"plural": 1}} for i in range(10)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("difference")


@pytest.fixture(scope="module")
def inner(home: Path) -> Any:
    text, model = write_text(home / "text.jsonl"), write_model(home / "model")
    small: dict[str, Any] = {"context": 48, "sequences": 3, "shuffle": 50, "dtype": "float32", "held_out": 0.25}
    return Huggingface(model=str(model), text=str(text), layer=0, **small)


@pytest.fixture(scope="module")
def file(home: Path) -> Path:
    path = home / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in TEXTS), encoding="utf-8")
    return path


def opened(source: Difference, seed: int = 0) -> DifferenceStream:
    stream = source.open(seed, CPU)
    assert isinstance(stream, DifferenceStream)
    return stream


def everything(source: Difference) -> list[Batch]:
    """All training pairs once, and all held-out ones."""
    stream = opened(source)
    n = source.facts().shuffle
    return [stream.next(n), stream.held_out().next(len(TEXTS) - n)]


def alone(inner: Any, text: str, position: str = "last") -> Tensor:
    """The activation of one text in a pass of its own."""
    stream = inner.open(0, CPU)
    assert isinstance(stream, LanguageStream)
    tokens_ST = stream.tokens(text)[None]
    x_TD = stream.activations(Sequences(tokens_ST=tokens_ST, real_ST=torch.ones_like(tokens_ST, dtype=torch.bool)))[0]
    return x_TD[-1] if position == "last" else x_TD[1:].mean(0)


# ----------------------------------------------------------------------------------------------------------- from texts
@pytest.mark.parametrize("position", ["last", "mean"])
def test_rows_are_differences_of_the_texts_activations(inner: Any, file: Path, position: Any) -> None:
    source = Difference(of=inner, pairs=str(file), position=position)
    rows_ND = torch.cat([batch.x_BD for batch in everything(source)])
    wanted_ND = torch.stack([alone(inner, t["b"], position) - alone(inner, t["a"], position) for t in TEXTS])  # type: ignore[arg-type]
    distance_NN = torch.cdist(rows_ND, wanted_ND)
    nearest = distance_NN.argmin(1)
    assert sorted(nearest.tolist()) == list(range(20)), "each pair is in one part, once"
    assert float(distance_NN.min(1).values.max()) < 1e-4


def test_labels_stay_with_their_rows(inner: Any, file: Path) -> None:
    source = Difference(of=inner, pairs=str(file))
    stream = opened(source)
    assert stream.concepts == ("past", "plural")
    assert "labels" in source.facts().provides
    wanted = {TEXTS.index(t): [t["labels"].get("past", 0), t["labels"]["plural"]] for t in TEXTS}  # type: ignore[attr-defined,index]
    truth_ND = torch.stack([alone(inner, t["b"]) - alone(inner, t["a"]) for t in TEXTS])  # type: ignore[arg-type]
    for batch in everything(source):
        which = torch.cdist(batch.x_BD, truth_ND).argmin(1).tolist()
        assert batch.truth_BN is not None
        assert batch.truth_BN.tolist() == [wanted[i] for i in which]


def test_columns_are_read_like_objects(home: Path, file: Path) -> None:
    table = home / "pairs.tsv"
    lines = ["a\tb\tpast\tplural"]
    lines += [f"{t['a']}\t{t['b']}\t{t['labels'].get('past', 0)}\t1" for t in TEXTS]  # type: ignore[attr-defined]
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    quoted = home / "pairs.csv"
    quoted.write_text('a,b\n"one, two","three ""four"""\n', encoding="utf-8")
    one, two = read_text_pairs(file), read_text_pairs(table)
    assert (one.texts, one.concepts) == (two.texts, two.concepts)
    assert one.labels_NC is not None
    assert two.labels_NC is not None
    assert torch.equal(one.labels_NC, two.labels_NC)
    assert read_text_pairs(quoted).texts == ("one, two", 'three "four"')


def test_texts_without_labels(inner: Any, home: Path) -> None:
    path = home / "plain.jsonl"
    path.write_text("".join(json.dumps({"a": t["a"], "b": t["b"]}) + "\n" for t in TEXTS), encoding="utf-8")
    source = Difference(of=inner, pairs=str(path))
    assert "labels" not in source.facts().provides
    assert opened(source).next(2).truth_BN is None


def test_each_text_is_read_once(inner: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mirrored pairs and pairs that share a text cost nothing more."""
    path = home / "mirrored.jsonl"
    rows = [{"a": "the cat", "b": "a dog"}, {"a": "a dog", "b": "the cat"}, {"a": "one", "b": "two three"}]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    seen: list[int] = []
    activations = LanguageStream.activations

    def counted(self: LanguageStream, sequences: Sequences) -> Tensor:
        seen.append(len(sequences.tokens_ST))
        return activations(self, sequences)

    monkeypatch.setattr(LanguageStream, "activations", counted)
    stream = opened(Difference(of=inner, pairs=str(path), held_out=0.4))
    assert sum(seen) == 4
    pair_2D = stream.next(2).x_BD
    torch.testing.assert_close(pair_2D[0], -pair_2D[1])


def test_facts_come_before_weights(inner: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Huggingface, "open", lambda *_: pytest.fail("facts opened the model"))
    facts = Difference(of=inner, pairs=str(file)).facts()
    base = inner.facts()
    assert (facts.d_model, facts.hook, facts.model, facts.n_vocab) == (
        base.d_model,
        base.hook,
        base.model,
        base.n_vocab,
    )
    assert facts.provides == {"activations", "unembedding", "labels"}
    assert (facts.shuffle, facts.flops_to_hook) == (18, 0.0)


def test_what_the_model_gives_is_passed_on(inner: Any, file: Path) -> None:
    stream, plain = opened(Difference(of=inner, pairs=str(file))), inner.open(0, CPU)
    assert torch.equal(stream.unembedding(), plain.unembedding())
    assert torch.equal(stream.token_counts(), plain.token_counts())
    assert torch.equal(stream.tokens("a dog"), plain.tokens("a dog"))
    assert stream.text(stream.tokens("a")) == plain.text(plain.tokens("a"))
    for refused in (lambda: stream.sequences(1), stream.truth):
        with pytest.raises(SourceError, match='source "difference" has no'):
            refused()


# ----------------------------------------------------------------------------------------------------- from activations
def harvested(path: Path, sentences: list[tuple[int, int]], **changes: Any) -> Path:
    n = len(sentences)
    draw = torch.Generator().manual_seed(0)
    ends = torch.tensor(sentences, dtype=torch.int64)
    x_SD = torch.randn(int(ends.max()) + 1, 4, generator=draw)
    facts = Facts(d_model=4, hook="blocks.0.hook_resid_post", model="drawn")
    options: dict[str, Any] = {
        "a_ND": x_SD[ends[:, 0]],
        "b_ND": x_SD[ends[:, 1]],
        "labels_NC": torch.arange(n)[:, None].remainder(3).sub(1).to(torch.int8),
        "concepts": ("third",),
        "sentence_a_N": ends[:, 0],
        "sentence_b_N": ends[:, 1],
        "facts": facts,
    }
    return write_pairs(path, Pairs(**{**options, **changes}))


CHAINS = [(10 * g + i, 10 * g + i + 1) for g in range(8) for i in range(4)]
"""Eight groups of four pairs, each pair sharing a sentence with the next."""


def test_a_directory_needs_no_model(tmp_path: Path) -> None:
    source = Difference(pairs=str(harvested(tmp_path / "p", CHAINS)), held_out=0.25)
    facts = source.facts()
    assert (facts.d_model, facts.model, facts.shuffle) == (4, "drawn", 24)
    assert facts.provides == {"activations", "labels"}
    stream = opened(source)
    assert stream.held_out().next(8).x_BD.shape == (8, 4)
    with pytest.raises(SourceError, match="has no unembedding"):
        stream.unembedding()


def test_a_directory_of_another_model_is_refused(tmp_path: Path, inner: Any) -> None:
    path = harvested(tmp_path / "p", CHAINS)
    with pytest.raises(SourceError, match=r"was harvested at d_model 4, source\.of has"):
        Difference(pairs=str(path), of=inner).facts()


def test_a_directory_of_the_same_model_lends_its_unembedding(tmp_path: Path, inner: Any) -> None:
    base = inner.facts()
    x_ND = torch.randn(32, base.d_model)
    path = harvested(tmp_path / "p", CHAINS, a_ND=x_ND, b_ND=x_ND + 1, facts=base)
    source = Difference(pairs=str(path), of=inner, held_out=0.25)
    assert "unembedding" in source.facts().provides
    stream = opened(source)
    assert stream.unembedding().shape == (base.n_vocab, base.d_model)
    torch.testing.assert_close(stream.next(5).x_BD, torch.ones(5, base.d_model))


# ------------------------------------------------------------------------------------------------------------ the split
def test_no_sentence_is_in_two_parts(tmp_path: Path) -> None:
    ends = torch.tensor(CHAINS)
    sentences = Sentences(a_N=ends[:, 0], b_N=ends[:, 1], is_labelled=False)
    held_N = held_out_pairs(sentences, 0.25)
    assert int(held_N.sum()) == 8
    held, training = (set(ends[keep].flatten().tolist()) for keep in (held_N, ~held_N))
    assert held & training == set()
    assert held


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=60), st.floats(0.05, 0.6))
def test_a_split_never_leaks(pairs: list[tuple[int, int]], share: float) -> None:
    ends = torch.tensor(pairs)
    sentences = Sentences(a_N=ends[:, 0], b_N=ends[:, 1], is_labelled=False)
    try:
        held_N = held_out_pairs(sentences, share)
    except SourceError:
        sizes = torch.bincount(groups(sentences))
        assert int(sizes.min()) > max(1, round(share * len(pairs))) or len(sizes) == 1
        return
    assert 0 < int(held_N.sum()) <= max(1, round(share * len(pairs)))
    held, training = (set(ends[keep].flatten().tolist()) for keep in (held_N, ~held_N))
    assert held & training == set()


def test_the_split_is_the_same_for_every_seed(tmp_path: Path) -> None:
    source = Difference(pairs=str(harvested(tmp_path / "p", CHAINS)), held_out=0.25)
    parts = [opened(source, seed).held_out().next(8).x_BD for seed in (0, 1)]
    assert not torch.equal(*parts), "the order is the seed's"
    assert torch.equal(*(x_ND[x_ND[:, 0].argsort()] for x_ND in parts))


def test_pairs_that_hang_together_cannot_be_split(tmp_path: Path) -> None:
    path = harvested(tmp_path / "p", [(0, i) for i in range(1, 9)])
    with pytest.raises(SourceError, match=r"none of 8 pairs can be held out .* are 1, the smallest of 8"):
        Difference(pairs=str(path)).facts()


# ------------------------------------------------------------------------------------------------------------ the order
def test_an_epoch_has_every_pair_once(tmp_path: Path) -> None:
    source = Difference(pairs=str(harvested(tmp_path / "p", CHAINS)), held_out=0.25)
    stream = opened(source)
    epochs = [stream.next(24).x_BD for _ in range(2)]
    assert not torch.equal(*epochs)
    assert torch.equal(*(x_ND[x_ND[:, 0].argsort()] for x_ND in epochs))
    assert len(torch.unique(epochs[0], dim=0)) == 24


def test_without_repeat_it_ends(tmp_path: Path) -> None:
    source = Difference(pairs=str(harvested(tmp_path / "p", CHAINS)), held_out=0.25, repeat=False)
    stream = opened(source)
    stream.next(24)
    with pytest.raises(SourceError, match="all 24 pairs are used up"):
        stream.next(1)
    assert stream.held_out().next(100).x_BD.shape == (100, 4)


# --------------------------------------------------------------------------------------------------------- in a recipe
def test_a_recipe_trains_on_differences(inner: Any, file: Path) -> None:
    """An inner source in TOML, as a table in the source's; the filled recipe gives it back."""
    of = f'{{ use = "huggingface", model = "{inner.model}", text = "{inner.text}", layer = 0, context = 48 }}'
    plan = toy_plan(
        source=f'{{ use = "difference", pairs = "{file}", of = {of} }}',
        phases='["calibrate", "fit"]',
        phase__calibrate__samples="64",
        phase__fit='{ use = "constrained", constraints = ["faithfulness"], gate = "exhausted" }',
        budget="{ tokens = 160, batch = 16 }",
        evaluator__ground_truth="false",
    )
    assert set(plan.origins) >= {"source.difference", "source.huggingface"}
    table = Converter(registry()).unstructure(plan.recipe)
    assert table["source"]["of"]["use"] == "huggingface"
    assert Converter(registry()).structure(table["source"], Source) == plan.recipe.source
    state = started(plan, steps=10)
    assert state.clock.step == 10
    assert all(bool(p.isfinite().all()) for _, p in state.sae.named_parameters())


def test_a_recipe_over_a_directory_names_no_model(tmp_path: Path) -> None:
    source = Difference(pairs=str(harvested(tmp_path / "p", CHAINS)), held_out=0.25)
    table = Converter(registry()).unstructure(source)
    assert "of" not in table
    assert Converter(registry()).structure(table, Source) == source


# -------------------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", "", "holds no pairs"),
        ("p.jsonl", '{"a": "x", "b": "y"}\n{"a": "x"', "line 2: is no JSON"),
        ("p.jsonl", '{"a": "x"}', 'line 1: "a" and "b" have to be text'),
        ("p.jsonl", '{"a": "x", "b": ""}', "not empty"),
        ("p.jsonl", '{"a": "x", "b": "y", "labels": [1]}', "as a table of concepts"),
        ("p.jsonl", "[1]", "as a table of concepts"),
        ("p.jsonl", '{"a": "x", "b": "y", "labels": {"c": 2}}', r"labels are -1, 0 or 1 .* found \{'c': 2\}"),
        ("p.jsonl", '{"a": "x", "b": "y", "labels": {"c": true}}', "labels are -1, 0 or 1"),
        ("p.tsv", "x\ty\n", "the first line names the columns"),
        ("p.tsv", "a\tb\tc\nx\ty\n", "line 2: has 2 columns, the first line names 3"),
        ("p.csv", "a,b,c\nx,y,much\n", "labels are -1, 0 or 1"),
        ("p.csv", 'a,b\n"x', "cannot be read"),
    ],
)
def test_a_bad_file_is_refused_by_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SourceError, match=message):
        read_text_pairs(path)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot be read: .*No such file"):
        read_text_pairs(tmp_path / "none.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match="is not UTF-8 text"):
        read_text_pairs(tmp_path / "binary.jsonl")


def test_texts_need_a_model(file: Path, tmp_path: Path, inner: Any) -> None:
    with pytest.raises(SourceError, match=r"texts need a model \(name a language source in source.of"):
        Difference(pairs=str(file)).facts()
    shards = Difference(pairs=str(harvested(tmp_path / "p", CHAINS)), held_out=0.25)
    with pytest.raises(SourceError, match=r"source\.of reads no text"):
        Difference(pairs=str(file), of=shards).facts()


def test_a_text_has_to_fit(inner: Any, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    rows = [{"a": "a b c d e f g h i j", "b": "x"}, {"a": "y", "b": "z"}, {"a": "v", "b": "w"}]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    short = evolve(inner, context=6)
    with pytest.raises(SourceError, match=r"the text 'a b c .* fit into a context \(raise source.of.context\)"):
        Difference(of=short, pairs=str(path), held_out=0.4).open(0, CPU)
