"""The sixteen slots and their decorators.

A decorator makes the class frozen and keyword-only, attaches its label and compares it with the slot's protocol at
once: it raises ComponentError where a method, parameter or attribute departs. It registers nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import attrs
from attrs import field, frozen

from spalf.core import protocols
from spalf.errors import ComponentError

C = TypeVar("C")


@frozen
class ComponentRef:
    """A component's label: its slot and the name that recipes use."""

    slot: str
    use: str


@frozen(kw_only=True)
class Slot:
    """A place for components. `form`: "one" table, "named" tables, or "inner" to another component's table."""

    name: str
    protocol: type
    form: str

    def methods(self) -> dict[str, Callable[..., Any]]:
        """The protocol's methods, by name."""
        return {
            k: v
            for k, v in vars(self.protocol).items()
            if inspect.isfunction(v) and (k == "__call__" or not k.startswith("_"))
        }


def _slot(name: str, form: str = "one") -> Slot:
    return Slot(name=name, protocol=getattr(protocols, name.capitalize()), form=form)


SLOTS: dict[str, Slot] = {
    s.name: s
    for s in (
        _slot("source"),
        _slot("whitener"),
        _slot("activation"),
        _slot("stratum", "named"),
        _slot("term", "named"),
        _slot("constraint", "named"),
        _slot("filter"),
        _slot("dual"),
        _slot("penalty"),
        _slot("lagrangian"),
        _slot("gate", "inner"),
        _slot("phase", "named"),
        _slot("schedule", "inner"),
        _slot("optimizer"),
        _slot("kernel"),
        _slot("evaluator", "named"),
    )
}


def from_knob(name: str, *, validator: Any = None) -> Any:
    """An option required in Python that a recipe may leave out: compile then takes the knob's value."""
    return field(kw_only=True, validator=validator, metadata={"knob": name})


def from_slot(use: str) -> Any:
    """An option that holds a component, required in Python; a recipe that leaves it out gets `use` with defaults."""
    return field(kw_only=True, metadata={"use": use})


def label(cls: type) -> ComponentRef:
    """The label of a component class. Raises ComponentError where a class has none."""
    ref = cls.__dict__.get("__spalf__")
    if not isinstance(ref, ComponentRef):
        name = f"{cls.__module__}.{cls.__qualname__}"
        raise ComponentError(f"{name} carries no label (decorate it, for example @spalf.dual)")
    return ref


def _parameters(function: Any) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values() if p.name != "self"]


def _misfits(slot: Slot, cls: type) -> list[str]:
    """How a class departs from its slot's protocol."""
    out = []
    for name, wanted in slot.methods().items():
        own = inspect.getattr_static(cls, name, None)
        if own is None:
            out.append(f"has no method {name}({', '.join(_parameters(wanted))})")
            continue
        if isinstance(own, classmethod | staticmethod):
            own = own.__func__
        if not callable(own):
            out.append(f"{name} is not a method")
        elif _parameters(own) != _parameters(wanted):
            out.append(f"{name}({', '.join(_parameters(own))}) should be {name}({', '.join(_parameters(wanted))})")
    options = {a.name for a in attrs.fields(cls)}
    for name in inspect.get_annotations(slot.protocol):
        if name not in options and not hasattr(cls, name):
            out.append(f"has no attribute {name!r}")
    return out


def _label(slot_name: str, use: str) -> Callable[[type[C]], type[C]]:
    slot = SLOTS[slot_name]

    def decorate(cls: type[C]) -> type[C]:
        made: type[C] = attrs.frozen(kw_only=True)(cls)
        misfits = _misfits(slot, made)
        if misfits:
            raise ComponentError(f'{slot_name} "{use}" ({cls.__module__}.{cls.__qualname__}): ' + "; ".join(misfits))
        made.__spalf__ = ComponentRef(slot_name, use)  # type: ignore[attr-defined]
        return made

    return decorate


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, from_knob, from_slot))
def source(use: str) -> Callable[[type[C]], type[C]]:
    """Label a class as a source: where activations come from."""
    return _label("source", use)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, from_knob, from_slot))
def whitener(use: str) -> Callable[[type[C]], type[C]]:
    """Label a class as a whitener: the change of coordinates."""
    return _label("whitener", use)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, from_knob, from_slot))
def activation(use: str) -> Callable[[type[C]], type[C]]:
    """Label a class as an activation: the nonlinearity and its pseudo-gradient."""
    return _label("activation", use)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, from_knob, from_slot))
def stratum(use: str) -> Callable[[type[C]], type[C]]:
    """Label a class as a stratum: a range of dictionary rows."""
    return _label("stratum", use)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, from_knob, from_slot))
def term(use: str) -> Callable[[type[C]], type[C]]:
    """Label a class as a term: a summand of the objective."""
    return _label("term", use)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, from_knob, from_slot))
def constraint(use: str) -> Callable[[type[C]], type[C]]:
    """Label a class as a constraint: value <= budget."""
    return _label("constraint", use)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, from_knob, from_slot))
def filter(use: str) -> Callable[[type[C]], type[C]]:
    """Label a class as a filter: what controllers see of the violations."""
    return _label("filter", use)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, from_knob, from_slot))
def dual(use: str) -> Callable[[type[C]], type[C]]:
    """Label a class as a dual: the multipliers' law."""
    return _label("dual", use)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, from_knob, from_slot))
def penalty(use: str) -> Callable[[type[C]], type[C]]:
    """Label a class as a penalty: the penalties' law."""
    return _label("penalty", use)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, from_knob, from_slot))
def lagrangian(use: str) -> Callable[[type[C]], type[C]]:
    """Label a class as a lagrangian: one scalar to descend."""
    return _label("lagrangian", use)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, from_knob, from_slot))
def gate(use: str) -> Callable[[type[C]], type[C]]:
    """Label a class as a gate: when a phase may end."""
    return _label("gate", use)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, from_knob, from_slot))
def phase(use: str) -> Callable[[type[C]], type[C]]:
    """Label a class as a phase: a stretch of a run."""
    return _label("phase", use)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, from_knob, from_slot))
def schedule(use: str) -> Callable[[type[C]], type[C]]:
    """Label a class as a schedule: the learning rate's course."""
    return _label("schedule", use)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, from_knob, from_slot))
def optimizer(use: str) -> Callable[[type[C]], type[C]]:
    """Label a class as an optimizer: the primal rule."""
    return _label("optimizer", use)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, from_knob, from_slot))
def kernel(use: str) -> Callable[[type[C]], type[C]]:
    """Label a class as a kernel: a compute backend."""
    return _label("kernel", use)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field, from_knob, from_slot))
def evaluator(use: str) -> Callable[[type[C]], type[C]]:
    """Label a class as an evaluator: numbers about a finished state."""
    return _label("evaluator", use)
