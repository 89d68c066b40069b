"""Where a step's time goes: the device's time by kernel, or a CPU's by operation."""

from __future__ import annotations

from typing import Any

import torch

from spalf.bench.peer_steps.measure import Task
from spalf.bench.speed import ours
from spalf.bench.speed.ours import Ours, Variant

STEPS = 20
"""Profiled steps: two ticks of the controllers."""


def breakdown(task: Task, variant: Variant) -> dict[str, Any]:
    """{"busy_ms", "rows": [{"name", "us", "calls"}]} per step, the longest first; or why there is none."""
    from torch.profiler import ProfilerActivity, profile

    is_cuda = torch.device(task.device).type == "cuda"
    try:
        subject = Ours(task, variant, ours.pool(task))
        for _ in range(task.warmup + STEPS):
            subject.step()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
        with profile(activities=activities) as seen:
            for _ in range(STEPS):
                subject.step()
            if is_cuda:
                torch.cuda.synchronize()
    except Exception as e:
        return {"status": "failed", "reason": f"{type(e).__name__}: {' '.join(str(e).split())[:240]}"}
    rows = [row for row in (_row(event, is_cuda) for event in seen.key_averages()) if row["us"] > 0]
    rows.sort(key=lambda r: -r["us"])
    return {"status": "ok", "name": variant.name, "busy_ms": sum(r["us"] for r in rows) / 1e3, "rows": rows}


def _row(event: Any, is_cuda: bool) -> dict[str, Any]:
    """Own time alone, so that the rows add up; on CUDA those of the device, not of the calls that launched them."""
    on_device = str(event.device_type).endswith("CUDA")
    is_range = "Optimizer." in event.key or event.key.startswith("ProfilerStep")
    us = event.self_device_time_total if is_cuda else event.self_cpu_time_total
    counts = (on_device and not is_range) if is_cuda else True
    return {"name": str(event.key), "us": us / STEPS if counts else 0.0, "calls": event.count / STEPS}
