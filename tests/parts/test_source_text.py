"""Text: which documents are read, which are held out, and how they are cut to contexts."""

import json
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spalf.assets.tiny_lm.making import corpus as rules
from spalf.errors import SourceError
from spalf.parts.source import contexts, language
from spalf.parts.source.contexts import Contexts, Vocabulary
from spalf.parts.source.documents import (
    Document,
    Documents,
    Files,
    StandardLibrary,
    document_id,
    find_files,
    is_held_out,
    is_stdlib_file,
    open_documents,
)


def open_text(text: str, *, seed: int = 0, column: str = "text", dataset: str = "", split: str = "train") -> Documents:
    return open_documents(text=text, dataset=dataset, config="", split=split, column=column, seed=seed, end_of_text=0)


def contents(documents: Documents, epoch: int = 0, part: int = 0, index: int = 0) -> list[str]:
    return [str(d.content) for d in documents.read(epoch, part, index)]


# ---------------------------------------------------------------------------------------------- the standard library
def test_stdlib_is_what_the_embedded_model_may_have_read_and_no_more() -> None:
    documents = list(open_text("stdlib").read(0, 0, 0))
    paths = {d.key.decode() for d in documents}
    assert {"json/decoder.py", "argparse.py"} <= paths
    assert all(rules.is_corpus_file(p) for p in paths)
    for path in paths:
        assert is_held_out(path.encode(), 20) == rules.is_heldout(path)
    share = sum(rules.is_heldout(p) for p in paths) / len(paths)
    assert 0.02 < share < 0.09
    root = Path(sysconfig.get_path("stdlib"))
    one = next(d for d in documents if d.key == b"argparse.py")
    assert one.content == (root / "argparse.py").read_bytes().decode()


@pytest.mark.parametrize(
    ("path", "is_read"),
    [
        ("json/decoder.py", True),
        ("idlelib/editor.py", True),
        ("test/test_os.py", False),
        ("idlelib/idle_test/test_editor.py", False),
        ("lib2to3/tests/data/a.py", False),
        ("ctypes/test/test_x.py", False),
        ("unittest/test/x.py", False),
        ("site-packages/numpy/core.py", False),
        ("dist-packages/a.py", False),
        ("__pycache__/a.py", False),
        ("_sysconfigdata__linux.py", False),
        ("config-3.11-x86_64-linux-gnu/python-config.py", False),
    ],
)
def test_stdlib_files(path: str, is_read: bool) -> None:
    assert is_stdlib_file(path) == is_read


