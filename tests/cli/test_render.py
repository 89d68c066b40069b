"""Tables are pure functions of records; text is taken as it is."""

from __future__ import annotations

import io
from typing import Any

import pytest
from attrs import field, frozen
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from spalf.cli import numbers, render
from spalf.core.recipe import Derived
from spalf.engine.examples import Context


def text(*parts: RenderableType, width: int = 100) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, markup=False, highlight=False)
    for part in parts:
        console.print(part)
    return out.getvalue()


def rows(*parts: RenderableType) -> list[str]:
    return [" ".join(line.split()) for line in text(*parts).splitlines()]


@frozen(kw_only=True)
class FakeRecipe:
    name: str = "small"
    seed: int = 3
    strata: tuple[str, ...] = ("free",)
    phases: tuple[str, ...] = ("fit",)
    stratum: dict[str, None] = field(factory=lambda: dict.fromkeys(["free", "anchored"]))
    phase: dict[str, None] = field(factory=lambda: dict.fromkeys(["fit"]))
    term: dict[str, None] = field(factory=lambda: dict.fromkeys(["l0", "l1"]))
    constraint: dict[str, None] = field(factory=lambda: dict.fromkeys(["drift"]))


@frozen(kw_only=True)
class FakeFacts:
    model: str = "tiny[1]"
    d_model: int = 64


@frozen(kw_only=True)
class FakePlan:
    recipe: FakeRecipe = field(factory=FakeRecipe)
    facts: FakeFacts = field(factory=FakeFacts)
    terms: tuple[str, ...] = ("l0",)
    constraints: tuple[str, ...] = ("drift",)
    origins: dict[str, str] = field(factory=lambda: {"dual.adrc": "spalf 0.1.0"})
    derived: tuple[Derived, ...] = (
        Derived(path="F", value=65536.0, formula="32 * d_model", origin="knobs.F = 0"),
        Derived(path="constraint.causal.budget", value=None, formula="(1 - r) KL [nats]", origin="phase.causal"),
        Derived(path="memory.parameters.bytes", value=3.0 * 2**30, formula="4 (2 F D + F + D)", origin="knobs.F"),
        Derived(path="dual.memory", value=200.0, formula="max(200, every) steps", origin="gain rule"),
        Derived(path="flops.training", value=2.5e15, formula="6 F D", origin="budget.tokens"),
    )


def test_a_plan_shows_every_number_with_formula_and_origin() -> None:
    plan: Any = FakePlan()
    told = rows(*render.plan_parts(plan))
    assert "small: tiny[1], d_model 64, seed 3" in told
    assert "F 65 536 32 * d_model knobs.F = 0" in told
    assert "constraint.causal.budget calibrated (1 - r) KL [nats] phase.causal" in told
    assert "memory.parameters.bytes 3 GiB 4 (2 F D + F + D) knobs.F" in told
    assert "dual.memory 200 max(200, every) steps gain rule" in told
    assert "flops.training 2.5 PFLOP 6 F D budget.tokens" in told
    assert "dual.adrc spalf 0.1.0" in told
    assert "idle (declared, used by no phase): stratum.anchored, term.l1" in told


def test_a_stretch_without_measurements_is_told_as_such() -> None:
    told = rows(*render.summary_parts({"l0": 31.5, "l0_target": 32, "kl": None, "wall_seconds": 95.0}))
    assert "L0 31.5 32" in told
    assert "KL(clean, patched) -" in told
    assert "cross-entropy, clean -" in told
    assert "total 1:35" in told
    assert not any(line.startswith("constraint") for line in told)


@pytest.mark.parametrize(("space", "row"), [("raw", "R2, raw 0.9 0.97"), ("white", "R2, whitened 0.8 0.97")])
def test_the_target_of_r2_stands_in_its_space(space: str, row: str) -> None:
    summary = {"r2_raw": 0.9, "r2_whitened": 0.8, "r2_target": 0.97, "r2_space": space}
    told = rows(*render.summary_parts(summary))
    assert row in told
    assert sum(line.endswith("0.97") for line in told) == 1


def context(*tokens: str, peak: int = 0) -> Context:
    return Context(tokens=tokens, values=tuple(2.5 if i == peak else 0.0 for i in range(len(tokens))), peak=peak)


def test_the_peak_stands_in_brackets_and_whitespace_is_seen() -> None:
    line = render.context_line(context("The", " cat", "\n", "\tsat", "[/b]", peak=1)).plain
    assert line == "      2.5  The[ cat]\\n\\tsat[/b]"


def test_only_the_peak_and_active_tokens_are_marked() -> None:
    line = render.context_line(Context(tokens=("a", "b", "c"), values=(0.0, 2.0, 1.0), peak=1))
    marked = {line.plain[s.start : s.end]: str(s.style) for s in line.spans if s.style}
    assert marked == {"[b]": "bold reverse", "c": "underline"}


@given(st.text())
def test_any_token_stays_on_one_line(token: str) -> None:
    shown = render.visible(token)
    assert all(c.isprintable() for c in shown)
    assert len(shown.splitlines()) <= 1
    if token.isprintable():
        assert shown == token


@given(st.text(alphabet="[]/abold \\", max_size=20))
def test_cells_are_text_and_never_markup(cell: str) -> None:
    assert cell.strip() in text(render.plain_table(["a"], [[cell]]), width=200)


def test_no_examples_no_heading() -> None:
    assert render.example_lines([]) == []


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (True, "yes"),
        (0.0, "0"),
        (1234567, "1 234 567"),
        (0.000123456, "0.0001235"),
        (31.96, "31.96"),
        (12345.6, "12 346"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        ("text", "text"),
    ],
)
def test_numbers(value: object, shown: str) -> None:
    assert numbers.number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-"), (float("inf"), "-"), (8.25, "8.25 s"), (59.9999, "60 s"), (187.4, "3:07"), (8109.0, "2:15:09")],
)
def test_durations(seconds: float | None, shown: str) -> None:
    assert numbers.clock(seconds) == shown


@pytest.mark.parametrize(
    ("value", "unit", "step", "shown"),
    [
        (512.0, "B", 1024, "512 B"),
        (1023.9 * 1024, "B", 1024, "1024 KiB"),
        (1536.0, "B", 1024, "1.5 KiB"),
        (3.2e15, "FLOP", 1000, "3.2 PFLOP"),
        (999.6, "", 1000, "1000 "),
        (123456.0, "", 1000, "123 k"),
        (999600.0, "", 1000, "1000 k"),
    ],
)
def test_scaled(value: float, unit: str, step: float, shown: str) -> None:
    assert numbers.scaled(value, unit, step) == shown


@given(st.floats(min_value=1, max_value=1e23))
def test_scaling_keeps_the_number(x: float) -> None:
    digits, prefix = numbers.scaled(x, "").split(" ")
    assert "e" not in digits
    factor = 1000.0 ** ["", "k", "M", "G", "T", "P", "E", "Z"].index(prefix)
    assert abs(float(digits) * factor - x) <= 0.5 * factor + 0.006 * x


def test_shares_and_violations() -> None:
    assert (numbers.share(0.015), numbers.share(None)) == ("1.5 %", "-")
    assert (numbers.signed(0.0312), numbers.signed(-0.4), numbers.signed(None)) == ("+0.031", "-0.400", "-")
    assert (numbers.rate(82134.0), numbers.rate(None)) == ("82.1k/s", "-")
