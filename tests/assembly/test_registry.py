"""Names to classes: duplicates, unknown names, origins. Milliseconds."""

import pytest

from spalf.assembly.registry import Registry
from spalf.core.slots import ComponentRef, gate, lagrangian
from spalf.errors import ComponentError, RecipeError


@lagrangian("sum")
class Sum:
    """Objective alone."""

    def __call__(self, objective, violations, control):
        return objective


@lagrangian("sum")
class OtherSum:
    """The same name, from somewhere else."""

    def __call__(self, objective, violations, control):
        return objective


@gate("never")
class Never:
    """Stays closed."""

    def init(self):
        return None

    def step(self, state, signal, clock):
        return state

    def open(self, state, clock):
        return False


def test_resolves_and_tells_the_origin() -> None:
    registry = Registry([(Never, "acme 1.0"), (Sum, "spalf 0.1")])
    assert registry.resolve("lagrangian", "sum") is Sum
    assert registry.origin(ComponentRef("gate", "never")) == "acme 1.0"


def test_iterates_in_the_order_of_slots() -> None:
    registry = Registry([(Never, "a 1"), (Sum, "a 1")])
    assert list(registry) == [ComponentRef("lagrangian", "sum"), ComponentRef("gate", "never")]
    assert len(registry) == 2
    assert ComponentRef("gate", "never") in registry
    assert ComponentRef("dual", "never") not in registry
    assert registry.names("gate") == ("never",)


def test_a_name_offered_twice_names_both_owners() -> None:
    with pytest.raises(ComponentError) as caught:
        Registry([(Sum, "spalf 0.1"), (OtherSum, "acme 1.0")])
    assert str(caught.value) == 'lagrangian "sum" is offered twice: by spalf 0.1 and by acme 1.0 (rename one of them)'


def test_an_unlabelled_class_is_refused() -> None:
    with pytest.raises(ComponentError, match="carries no label"):
        Registry([(int, "acme 1.0")])


@pytest.mark.parametrize(
    ("slot", "use", "message"),
    [
        ("lagrangian", "summ", 'lagrangian: no lagrangian is called "summ" (did you mean "sum"?)'),
        ("lagrangian", "zzz", 'lagrangian: no lagrangian is called "zzz" (known: sum)'),
        ("dual", "pi", 'dual: no dual is called "pi" (known: none)'),
        ("dul", "pi", 'dul: no slot is called "dul" (did you mean "dual"?)'),
    ],
)
def test_an_unknown_name_comes_with_a_hint(slot: str, use: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Registry([(Sum, "spalf 0.1")]).resolve(slot, use)
    assert str(caught.value) == message


def test_the_origin_of_a_stranger_is_an_error() -> None:
    with pytest.raises(RecipeError, match="no gate is called"):
        Registry([]).origin(ComponentRef("gate", "never"))