def test_stdlib_skips_what_is_not_utf8_and_shuffles_by_seed_and_epoch(tmp_path: Path) -> None:
    for i in range(30):
        (tmp_path / f"m{i:02d}.py").write_text(f"x = {i}", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9")
    orders = {
        (seed, epoch): contents(StandardLibrary(seed=seed, root=tmp_path), epoch) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len({tuple(o) for o in orders.values()}) == 4
    assert {tuple(sorted(o)) for o in orders.values()} == {tuple(sorted(f"x = {i}" for i in range(30)))}
    assert contents(StandardLibrary(seed=0, root=tmp_path)) == orders[0, 0]


# --------------------------------------------------------------------------------------------------- files and formats
def write_parquet(path: Path, texts: list[str | None], rows_per_group: int = 3) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, row_group_size=rows_per_group)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("a plain file\n", encoding="utf-8")
    lines = [json.dumps({"text": f"line {i}"}) for i in range(7)]
    (tmp_path / "b.jsonl").write_text("\n".join([*lines[:3], "", *lines[3:]]) + "\n", encoding="utf-8")
    write_parquet(tmp_path / "c.parquet", ["row 0", "row 1", None, "row 3", "row 4", "row 5", "row 6"])
    tokens = [[5, 6], [], [7], [8, 9, 10]]
    np.concatenate([[*t, 0] for t in tokens]).astype("<u2").tofile(tmp_path / "d.u16")
    return tmp_path


def test_every_format_is_read_whole(mixed: Path) -> None:
    found = contents(open_text(str(mixed)))
    texts = ["a plain file\n", *(f"line {i}" for i in range(7)), *(f"row {i}" for i in (0, 1, 3, 4, 5, 6))]
    tokens = ["[5 6]", "[]", "[7]", "[ 8  9 10]", "[]"]
    assert sorted(found) == sorted(texts + tokens)


def test_reading_resumes_at_every_document(mixed: Path) -> None:
    documents = open_text(str(mixed), seed=3)
    whole = list(documents.read(1, 0, 0))
    for i, document in enumerate(whole):
        rest = list(documents.read(1, document.part, document.index))
        assert [str(d.content) for d in rest] == [str(d.content) for d in whole[i:]]
        assert [(d.part, d.index, d.key) for d in rest] == [(d.part, d.index, d.key) for d in whole[i:]]


def test_paths_globs_and_directories(mixed: Path) -> None:
    def found(text: str) -> list[str]:
        return [p.name for p in find_files(text)]

    assert found(str(mixed / "a.txt")) == ["a.txt"]
    assert found(f"{mixed}/*.jsonl, {mixed}/a.txt") == ["a.txt", "b.jsonl"]
    assert found(str(mixed)) == ["a.txt", "b.jsonl", "c.parquet", "d.u16"]
    with pytest.raises(SourceError, match=r"none.txt.* matches no file"):
        find_files(f"{mixed / 'a.txt'},{mixed / 'none.txt'}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"body": "x"}\n', r"a.jsonl, line 1: no text .*column"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl, line 2"),
        ("a.jsonl", b'{"text": 3}\n', "is int, not text"),
        ("a.txt", b"caf\xe9 \xff", "not UTF-8"),
        ("a.u16", b"abc", "cannot be read"),
        ("a.u16", b"", "cannot be read"),
        ("a.parquet", b"PAR1 and then nothing", "cannot be read"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        contents(open_text(str(tmp_path / name)))


def test_a_parquet_file_without_the_column_lists_its_own(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ["x"])
    with pytest.raises(SourceError, match=r'no column "body" .*\bid\b.*\btext\b'):
        contents(open_text(str(tmp_path / "a.parquet"), column="body"))


def test_text_and_dataset_exclude_each_other() -> None:
    for text, dataset in (("", ""), ("stdlib", "x")):
        with pytest.raises(SourceError, match="either text or a dataset"):
            open_text(text, dataset=dataset)


# -------------------------------------------------------------------------------------------------------- hub datasets
@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "train-0.parquet", [f"train {i}" for i in range(9)])
    write_parquet(tmp_path / "test-0.parquet", [f"test {i}" for i in range(4)])
    return tmp_path


def test_a_dataset_streams_and_resumes(dataset: Path) -> None:
    documents = open_text("", dataset=str(dataset))
    assert contents(documents) == [f"train {i}" for i in range(9)]
    assert contents(documents, index=6) == ["train 6", "train 7", "train 8"]
    assert [d.index for d in documents.read(0, 0, 6)] == [6, 7, 8]
    assert contents(open_text("", dataset=str(dataset), split="test")) == [f"test {i}" for i in range(4)]


def test_a_dataset_that_cannot_be_opened_says_what_to_check(dataset: Path) -> None:
    with pytest.raises(SourceError, match=r'split "nowhere", cannot be opened.*check dataset, config and split'):
        contents(open_text("", dataset=str(dataset), split="nowhere"))
    with pytest.raises(SourceError, match=r'column "body" holds no text .*\btext\b'):
        contents(open_text("", dataset=str(dataset), column="body"))


@pytest.mark.parametrize("error", [ConnectionError, TimeoutError, ZeroDivisionError])
def test_a_network_that_goes_away_names_the_row_and_the_way_on(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    import datasets

    def rows():  # type: ignore[no-untyped-def]
        yield {"text": "first"}
        raise error("gone")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: rows())
    documents = open_text("", dataset="a/b").read(0, 0, 0)
    assert next(documents).content == "first"
    with pytest.raises(SourceError, match=rf'dataset "a/b", split "train", row 1 .*{error.__name__}: gone .*resume'):
        next(documents)


# ------------------------------------------------------------------------------------------------------------ contexts
class Listed:
    """Documents of token ids, one part, in the same order each epoch."""

    name = "listed"

    def __init__(self, documents: list[list[int]]) -> None:
        self.documents = [np.array(d, dtype=np.int64) for d in documents]

    def read(self, epoch: int, part: int, index: int):  # type: ignore[no-untyped-def]
        for i in range(index, len(self.documents)):
            yield Document(part=0, index=i, key=str(i).encode(), content=self.documents[i])


def pack(documents: list[list[int]], length: int, *, begin: int | None = None, repeat: bool = True) -> Contexts:
    vocabulary = Vocabulary(tokenizer=None, size=100, end_of_text=0, begin=begin)
    return Contexts(Listed(documents), vocabulary, length=length, keep=lambda key: True, repeat=repeat)


def test_documents_are_joined_by_end_of_text_and_nothing_is_lost() -> None:
    contexts = pack([[1, 2, 3], [], [4], [5, 6, 7, 8]], 3)
    # an empty document adds nothing; the second pass follows on
    assert contexts.take(5).tolist() == [[1, 2, 3], [0, 4, 0], [5, 6, 7], [8, 0, 1], [2, 3, 0]]
    assert contexts.take(1).dtype == torch.int64


def test_bos_begins_each_context_and_costs_one_token() -> None:
    assert pack([[1, 2, 3, 4]], 3, begin=9).take(3).tolist() == [[9, 1, 2], [9, 3, 4], [9, 0, 1]]


def test_a_text_that_does_not_repeat_ends_with_its_last_whole_context() -> None:
    contexts = pack([[1, 2, 3], [4]], 4, repeat=False)
    assert contexts.take(5).tolist() == [[1, 2, 3, 0]]
    assert contexts.take(1).shape == (0, 4)


@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any),
    length=st.integers(2, 5),
    before=st.integers(0, 4),
)
def test_contexts_of_one_epoch_are_those_of_the_endless_text(sizes: list[int], length: int, before: int) -> None:
    documents = [[10 * i + j + 1 for j in range(n)] for i, n in enumerate(sizes)]
    per_epoch = sum(n + 1 for n in sizes if n)
    whole, cut = pack(documents, length), pack(documents, length)
    for _ in range(before):
        cut.take(99, one_epoch=True)
    rows_ST = cut.take(99, one_epoch=True)
    assert 1 <= len(rows_ST) <= per_epoch // length + 1
    resumed = pack(documents, length)
    resumed.load_state_dict(cut.state_dict())
    assert torch.equal(resumed.take(99, one_epoch=True), cut.take(99, one_epoch=True))
    endless = whole.take(99).tolist()
    first = pack(documents, length).take(99, one_epoch=True).tolist()
    assert first == endless[: len(first)]
    assert len(first) * length >= min(per_epoch, length)


