"""The study: every method on every share of the data, and how sparse codes are at equal error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, stdev

import torch
from attrs import evolve, frozen

from spalf_pam.study.data import Rows
from spalf_pam.study.fit import AT_EQUAL_ERROR, METHODS, PAM, SGD, Method, Score, Settings, fit

SHARES = (0.01, 0.05, 0.10, 0.25, 0.45, 0.50, 1.0)
PENALTY = 1.0
PENALTIES = (0.3, 1.0, 3.0)
TELL = Callable[[str], None]


@frozen(kw_only=True)
class Cell:
    """One fit: on `rows` rows of `data`, by `method`, under a code called `code`."""

    data: str
    code: str
    method: str
    rows: int
    features: int
    weight: float
    seed: int
    score: Score


def sweep(data: Rows, settings: Settings, seeds: int, tell: TELL) -> list[Cell]:
    """ReLU with a penalty, and TopK, by each method on each share of the training rows; subsets differ by seed."""
    out = []
    topk = max(1, data.train_ND.shape[1] // 8)
    for kind in (evolve(settings, weight=PENALTY), evolve(settings, k=topk)):
        for share in SHARES:
            tell(f"{data.name}: {_code(kind)} on {share:.0%}")
            for seed in range(seeds):
                out += [_cell(data, kind, method, share, seed) for method in METHODS]
    return out


def frontier(data: Rows, settings: Settings, seeds: int, tell: TELL) -> list[Cell]:
    """ReLU on all rows at three penalties, by gradient steps and by PAM at two ridges."""
    out = []
    for weight in PENALTIES:
        tell(f"{data.name}: ReLU at lambda {weight:g}")
        kind = evolve(settings, weight=weight)
        out += [_cell(data, kind, method, 1.0, seed) for seed in range(seeds) for method in AT_EQUAL_ERROR]
    return out


def _code(settings: Settings) -> str:
    return f"TopK {settings.k}" if settings.k else "ReLU"


def _cell(data: Rows, settings: Settings, method: Method, share: float, seed: int) -> Cell:
    n = max(2, round(share * len(data.train_ND)))
    kept = torch.randperm(len(data.train_ND), generator=torch.Generator().manual_seed(seed))[:n]
    score = fit(method, data.train_ND[kept], data.test_ND, settings, seed)
    return Cell(
        data=data.name,
        code=_code(settings),
        method=method.name,
        rows=n,
        features=settings.features,
        weight=settings.weight,
        seed=seed,
        score=score,
    )


# ------------------------------------------------------------------------------------------------------ to read
def ratios(cells: Sequence[Cell], one: str = PAM.name, other: str = SGD.name) -> list[float]:
    """L0 of `one` over L0 of `other` at equal test error, where the latter's curve over lambda reaches it; per seed.

    log L0 is interpolated linearly in log error between neighbouring penalties. Empty where the curves do not overlap.
    """
    out = []
    for seed in sorted({c.seed for c in cells}):
        curve = sorted((c.score.test, c.score.l0) for c in cells if c.seed == seed and c.method == other)
        for cell in cells:
            if cell.seed == seed and cell.method == one and curve[0][0] <= cell.score.test <= curve[-1][0]:
                out.append(cell.score.l0 / _interpolated(curve, cell.score.test))
    return out


def _interpolated(curve: Sequence[tuple[float, float]], error: float) -> float:
    i = next(i for i in range(1, len(curve)) if error <= curve[i][0])
    (low, dense), (high, sparse) = curve[i - 1], curve[i]
    t = math.log(error / low) / math.log(high / low) if high > low else 0.0
    return math.exp((1 - t) * math.log(dense) + t * math.log(sparse))


def sweep_table(cells: Sequence[Cell]) -> str:
    """Markdown: test error (mean and standard deviation over seeds) with L0, one row per code and share."""
    methods = [m.name for m in METHODS]
    lines = [_row(["data", "code", "rows", "rows / F", *methods]), _row(["---"] * (4 + len(methods)))]
    for key in dict.fromkeys((c.data, c.code, c.rows) for c in cells):
        mine = [c for c in cells if (c.data, c.code, c.rows) == key]
        scores = [_both([c.score for c in mine if c.method == m]) for m in methods]
        lines.append(_row([*map(str, key), f"{key[2] / mine[0].features:.2f}", *scores]))
    return "\n".join(lines)


def frontier_table(cells: Sequence[Cell]) -> str:
    """Markdown: each method at each penalty, and L0 at equal error."""
    methods = [m.name for m in AT_EQUAL_ERROR]
    lines = [_row(["data", "lambda", *methods]), _row(["---"] * (2 + len(methods)))]
    for name, weight in dict.fromkeys((c.data, c.weight) for c in cells):
        mine = [c for c in cells if (c.data, c.weight) == (name, weight)]
        lines.append(_row([name, f"{weight:g}", *(_both([c.score for c in mine if c.method == m]) for m in methods)]))
    for name in dict.fromkeys(c.data for c in cells):
        mine = [c for c in cells if c.data == name]
        lines += ["", *(f"{name}: {m} {_verdict(ratios(mine, m))}" for m in methods if m != SGD.name)]
    return "\n".join(lines)


def _verdict(found: Sequence[float]) -> str:
    if not found:
        return f"and {SGD.name} do not overlap in error: nothing can be said of L0 at equal error."
    mean = math.exp(fmean(math.log(r) for r in found))
    span = f"{min(found):.2f} to {max(found):.2f}, {len(found)} comparisons"
    return f"at the test error of {SGD.name}: {mean:.2f} times its L0 ({span})."


def _both(scores: Sequence[Score]) -> str:
    error = _spread([s.test for s in scores])
    return f"{error} (L0 {fmean(s.l0 for s in scores):.0f})"


def _spread(values: Sequence[float]) -> str:
    mean, digits = fmean(values), 3
    text = f"{mean:.{digits}f}" if mean < 10 else f"{mean:.1e}"
    if len(values) < 2:
        return text
    deviation = stdev(values)
    return f"{text} +- {deviation:.{digits}f}" if deviation < 10 else f"{text} +- {deviation:.1e}"


def _row(entries: Iterable[str]) -> str:
    return f"| {' | '.join(entries)} |"
