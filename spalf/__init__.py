"""spalf: sparse autoencoders as constrained problems. Name the targets; the multipliers find the coefficients.

Names are imported when they are first used, so that `spalf --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spalf.core.protocols import Activator, Autoencoder, Metric, Ops, Stream
    from spalf.core.recipe import Budget, Derived, Knobs, Plan, Recipe, Record
    from spalf.core.slots import (
        ComponentRef,
        activation,
        constraint,
        dual,
        evaluator,
        filter,
        from_knob,
        from_slot,
        gate,
        kernel,
        lagrangian,
        optimizer,
        penalty,
        phase,
        schedule,
        source,
        stratum,
        term,
        whitener,
    )
    from spalf.core.state import Anchor, ControlState, Learner, TrainingState
    from spalf.core.values import (
        Batch,
        Clock,
        Code,
        Facts,
        Forward,
        Machine,
        Raw,
        Reading,
        Sequences,
        Signal,
        View,
        Violations,
        White,
    )
    from spalf.engine.evaluate import untouched
    from spalf.engine.step import Assessment, assess, conclude, look, switch_on, view_of
    from spalf.errors import (
        CheckpointError,
        ComponentError,
        ExchangeError,
        Problem,
        RecipeError,
        RunError,
        SourceError,
        SpalfError,
    )
    from spalf.evaluation import compare, evaluate
    from spalf.exchange.verbs import export, import_dictionary
    from spalf.hooks import hookimpl
    from spalf.launch import compile_recipe, harvest, load, resume, run
    from spalf.loaded import Codes, Loaded
    from spalf.parts.source.pairs import Pairs, read_pairs, write_pairs
    from spalf.reporting import features, write_report
    from spalf.sweeping import sweep

__version__ = "0.1.0"

_HOMES = {
    "spalf.core.protocols": "Activator Autoencoder Metric Ops Stream",
    "spalf.core.recipe": "Budget Derived Knobs Plan Recipe Record",
    "spalf.core.slots": (
        "ComponentRef activation constraint dual evaluator filter from_knob from_slot gate kernel lagrangian "
        "optimizer penalty phase schedule source stratum term whitener"
    ),
    "spalf.core.state": "Anchor ControlState Learner TrainingState",
    "spalf.core.values": ("Batch Clock Code Facts Forward Machine Raw Reading Sequences Signal View Violations White"),
    "spalf.engine.evaluate": "untouched",
    "spalf.engine.step": "Assessment assess conclude look switch_on view_of",
    "spalf.errors": "CheckpointError ComponentError ExchangeError Problem RecipeError RunError SourceError SpalfError",
    "spalf.exchange.verbs": "export import_dictionary",
    "spalf.evaluation": "compare evaluate",
    "spalf.sweeping": "sweep",
    "spalf.hooks": "hookimpl",
    "spalf.launch": "compile_recipe harvest load resume run",
    "spalf.loaded": "Codes Loaded",
    "spalf.parts.source.pairs": "Pairs read_pairs write_pairs",
    "spalf.reporting": "features write_report",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Activator",
    "Anchor",
    "Assessment",
    "Autoencoder",
    "Batch",
    "Budget",
    "CheckpointError",
    "Clock",
    "Code",
    "Codes",
    "ComponentError",
    "ComponentRef",
    "ControlState",
    "Derived",
    "ExchangeError",
    "Facts",
    "Forward",
    "Knobs",
    "Learner",
    "Loaded",
    "Machine",
    "Metric",
    "Ops",
    "Pairs",
    "Plan",
    "Problem",
    "Raw",
    "Reading",
    "Recipe",
    "RecipeError",
    "Record",
    "RunError",
    "Sequences",
    "Signal",
    "SourceError",
    "SpalfError",
    "Stream",
    "TrainingState",
    "View",
    "Violations",
    "White",
    "__version__",
    "activation",
    "assess",
    "compare",
    "compile_recipe",
    "conclude",
    "constraint",
    "dual",
    "evaluate",
    "evaluator",
    "export",
    "features",
    "filter",
    "from_knob",
    "from_slot",
    "gate",
    "harvest",
    "hookimpl",
    "import_dictionary",
    "kernel",
    "lagrangian",
    "load",
    "look",
    "optimizer",
    "penalty",
    "phase",
    "read_pairs",
    "resume",
    "run",
    "schedule",
    "source",
    "stratum",
    "sweep",
    "switch_on",
    "term",
    "untouched",
    "view_of",
    "whitener",
    "write_pairs",
    "write_report",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