@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any),
    length=st.integers(2, 5),
    before=st.lists(st.integers(1, 5), max_size=3),
)
def test_a_cursor_continues_inside_any_document(sizes: list[int], length: int, before: list[int]) -> None:
    documents = [[10 * i + j + 1 for j in range(n)] for i, n in enumerate(sizes)]
    whole, resumed = pack(documents, length), pack(documents, length)
    for n in before:
        whole.take(n)
    resumed.load_state_dict(whole.state_dict())
    assert torch.equal(whole.take(9), resumed.take(9))
    assert whole.state_dict() == resumed.state_dict()


def test_every_token_knows_its_document_in_every_epoch() -> None:
    documents = [[1, 2, 3], [4], [5, 6, 7, 8]]
    tokens_ST, document_ST = pack(documents, 3, begin=9).take_marked(9)
    home = {token: document_id(str(i).encode()) for i, ids in enumerate(documents) for token in ids}
    assert torch.equal(document_ST[:, 0], document_ST[:, 1]), "BOS belongs to the document that it precedes"
    tokens, marks = tokens_ST[:, 1:].flatten().tolist(), document_ST[:, 1:].flatten().tolist()
    for before, token, mark in zip([0, *tokens], tokens, marks, strict=False):
        # an end-of-text token belongs to the document that it ends
        assert mark == home[token or before]
    assert document_ST.dtype == torch.int64
    assert len(set(home.values())) == 3
    assert min(home.values()) >= 0


def test_ids_of_held_out_documents_have_every_remainder() -> None:
    held = [key for i in range(4000) if is_held_out(key := str(i).encode(), 20)]
    assert {document_id(key) % 10 for key in held} == set(range(10))


def test_documents_without_text_are_refused_rather_than_read_for_ever() -> None:
    with pytest.raises(SourceError, match=r'"listed" has no document in this split'):
        pack([[], []], 3).take(1)


def test_an_id_that_the_model_does_not_know_is_refused() -> None:
    with pytest.raises(SourceError, match="token id 100 in the text, but the model knows 100"):
        pack([[1, 100]], 3).take(1)


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    documents = Files(paths=(tmp_path / "a.txt",), seed=0, column="text", end_of_text=0, name="a")
    vocabulary = Vocabulary(tokenizer=None, size=100, end_of_text=0, begin=None)
    contexts = Contexts(documents, vocabulary, length=3, keep=lambda key: True, repeat=True)
    with pytest.raises(SourceError, match="no tokenizer"):
        contexts.take(1)


