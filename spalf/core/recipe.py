"""A recipe is complete text; a plan is that text with every number settled or marked as calibrated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import field, frozen
from attrs.validators import ge, gt, lt

from spalf.core.values import Facts

if TYPE_CHECKING:
    from spalf.core import protocols as p


@frozen(kw_only=True)
class Knobs:
    """The four numbers a person sets. In a table 0 means "derive it"; in a Plan no 0 survives."""

    F: int = field(default=0, validator=ge(0))
    L0_target: int = field(default=0, validator=ge(0))
    R2_target: float = field(default=0.97, validator=[gt(0.0), lt(1.0)])
    lr: float = field(default=3e-4, validator=gt(0.0))


@frozen(kw_only=True)
class Budget:
    """`tokens` activations to train on, `batch` activations per step."""

    tokens: int = field(default=100_000_000, validator=gt(0))
    batch: int = field(default=4096, validator=gt(0))


@frozen(kw_only=True)
class Record:
    """Steps between log lines and between checkpoints, how many checkpoints are kept, and the names of trackers."""

    log_every: int = field(default=100, validator=gt(0))
    save_every: int = field(default=10_000, validator=gt(0))
    keep: int = field(default=3, validator=gt(0))
    track: tuple[str, ...] = ()


@frozen(kw_only=True)
class Recipe:
    """Every component with every option. Unstructured, it is the recipe.toml that a run directory holds."""

    name: str
    seed: int = 0
    phases: tuple[str, ...]
    strata: tuple[str, ...]
    knobs: Knobs
    budget: Budget
    record: Record
    source: p.Source
    whitener: p.Whitener
    activation: p.Activation
    filter: p.Filter[Any]
    dual: p.Dual[Any]
    penalty: p.Penalty[Any]
    lagrangian: p.Lagrangian
    optimizer: p.Optimizer
    kernel: p.Kernel
    stratum: Mapping[str, p.Stratum]
    term: Mapping[str, p.Term]
    constraint: Mapping[str, p.Constraint]
    phase: Mapping[str, p.Phase]
    evaluator: Mapping[str, p.Evaluator]


@frozen(kw_only=True)
class Derived:
    """One number of the plan: its path, value (None: calibrated during the run), formula and origin."""

    path: str
    value: float | None
    formula: str
    origin: str


@frozen(kw_only=True)
class Plan:
    """A recipe in which every number is settled. Holds no tensor, no module, no device."""

    recipe: Recipe
    facts: Facts
    knobs: Knobs
    rows: Mapping[str, int]
    """Dictionary rows per stratum, in the order of `recipe.strata`."""
    total_steps: int
    terms: tuple[str, ...]
    """Names of all declared terms that some phase uses, in name order."""
    constraints: tuple[str, ...]
    """Names of all declared constraints that some phase uses, in name order: the M axis."""
    derived: tuple[Derived, ...]
    origins: Mapping[str, str] = field(factory=dict)
    """slot.name -> distribution and version of each component used."""
