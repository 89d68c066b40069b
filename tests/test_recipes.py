"""Every shipped recipe and preset compiles, without a network and to the same plan when filled. A few seconds."""

from pathlib import Path
from typing import Any

import attrs
import pytest

from spalf import plugins
from spalf.assembly import toml, walk
from spalf.assembly.compile import compile
from spalf.assembly.convert import Converter
from spalf.assembly.registry import Registry
from spalf.core.recipe import Plan

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.toml"))
HUB = {
    "pythia_70m": ("EleutherAI/pythia-70m-deduped", 512, 50304, 6),
    "pythia_160m": ("EleutherAI/pythia-160m-deduped", 768, 50304, 12),
    "pythia_1b": ("EleutherAI/pythia-1.4b", 2048, 50304, 24),
    "gemma2_2b": ("google/gemma-2-2b", 2304, 256000, 26),
    "llama3_8b": ("meta-llama/Meta-Llama-3-8B", 4096, 128256, 32),
    "spalf_literal": ("EleutherAI/pythia-1.4b", 2048, 50304, 24),
}


@pytest.fixture(scope="module")
def registry() -> Registry:
    return plugins.registry()


class Plans(dict[str, Plan]):
    """Plans by recipe name, made when asked for."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def __missing__(self, name: str) -> Plan:
        self[name] = compile(toml.read(FOLDER / f"{name}.toml"), self._registry)
        return self[name]


@pytest.fixture(scope="module")
def plans(registry: Registry) -> Plans:
    return Plans(registry)


def test_there_are_the_recipes_that_the_readme_promises() -> None:
    assert {p.stem for p in RECIPES} >= {*HUB, "quickstart", "synthetic", "toy"}


@pytest.mark.parametrize("path", RECIPES, ids=[p.stem for p in RECIPES])
def test_a_recipe_compiles(path: Path, registry: Registry) -> None:
    plan = compile(toml.read(path), registry)
    assert plan.recipe.name == path.stem
    assert sum(plan.rows.values()) == plan.knobs.F
    assert plan.total_steps > 0
    own = [getattr(plan.recipe.phase[name], "objective", "") for name in plan.recipe.phases]
    assert plan.terms or any(own)
    assert plan.recipe.phases[0] == "calibrate"


@pytest.mark.parametrize("path", RECIPES, ids=[p.stem for p in RECIPES])
def test_a_filled_recipe_is_the_same_recipe(path: Path, registry: Registry) -> None:
    plan = compile(toml.read(path), registry)
    filled = toml.parse(toml.write(Converter(registry).unstructure(plan.recipe)), "filled")
    again = compile(filled, registry)
    assert again.recipe == plan.recipe
    assert attrs.evolve(again, derived=()) == attrs.evolve(plan, derived=())
    for row in plan.derived:
        assert row.path in {r.path: r for r in again.derived}


@pytest.mark.parametrize("name", HUB)
def test_a_hub_model_states_its_facts(name: str, plans: Plans) -> None:
    model, d_model, n_vocab, n_layers = HUB[name]
    source: Any = plans[name].recipe.source
    assert (source.model, source.d_model, source.n_vocab, source.n_layers) == (model, d_model, n_vocab, n_layers)
    assert 0 < source.layer < n_layers
    assert plans[name].facts.d_model == d_model


def test_the_numbers_of_pythia_1b(plans: Plans) -> None:
    plan = plans["pythia_1b"]
    assert (plan.knobs.F, plan.knobs.L0_target, plan.total_steps) == (65536, 164, 244140)
    assert plan.rows == {"anchored": 16384, "free": 49152}
    assert plan.constraints == ("causal", "drift", "faithfulness", "orthogonality")


def test_the_default_method(plans: Plans) -> None:
    recipe: Any = plans["pythia_1b"].recipe
    assert recipe.phases == ("calibrate", "fit", "causal")
    assert recipe.constraint["faithfulness"].space == "raw"
    assert table_use(recipe.penalty) == "constant"
    assert table_use(recipe.dual) == "adrc_tracking"
    assert "discretization" not in plans["pythia_1b"].terms
    assert table_use(recipe.phase["fit"].gate) == "feasible"
    assert recipe.phase["causal"].hold == ("penalty",)


def test_the_published_method_is_kept_whole(plans: Plans) -> None:
    plan = plans["spalf_literal"]
    recipe: Any = plan.recipe
    assert table_use(recipe.dual) == "adrc_literal"
    assert table_use(recipe.penalty) == "capu"
    assert recipe.constraint["faithfulness"].space == "white"
    assert "causal_blend" in plan.constraints
    assert "causal" not in plan.constraints
    assert plan.terms == ("discretization", "l0")
    assert plan.rows["anchored"] == 32768 == plan.knobs.F // 2


def test_toy_is_small(plans: Plans) -> None:
    plan = plans["toy"]
    assert plan.facts.d_model == 32
    assert plan.knobs.F == 256
    assert plan.total_steps <= 1000
    assert walk.idle(plan.recipe) == ("term.discretization",)


def test_quickstart_needs_no_network() -> None:
    source = toml.read(FOLDER / "quickstart.toml")["source"]
    assert source["model"] == "embedded"
    assert source["text"] == "stdlib"
    assert "dataset" not in source


@pytest.mark.parametrize("name", toml.presets())
def test_a_preset_is_a_parent(name: str, registry: Registry) -> None:
    table = toml.read(name, ["name=x", "source={use='synthetic'}", "strata=['free']"])
    assert "extends" not in table
    assert toml.preset(name).startswith("# ")


def table_use(component: Any) -> str:
    return str(type(component).__spalf__.use)
