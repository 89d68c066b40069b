"""A small run in three parts: a plan, what a run would have written, and an atlas with texts that mean harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from spalf.core.recipe import Plan
from spalf.engine.atlas import Atlas, Feature, Place, atlas
from spalf.report import RunRecord, evaluation, headline, parameters, story
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
            "downstream_loss": {"kl": 0.25, "kl.ci_low": 0.2, "kl.ci_high": 0.3125, "documents": 17.0},
            "sparsity_frontier": {
                "l0@0.5": 12.0,
                "r2_raw@0.5": 0.7,
                "ce@0.5": 2.7,
                "l0@1": 6.5,
                "r2_raw@1": 0.81,
                "ce@1": 2.75,
                "ce@1.ci_low": 2.7,
                "ce@1.ci_high": 2.8,
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


def data_of(plan: Plan, record: RunRecord) -> dict[str, Any]:
    return {
        "run": headline(plan, record),
        "story": story(plan, record),
        "parameters": parameters(plan, {}),
        "evaluation": evaluation(record),
        "recipe": record.recipe,
    }


def wide(seen: Atlas, features: int = 4096, tokens: int = 65_536, context: int = 128) -> Atlas:
    """As many features as a page holds by default, each with as much as a feature has."""
    sequences = tuple(tuple((s * 7919 + t * 104729) % 5000 for t in range(context)) for s in range(tokens // context))
    fires = tuple((t, 3.0 + t % 7) for t in range(0, 120, 11))
    places = tuple(Place(sequence=(37 * i) % 500, position=11, rank=i / 12, activations=fires) for i in range(12))
    pairs = tuple((j * 13, 0.123 * j) for j in range(1, 7))
    one = Feature(
        id=0, stratum="free", fired=500, peak=9.0, mean=5.0, histogram=tuple(range(100, 124)), tokens=pairs,
        promoted=pairs, suppressed=pairs, neighbours=pairs, partners=pairs, places=places,
    )  # fmt: skip
    return evolve(
        seen,
        width=features,
        rows=tokens,
        features=tuple(
            evolve(one, id=i, fired=1 + i * i % 3000, tokens=(((i * 31) % 5000, 0.5), *pairs)) for i in range(features)
        ),
        sequences=sequences,
        text={v: f" token{v}" for v in range(5000)},
    )


@pytest.fixture(scope="session")
def many(seen: Atlas) -> Atlas:
    return wide(seen)
