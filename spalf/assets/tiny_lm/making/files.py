"""Files that people read too, and what they say of the versions that made them."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch


def write_json(path: Path, value: Any) -> None:
    """Write `value` to be read by people too."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def versions(*modules: Any) -> dict[str, str]:
    """What the numbers were made with."""
    used = {module.__name__: str(module.__version__) for module in (torch, *modules)}
    return {"python": platform.python_version(), **used}
