"""One primal for every law and seed: what happens to a plant under many laws at once.

T ticks, C configurations of laws, S seeds, M constraints. All configurations see the same batches and the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from spalf.bench.control_plants import Plant
from spalf.core.values import Clock, Signal
from spalf.parts.filter import DualRateEma
from spalf.parts.schedule import Linear as Schedule

EVERY = 10
"""Steps from tick to tick, the preset's."""
RHO = 1.0


@frozen(kw_only=True, eq=False)
class Trace:
    """Multipliers lam and exact violations g at each tick, [T, C, S, M], and lam* [T, M]."""

    lam: Tensor
    g: Tensor
    target_TM: Tensor


def follow(plant: Plant, laws: Sequence[Any], seeds: int, every: int = EVERY) -> Trace:
    """Descend on the augmented Lagrangian (arXiv 2510.20995) under each of `laws`; same arguments, same trace."""
    m, c = len(plant.target_M(0)), len(laws)
    shape = (c, seeds, m)
    random = torch.Generator().manual_seed(1)
    x_CSN = plant.start_N().expand(c, seeds, -1).clone().requires_grad_()
    optimizer = (torch.optim.Adam if plant.adam else torch.optim.SGD)([x_CSN], lr=plant.lr)
    schedule = Schedule(warmup=1, decay=plant.decay, final=plant.final)
    filter = DualRateEma(every=every)
    seen = filter.init(c * seeds * m)
    states = [law.init(seeds * m) for law in laws]
    lam_CSM = torch.zeros(shape, dtype=x_CSN.dtype)
    history: list[Tensor] = []
    out: list[tuple[Tensor, Tensor]] = []
    was_on = False
    for step in range(plant.steps):
        rate = schedule.scale(Clock(step=step, total=plant.steps))
        for group in optimizer.param_groups:
            group["lr"] = plant.lr * rate
        batch = plant.draw(seeds, random)
        noise = plant.noise * torch.randn(seeds, m, generator=random, dtype=torch.float64)
        f_CS, g_CSM = plant.measure(x_CSN, batch, step)
        g_CSM = g_CSM + noise.to(g_CSM)
        on = plant.on(step)
        # rho Psi(g, lam / rho) up to a constant: its gradient in g is [lam + 2 rho g]+
        push_CS = (lam_CSM + 2 * RHO * g_CSM).clamp(min=0).square().sum(-1) / (4 * RHO)
        optimizer.zero_grad(set_to_none=True)
        (f_CS + push_CS if on else f_CS).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            plant.project_(x_CSN, step)
            history = [*history[-plant.delay :], g_CSM.detach()] if plant.delay else [g_CSM.detach()]
            measured = history[0].reshape(-1).float()
            mask = torch.full(measured.shape, on)
            if on and not was_on:
                seen, was_on = filter.enter(seen, measured, mask), True
            seen = filter.step(seen, measured, mask)
            if (step + 1) % every == 0:
                signal = filter.signal(seen, measured, mask)
                states = [
                    law.step(state, _of(signal, i * seeds * m, seeds * m))
                    for i, (law, state) in enumerate(zip(laws, states, strict=True))
                ]
                seen = filter.tick(seen)
                lam_CSM = torch.stack([state.lam_M for state in states]).view(shape).to(x_CSN.dtype)
                out.append((lam_CSM, plant.exact(x_CSN, step)))
    targets = [plant.target_M(step) for step in range(every - 1, plant.steps, every)]
    lam, g = (torch.stack([pair[i] for pair in out]).double() for i in (0, 1))
    return Trace(lam=lam, g=g, target_TM=torch.stack(targets))


def _of(signal: Signal, start: int, length: int) -> Signal:
    """The part of a signal that belongs to one law."""
    part = slice(start, start + length)
    rows = {name: getattr(signal, name)[part] for name in ("g_M", "fast_M", "slow_M", "previous_M", "on_M")}
    return Signal(**rows, rho_M=torch.full((length,), RHO))
