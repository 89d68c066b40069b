"""Numbers as people read them."""

from __future__ import annotations

import math

MISSING = "-"


def number(x: object, digits: int = 4) -> str:
    """Whole and large numbers to the last unit, others to `digits` significant ones; "-" where nothing was measured."""
    if x is None:
        return MISSING
    if isinstance(x, bool):
        return "yes" if x else "no"
    if not isinstance(x, int | float):
        return str(x)
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    if abs(x) < 1e15 and (x == int(x) or abs(x) >= 10**digits):
        return f"{round(x):,}".replace(",", " ")
    return f"{x:.{digits}g}"


def signed(x: object) -> str:
    """A violation: +0.012 is over its budget."""
    return f"{x:+.3f}" if isinstance(x, int | float) else MISSING


def share(x: object) -> str:
    """A fraction as a percentage."""
    return f"{100 * x:.3g} %" if isinstance(x, int | float) else MISSING


def scaled(x: float, unit: str, step: float = 1000.0) -> str:
    """1.23e15 FLOP is 1.23 PFLOP; with step 1024, bytes are KiB, MiB, GiB."""
    prefixes = ("", "Ki", "Mi", "Gi", "Ti", "Pi") if step == 1024 else ("", "k", "M", "G", "T", "P", "E", "Z")
    power = 0
    while abs(x) >= step and power < len(prefixes) - 1:
        x, power = x / step, power + 1
    text = f"{x:.0f}" if power == 0 else f"{x:.3g}" if abs(x) < 999.5 else f"{x:.0f}"
    return f"{text} {prefixes[power]}{unit}"


def rate(x: float | None) -> str:
    """Activations per second."""
    return MISSING if x is None else scaled(x, "").replace(" ", "") + "/s"


def clock(seconds: float | None) -> str:
    """A duration: 8.2 s, 3:07, 2:15:09."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