# -------------------------------------------------------------------------------------------------------- tokenising
class Letters:
    """A tokenizer: a letter is its place in the alphabet. Notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        self.asked += texts
        return {"input_ids": [[ord(c) - 96 for c in one] for one in texts]}


def documents_of(*texts: str) -> list[Document]:
    return [Document(part=i, index=0, key=b"same", content=text) for i, text in enumerate(texts)]


def test_a_text_is_tokenised_once_in_whatever_company_it_comes_again() -> None:
    letters = Letters()
    vocabulary = Vocabulary(tokenizer=letters, size=100, end_of_text=0, begin=None)
    assert [ids.tolist() for ids in vocabulary.encode(documents_of("ab", "c", "ab"))] == [[1, 2], [3], [1, 2]]
    again = vocabulary.encode(documents_of("d", "", "ab", "c"))
    assert [ids.tolist() for ids in again] == [[4], [], [1, 2], [3]]
    assert {ids.dtype for ids in again} == {np.dtype(np.int64)}
    assert letters.asked == ["ab", "c", "d", ""]


def test_no_more_ids_are_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "REMEMBERED", 4)
    letters = Letters()
    vocabulary = Vocabulary(tokenizer=letters, size=100, end_of_text=0, begin=None)
    for _ in range(2):
        assert [ids.tolist() for ids in vocabulary.encode(documents_of("abc", "de", "f"))] == [[1, 2, 3], [4, 5], [6]]
    assert letters.asked == ["abc", "de", "f", "de"]


@pytest.mark.parametrize(("tokens", "wanted"), [(1, ["ab"]), (4, ["ab", "c", "de"]), (100, ["ab", "c", "de", "f"])])
def test_texts_are_encoded_on_the_side_up_to_so_many_ids(tokens: int, wanted: list[str]) -> None:
    """A group of texts at a time: of one, of two, of four."""
    letters = Letters()
    vocabulary = Vocabulary(tokenizer=letters, size=100, end_of_text=0, begin=None)
    is_read = threading.Event()

    def read() -> Iterator[Document]:
        yield from documents_of("ab", "c", "de", "f")
        is_read.set()

    with vocabulary.encoding(read(), tokens):
        if tokens == 100:
            assert is_read.wait(10)
        else:
            deadline = time.monotonic() + 10
            while letters.asked != wanted and time.monotonic() < deadline:
                time.sleep(0.001)
    assert letters.asked == wanted
    vocabulary.encode(documents_of("ab"))
    assert letters.asked == wanted


def test_a_text_that_cannot_be_encoded_on_the_side_is_told_of_by_its_reader() -> None:
    vocabulary = Vocabulary(tokenizer=Letters(), size=3, end_of_text=0, begin=None)
    with vocabulary.encoding(documents_of("ab", "z"), 100):
        pass
    with pytest.raises(SourceError, match="token id 26"):
        vocabulary.encode(documents_of("z"))


# ------------------------------------------------------------------------------------------------ passes of the model
class Sums:
    """A model: a position's row is the sum of the ids up to it that are text. Notes how many tokens each pass has."""

    def __init__(self) -> None:
        self.passes: list[int] = []

    def activations(self, tokens_ST: torch.Tensor, real_ST: torch.Tensor | None) -> torch.Tensor:
        self.passes.append(tokens_ST.numel())
        return (tokens_ST if real_ST is None else tokens_ST * real_ST).cumsum(1)[:, :, None]

    def logits(self, *_: object) -> torch.Tensor:
        raise NotImplementedError

    def unembedding(self) -> torch.Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("is_masked", [False, True])
def test_a_cpu_is_asked_for_few_contexts_at_a_time(is_masked: bool) -> None:
    tokens_ST = torch.arange(70 * 100).view(70, 100)
    real_ST = tokens_ST % 3 != 0 if is_masked else None
    model = Sums()
    found_STD = language.activations_of(model, tokens_ST, real_ST)
    assert torch.equal(found_STD, Sums().activations(tokens_ST, real_ST))
    assert model.passes == [1000] * 7
    assert max(model.passes) <= language.CPU_TOKENS
    language.activations_of(model, torch.ones(2, 2 * language.CPU_TOKENS), None)
    assert model.passes[7:] == [2 * language.CPU_TOKENS] * 2
