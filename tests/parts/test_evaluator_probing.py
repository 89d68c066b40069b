"""Sparse probing: what counts as a comment, files of labelled texts, and accuracies that are known in advance."""

from __future__ import annotations

import io
import json
import tokenize
from pathlib import Path

import pytest
import torch

from spalf.errors import SourceError
from spalf.parts.evaluator import SparseProbing
from spalf.parts.evaluator.probing import _balanced
from spalf.parts.evaluator.tasks import comment, quoted, read_labelled, token_labels
from spalf.testing.whole import stage_for


# ------------------------------------------------------------------------------------------------- what is a comment
@pytest.mark.parametrize("module", ["json/decoder.py", "dataclasses.py", "textwrap.py"])
def test_comments_and_quotations_are_python_s(module: str) -> None:
    """Against the tokenizer of the language, character by character."""
    path = Path(io.__file__).parent / module
    text = path.read_text(encoding="utf-8")
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    is_comment, is_string = [False] * len(text), [False] * len(text)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        begin, end = starts[token.start[0] - 1] + token.start[1], starts[token.end[0] - 1] + token.end[1]
        if token.type == tokenize.COMMENT:
            is_comment[begin:end] = [True] * (end - begin)
        elif token.type == tokenize.STRING:
            is_string[begin:end] = [True] * (end - begin)
    wrong = sum(a != b for a, b in zip(comment(text), is_comment, strict=True))
    assert wrong <= 0.01 * len(text)
    # the marks and a prefix are part of the token, and not of what they enclose
    outside = sum(a and not b for a, b in zip(quoted(text), is_string, strict=True))
    assert outside <= 0.02 * len(text)
    assert sum(quoted(text)) >= 0.9 * sum(is_string) - 3 * text.count('"""')


def test_an_apostrophe_quotes_no_more_than_its_line() -> None:
    assert not any(quoted("don't\nstop")[6:])
    assert quoted(r"'a\'b' c") == [False, True, True, True, True, False, False, False]


def test_a_token_has_the_label_of_its_first_character_that_is_no_space() -> None:
    pieces = ["x", " =", " 1", "  #", " why", "\n", "from", " a", " import", " B"]
    assert token_labels(pieces, "comment") == [False] * 3 + [True, True] + [False] * 5
    assert token_labels(pieces, "number") == [False, False, True] + [False] * 7
    assert token_labels(pieces, "import") == [False] * 6 + [True] * 4
    assert token_labels(pieces, "capitalised") == [False] * 9 + [True]
    assert token_labels(["def", " f", "():", "\n    ", "pass"], "definition") == [True, True, True, True, False]


# ---------------------------------------------------------------------------------------------------- labelled texts
def write(path: Path, rows: list[tuple[str, object]]) -> Path:
    path.write_text("".join(json.dumps({"text": t, "label": v}) + "\n" for t, v in rows), encoding="utf-8")
    return path


def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [("one", "x"), ("two", 2)])
    path.write_text(path.read_text() + "\n")
    assert list(read_labelled(path)) == [("one", "x"), ("two", "2")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", r"line 1: is not \{\"text\": ..., \"label\": ...\}"),
        ('{"text": "a"}', "line 1: is not"),
        ('{"text": "a", "label": 1}\n[1]', "line 2: is not"),
        ('{"text": 3, "label": 1}', "line 1: text has to be a string"),
        ('{"text": "a", "label": [1]}', "label a string or a number"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(SourceError, match=said):
        list(read_labelled(path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nowhere.jsonl: cannot be read.*evaluator.sparse_probing.data"):
        list(read_labelled(tmp_path / "nowhere.jsonl"))


# -------------------------------------------------------------------------------------------------------- accuracies
def test_rows_are_balanced_on_both_sides() -> None:
    draw = torch.Generator().manual_seed(0)
    yes_N, is_test_N = torch.rand(5000, generator=draw) < 0.1, torch.rand(5000, generator=draw) < 0.4
    task = _balanced("a", yes_N, is_test_N, rows=400)
    assert task is not None
    for is_test in (False, True):
        here_n = task.is_test_n == is_test
        assert int(here_n.sum()) == 200
        assert int(task.yes_n[here_n].sum()) == 100
    assert torch.equal(task.yes_n, yes_N[task.rows_n])
    assert len(task.rows_n.unique()) == 400
    assert _balanced("a", yes_N & is_test_N, is_test_N, rows=400) is None, "none of one answer to learn from"


def texts(seed: int = 0) -> list[str]:
    """Half numbers, half words, no two alike."""
    draw = torch.Generator().manual_seed(seed)
    out = []
    for i in range(240):
        some = torch.randint(100, 999, (6,), generator=draw).tolist()
        out.append(f"[{i}, " + ", ".join(map(str, some)) if i % 2 else f"def f{i}(self, " + ", ".join("abcdef"))
    return out


def test_labels_that_the_text_shows_are_found_and_drawn_ones_are_not(tmp_path: Path) -> None:
    plan, state = stage_for(frozenset({"logits"}))
    rows = [(text, "number" if i % 2 else "word") for i, text in enumerate(texts())]
    out = SparseProbing(data=str(write(tmp_path / "true.jsonl", rows)), k=(1, 5))(plan, state)
    assert out["tasks"] == 1.0
    assert out["accuracy@dense"] == 1.0
    assert out["accuracy@5"] > 0.95
    assert out["word.accuracy@5"] == out["accuracy@5"]
    assert out["texts"] > 60
    draw = torch.Generator().manual_seed(3)
    coin = torch.randint(2, (240,), generator=draw).tolist()
    drawn = [(text, flip) for (text, _), flip in zip(rows, coin, strict=True)]
    out = SparseProbing(data=str(write(tmp_path / "drawn.jsonl", drawn)), k=(1, 5))(plan, state)
    assert 0.3 < out["accuracy@5"] < 0.7


def test_several_labels_are_asked_for_one_by_one(tmp_path: Path) -> None:
    plan, state = stage_for(frozenset({"logits"}))
    rows = [(text, "abc"[i % 3]) for i, text in enumerate(texts())]
    out = SparseProbing(data=str(write(tmp_path / "a.jsonl", rows)), k=(1,))(plan, state)
    assert out["tasks"] == 3.0
    assert {"a.accuracy@1", "b.accuracy@1", "c.accuracy@dense"} <= out.keys()


def test_too_few_texts_are_refused(tmp_path: Path) -> None:
    plan, state = stage_for(frozenset({"logits"}))
    path = write(tmp_path / "a.jsonl", [("one", 0), ("two", 1)])
    with pytest.raises(SourceError, match=r"no label has 20 texts.*\(2 texts, 2 labels; give it more of each\)"):
        SparseProbing(data=str(path))(plan, state)


def test_questions_about_held_out_text() -> None:
    plan, state = stage_for(frozenset({"logits"}))
    out = SparseProbing(k=(1, 8), sequences=256)(plan, state)
    assert out["tasks"] >= 3
    assert 0.4 < out["accuracy@1"] <= out["accuracy@8"] + 0.1
    assert out["accuracy@dense"] > 0.7
    assert out["accuracy@dense.ci_low"] < out["accuracy@dense"] < out["accuracy@dense.ci_high"]
    assert out["documents"] >= 2
