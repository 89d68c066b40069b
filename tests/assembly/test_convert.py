"""Tables <-> components: strict, complete, and every problem told. A second or two."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import pytest
from attrs import field, frozen
from attrs.validators import deep_iterable, ge, gt, in_, le, lt, matches_re, min_len
from hypothesis import given
from hypothesis import strategies as st

from spalf.assembly import fill
from spalf.assembly.convert import Converter
from spalf.assembly.registry import Registry
from spalf.core.protocols import Filter, Gate, Phase, Term
from spalf.core.recipe import Knobs
from spalf.core.slots import filter, from_knob, gate, phase, term
from spalf.errors import ComponentError, RecipeError


class Gated:
    """The methods of a gate."""

    def init(self):
        return None

    def step(self, state, signal, clock):
        return state

    def open(self, state, clock):
        return False


@gate("patient")
class Patient(Gated):
    """A gate with options."""

    patience: int = field(default=100, validator=gt(0))
    latest: float = field(default=0.97, validator=[ge(0.0), le(1.0)])


@gate("shut")
class Shut(Gated):
    """A gate without any."""


@phase("stretch")
class Stretch:
    """A phase with a slot inside."""

    gate: Gate[Any]
    terms: tuple[str, ...] = ("l0",)
    handover: Mapping[str, str] = field(factory=dict)
    spare: Gate[Any] | None = None

    def init(self, plan):
        return None

    def enter(self, plan, state):
        return None

    def step(self, plan, state):
        return None

    def done(self, plan, state):
        return True


@frozen(kw_only=True)
class Inner:
    """A record inside a component."""

    a: int = 1
    b: str = "b"


@term("all")
class All:
    """One option of each kind."""

    partial: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    integer: int = field(default=1, validator=[gt(0), lt(100)])
    real: float = field(default=0.5, validator=lt(1e6))
    truth: bool = True
    text: str = field(default="raw", validator=in_(("raw", "white")))
    either: int | str = 3
    number: int | float = 2
    maybe: float | None = None
    choice: Literal["one", "two", 3] = "one"
    many: tuple[float, ...] = field(default=(1.0,), validator=[min_len(1), deep_iterable(gt(0.0))])
    pair: tuple[int, str] = (1, "x")
    listed: list[int] = field(factory=list)
    names: frozenset[str] = frozenset()
    table: Mapping[str, float] = field(factory=dict)
    inner: Inner = field(factory=Inner)
    path: str = field(default="p", validator=matches_re("[a-z]+"))
    anything: int | tuple[int, ...] = 0

    def value(self, view):
        return None


@term("targeted")
class Targeted:
    """An option from a knob, and a validator that looks at its neighbour."""

    partial: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    target: int = from_knob("L0_target", validator=gt(0))
    low: int = 0
    high: int = field(default=10)

    @high.validator
    def _above(self, attribute, value):
        if value < self.low:
            raise ValueError(f"high {value} lies below low {self.low}")

    def value(self, view):
        return None


@filter("one")
class One:
    """A filter, whose protocol has a parameter."""

    every: int = 1

    def init(self, m):
        return None

    def enter(self, state, g_M, entering_M):
        return state

    def step(self, state, g_M, on_M):
        return state

    def signal(self, state, g_M, on_M):
        return None

    def tick(self, state):
        return state


REGISTRY = Registry((c, "tests 1") for c in (Patient, Shut, Stretch, All, Targeted, One))
CONVERTER = Converter(REGISTRY)


def problems(value: Any, kind: Any, path: str = "here") -> list[str]:
    with pytest.raises(RecipeError) as caught:
        CONVERTER.structure(value, kind, path)
    return [str(p) for p in caught.value.problems]


# --------------------------------------------------------------------------------------------- what is taken
def test_a_name_is_short_for_a_table() -> None:
    assert CONVERTER.structure("shut", Gate[Any]) == Shut() == CONVERTER.structure({"use": "shut"}, Gate)


def test_a_parametrised_protocol_is_its_slot() -> None:
    assert CONVERTER.structure("one", Filter[Any]) == One()


def test_slots_inside_a_component() -> None:
    table = {"use": "stretch", "gate": {"use": "patient", "patience": 3}, "spare": "shut"}
    made = CONVERTER.structure(table, Phase)
    assert made == Stretch(gate=Patient(patience=3), spare=Shut())
    assert CONVERTER.unstructure(made)["gate"] == {"use": "patient", "patience": 3, "latest": 0.97}


def test_use_defaults_to_the_name_of_a_named_table() -> None:
    made = CONVERTER.structure({"all": {}, "other": {"use": "all", "integer": 2}}, Mapping[str, Term])
    assert made == {"all": All(), "other": All(integer=2)}


def test_every_default_is_written_and_none_is_left_out() -> None:
    table = CONVERTER.unstructure(All())
    assert table["use"] == "all"
    assert table["many"] == [1.0]
    assert table["inner"] == {"a": 1, "b": "b"}
    assert "maybe" not in table
    assert CONVERTER.unstructure(All(maybe=1.0, names=frozenset("ba")))["names"] == ["a", "b"]


def test_an_int_is_a_float_and_stays_an_int_where_both_are_allowed() -> None:
    made = CONVERTER.structure({"use": "all", "real": 3, "number": 3}, Term)
    assert type(made.real) is float
    assert type(made.number) is int


# ------------------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"integer": 3.5}, "here.integer: expected int, got float 3.5"),
        ({"integer": True}, "here.integer: expected int, got bool true"),
        ({"integer": "3"}, 'here.integer: expected int, got str "3"'),
        ({"integer": 0}, "here.integer: must be > 0, got 0"),
        ({"integer": 100}, "here.integer: must be < 100, got 100"),
        ({"integer": 2**70}, "here.integer: does not fit into 64 bits"),
        ({"real": "x"}, 'here.real: expected float, got str "x"'),
        ({"real": True}, "here.real: expected float, got bool true"),
        ({"real": float("nan")}, "here.real: is not a number"),
        ({"real": 2**70}, f"here.real: expected float, got int {2**70}"),
        ({"truth": 1}, "here.truth: expected bool, got int 1"),
        ({"truth": "no"}, 'here.truth: expected bool, got str "no"'),
        ({"text": "row"}, 'here.text: must be one of "raw", "white", got "row" (did you mean "raw"?)'),
        ({"text": "zzz"}, 'here.text: must be one of "raw", "white", got "zzz"'),
        ({"text": ["raw"]}, "here.text: expected str, got an array ['raw']"),
        ({"either": 0.5}, "here.either: expected int or str, got float 0.5"),
        ({"number": "x"}, 'here.number: expected int or float, got str "x"'),
        ({"maybe": "x"}, 'here.maybe: expected float, got str "x"'),
        ({"choice": "too"}, 'here.choice: must be one of "one", "two", 3, got "too" (did you mean "two"?)'),
        ({"choice": 4}, 'here.choice: must be one of "one", "two", 3, got 4'),
        ({"many": 3}, "here.many: expected an array, got int 3"),
        ({"many": []}, "here.many: must have at least 1 entry, got 0"),
        ({"many": [1.0, "x"]}, 'here.many[1]: expected float, got str "x"'),
        ({"many": [1.0, -2.0]}, "here.many: must be > 0.0, got -2.0"),
        ({"pair": [1]}, "here.pair: expected 2 entries, got 1"),
        ({"pair": [1, 2]}, "here.pair[1]: expected str, got int 2"),
        ({"table": [1]}, "here.table: expected a table, got an array [1]"),
        ({"table": {"a": "x"}}, 'here.table.a: expected float, got str "x"'),
        ({"inner": 3}, "here.inner: expected a table, got int 3"),
        ({"inner": {"a": "x"}}, 'here.inner.a: expected int, got str "x"'),
        ({"inner": {"c": 1}}, "here.inner.c: unknown key (keys: a, b)"),
        ({"path": "P"}, "here.path: must match the pattern '[a-z]+', got \"P\""),
        ({"anything": ["x"]}, 'here.anything[0]: expected int, got str "x"'),
        ({"intger": 3}, 'here.intger: unknown option (did you mean "integer"?)'),
    ],
)
def test_one_wrong_option(option: dict[str, Any], message: str) -> None:
    assert problems({"use": "all", **option}, Term) == [message]


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("patent", Gate, 'here: no gate is called "patent" (did you mean "patient"?)'),
        ({"patience": 3}, Gate, "here.use: is required and missing (known: patient, shut)"),
        ({"use": 3}, Gate, "here.use: expected str, got int 3"),
        (3, Gate, "here: expected a table or a name, got int 3"),
        ({"use": "shut", "x": 1}, Gate, "here.x: unknown option (options: none)"),
        ({"use": "stretch"}, Phase, "here.gate: is required and missing"),
        ({"use": "stretch", "gate": "shutt"}, Phase, 'here.gate: no gate is called "shutt" (did you mean "shut"?)'),
        (
            {"use": "stretch", "gate": {"use": "patient", "patience": -1}},
            Phase,
            "here.gate.patience: must be > 0, got -1",
        ),
        ({"use": "targeted"}, Term, "here.target: is required and missing"),
        ({"use": "targeted", "target": 1, "low": 5, "high": 2}, Term, "here.high: 2 lies below low 5"),
        (
            {"a.b": {"use": "all"}},
            Mapping[str, Term],
            "here.a.b: is no name (letters, digits, _ and -, no digit first)",
        ),
        ({"alll": {}}, Mapping[str, Term], 'here.alll: no term is called "alll" (did you mean "all"?)'),
        ([], Mapping[str, Term], "here: expected a table, got an array []"),
    ],
)
def test_one_wrong_component(value: Any, kind: Any, message: str) -> None:
    assert problems(value, kind) == [message]


def test_all_problems_at_once() -> None:
    table = {"use": "all", "integer": -1, "real": "x", "many": ["y", 1.0, "z"], "inner": {"a": "x", "q": 1}, "oops": 1}
    assert [line.split(":")[0] for line in problems(table, Term)] == [
        "here.oops",
        "here.real",
        "here.many[0]",
        "here.many[2]",
        "here.inner.q",
        "here.inner.a",
        "here.integer",
    ]


def test_several_validators_are_all_heard() -> None:
    table = {"use": "all", "integer": -1, "text": "row", "many": []}
    assert len(problems(table, Term)) == 3


def test_an_unreadable_option_type_is_the_components_fault() -> None:
    @term("odd")
    class Odd:
        """Its option type cannot be evaluated at run time."""

        partial: ClassVar[bool] = False
        dense: ClassVar[bool] = False
        x: "NotHere" = 0  # noqa: F821

        def value(self, view):
            return None

    with pytest.raises(ComponentError, match=r"NotHere.*not under TYPE_CHECKING"):
        Converter(Registry([(Odd, "a 1")])).structure("odd", Term)


def test_an_option_that_toml_cannot_hold_is_the_components_fault() -> None:
    @term("imaginary")
    class Imaginary:
        """Its option has no TOML."""

        partial: ClassVar[bool] = False
        dense: ClassVar[bool] = False
        x: complex = 0j

        def value(self, view):
            return None

    with pytest.raises(ComponentError, match=r"term\.i: an option of type .*complex.* cannot be written in TOML"):
        Converter(Registry([(Imaginary, "a 1")])).structure({"use": "imaginary", "x": 1}, Term, "term.i")


# ------------------------------------------------------------------------------------------------- the knobs
KNOBS = Knobs(F=100, L0_target=7, R2_target=0.5, lr=1.0)


@pytest.mark.parametrize(
    ("given", "target"), [("targeted", 7), ({"use": "targeted"}, 7), ({"use": "targeted", "target": 3}, 3)]
)
def test_a_knob_fills_what_is_missing(given: Any, target: int) -> None:
    filled = fill.with_knobs({"term": {"t": given}}, REGISTRY, KNOBS)
    assert filled["term"]["t"]["target"] == target


@pytest.mark.parametrize(
    "table",
    [{"term": 3}, {"term": {"t": 3}}, {"term": {"t": {"use": "none"}}}, {"term": {"t": {"use": 3}}}, {"gate": 1}],
)
def test_filling_leaves_junk_for_the_converter(table: dict[str, Any]) -> None:
    assert fill.with_knobs(table, REGISTRY, KNOBS) == table


def test_an_unknown_knob_is_the_components_fault() -> None:
    @term("wrong")
    class Wrong:
        """Asks for a knob that there is not."""

        partial: ClassVar[bool] = False
        dense: ClassVar[bool] = False
        x: int = from_knob("F2")

        def value(self, view):
            return None

    with pytest.raises(ComponentError, match='no knob is called "F2"'):
        fill.with_knobs({"term": {"wrong": {}}}, Registry([(Wrong, "a 1")]), KNOBS)


# ------------------------------------------------------------------------------------------------ properties
ALLS = st.builds(
    All,
    integer=st.integers(1, 99),
    real=st.floats(max_value=1e5, allow_nan=False),
    truth=st.booleans(),
    text=st.sampled_from(["raw", "white"]),
    either=st.integers(-9, 9) | st.text(max_size=3),
    number=st.integers(-9, 9) | st.floats(allow_nan=False),
    maybe=st.none() | st.floats(allow_nan=False),
    choice=st.sampled_from(["one", "two", 3]),
    many=st.lists(st.floats(0.1, 9), min_size=1, max_size=3).map(tuple),
    pair=st.tuples(st.integers(-9, 9), st.text(max_size=3)),
    listed=st.lists(st.integers(-9, 9), max_size=3),
    names=st.frozensets(st.text(max_size=3), max_size=3),
    table=st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False), max_size=3),
    inner=st.builds(Inner, a=st.integers(-9, 9), b=st.text(max_size=3)),
    anything=st.integers(-9, 9) | st.lists(st.integers(-9, 9), max_size=3).map(tuple),
)


@given(ALLS)
def test_unstructured_and_structured_again_is_the_same(component: All) -> None:
    assert CONVERTER.structure(CONVERTER.unstructure(component), Term) == component


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["all", "stretch", "patient", "shut"])
    | st.dates(),
    lambda v: (
        st.lists(v, max_size=3)
        | st.dictionaries(
            st.text(max_size=4) | st.sampled_from(["use", "gate", "integer", "many", "table", "inner", "spare"]),
            v,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@given(JUNK, st.sampled_from([Term, Phase, Gate, Mapping[str, Phase], Mapping[str, Term], Knobs]))
def test_junk_raises_nothing_but_a_recipe_error(junk: Any, kind: Any) -> None:
    found = None
    try:
        CONVERTER.structure(junk, kind)
    except RecipeError as e:
        found = [p.message for p in e.problems]
    assert found is None or (found and all(found))


@given(st.dictionaries(st.sampled_from([a for a in CONVERTER.unstructure(All()) if a != "use"]), JUNK, max_size=6))
def test_junk_in_options_raises_nothing_but_a_recipe_error(options: dict[str, Any]) -> None:
    try:
        made = CONVERTER.structure({"use": "all", **options}, Term)
    except RecipeError as e:
        blamed = {p.path.split(".")[0].split("[")[0] for p in e.problems}
    else:
        blamed = set()
        assert CONVERTER.structure(CONVERTER.unstructure(made), Term) == made
    assert blamed <= options.keys()
