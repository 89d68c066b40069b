"""Recorded steps: when one is recorded, and that its numbers are those of a step that is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve

from spalf.bench.speed import ours
from spalf.core import tree
from spalf.core.values import Batch, Raw, Signal
from spalf.engine import replay
from spalf.engine.build import build
from spalf.engine.replay import Outcome, Replay
from spalf.testing import toy_plan
from spalf.testing.whole import CPU

BATCH = Batch(x_BD=Raw(torch.zeros(2, 3)))


def outcome_of(state: Any) -> Outcome:
    m = state.control.on_M
    signal = Signal(g_M=m * 1.0, fast_M=m * 1.0, slow_M=m * 1.0, previous_M=m * 1.0, on_M=m)
    return Outcome(control=state.control, silent_F=state.silent_F, signal=signal, lam_M=m * 1.0, numbers={})


def test_each_variant_of_a_kind_is_recorded_at_its_second_step(monkeypatch: pytest.MonkeyPatch) -> None:
    state = build(toy_plan(), CPU)
    out, told = outcome_of(state), []
    at = ""

    def record(*_: Any) -> Any:
        told.append(f"record {at}")
        name = at

        def recorded(*_: Any) -> Outcome:
            told.append(f"replay {name}")
            return out

        return recorded

    def body(_: Batch) -> Outcome:
        told.append(f"body {at}")
        return out

    monkeypatch.setattr(Replay, "_record", record)
    made = Replay()
    for at in ("a1", "a1", "a2", "a1", "a2", "a1", "b1", "b1", "a1"):
        assert made.step(at[0], at[1], state, BATCH, body) is out
    first = ["body a1", "record a1", "replay a1", "body a2", "replay a1", "record a2", "replay a2", "replay a1"]
    # Another kind drops what was recorded.
    assert told == [*first, "body b1", "record b1", "replay b1", "body a1"]


def test_what_cannot_be_recorded_runs_as_it_is_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    state = build(toy_plan(), CPU)
    out = outcome_of(state)

    def refuse(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Replay, "_record", refuse)
    made, draws = Replay(), state.rng.device.get_state()
    made.step("a", 0, state, BATCH, lambda _: out)
    with pytest.warns(RuntimeWarning, match="could not be recorded .*not permitted"):
        assert made.step("a", 0, state, BATCH, lambda _: out) is out
    assert torch.equal(state.rng.device.get_state(), draws)
    assert made.step("a", 0, state, BATCH, lambda _: out) is out


def test_what_is_refused_drops_the_graphs_that_draw_from_the_old_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    state = build(toy_plan(), CPU)
    out, refuses = outcome_of(state), False

    def record(*_: Any) -> Any:
        if refuses:
            raise RuntimeError("no")
        return lambda *_: pytest.fail("replayed")

    monkeypatch.setattr(Replay, "_record", record)
    made = Replay()
    made._kind, made._seen = "a", {0, 1}
    made._recorded[0] = record()
    refuses = True
    with pytest.warns(RuntimeWarning, match="could not be recorded"):
        assert made.step("a", 1, state, BATCH, lambda _: out) is out
    assert made.step("a", 0, state, BATCH, lambda _: out) is out


def test_pouring_reads_all_before_it_writes() -> None:
    plan = toy_plan()
    control = tree.apply(torch.clone, build(plan, CPU).control)
    ones = torch.ones_like(control.filter.fast_M)
    control = evolve(control, filter=evolve(control.filter, fast_M=ones, previous_M=0 * ones))
    # The new record's previous value is the old one's current tensor.
    moved = evolve(control, filter=evolve(control.filter, fast_M=2 * ones, previous_M=control.filter.fast_M))
    replay._pour(moved, control)
    assert control.filter.fast_M.tolist() == [2.0] * len(ones)
    assert control.filter.previous_M.tolist() == [1.0] * len(ones)


def test_parts_that_read_the_clock_or_wait_are_not_recorded() -> None:
    plan = toy_plan()
    assert replay.is_capturable(plan, ("l0",), ("faithfulness", "orthogonality"), ticks=True)
    warm = evolve(plan.recipe.term["l0"], warmup=5)  # type: ignore[arg-type,misc]
    rising = evolve(plan, recipe=evolve(plan.recipe, term={**plan.recipe.term, "l0": warm}))
    assert not replay.is_capturable(rising, ("l0",), ("faithfulness",))

    class Foreign:
        """A part that says nothing."""

    other = evolve(plan, recipe=evolve(plan.recipe, term={**plan.recipe.term, "foreign": Foreign()}))
    assert not replay.is_capturable(other, ("foreign",), ())


@pytest.mark.gpu
def test_recorded_steps_give_the_numbers_of_unrecorded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through ticks of the controllers, at a rate at which everything moves."""
    # Wide enough that the lists stay short beside it: dense products are not recorded.
    task = ours.Task(d=128, width=32768, l0=20, batch=512, device="cuda", precision="bf16")
    sets = ("constraint.orthogonality.sample=64", "filter.every=10", "record.log_every=20")
    variant = ours.Variant(kernel="triton", sets=sets)

    def trained(recorded: bool) -> tuple[list[dict[str, float]], dict[str, Any], int]:
        replayed = []
        call = replay._Recorded.__call__

        def counted(*given: Any) -> Outcome:
            replayed.append(1)
            return call(*given)

        monkeypatch.setattr(ours, "SETTINGS", (*ours.SETTINGS[:-1], "knobs.lr=1e-3"))
        stream = ours.pool(task)
        made = ours.Ours(task, variant, stream)
        with monkeypatch.context() as patch:
            patch.setattr(replay._Recorded, "__call__", counted)
            if not recorded:
                patch.setattr(Replay, "step", lambda self, kind, variant, state, batch, body: body(batch))
            readings = [made.phase.step(made.plan, made.state) for _ in range(100)]
        numbers = [{name: float(value) for name, value in r.values.items()} for r in readings]
        return numbers, tree.flatten(made.state.control), len(replayed)

    found, control, replays = trained(recorded=True)
    plain, other, none = trained(recorded=False)
    # Once each: plain steps, ticks, and ticks that are logged; once more after each time that the lists grow.
    assert replays > 60
    assert none == 0
    # Sums by atomics end in other last bits in every run.
    assert [one["loss"] for one in found] == pytest.approx([one["loss"] for one in plain], rel=1e-2)
    for mine, other_numbers in zip(found, plain, strict=True):
        assert mine == pytest.approx(other_numbers, rel=3e-2, abs=1e-3)
    assert [step for step, one in enumerate(found, 1) if "lr" in one] == [20, 40, 60, 80, 100]
    assert {"r2_raw", "gain", "dead", "threshold.p50", "bandwidth.p95"} <= set(found[-1])
    for name, leaf in control.items():
        torch.testing.assert_close(leaf, other[name], rtol=1e-2, atol=1e-3)
