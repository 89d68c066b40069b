"""What can go wrong, by who can mend it: exit code 2 is a user's to mend, 1 a run's."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import frozen


@frozen
class Problem:
    """One mistake: where it is, what is wrong, and what to do about it."""

    path: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        return f"{where}{self.message}" + (f" ({self.hint})" if self.hint else "")


class SpalfError(Exception):
    """Base of every error that spalf raises on purpose; shown to a user without a traceback."""

    exit_code: int = 1


class RecipeError(SpalfError):
    """A recipe that cannot be run; holds all of its problems at once."""

    exit_code = 2

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("\n".join(str(p) for p in self.problems))


class ComponentError(SpalfError):
    """A component or a plugin that breaks its slot's contract."""

    exit_code = 2


class SourceError(SpalfError):
    """A model, a dataset or a file that a source cannot use."""

    exit_code = 2


class CheckpointError(SpalfError):
    """A run or checkpoint directory that cannot be read, written or poured into this recipe's state."""

    exit_code = 2


class ExchangeError(SpalfError):
    """A dictionary that another library's format cannot hold, a file of one that cannot be read, or a failed upload."""

    exit_code = 2


class RunError(SpalfError):
    """A run that started and could not go on."""


class DeadConstraintError(RunError):
    """A constraint or term whose value depends on no parameter, so that it could never be met by training."""


class DivergedError(RunError):
    """A loss, a parameter or a multiplier that became NaN or infinite."""
