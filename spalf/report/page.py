"""The page: assets of the package around two blocks of data, in one file that needs no other."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import zlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

SCRIPTS = ("base", "chart", "run", "plan", "evaluation", "list", "feature", "main")
"""Files of the script, in the order in which they are joined."""


def page(title: str, data: Mapping[str, Any], atlas: Mapping[str, Any] | None) -> str:
    """The whole page as text. `atlas` is a packed one, None for a page without features.

    Nothing of `data` or `atlas` can end its block or run: JSON stands with < as an escape, the atlas as base64 of a
    deflate stream, and the policy in the head allows this page's own script and style, by their hashes, and no address.
    """
    script, style = _script(), _asset("style.css")
    parts = {
        "title": html.escape(title),
        "policy": _policy(script, style),
        "style": style,
        "data": _json(data).replace("<", "\\u003c"),
        "atlas": "" if atlas is None else _deflated(atlas),
        "script": script,
    }
    # Split once, filled once: what is put in is never looked through for places again.
    pieces = re.split(r"<!--(\w+)-->", _asset("page.html"))
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


@cache
def _asset(name: str) -> str:
    return (files("spalf.report") / "assets" / name).read_text(encoding="utf-8")


@cache
def _script() -> str:
    return "\n".join(['"use strict";', "(() => {", *(_asset(f"{name}.js") for name in SCRIPTS), "})();"])


def _policy(script: str, style: str) -> str:
    """No address may be reached; only this script and this style count."""

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {source(script)}; style-src {source(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _deflated(value: Any) -> str:
    return base64.b64encode(zlib.compress(_json(value).encode(), 9)).decode()
