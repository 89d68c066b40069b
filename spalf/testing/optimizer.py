"""Conformance of optimizers, alone and inside a Learner, and of their schedules."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from spalf.core.built import Ops
from spalf.core.slots import label
from spalf.core.state import Learner
from spalf.core.values import Clock, Machine
from spalf.nn import StratifiedAutoencoder

Check = Callable[[], None]


class Thresholds(nn.Module):
    """The least an activator has to own here: one trained tensor."""

    owns_bias = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.log_threshold_F = nn.Parameter(torch.zeros(width))


class PlainOps:
    """Fuses nothing."""

    def update(self, learner: Learner, loss: Tensor) -> bool:
        return False


def learner(component: Any, seed: int = 0) -> Learner:
    """A Learner of 6 free rows whose parameters are random."""
    from spalf.parts.stratum import Free

    machine = Machine(device=torch.device("cpu"), ops=cast(Ops, PlainOps()))
    sae = StratifiedAutoencoder(4, {"free": 6}, cast(Any, Thresholds(6)), machine)
    draw = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw)
    made = component.build(sae.named_parameters())
    rates = tuple(float(group["lr"]) for group in made.param_groups)
    built = Learner(sae=sae, optimizer=made, rule=component, strata={"free": Free(unit_norm=True)}, rates=rates)
    built.project_()
    return built


def loss_of(built: Learner) -> Tensor:
    """A bowl around 1 for each parameter, so that a sphere still has one lowest point."""
    return torch.stack([(p - 1).square().sum() for _, p in built.sae.named_parameters()]).sum()


def run(built: Learner, start: int, stop: int, total: int = 400) -> list[float]:
    """Losses over steps `start` to `stop` of a run of `total`."""
    seen = []
    for step in range(start, stop):
        loss = loss_of(built)
        seen.append(float(loss.detach()))
        built.descend(loss, Clock(step=step, total=total))
    return seen


def checks(cls: type, component: Any) -> list[Check]:
    """The checks of the slots `optimizer` and `schedule`."""
    return _schedule(component) if label(cls).slot == "schedule" else _optimizer(component)


def _schedule(component: Any) -> list[Check]:
    totals = (1, 7, 400, 20_000)

    def clocks(total: int, entered: int = 0) -> list[Clock]:
        steps = range(entered, total + 1, max(1, total // 400))
        return [Clock(step=s, total=total, entered=entered) for s in steps]

    def is_a_share_of_the_peak() -> None:
        for total in totals:
            for entered in (0, total // 2):
                scales = [component.scale(c) for c in clocks(total, entered)]
                assert all(type(s) is float and 0 <= s <= 1 for s in scales), f"outside [0, 1] in {total} steps"
                assert all(s > 0 for s in scales[:-1]), f"no rate at all before the end of {total} steps"

    def reaches_its_peak() -> None:
        scales = [component.scale(Clock(step=s, total=20_000)) for s in range(20_000)]
        assert max(scales) > 0.99, "the rate that a recipe names is never reached"

    def is_a_pure_function_of_the_clock() -> None:
        asked = clocks(400)
        forward = [component.scale(c) for c in asked]
        assert [component.scale(c) for c in reversed(asked)] == forward[::-1], "the order of the questions matters"

    def a_settled_one_stays_as_it_is_in_a_longer_run() -> None:
        settle = getattr(component, "settle", lambda plan: component)
        settled = settle(SimpleNamespace(total_steps=400))
        again = getattr(settled, "settle", lambda plan: settled)(SimpleNamespace(total_steps=40_000))
        assert again == settled, "a run that is resumed with a larger budget would warm up anew"
        seen = [[c.scale(Clock(step=s, total=400)) for s in range(400)] for c in (component, settled)]
        assert seen[0] == seen[1], "settling changes the numbers"

    return [
        is_a_share_of_the_peak,
        reaches_its_peak,
        is_a_pure_function_of_the_clock,
        a_settled_one_stays_as_it_is_in_a_longer_run,
    ]


def _optimizer(component: Any) -> list[Check]:
    def every_parameter_has_one_group() -> None:
        built = learner(component)
        held = [id(p) for group in built.optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for _, p in built.sae.named_parameters())

    def lowers_a_quadratic() -> None:
        losses = run(learner(component), 0, 200)
        assert losses[-1] < 0.9 * losses[0]
        assert all(math.isfinite(x) and x < 2 * losses[0] for x in losses)

    def scale_is_a_positive_function_of_the_clock() -> None:
        clocks = [Clock(step=s, total=400) for s in (0, 1, 10, 100, 399, 400)]
        scales = [component.scale(c) for c in clocks]
        assert all(0 < s <= 1 for s in scales[:-1])
        assert 0 <= scales[-1] <= 1
        assert scales == [component.scale(c) for c in clocks]

    def a_saved_learner_continues_bit_for_bit() -> None:
        uncut, cut = learner(component), learner(component)
        run(uncut, 0, 12)
        run(cut, 0, 5)
        saved = copy.deepcopy(cut.state_dict())
        poured = learner(component, seed=1)
        poured.load_state_dict(saved)
        run(poured, 5, 12)
        wanted, got = uncut.state_dict(), poured.state_dict()
        assert wanted.keys() == got.keys()
        for key, value in wanted.items():
            assert torch.equal(value, got[key]) if isinstance(value, Tensor) else value == got[key], key

    def a_rate_of_zero_freezes() -> None:
        built = learner(component)
        before = {name: p.detach().clone() for name, p in built.sae.named_parameters()}
        built.rates = tuple(0.0 for _ in built.rates)
        run(built, 0, 3)
        # All but the decoder, whose rows are put back on the sphere after each step.
        moved = [n for n, p in built.sae.named_parameters() if n != "W_dec_FD" and not torch.equal(before[n], p)]
        assert not moved, f"a rate of 0 moves {moved}"

    made = [
        every_parameter_has_one_group,
        lowers_a_quadratic,
        a_rate_of_zero_freezes,
        scale_is_a_positive_function_of_the_clock,
        a_saved_learner_continues_bit_for_bit,
    ]
    return [*made, _follows_adam(component)] if component.rule == "adam" else made


def _follows_adam(component: Any) -> Check:
    def follows_the_rule_it_names() -> None:
        """m / (1 - b1^t) over sqrt(v / (1 - b2^t)) + eps, in float64."""
        built = learner(component)
        group = built.optimizer.param_groups[0]
        assert len(group["params"]) == 1
        (b1, b2), eps, p = group["betas"], group["eps"], group["params"][0]
        plain, m, v = p.detach().double().clone(), 0.0, 0.0
        for t in range(1, 8):
            p.grad = (p.detach() - 1) * t
            g = p.grad.double()
            built.optimizer.step()
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g.square()
            plain -= group["lr"] * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
            torch.testing.assert_close(p.detach().double(), plain, rtol=1e-5, atol=1e-5)

    return follows_the_rule_it_names
