"""Numbers for a page: no longer than they need to be."""

from __future__ import annotations

import math
from typing import Any


def short(x: Any, digits: int = 5) -> float | None:
    """`x` to `digits` significant ones; whole numbers lose their point; None for what is no finite number."""
    if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x):
        return None
    y = float(f"{x:.{digits}g}")
    return int(y) if y == int(y) and abs(y) < 2**53 else y
