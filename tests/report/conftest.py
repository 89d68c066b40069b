"""A small run in three parts: a plan, what a run would have written, and an atlas with texts that mean harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from spalf.core.recipe import Plan
from spalf.engine.atlas import Atlas, atlas
from spalf.report import RunRecord
from spalf.testing.whole import stage_for

HOSTILE = (
    "</script><script>document.title = 'hacked'</script>",
    "<!--<script>",
    "<img src=x onerror=\"document.title='hacked'\">",
    '"\\]]>\u2028\u2029\0',
    "&lt;b&gt;&amp;",
)


def line(step: int, phase: str, **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    held = {
        "faithfulness": {"g": 2.0 / step, "fast": 2.5 / step, "lam": 1.5, "rho": 1.0, "on": True},
        "orthogonality": {"g": 0.0, "fast": 0.0, "lam": 0.0, "rho": 1.0, "on": phase == "causal"},
        "drift": {"g": -0.5, "fast": -0.5, "lam": 0.0, "rho": 1.0, "on": True},
    }
    numbers = {"l0": 40.0 / step + 6, "loss": 3.0 / step, "r2_raw": 1 - 1 / (step + 1), "r2_white": 0.5, "term.l0": 1.0}
    spread = {f"{name}.p{p}": float(p) for name in ("threshold", "bandwidth") for p in ("05", "50", "95")}
    return {"step": step, "phase": phase, **numbers, **spread, "novel": 7.0, "constraints": held, **more}


@pytest.fixture(scope="session")
def plan() -> Plan:
    return stage_for(frozenset({"tokens"}))[0]


@pytest.fixture(scope="session")
def record(plan: Plan) -> RunRecord:
    calibration = [{"step": 0, "phase": "calibrate", "tokens": 1024.0 * i, "change": 1.0 / i} for i in (1, 2)]
    steps = [line(s, "fit" if s <= 60 else "causal") for s in range(10, 101, 10)]
    summary = {
        "outcome": "done",
        "step": 100,
        "l0": 6.5,
        "r2_raw": 0.81,
        "r2_whitened": 0.7,
        "r2_space": "raw",
        "ce_clean": 2.5,
        "ce_patched": 2.75,
        "loss_recovered": 0.96875,
        "kl": 0.25,
        "dead_fraction": 0.0,
        "dead_window": 2560.0,
        "feasible": False,
        "constraints": {
            "faithfulness": {"violation": 0.125, "multiplier": 1.5, "penalty": 1.0, "budget": 12.5, "feasible": False},
            "drift": {"violation": -0.5, "multiplier": 0.0, "penalty": 1.0, "budget": 0.64, "feasible": True},
        },
        "notes": [f"constraint faithfulness is not met {HOSTILE[0]}"],
        "wall_seconds": {"fit": 61.5, "harvest": 2.25},
        "device": "cpu",
        "versions": {"torch": "2.13.0"},
        "evaluators": {
            "dictionary": {"l0": 6.5, "r2_raw": 0.81, "rows": 65536.0},
            "downstream_loss": {"kl": 0.25, "kl.low": 0.2, "kl.high": 0.3125, "documents": 17.0},
            "sparsity_frontier": {
                "l0@0.5": 12.0,
                "r2_raw@0.5": 0.7,
                "ce@0.5": 2.7,
                "l0@1": 6.5,
                "r2_raw@1": 0.81,
                "ce@1": 2.75,
                "ce@1.low": 2.7,
                "ce@1.high": 2.8,
                "l0@2": 2.0,
                "r2_raw@2": 0.4,
                "ce@2": 4.0,
                "documents": 17.0,
            },
        },
    }
    return RunRecord(directory=Path("run"), metrics=(*calibration, *steps), summary=summary, recipe='name = "toy"\n')


@pytest.fixture(scope="session")
def seen() -> Atlas:
    """Of the kit's language run; the most common tokens read as something that means harm."""
    found = atlas(*stage_for(frozenset({"tokens"})), sequences=24, contexts=4)
    firing = [f.tokens[0][0] for f in sorted(found.features, key=lambda f: -f.fired) if f.tokens]
    worst = dict(zip(dict.fromkeys(firing), HOSTILE, strict=False))
    assert len(worst) == len(HOSTILE)
    return evolve(found, text={**found.text, **worst})
