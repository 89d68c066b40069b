"""The page as a file: whole in itself, small, and deaf to what its texts would have it do."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from html.parser import HTMLParser

import pytest

from spalf.core.recipe import Plan
from spalf.engine.atlas import Atlas
from spalf.report import RunRecord, pack, page

from .conftest import HOSTILE, data_of

MEBIBYTE = 2**20


class Parts(HTMLParser):
    """Elements with their attributes, and the text of each script and style."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") or tag if tag in ("script", "style", "title") else ""
        if self._inside:
            self.texts[self._inside] = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[self._inside] += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


@pytest.fixture(scope="module")
def text(plan: Plan, record: RunRecord, seen: Atlas) -> str:
    return page('<b>a & "run"</b>', data_of(plan, record), pack(seen))


@pytest.fixture(scope="module")
def parts(text: str) -> Parts:
    found = Parts()
    found.feed(text)
    return found


def test_it_is_one_file_that_asks_for_nothing(text: str, parts: Parts) -> None:
    addresses = [v for _, attrs in parts.elements for k, v in attrs.items() if k in ("src", "href") and v]
    assert all(a.startswith(("#", "data:,")) for a in addresses)
    assert re.findall(r"url\((?!#)|@import|https?://(?!www\.w3\.org/2000/svg)", text) == []
    tags = [tag for tag, _ in parts.elements]
    assert tags.count("script") == 3
    assert tags.count("style") == 1
    assert "<!--" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL), "every place was filled"


def test_its_policy_allows_itself_and_no_address(parts: Parts) -> None:
    [policy] = [a["content"] for t, a in parts.elements if t == "meta" and a.get("http-equiv")]
    assert policy is not None

    def source(text: str) -> str:
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == source(parts.texts["script"])
    assert rules["style-src"] == source(parts.texts["style"])
    assert "unsafe" not in policy


def test_hostile_texts_stay_in_their_blocks(text: str, parts: Parts, seen: Atlas, record: RunRecord) -> None:
    for harm in HOSTILE[:3]:
        assert harm not in text
    assert [t for t, _ in parts.elements].count("img") == 0
    assert "<" not in parts.texts["data"]
    data = json.loads(parts.texts["data"])
    assert data["run"]["summary"]["notes"] == record.summary["notes"]
    held = json.loads(zlib.decompress(base64.b64decode(parts.texts["atlas"])))
    assert held == json.loads(json.dumps(pack(seen)))
    assert set(HOSTILE) <= set(held["text"])
    assert parts.texts["title"] == '<b>a & "run"</b>'


def test_a_place_inside_the_data_is_left_alone(plan: Plan, record: RunRecord) -> None:
    found = Parts()
    found.feed(page("<!--script-->", {**data_of(plan, record), "recipe": "<!--style-->"}, None))
    assert found.texts["title"] == "<!--script-->"
    assert json.loads(found.texts["data"])["recipe"] == "<!--style-->"
    assert found.texts["atlas"] == ""


def test_the_script_is_ascii_and_asks_no_network(parts: Parts) -> None:
    script = parts.texts["script"]
    assert script.isascii()
    assert parts.texts["style"].isascii()
    assert (
        re.findall(r"\b(fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|eval|Function|innerHTML)\b", script) == []
    )


@pytest.mark.slow
def test_the_default_page_is_below_five_megabytes(plan: Plan, record: RunRecord, many: Atlas) -> None:
    """Packed alone it would not be."""
    packed = pack(many)
    assert len(page("wide", data_of(plan, record), packed).encode()) < 5e6
    assert len(json.dumps(packed, separators=(",", ":"))) > 4 * MEBIBYTE


def test_a_page_without_features_is_small(plan: Plan, record: RunRecord) -> None:
    assert len(page("toy", data_of(plan, record), None)) < 200_000
