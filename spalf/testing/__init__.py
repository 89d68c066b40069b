"""The test kit, for spalf's own components and for plugin authors'.

@pytest.mark.parametrize("check", conform(Optimistic))
def test_conforms(check): check()
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from spalf import plugins
from spalf.assembly.options import option_types, slot_of
from spalf.core.slots import SLOTS, label
from spalf.core.values import Signal
from spalf.testing.whole import started, toy_plan

__all__ = ["KNOBS", "Check", "conform", "example", "signal", "started", "toy_plan"]

Check = Callable[[], None]
"""A named check (it has `__name__`, which pytest shows): returns, or raises AssertionError."""

KNOBS: Mapping[str, Any] = {"F": 64, "L0_target": 4, "R2_target": 0.9, "lr": 1e-2}
"""What knob-bound options are in the kit."""

_DUAL_SIDE = dict.fromkeys(("filter", "dual", "penalty", "lagrangian", "gate"), "spalf.testing.control")
_PRIMAL = ("activation", "constraint", "kernel", "term")
_MODULES: Mapping[str, str] = {
    **_DUAL_SIDE,
    **dict.fromkeys(_PRIMAL, "spalf.testing.primal"),
    **dict.fromkeys(("stratum", "whitener"), "spalf.testing.primal_linear"),
    **dict.fromkeys(("optimizer", "schedule"), "spalf.testing.optimizer"),
    **dict.fromkeys(("phase", "evaluator"), "spalf.testing.whole"),
    "source": "spalf.testing.source",
}


def conform(cls: type, **options: Any) -> list[Check]:
    """The named checks that every component of this class's slot must pass, for `pytest.mark.parametrize`.

    Options that are not given come from `example`. Raises ComponentError where the class carries no label.
    """
    module = importlib.import_module(_MODULES[label(cls).slot])
    checks: list[Check] = module.checks(cls, example(cls, **options))
    return checks


def example(cls: type, **options: Any) -> Any:
    """A component for testing: `options`, then its module's EXAMPLES, then the kit's, then the kit's knobs.

    An option that holds a component by default gets that component's example.

    EXAMPLES maps (slot, use) to options. A required option that nobody gives raises TypeError.
    """
    ref = label(cls)
    key = (ref.slot, ref.use)
    assert ref.slot in SLOTS
    knobs = {a.name: KNOBS[a.metadata["knob"]] for a in attrs.fields(cls) if "knob" in a.metadata}
    inner = {a.name: example(_held(cls, a.name, a.metadata["use"])) for a in attrs.fields(cls) if "use" in a.metadata}
    kit = getattr(importlib.import_module(_MODULES[ref.slot]), "EXAMPLES", {})
    own = getattr(sys.modules.get(cls.__module__), "EXAMPLES", {})
    return cls(**{**knobs, **inner, **kit.get(key, {}), **own.get(key, {}), **options})


def _held(cls: type, name: str, use: str) -> type:
    """The class that option `name` of `cls` holds by default."""
    slot = slot_of(option_types(cls)[name])
    assert slot is not None, f"option {name} is no component's"
    return plugins.registry().resolve(slot.name, use)


def signal(
    g: Sequence[float] | Tensor,
    *,
    fast: Sequence[float] | Tensor | None = None,
    slow: Sequence[float] | Tensor | None = None,
    previous: Sequence[float] | Tensor | None = None,
    on: Sequence[bool] | Tensor | None = None,
    rho: Sequence[float] | Tensor | None = None,
) -> Signal:
    """A Signal of M constraints; `fast` defaults to `g`, `slow` and `previous` to `fast`, `on` to all, `rho` to 1."""
    g_M = torch.as_tensor(g, dtype=torch.float32)
    fast_M = g_M if fast is None else torch.as_tensor(fast, dtype=torch.float32)
    return Signal(
        g_M=g_M,
        fast_M=fast_M,
        slow_M=fast_M if slow is None else torch.as_tensor(slow, dtype=torch.float32),
        previous_M=fast_M if previous is None else torch.as_tensor(previous, dtype=torch.float32),
        on_M=torch.ones_like(g_M, dtype=torch.bool) if on is None else torch.as_tensor(on, dtype=torch.bool),
        rho_M=torch.ones_like(g_M) if rho is None else torch.as_tensor(rho, dtype=torch.float32),
    )
