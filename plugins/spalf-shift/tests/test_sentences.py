"""The labelled sentences: Python, different in what the labels say and in nothing else, the same for the same seed."""

from __future__ import annotations

import ast
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from spalf_shift import sentences
from spalf_shift.sentences import CONCEPTS, NAMES, render, text_pairs, write_text

from spalf import SourceError


def test_there_are_at_least_thirteen_concepts() -> None:
    assert len(CONCEPTS) == len(set(NAMES)) >= 13


bits = st.fixed_dictionaries(dict.fromkeys(NAMES, st.booleans()))


@given(bits=bits, seed=st.integers(0, 10_000), name=st.sampled_from(NAMES))
@settings(max_examples=100, deadline=None)
def test_every_concept_shows_in_the_text(bits: dict[str, bool], seed: int, name: str) -> None:
    content = sentences._content(random.Random(seed))
    assert render(content, bits) != render(content, {**bits, name: not bits[name]})


@given(bits=bits, seed=st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_every_snippet_is_python(bits: dict[str, bool], seed: int) -> None:
    text = render(sentences._content(random.Random(seed)), bits)
    tree = ast.parse(f"class C:\n{text}" if bits["nested"] else text)
    found = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    assert isinstance(found, ast.AsyncFunctionDef) == bits["async"]
    assert (found.returns is not None) == bits["annotated"]
    assert bool(found.decorator_list) == bits["decorated"]
    assert (ast.get_docstring(found) is not None) == bits["documented"]
    assert (found.args.args[0].arg == "self") == bits["method"]
    assert found.name.startswith("_") == bits["private"]
    assert any(isinstance(n, ast.While) for n in ast.walk(found)) == bits["while_loop"]
    assert any(isinstance(n, ast.Not) for n in ast.walk(found)) == bits["negated"]
    assert any(isinstance(n, ast.Yield) for n in ast.walk(found)) == bits["yields"]


def test_pairs_are_mirrored_labelled_and_counted() -> None:
    pairs = text_pairs(40, variants=2, most=3, seed=1)
    assert len(pairs) == 160
    for pair, mirror in zip(pairs[::2], pairs[1::2], strict=True):
        assert (mirror.a, mirror.b) == (pair.b, pair.a)
        assert {k: -v for k, v in mirror.changes.items()} == dict(pair.changes)
        assert 1 <= len(pair.changes) <= 3
        assert set(pair.changes.values()) <= {1, -1}
        assert pair.a != pair.b


def test_single_changes_are_possible() -> None:
    assert {len(pair.changes) for pair in text_pairs(20, most=1)} == {1}


def test_no_text_is_in_two_groups() -> None:
    pairs, size = text_pairs(200), 4
    groups = [{text for pair in pairs[i : i + size] for text in (pair.a, pair.b)} for i in range(0, len(pairs), size)]
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_concepts_change_equally_often() -> None:
    counts = dict.fromkeys(NAMES, 0)
    for pair in text_pairs(400):
        for name in pair.changes:
            counts[name] += 1
    assert max(counts.values()) < 1.1 * min(counts.values())


def test_the_seed_decides() -> None:
    assert text_pairs(10, seed=3) == text_pairs(10, seed=3)
    assert text_pairs(10, seed=3) != text_pairs(10, seed=4)


def test_numbers_that_cannot_be_met() -> None:
    with pytest.raises(SourceError, match="most is 1 to 16"):
        text_pairs(10, most=17)


def test_a_file_is_not_written_over(tmp_path: Path) -> None:
    path = write_text(tmp_path / "deep" / "pairs.jsonl", text_pairs(3))
    assert len(path.read_text().splitlines()) == 12
    with pytest.raises(SourceError, match="exists"):
        write_text(path, text_pairs(3))
