"""The mathematics page: every test that it cites exists, and its numbers are those of the code."""

import re
from pathlib import Path

import pytest

from spalf.parts.dual import Adrc
from spalf.parts.filter import DualRateEma
from spalf.testing.control import control_plan

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "maths.md").read_text(encoding="utf-8")
CITED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", TEXT)))


def test_the_page_cites_tests() -> None:
    assert len(CITED) > 25
    assert "::" not in re.sub(r"`([\w/]+\.py|file)::\w+`|`tests/file::test`", "", TEXT)


@pytest.mark.parametrize(("file", "name"), CITED, ids=[f"{f}-{n}" for f, n in CITED])
def test_a_cited_test_exists(file: str, name: str) -> None:
    assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("every", [1, 10, 100])
def test_the_gain_table_is_the_rule(every: int) -> None:
    cells = re.search(rf"^\| {every} \| ([\d.]+), ([\d.]+) \| ([\d.]+) \| ([\d.]+), ([\d.]+) \|", TEXT, re.MULTILINE)
    assert cells is not None
    for delay, at in ((0.0, 1), (100.0, 4)):
        rows = {r.path: r.value for r in Adrc(delay=delay).derive(control_plan(DualRateEma(every=every)))}
        assert float(cells[at]) == pytest.approx(rows["dual.K_P"], rel=0.01)
        assert float(cells[at + 1]) == pytest.approx(rows["dual.K_I"], rel=0.01)
