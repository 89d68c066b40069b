"""Tables to plans: knobs, facts, cross-checks, derived numbers. A few seconds."""

from typing import Any, ClassVar

import attrs
import pytest
from attrs import field
from hypothesis import given
from hypothesis import strategies as st

from spalf.assembly import toml, walk
from spalf.assembly.compile import compile
from spalf.assembly.convert import Converter
from spalf.assembly.registry import Registry
from spalf.core.recipe import Derived, Plan
from spalf.core.slots import constraint, label, source, stratum, term
from spalf.core.values import Facts
from spalf.errors import RecipeError, SourceError
from spalf.parts import spalf_components


@source("told")
class Told:
    """Facts as its options say; opened by nobody."""

    d_model: int = 64
    n_vocab: int = 1000
    gives: tuple[str, ...] = ("activations", "tokens", "logits", "unembedding")
    shuffle: int = 8192
    overlap: bool = False
    broken: bool = False

    def facts(self) -> Facts:
        if self.broken:
            raise SourceError("the model is not there (download it)")
        return Facts(
            d_model=self.d_model,
            n_vocab=self.n_vocab,
            provides=frozenset(self.gives),
            context=128,
            n_parameters=1_000_000,
            flops_to_hook=1e6,
            flops_full=2e6,
            bytes_per_activation=2 * self.d_model,
            shuffle=self.shuffle,
        )

    def open(self, seed, device):
        raise AssertionError("compile opens nothing")


@stratum("fixed")
class Fixed:
    """So many rows, whatever remains."""

    count: int = 8

    def rows(self, facts, remaining, width):
        return self.count

    def anchor(self, stream, rows) -> None:
        return None

    def start(self, rows, metric, anchor, draw):
        return None

    def project_gradient_(self, weight_FD, grad_FD):
        return None

    def project_(self, weight_FD):
        return None


@constraint("settled")
class Settled:
    """Has an option that 0 derives, and rows for the plan."""

    needs: ClassVar[frozenset[str]] = frozenset()
    partial: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    level: float = field(default=0.0)

    def settle(self, plan: Plan) -> "Settled":
        if self.level < 0:
            raise ValueError("level lies below 0 (raise it)")
        return attrs.evolve(self, level=self.level or 1.0 / plan.facts.d_model)

    def derive(self, plan: Plan) -> list[Derived]:
        return [Derived(path="budget", value=self.level, formula="1 / d_model", origin="constraint.settled.level = 0")]

    def budget(self, view):
        return None

    def value(self, view):
        return None


@term("picky")
class Picky:
    """Needs what only synthetic sources have."""

    needs: ClassVar[frozenset[str]] = frozenset({"truth"})
    partial: ClassVar[bool] = False
    dense: ClassVar[bool] = False

    def value(self, view):
        return None


REGISTRY = Registry(
    [*((c, "spalf 9") for c in spalf_components()), *((c, "tests 1") for c in (Told, Fixed, Settled, Picky))]
)
BASE = ("source=told", "name=base", "budget.tokens=409600")


def table(*sets: str) -> toml.Table:
    return toml.read("spalf", [*BASE, *sets])


def plan_of(*sets: str) -> Plan:
    return compile(table(*sets), REGISTRY)


