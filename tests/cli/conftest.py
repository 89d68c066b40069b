"""A launch and plugins that train nothing: the command line is tested for what it hands over and what it shows."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy
import pytest
from attrs import field, frozen
from attrs.validators import ge, gt, in_, lt
from torch import Tensor
from typer.testing import CliRunner, Result

from spalf import hooks
from spalf import launch as real
from spalf.assembly.registry import Registry
from spalf.cli import app
from spalf.core.slots import dual, from_knob, whitener
from spalf.core.values import Facts, Signal
from spalf.engine.examples import Context, FeatureExample
from spalf.exchange import verbs

SUMMARY: dict[str, Any] = {
    "name": "small",
    "outcome": "done",
    "step": 1200,
    "l0": 31.96,
    "l0_target": 32,
    "r2_raw": 0.9312,
    "r2_whitened": 0.9001,
    "r2_target": 0.97,
    "ce_clean": 2.5,
    "ce_patched": 2.625,
    "ce_mean_ablated": 6.5,
    "loss_recovered": 0.96875,
    "kl": 0.0625,
    "dead_fraction": 0.015,
    "constraints": {
        "faithfulness": {"violation": 0.031, "multiplier": 2.5, "feasible": False},
        "drift": {"violation": -0.4, "multiplier": 0.0, "feasible": True},
    },
    "wall_seconds": {"harvest": 12.5, "fit": 187.0},
    "notes": ["constraint faithfulness is not met [by 3.1 %]"],
}
EXAMPLES = [
    FeatureExample(
        feature=7,
        stratum="free",
        density=0.0125,
        contexts=(Context(tokens=("Once", " upon", "\n", " a", "[x]"), values=(0.0, 3.25, 0.0, 0.5, 0.0), peak=1),),
    )
]


@frozen
class Ended:
    """What `run` and `resume` give back."""

    directory: Path
    outcome: str = "done"
    summary: dict[str, Any] = field(factory=lambda: dict(SUMMARY))
    examples: list[FeatureExample] = field(factory=lambda: list(EXAMPLES))


@frozen(kw_only=True)
class StubState:
    lam_M: Tensor


@dual("steady")
class Steady:
    """Multipliers that never move [ever].

    Only for looking at.
    """

    rate: float = field(default=0.1, validator=[gt(0.0), lt(1.0)])
    """How fast, were it to move."""
    mode: str = field(default="slow", validator=in_(["slow", "fast"]))
    betas: tuple[float, float] = (0.9, 0.999)
    memory: int = field(default=0, validator=ge(0))
    target: float = from_knob("R2_target")

    def init(self, m: int) -> StubState:
        raise AssertionError("nothing is trained here")

    def step(self, state: StubState, signal: Signal) -> StubState:
        raise AssertionError("nothing is trained here")


@whitener("nothing")
class Nothing:
    """Leaves things as they are."""

    def build(self, facts: Facts) -> Any:
        raise AssertionError("nothing is trained here")

    def fit_(self, metric: Any, mean_D: Tensor, cov_DD: Tensor) -> None:
        raise AssertionError("nothing is trained here")


class StubPlugin:
    """A plugin with two components."""

    @hooks.hookimpl
    def spalf_components(self) -> list[type]:
        return [Steady, Nothing]


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An empty module in the place of spalf.launch, for a test to put functions into."""
    assert verbs.launch is real, "what stands on launch has to be imported before it is replaced"
    module = ModuleType("spalf.launch")
    monkeypatch.setitem(sys.modules, "spalf.launch", module)
    monkeypatch.setattr("spalf.launch", module, raising=False)
    return module


@pytest.fixture
def summary() -> dict[str, Any]:
    return dict(SUMMARY)


@pytest.fixture
def ended() -> type[Ended]:
    return Ended


@pytest.fixture
def examples() -> list[FeatureExample]:
    return list(EXAMPLES)


@pytest.fixture
def calls(launch: Any) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Every function of launch, recording its calls; a call that the real one would not take is a TypeError."""
    made: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def recording(name: str, give: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            inspect.signature(getattr(real, name)).bind(*args, **options)
            made.append((name, args, options))
            return give(*args, **options)

        return call

    for name, give in {
        "run": lambda *_, **o: Ended(Path(o["out"]) / "small"),
        "resume": lambda path, **_: Ended(Path(path)),
        "harvest": lambda _, out, **__: Path(out),
        "filled_text": lambda *_: 'name = "small"\n',
    }.items():
        setattr(launch, name, recording(name, give))
    return made


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry of two components from one plugin, in the place of what is installed."""
    manager = pluggy.PluginManager("spalf")
    manager.add_hookspecs(hooks)
    manager.register(StubPlugin(), name="stub")
    registry = Registry([(Steady, "acme 1.0"), (Nothing, "acme 1.0")])
    module: Any = ModuleType("spalf.plugins")
    module.load = lambda: (manager, registry)
    module.origin_of = lambda name: f"{name} 1.0"
    monkeypatch.setitem(sys.modules, "spalf.plugins", module)
    return registry


@pytest.fixture
def spalf() -> Callable[..., Result]:
    """Call the command line with words; stdout and stderr come back apart."""

    def call(*words: str) -> Result:
        return CliRunner().invoke(app, list(words), env={"COLUMNS": "120"})

    return call
