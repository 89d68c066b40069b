"""What docs/benchmarks/quality.md says of the suites sensitivity and sensitivity_embedded is what their lines say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import correlation, fmean, stdev

import pytest

from spalf.bench import results
from spalf.bench.suite import read
from spalf.bench.summary import Row, current, rows

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/benchmarks/quality.md"
HELD = ROOT / "docs/benchmarks/quality"
RECIPE = "as it is"


def found(name: str) -> dict[str, Row]:
    """A suite's rows by their titles."""
    suite = read(ROOT / f"recipes/bench/{name}.toml")
    return {row.method.title: row for row in rows(suite, current(suite, results.read(HELD / name)))}


def mean(row: Row, measure: str) -> float:
    held = row.mean(measure)
    assert held is not None
    return held


def over(every: dict[str, Row], measure: str) -> dict[str, float]:
    """How far each row's mean is above the recipe's, in per cent."""
    base = mean(every[RECIPE], measure)
    return {title: 100 * (mean(row, measure) / base - 1) for title, row in every.items() if title != RECIPE}


def noise(every: dict[str, Row], measure: str, seeds: int) -> float:
    """The spread of seeds in per cent of the recipe's mean: root mean square over the rows of `seeds` or more."""
    some = [row for row in every.values() if len(row.seeds) >= seeds]
    return 100 * math.sqrt(fmean(stdev(row.values[measure]) ** 2 for row in some)) / mean(every[RECIPE], measure)


@pytest.fixture(scope="module")
def said() -> Callable[[str], bool]:
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    return lambda words: words in text


def test_what_exceeds_the_aim_on_the_large_model(said: Callable[[str], bool]) -> None:
    every = found("sensitivity")
    gap, kl = over(every, "ce_gap"), over(every, "kl")
    assert len(gap) == 46
    of = ["stratum.anchored.cap x 0.5", "stratum.anchored.cap x 1.9", "constraint.causal.sequences x 0.5"]
    of += ["phase.causal.rate x 0.5", "whitener.condition x 0.5", "dual.span x 0.5"]
    told = "the number of anchors ({:.0f} % at half, {:.0f} % at 1.9 times), half the sequences of the end-to-end "
    told += "phase ({:.0f} %), half its rate ({:.0f} %), half the `whitener.condition` ({:.0f} %) and half the "
    told += "`dual.span` ({:.0f} %)"
    assert said(told.format(*(gap[one] for one in of)))
    assert said(
        "The KL of the same runs is {:.1f}, {:.1f}, {:.1f}, {:.1f}, {:.1f} and".format(*(kl[one] for one in of))
    )
    assert said(f"No constant, halved or doubled, costs more than {max(kl.values()):.1f} % in KL")
    counted = sum(len(row.seeds) == 3 for row in every.values())
    assert said(f"spread by {noise(every, 'ce_gap', 3):.1f} % in CE gap ({counted} recipes of three seeds)")
    assert said(f"by {noise(every, 'kl', 3):.1f} % in KL, so three of them")


def test_runs_that_change_nothing_else_have_more_gap_than_the_recipe(said: Callable[[str], bool]) -> None:
    every = found("sensitivity")
    base = every.pop(RECIPE)
    still: list[float] = []
    for row in every.values():
        for gap, kl, l0 in zip(*(row.values[measure] for measure in ("ce_gap", "kl", "l0")), strict=True):
            if abs(kl / mean(base, "kl") - 1) < 0.005 and abs(l0 / mean(base, "l0") - 1) < 0.02:
                still.append(100 * gap / mean(base, "ce_gap"))
    assert said(f"the {len(still)} runs that move the KL by less than 0.5 % and L0 by less than 2 % have on average")
    assert said(f"{fmean(still) - 100:.1f} % more CE gap than the recipe (they spread by {stdev(still):.1f} %")


def test_two_measurements_agree_in_all_but_the_gap(said: Callable[[str], bool]) -> None:
    lines = [line for line in results.read(HELD / "sensitivity") if line["commit"] != "1498821"]
    first = {line["job"]["name"]: line["measures"] for line in lines if line["commit"] != "f4f131d"}
    second = {line["job"]["name"]: line["measures"] for line in lines if line["commit"] == "f4f131d"}
    assert first.keys() == second.keys()

    def agreement(measure: str) -> float:
        both: Sequence[list[float]] = [[held[name][measure] for name in first] for held in (first, second)]
        return correlation(*both)

    l0, fvu, kl, gap = (agreement(measure) for measure in ("l0", "fvu", "kl", "ce_gap"))
    told = f"Over {len(first)} jobs the two agree in L0, FVU and KL (correlation {l0:.2f}, {fvu:.2f}, {kl:.2f})"
    assert said(f"{told} and hardly in CE gap ({gap:.2f})")


def test_what_each_constant_costs_on_the_small_model(said: Callable[[str], bool]) -> None:
    every = found("sensitivity_embedded")
    gap, kl, l0 = (over(every, measure) for measure in ("ce_gap", "kl", "l0"))
    assert len(gap) == 46
    share = 100 * mean(every[RECIPE], "ce_gap") / mean(every[RECIPE], "kl")
    told = f"the CE gap is {share:.0f} % of the KL and seeds spread by {noise(every, 'ce_gap', 2):.1f} % in it"
    ordered = sorted(gap, key=gap.__getitem__, reverse=True)
    most = ordered[0]
    assert most == "penalty.rho x 0.5"
    assert said(f"{told}, no constant costs more than {gap[most]:.1f} %")
    r2 = [1 - mean(every[title], "fvu") for title in (most, RECIPE)]
    told = f"Most is half `penalty.rho`, {gap[most]:.2f} %, which ends at {-l0[most]:.0f} % less L0 and an R2 of"
    assert said(f"{told} {r2[0]:.3f} for {r2[1]:.3f}.")
    assert ordered[1:5] == ["dual.delay x 2", "dual.reach x 0.5", "filter.every x 0.5", "knobs.lr x 0.5"]
    assert said(f"`filter.every` and the rate, {gap[ordered[4]]:.1f} to {gap[ordered[1]]:.1f} %")
    half, twice = (gap[f"stratum.anchored.cap x {by}"] for by in ("0.5", "2"))
    keys = ("constraint.causal.sequences", "phase.causal.rate", "whitener.condition", "dual.span")
    halves = [gap[f"{key} x 0.5"] for key in keys]
    assert said(
        f"The five from above are within {max(halves):.1f} %: anchors {half:.1f} and {twice:+.1f} % (half and twice),"
    )
    told = "half the sequences {:.1f}, half the phase's rate {:.1f}, half `whitener.condition` {:.1f}, "
    told += "half `dual.span` {:.1f}."
    assert said(told.format(*halves))
    others = max(cost for title, cost in kl.items() if title != most)
    assert said(f"In KL half `penalty.rho` is {kl[most]:.1f} % above, all else within {others:.1f} %.")
    dear = [l0[f"{key} x {by}"] for key, by in (("knobs.lr", 0.5), ("optimizer.schedule.decay", 2))]
    dear += [l0["constraint.orthogonality.slack x 0.5"]]
    assert dear == sorted(l0.values(), reverse=True)[:3]
    told = "the rate at half costs {:.0f} %, decay over all of the steps {:.0f} % and half the slack of orthogonality "
    told += "{:.0f} %"
    assert said(told.format(*dear))