def problems(*sets: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        plan_of(*sets)
    return [str(p) for p in caught.value.problems]


def row(plan: Plan, path: str) -> Derived:
    return next(r for r in plan.derived if r.path == path)


# ----------------------------------------------------------------------------------------------- what is settled
@pytest.mark.parametrize(
    ("optimizer", "use", "warmup"),
    [
        ("'adamw'", "linear", 20),
        ("{ use = 'adamw', schedule = { warmup = 7 } }", "linear", 7),
        ("{ use = 'adamw', schedule = 'cosine' }", "cosine", 20),
        ("{ use = 'adamw', schedule = { use = 'constant', warmup = 3 } }", "constant", 3),
    ],
)
def test_an_optimizer_that_names_no_schedule_gets_one(optimizer: str, use: str, warmup: int) -> None:
    plan = plan_of(f"optimizer={optimizer}")
    schedule: Any = getattr(plan.recipe.optimizer, "schedule", None)
    assert label(type(schedule)).use == use
    assert schedule.warmup == warmup
    if use != "constant":
        assert row(plan, "optimizer.schedule.warmup").value == warmup
    assert f"schedule.{use}" in plan.origins


def test_knobs_that_are_0_are_derived() -> None:
    plan = plan_of()
    assert (plan.knobs.F, plan.knobs.L0_target) == (32 * 64, 6)
    assert plan.recipe.knobs == plan.knobs
    assert row(plan, "F") == Derived(path="F", value=2048, formula="32 * d_model", origin="knobs.F = 0")
    assert row(plan, "L0_target") == Derived(
        path="L0_target", value=6, formula="ceil(F / 400)", origin="knobs.L0_target = 0"
    )


def test_knobs_that_are_given_stay() -> None:
    plan = plan_of("knobs.F=1024", "knobs.L0_target=9")
    assert (plan.knobs.F, plan.knobs.L0_target) == (1024, 9)
    assert row(plan, "F").formula == "given"


def test_knobs_reach_the_options_that_are_theirs() -> None:
    recipe: Any = plan_of("knobs.L0_target=9", "knobs.R2_target=0.5", "knobs.lr=0.001").recipe
    assert recipe.term["l0"].target == 9
    assert recipe.constraint["faithfulness"].r2 == 0.5
    assert recipe.optimizer.lr == 0.001


def test_an_option_wins_over_its_knob() -> None:
    recipe: Any = plan_of("knobs.R2_target=0.5", "constraint.faithfulness.r2=0.25").recipe
    assert recipe.constraint["faithfulness"].r2 == 0.25


def test_rows_follow_the_order_of_strata() -> None:
    assert plan_of().rows == {"anchored": 512, "free": 1536}
    rows = plan_of("stratum.few={use='fixed'}", "strata=['few', 'anchored', 'free']").rows
    assert list(rows.items()) == [("few", 8), ("anchored", 512), ("free", 1528)]


def test_the_axes_are_in_name_order_and_hold_what_phases_use() -> None:
    plan = plan_of("phase.fit.constraints=['orthogonality', 'faithfulness']", "phases=['calibrate', 'fit']", LAST)
    assert plan.constraints == ("faithfulness", "orthogonality")
    assert plan.terms == ("l0",)


def test_idle_tables_are_allowed_and_found() -> None:
    assert walk.idle(plan_of().recipe) == ("term.discretization",)


def test_facts_can_be_given() -> None:
    facts = Facts(d_model=16, n_vocab=50, provides=frozenset({"activations", "tokens", "logits"}))
    plan = compile(table("source.broken=true"), REGISTRY, facts)
    assert plan.facts is facts
    assert plan.knobs.F == 512


def test_settle_and_derive() -> None:
    plan = plan_of("constraint.mine={use='settled'}", "phase.fit.constraints=['mine', 'drift', 'faithfulness']")
    recipe: Any = plan.recipe
    assert recipe.constraint["mine"].level == 1 / 64
    assert row(plan, "constraint.mine.budget").value == 1 / 64
    assert row(plan, "constraint.faithfulness.budget").value is None
    assert row(plan, "constraint.faithfulness.budget").origin == "on entering phase.fit"


def test_an_idle_component_is_not_settled() -> None:
    recipe: Any = plan_of("constraint.mine={use='settled', level=-1.0}").recipe
    assert recipe.constraint["mine"].level == -1.0


def test_the_gains_of_the_controller_are_derived() -> None:
    plan = plan_of()
    paths = {r.path for r in plan.derived}
    assert {"dual.K_P", "dual.K_I", "optimizer.schedule.warmup", "phase.calibrate.tokens"} <= paths
    assert row(plan, "total_steps").value == plan.total_steps == 100


def test_estimates_follow_their_formulas() -> None:
    plan = plan_of("knobs.F=1000", "knobs.L0_target=10", "budget.tokens=8000", "budget.batch=100")
    values = {r.path: r.value for r in plan.derived}
    parameters = 2 * 1000 * 64 + 1000 + 64 + 1
    assert values["parameters"] == parameters
    assert values["memory.moments.bytes"] == 8 * parameters
    assert values["memory.code_dense.bytes"] == 12 * 100 * 1000
    assert values["memory.code_compact.bytes"] == 20 * 100 * 10
    assert values["memory.shuffle.bytes"] == 8192 * 128
    assert values["memory.model.bytes"] == 2_000_000
    assert values["memory.logits.bytes"] == 16 * 16 * 128 * 1000
    assert values["memory.total.bytes"] == sum(
        v for k, v in values.items() if k.startswith("memory.") and "total" not in k and "compact" not in k and v
    )
    assert values["flops.sae_dense"] == 8000 * 10 * 1000 * 64
    assert values["flops.sae_compact"] == 8000 * (2 * 1000 + 8 * 10) * 64
    assert values["flops.harvest"] == 8000 * 1e6


def test_a_source_that_harvests_ahead_needs_one_more_block() -> None:
    plain, ahead = plan_of(), plan_of("source.overlap=true")
    assert row(ahead, "memory.shuffle_ahead.bytes").value == 8192 * 128
    total = "memory.total.bytes"
    assert (row(ahead, total).value or 0) - (row(plain, total).value or 0) == 8192 * 128
    assert "memory.shuffle_ahead.bytes" not in {r.path for r in plain.derived}


def test_every_row_says_where_it_comes_from() -> None:
    plan = plan_of()
    assert all(r.formula and r.origin for r in plan.derived)
    assert len({r.path for r in plan.derived}) == len(plan.derived)


def test_origins_name_the_distributions() -> None:
    origins = plan_of().origins
    assert origins["source.told"] == "tests 1"
    assert origins["gate.feasible"] == "spalf 9"


def test_a_filled_recipe_compiles_to_the_same_plan() -> None:
    plan = plan_of()
    text = toml.write(Converter(REGISTRY).unstructure(plan.recipe))
    again = compile(toml.parse(text, "filled"), REGISTRY)
    assert again.recipe == plan.recipe
    assert again.rows == plan.rows
    assert (again.terms, again.constraints, again.total_steps) == (plan.terms, plan.constraints, plan.total_steps)


# ------------------------------------------------------------------------------------------------ known mistakes
LAST = "phase.fit.gate='exhausted'"
SYNTHETIC = "source.gives=['activations', 'truth']"
MISTAKES = [
    # names in lists
    (["phases=[]"], "phases: is empty (name at least one phase)"),
    (["strata=[]"], "strata: is empty (name at least one stratum)"),
    (["phases=['calibrate', 'fitt']"], 'phases: "fitt" is not declared (did you mean "fit"?)'),
    (["phases=['calibrate', 'fit', 'fit']", LAST], 'phases: "fit" is named 2 times (name it once)'),
    (["strata=['anchored', 'fre']"], 'strata: "fre" is not declared (did you mean "free"?)'),
    (["strata=['free', 'free']"], 'strata: "free" is named 2 times (name it once)'),
    (["phases='fit'"], 'phases: expected an array, got str "fit"'),
    (["phases=['calibrate', 3]"], "phases[1]: expected str, got int 3"),
    (["phases=['fit', 'calibrate', 'causal']"], 'phases: "fit" trains before whitener, rows and thresholds are set'),
    (["phase.fit.terms=[]"], "phase.fit.terms: is empty: nothing would be minimised"),
    (["phase.fit.terms=['l00']"], 'phase.fit.terms: "l00" is not declared (did you mean "l0"?)'),
    (["phase.fit.terms=['l0', 'l0']"], 'phase.fit.terms: "l0" is named 2 times'),
    (
        ["phase.fit.constraints=['faithfulnes']"],
        'phase.fit.constraints: "faithfulnes" is not declared (did you mean "faithfulness"?)',
    ),
    (["phase.causal.hold=['penalti']"], 'phase.causal.hold: "penalti" is not declared (did you mean "penalty"?)'),
    (
        ["phase.causal.handover={nothing='causal'}"],
        "phase.causal.handover.nothing: is no constraint of the phase before (that phase has: drift",
    ),
    (["phase.causal.handover={drift='causal'}"], "phase.causal.handover.drift: goes on in this phase"),
    (
        ["phase.causal.handover={drift='nothing'}", "phase.causal.constraints=['causal']"],
        'phase.causal.handover.drift: "nothing" is no constraint of this phase',
    ),
    ([LAST], 'phase.fit.gate: "exhausted" leaves no step to "causal" (use a gate such as "feasible")'),
    # strata and what refers to them
    (["knobs.F=16", "knobs.L0_target=2", "stratum.anchored.cap=24"], "more than half of the 16 rows"),
    (["stratum.anchored.cap=1030", "source.n_vocab=5000"], "stratum.anchored.cap: 1030 anchors are more than half"),
    (["stratum.few={use='fixed', count=2048}", "strata=['few', 'free']"], "stratum.free: gets 0 of 2048 rows"),
    (["stratum.few={use='fixed', count=-1}", "strata=['few', 'free']"], "stratum.few: gets -1 of 2048 rows"),
    (
        ["stratum.few={use='fixed', count=3000}", "strata=['few', 'free']"],
        "stratum.few: takes 3000 rows where 2048 of 2048 remain",
    ),
    (["stratum.few={use='fixed'}", "strata=['few']"], "strata: leaves 2040 of 2048 rows to no stratum"),
    (["strata=['free', 'anchored']"], "stratum.anchored: takes 512 rows where 0 of 2048 remain"),
    (["strata=['free']"], 'constraint.drift.stratum: "anchored" is not in strata (add it there'),
    (["constraint.drift.stratum=anchord"], 'constraint.drift.stratum: "anchord" is not declared (did you mean "anch'),
    (
        ["constraint.drift.stratum=free"],
        'constraint.drift.stratum: "free" is tied to no anchors to drift from (name one of anchored)',
    ),
    (
        ["source.gives=['activations', 'logits']"],
        'stratum.anchored: anchors of the activation need "tokens", which this source does not provide',
    ),
    (["stratum.x-1={use='free'}", "stratum.'a b'={use='free'}"], "stratum.a b: is no name"),
    # what the source gives
    (
        ["source.gives=['activations', 'unembedding']"],
        'constraint.causal: needs logits (source "told" provides activations, unembedding; take it out of the phases',
    ),
    ([SYNTHETIC], "evaluator.downstream_loss: needs logits"),
    ([SYNTHETIC], "set evaluator.downstream_loss = false"),
    (["term.picky={}", "phase.fit.terms=['picky']"], "term.picky: needs truth"),
    (["source.broken=true"], "source: the model is not there (download it)"),
    (["source.d_model=0"], "source: has activations of 0 dimensions"),
    (["source.shuffle=1000"], "source.shuffle: a block of 1000 is smaller than a batch of 4096"),
    (["constraint.causal.sequences=100000"], "constraint.causal.sequences: 100000 contexts of 128 tokens need 191 GiB"),
    (["source=tolld"], 'source: no source is called "tolld" (did you mean "told"?)'),
    # numbers
    (["budget.tokens=100"], "budget.tokens: 100 are less than one batch of 4096 (raise it, or lower budget.batch)"),
    (["budget.batch=3.5"], "budget.batch: expected int, got float 3.5"),
    (["budget.batch=0"], "budget.batch: must be > 0, got 0"),
    (["knobs.F=64", "knobs.L0_target=64"], "knobs.L0_target: 64 active features of 64 are all of them"),
    (["knobs.L0_target=65"], "knobs.L0_target: 65 active features exceed the 64 dimensions"),
    (["knobs.F=4294967296", "knobs.L0_target=5"], "knobs.F: 4294967296 features are more than 2147483647"),
    (["knobs.F=-1"], "knobs.F: must be >= 0, got -1"),
    (["knobs.F=1e3"], "knobs.F: expected int, got float 1000.0"),
    (["knobs.R2_target=1.0"], "knobs.R2_target: must be < 1.0, got 1.0"),
    (["knobs.R2_target=0"], "knobs.R2_target: must be > 0.0, got 0.0"),
    (["knobs.lr=0.0"], "knobs.lr: must be > 0.0, got 0.0"),
    (["knobs.lr=nan"], "knobs.lr: is not a number"),
    (["knobs.lr=1.0"], "optimizer.lr: one step would move a unit row"),
    (["knobs.L0=3"], 'knobs.L0: unknown key (did you mean "L0_target"?)'),
    (["knobs=3"], "knobs: expected a table, got int 3"),
    (["seed=-1"], "seed: must be from 0 to 9223372036854775806, got -1"),
    (["seed=true"], "seed: expected int, got bool true"),
    (["name='a/b'"], 'name: "a/b" is no name for a run'),
    (["name=''"], 'name: "" is no name for a run'),
    (["record.keep=0"], "record.keep: must be > 0, got 0"),
    # components
    (["dual.kpp=1"], "dual.kpp: unknown option"),
    (
        ["optimizer.warmup=3"],
        'optimizer.warmup: unknown option (write "schedule.warmup": it is an option of schedule "linear")',
    ),
    (["optimizer.schedule.decoy=0.1"], 'optimizer.schedule.decoy: unknown option (did you mean "decay"?)'),
    (["optimizer.schedule=linar"], 'optimizer.schedule: no schedule is called "linar" (did you mean "linear"?)'),
    (["dual=adcr"], 'dual: no dual is called "adcr" (did you mean "adrc"?)'),
    (["dual=3"], "dual: expected a table or a name, got int 3"),
    (["phase.fit.gate='feasibl'"], 'phase.fit.gate: no gate is called "feasibl" (did you mean "feasible"?)'),
    (["phase.fit.gate.patience=0"], "phase.fit.gate.patience: must be > 0, got 0"),
    (["filter.every=1_000_000"], "filter.every: the dual side would never move"),
    (["dual.every=7"], "dual: every = 7, but this law moves on the filter's ticks (set filter.every)"),
    (["phase.fit.gate.latest=0.1"], "phase.fit.gate: latest = 0.1 comes before earliest = 0.9"),
    (["phase.extra={}"], 'phase.extra: no phase is called "extra"'),
    (["penality='capu'"], 'penality: unknown key (did you mean "penalty"?)'),
    (["stratum=3"], "stratum: expected a table, got int 3"),
    (["stratum.free=true"], "stratum.free: expected a table or a name, got bool true"),
    (["evaluator.downstream_loss=true"], "evaluator.downstream_loss: expected a table or a name, got bool true"),
    (
        ["constraint.faithfulness.space=grey"],
        'constraint.faithfulness.space: must be one of "raw", "white", got "grey"',
    ),
    (["constraint.faithfulness.r2=2.0"], "constraint.faithfulness.r2: must be < 1.0, got 2.0"),
    (["optimizer.betas=[0.9]"], "optimizer.betas: expected 2 entries, got 1"),
    (
        ["constraint.mine={use='settled', level=-1.0}", "phase.fit.constraints=['mine']"],
        "constraint.mine: level lies below 0 (raise it)",
    ),
]


@pytest.mark.parametrize(("sets", "expected"), MISTAKES, ids=[m[1][:60] for m in MISTAKES])
def test_a_known_mistake_is_told(sets: list[str], expected: str) -> None:
    found = problems(*sets)
    assert any(expected in line for line in found), found


@pytest.mark.parametrize("slot", ["source", "dual", "optimizer", "name", "phases", "strata"])
def test_what_is_left_out_is_asked_for(slot: str) -> None:
    recipe = table()
    del recipe[slot]
    with pytest.raises(RecipeError, match=f"(?m)^{slot}: is required and missing"):
        compile(recipe, REGISTRY)


def test_problems_of_every_kind_come_together_and_once() -> None:
    found = problems("dual.kpp=1", "knobs.lr=-1.0", "source.broken=true", "budget.tokens='x'", "phase.fit.gate=7")
    assert sorted(line.split(":")[0] for line in found) == [
        "budget.tokens",
        "dual.kpp",
        "knobs.lr",
        "phase.fit.gate",
        "source",
    ]


def test_cross_checks_come_together() -> None:
    found = problems("phases=['calibrate', 'fit', 'cause']", "strata=['anchored', 'fre']", "budget.tokens=1", "seed=-3")
    assert {"phases", "strata", "budget.tokens", "seed"} <= {line.split(":")[0] for line in found}


def test_a_recipe_without_a_parent_needs_no_empty_tables() -> None:
    bare = {
        "name": "bare",
        "phases": ["calibrate", "fit"],
        "strata": ["free"],
        "source": "told",
        "whitener": "identity",
        "activation": "jumprelu",
        "filter": "identity",
        "dual": "pi",
        "penalty": "constant",
        "lagrangian": "plain",
        "optimizer": "adam",
        "kernel": "torch",
        "stratum": {"free": {}},
        "term": {"l0": {}},
        "constraint": {"faithfulness": {}},
        "phase": {
            "calibrate": {},
            "fit": {"use": "constrained", "constraints": ["faithfulness"], "gate": "exhausted"},
        },
    }
    plan = compile(bare, REGISTRY)
    assert plan.rows == {"free": 2048}
    assert plan.recipe.evaluator == {}


PATHS = ["name", "seed", "phases", "strata", "knobs.F", "budget.batch", "source", "dual.gain", "phase.fit", "term.l0"]
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=5), v, max_size=2),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(PATHS), JUNK, min_size=1, max_size=4))
def test_junk_raises_nothing_but_a_recipe_error(junk: dict[str, Any]) -> None:
    recipe: Any = table()
    for path, value in junk.items():
        slot, _, key = path.partition(".")
        recipe[slot] = {**recipe[slot], key: value} if key and isinstance(recipe[slot], dict) else value
    try:
        plan = compile(recipe, REGISTRY)
    except RecipeError as e:
        found = e.problems
    else:
        found = ()
        assert sum(plan.rows.values()) == plan.knobs.F
    assert all(p.message for p in found)
