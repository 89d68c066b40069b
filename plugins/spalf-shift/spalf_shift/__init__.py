"""A plugin for spalf: sparse shift autoencoders, by Cooper, and measures of what their features stand for.

Components are imported when they are asked for, so that a command's help does not wait for torch.
"""

from typing import Any

from spalf import hookimpl

__all__ = ["spalf_commands", "spalf_components"]


@hookimpl
def spalf_components() -> list[type]:
    """What this package offers."""
    from spalf_shift.activation import SoftThreshold
    from spalf_shift.constraint import CodeLevel
    from spalf_shift.dual import Cooper
    from spalf_shift.evaluator import ConceptMcc, ConceptProbe, SteeringAccuracy
    from spalf_shift.phase import CooperPhase
    from spalf_shift.source import Endpoints
    from spalf_shift.whitener import ShiftScale

    return [
        CodeLevel,
        ConceptMcc,
        ConceptProbe,
        Cooper,
        CooperPhase,
        Endpoints,
        ShiftScale,
        SoftThreshold,
        SteeringAccuracy,
    ]


@hookimpl
def spalf_commands(app: Any) -> None:
    """`spalf shift`."""
    from spalf_shift.commands import shift

    app.add_typer(shift, name="shift")
