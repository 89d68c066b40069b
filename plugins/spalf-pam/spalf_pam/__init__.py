"""A plugin for spalf: phase `pam` (PAM-SGD, arXiv 2505.11836), evaluator `power_diagram`, command `spalf pam`.

Importing it loads neither torch nor the components: `spalf --help` lists its command.
"""

from typing import Any

from spalf import hookimpl

__all__ = ["spalf_commands", "spalf_components"]


@hookimpl
def spalf_components() -> list[type]:
    """What this package offers."""
    from spalf_pam.phase import Pam
    from spalf_pam.power import PowerDiagram

    return [Pam, PowerDiagram]


@hookimpl
def spalf_commands(app: Any) -> None:
    """`spalf pam study`."""
    from spalf_pam.commands import pam

    app.add_typer(pam, name="pam")
