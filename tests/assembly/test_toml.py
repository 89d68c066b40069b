"""Reading, merging, settings, writing. Under a second."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spalf.assembly import toml
from spalf.errors import RecipeError


def put(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.toml").write_text(text)
    return folder


def refused(path: str | Path, sets: tuple[str, ...] = ()) -> str:
    with pytest.raises(RecipeError) as caught:
        toml.read(path, sets)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ reading
def test_a_child_lies_over_its_parent(tmp_path: Path) -> None:
    put(tmp_path, parent="a = 1\nb = [1, 2]\n[t]\nx = 1\ny = 2", child='extends = "./parent.toml"\nb = [3]\nt.y = 5')
    assert toml.read(tmp_path / "child.toml") == {"a": 1, "b": [3], "t": {"x": 1, "y": 5}}


def test_a_parent_is_relative_to_its_child(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    put(tmp_path, root="a = 1")
    put(tmp_path / "inner", middle='extends = "../root.toml"\nb = 2', leaf='extends = "middle.toml"\nc = 3')
    assert toml.read(tmp_path / "inner" / "leaf.toml") == {"a": 1, "b": 2, "c": 3}


def test_toml_1_1_inline_tables_may_span_lines(tmp_path: Path) -> None:
    put(tmp_path, r="t = { a = 1,\n  b = 2, }")
    assert toml.read(tmp_path / "r.toml") == {"t": {"a": 1, "b": 2}}


def test_a_bare_name_is_a_preset() -> None:
    assert set(toml.presets()) >= {"spalf", "spalf_literal"}
    assert toml.read("spalf")["lagrangian"] == {"use": "al_cole"}
    assert "extends" not in toml.read("spalf_literal")


def test_a_circle_of_parents_is_refused(tmp_path: Path) -> None:
    put(tmp_path, a='extends = "./b.toml"', b='extends = "./a.toml"')
    message = refused(tmp_path / "a.toml")
    assert "extends itself" in message
    assert "a.toml -> " in message
    assert message.count("a.toml") >= 2


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("a = 1\nb = = 2", "r.toml:2:5: invalid value"),
        ("a = 1\na = 2", "cannot overwrite a value"),
        ("extends = 3", "expected str, got int 3 (a recipe has one parent)"),
        ('extends = ["spalf"]', "expected str, got an array ['spalf']"),
        ('extends = "spalff"', 'no preset is called "spalff" (did you mean "spalf"?; a file needs a / or .toml'),
        ('extends = "./gone.toml"', "gone.toml: cannot be read: No such file or directory"),
        ("a = " + "[" * 5000, "cannot be read"),
        ("a = " + "1" * 5000, "cannot be read"),
    ],
)
def test_a_bad_file_says_where(tmp_path: Path, text: str, fragment: str) -> None:
    assert fragment in refused(put(tmp_path, r=text) / "r.toml")


def test_what_is_no_text_file(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in refused(tmp_path / "r.toml")
    assert "Is a directory (name a file)" in refused(tmp_path)
    assert "presets: " in refused(tmp_path / "none.toml")


# ------------------------------------------------------------------------------------------------ merging
@pytest.mark.parametrize(
    ("parent", "child", "merged"),
    [
        ({"dual": {"use": "adrc", "gain": 2}}, {"dual": {"use": "pi"}}, {"dual": {"use": "pi"}}),
        ({"dual": {"use": "adrc", "gain": 2}}, {"dual": "pi"}, {"dual": {"use": "pi"}}),
        ({"dual": {"use": "adrc", "gain": 2}}, {"dual": "adrc"}, {"dual": {"use": "adrc", "gain": 2}}),
        (
            {"dual": {"use": "adrc", "gain": 2}},
            {"dual": {"delay": 1}},
            {"dual": {"use": "adrc", "gain": 2, "delay": 1}},
        ),
        ({"dual": "adrc"}, {"dual": {"delay": 1}}, {"dual": {"use": "adrc", "delay": 1}}),
        # in a named slot `use` defaults to the table's own name
        ({"term": {"l0": {"target": 3}}}, {"term": {"l0": {"use": "l1"}}}, {"term": {"l0": {"use": "l1"}}}),
        (
            {"term": {"l0": {"target": 3}}},
            {"term": {"l0": {"use": "l0"}}},
            {"term": {"l0": {"use": "l0", "target": 3}}},
        ),
        ({"term": {"a": {"x": 1}}}, {"term": {"b": {"x": 2}}}, {"term": {"a": {"x": 1}, "b": {"x": 2}}}),
        # inner slots change whole, too
        (
            {"phase": {"fit": {"terms": ["l0"], "gate": {"use": "feasible", "patience": 3}}}},
            {"phase": {"fit": {"gate": "exhausted"}}},
            {"phase": {"fit": {"terms": ["l0"], "gate": {"use": "exhausted"}}}},
        ),
        (
            {"optimizer": {"use": "adam", "schedule": {"use": "linear", "final": 0.1}}},
            {"optimizer": {"schedule": "cosine"}},
            {"optimizer": {"use": "adam", "schedule": {"use": "cosine"}}},
        ),
        (
            {"optimizer": {"use": "adam", "schedule": "cosine"}},
            {"optimizer": {"schedule": {"final": 0.2}}},
            {"optimizer": {"use": "adam", "schedule": {"use": "cosine", "final": 0.2}}},
        ),
        ({"strata": ["a", "b"]}, {"strata": ["b"]}, {"strata": ["b"]}),
        ({"knobs": {"F": 1}}, {"knobs": 3}, {"knobs": 3}),
    ],
)
def test_merge(parent: dict[str, Any], child: dict[str, Any], merged: dict[str, Any]) -> None:
    before = repr(parent), repr(child)
    assert toml.merge(parent, child) == merged
    assert (repr(parent), repr(child)) == before


def test_false_drops_a_named_table(tmp_path: Path) -> None:
    put(tmp_path, p="evaluator = { a = {}, b = { x = 1 } }", c='extends = "./p.toml"\nevaluator.b = false')
    assert toml.read(tmp_path / "c.toml") == {"evaluator": {"a": {}}}
    assert toml.read(tmp_path / "p.toml", ["evaluator.a=false", "evaluator.b=false"]) == {"evaluator": {}}


def test_false_stays_a_value_elsewhere() -> None:
    assert toml.dropped({"source": {"bos": False}, "term": {"l0": {"x": False}}}) == {
        "source": {"bos": False},
        "term": {"l0": {"x": False}},
    }


# ------------------------------------------------------------------------------------------------ settings
@pytest.mark.parametrize(
    ("text", "table"),
    [
        ("dual.kp=0.5", {"dual": {"kp": 0.5}}),
        ("name=toy", {"name": "toy"}),
        ('name="toy"', {"name": "toy"}),
        ("dual=pi", {"dual": "pi"}),
        ("a.b.c = [1, 2]", {"a": {"b": {"c": [1, 2]}}}),
        ("phase.fit={terms=['l0']}", {"phase": {"fit": {"terms": ["l0"]}}}),
        ("source.bos=true", {"source": {"bos": True}}),
        ("source.text=a=b", {"source": {"text": "a=b"}}),
        ("source.text=", {"source": {"text": ""}}),
        ("budget.tokens=1_000", {"budget": {"tokens": 1000}}),
        ('term."odd name".x=1', {"term": {"odd name": {"x": 1}}}),
        ("a=1\nb=2", {"a": "1\nb=2"}),
    ],
)
def test_setting(text: str, table: dict[str, Any]) -> None:
    assert toml.setting(text) == table


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("dual.kp", '"dual.kp" is not a setting (write --set path.to.option=value)'),
        ("=3", '"=3" is not a setting'),
        ("a b=3", '"a b" is not a path (write names with dots between: dual.kp)'),
        ("a..b=3", "is not a path"),
        ("extends=spalf", "extends cannot be set"),
    ],
)
def test_a_bad_setting(text: str, fragment: str) -> None:
    with pytest.raises(RecipeError) as caught:
        toml.setting(text)
    assert fragment in str(caught.value)


def test_settings_apply_in_order() -> None:
    table = toml.read("spalf", ["dual=pi", "dual.kp=0.25", "knobs.F=64", "budget.batch=8"])
    assert table["dual"] == {"use": "pi", "kp": 0.25}
    assert table["knobs"]["F"] == 64
    assert table["knobs"]["R2_target"] == 0.97


@given(st.text(max_size=30), st.text(max_size=30))
def test_no_setting_raises_anything_but_a_recipe_error(key: str, value: str) -> None:
    try:
        table = toml.setting(f"{key}={value}")
    except RecipeError:
        return
    assert table


# ------------------------------------------------------------------------------------------------ writing
SCALARS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans() | st.text(max_size=8)
KEYS = st.text(min_size=1, max_size=6)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(KEYS, v, max_size=3), max_leaves=8)


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_what_is_written_is_read_back(table: dict[str, Any]) -> None:
    assert toml.parse(toml.write(table), "here") == table
