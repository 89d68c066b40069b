"""docs/coming_from.md is true: what it names exists, defaults are the defaults, and its recipes compile.

Code is spalf's, but for the first two columns of a table and fenced blocks: there it is another library's. Where `make
peers` has been run, names and defaults of SAELens and dictionary_learning are compared with their sources, which are
read and not imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import attrs
import pytest
import tomli
import torch
from attrs import frozen
from typer.main import get_command

import spalf
from spalf import Facts, Pairs, RecipeError, hooks, plugins, write_pairs
from spalf.assembly import toml
from spalf.assembly.compile import compile
from spalf.assembly.convert import Converter
from spalf.assembly.options import option_types, options, slot_of
from spalf.assembly.registry import Registry
from spalf.cli import app
from spalf.core.recipe import Plan, Recipe
from spalf.core.slots import SLOTS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "coming_from.md"
PRESETS = sorted(p.stem for p in (ROOT / "spalf" / "presets").glob("*.toml"))
PEERS = ROOT / ".venv" / "peers" / "lib"
TEXT = PAGE.read_text(encoding="utf-8")
CODE = re.compile(r"`([^`\n]+)`")
NOTHING = attrs.NOTHING


# ------------------------------------------------------------------------------------------------------- the page
@frozen(kw_only=True)
class Row:
    """A table's row: the headings above it and its cells by column, first as `theirs`, the default columns apart."""

    section: str
    part: str
    cells: tuple[str, ...]
    heads: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return [name.strip("` ") for name in self.cells[0].split(",")]

    def code(self, column: int) -> list[str]:
        return CODE.findall(self.cells[column])


def rows() -> Iterator[Row]:
    section = part = ""
    heads: tuple[str, ...] = ()
    for line in re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL).splitlines():
        if found := re.match(r"(##+) (.+)", line):
            section, part = (found[2], "") if found[1] == "##" else (section, found[2])
        if not line.startswith("| "):
            heads = ()
            continue
        cells = tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
        if not heads:
            heads = cells
        elif set(line) - set("|- "):
            assert len(cells) == len(heads), line
            yield Row(section=section, part=part, cells=cells, heads=heads)


ROWS = list(rows())
WITH_DEFAULTS = [row for row in ROWS if row.heads[1] == "default"]


def ours() -> Iterator[str]:
    """Every code span that names something of spalf."""
    prose = re.sub(r"^```.*?^```$|^\|.*?$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    yield from CODE.findall(prose)
    for row in ROWS:
        for column in range(2, len(row.cells)):
            if row.heads[column] != "default":
                yield from row.code(column)


# ---------------------------------------------------------------------------------------------------- what there is
class Offered:
    """The recipe's keys and the components, as places that a dotted path can name."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.converter = Converter(registry)

    @cached_property
    def uses(self) -> Mapping[tuple[str, str], set[str]]:
        """(slot, table) -> components that presets make of it; a table may be called like a component."""
        found = {(ref.slot, ref.use): {ref.use} for ref in self.registry}
        for table in self.presets.values():
            for slot, tables in table.items():
                if slot in SLOTS and all(isinstance(t, dict) for t in tables.values()):
                    for name, inner in tables.items():
                        found.setdefault((slot, name), set()).add(inner.get("use", name))
        return found

    @cached_property
    def presets(self) -> Mapping[str, Mapping[str, Any]]:
        return {name: toml.read(name) for name in PRESETS}

    def classes(self, slot: str, names: set[str] | None = None) -> list[type]:
        known = self.registry.names(slot)
        return [self.registry.resolve(slot, name) for name in (known if names is None else names) if name in known]

    def takes(self, cls: type, path: list[str], value: Any = NOTHING) -> bool:
        """Whether `cls` has the option that `path` names, and takes `value` for it."""
        name, *rest = path
        if name not in options(cls):
            return False
        field, kind = options(cls)[name], _bare(option_types(cls)[options(cls)[name].name])
        if get_origin(kind) is not None and issubclass(get_origin(kind), Mapping):
            inner = slot_of(get_args(kind)[1])
            if inner is None or not rest:
                return not rest
            table, *rest = rest
            return self.component(inner.name, self.uses.get((inner.name, table)), rest, value)
        if slot := slot_of(kind):
            return self.component(slot.name, None, rest, value)
        if attrs.has(kind) and rest:
            return self.takes(kind, rest, value)
        return not rest and (value is NOTHING or self.is_valid(field, kind, value))

    def component(self, slot: str, names: set[str] | None, path: list[str], value: Any) -> bool:
        if path:
            return any(self.takes(cls, path, value) for cls in self.classes(slot, names))
        if value is NOTHING:
            return bool(self.classes(slot, names))
        table = {"use": value} if isinstance(value, str) else value
        given = {key: item for key, item in table.items() if key != "use"}
        chosen = self.classes(slot, {table["use"]} if "use" in table else names)
        return any(all(self.takes(cls, [key], item) for key, item in given.items()) for cls in chosen)

    def is_valid(self, field: attrs.Attribute[Any], kind: Any, value: Any) -> bool:
        try:
            made = self.converter.structure(value, kind)
            if field.validator is not None:
                field.validator(None, field, made)
        except (RecipeError, ValueError):
            return False
        return True

    def defaults(self, path: list[str]) -> list[Any]:
        """What the option is when a recipe says nothing: in each component that has it, and in each preset."""
        found = [_at(table, path) for table in self.presets.values()]
        for cls in self._owners(path):
            if path[-1] in options(cls):
                field = options(cls)[path[-1]]
                found.append(field.metadata.get("use", field.default))
        return [list(x) if isinstance(x, tuple) else x for x in found if x is not NOTHING]

    def _owners(self, path: list[str]) -> list[type]:
        """Classes that the last name of `path` may be an option of."""
        if len(path) == 1:
            return [Recipe]
        kind = option_types(Recipe)[path[0]]
        if attrs.has(kind) and slot_of(kind) is None:
            return [kind]
        if slot_of(kind) is not None:
            inner = path[1] if len(path) == 3 else path[0]
            return self.classes(inner if inner in SLOTS else path[0])
        return self.classes(path[0], self.uses.get((path[0], path[1])))


def _bare(kind: Any) -> Any:
    """`X | None` as X."""
    kept = [k for k in get_args(kind) if k is not NoneType]
    return kept[0] if NoneType in get_args(kind) and len(kept) == 1 else kind


def _at(table: Any, path: list[str]) -> Any:
    for name in path:
        table = table.get(name, NOTHING) if isinstance(table, dict) else NOTHING
    return table.get("use", NOTHING) if isinstance(table, dict) else table


def leaves(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[list[str], Any]]:
    """Assignments of dotted keys; an inline table is one value."""
    for key, value in table.items():
        if isinstance(value, dict) and not ("use" in value or key == "schedule"):
            yield from leaves(value, (*path, key))
        else:
            yield [*path, key], value


@pytest.fixture(scope="module")
def offered() -> Offered:
    for package in ("spalf_pam", "spalf_shift"):
        pytest.importorskip(package, reason="the page names components of plugins/: run make setup")
    return Offered(plugins.registry())


def is_command(line: str, offered: Offered) -> bool:
    """Whether `spalf ...` or `--option ...` is what the command line takes; capitals stand for what a user gives."""
    command: Any = get_command(app)
    words = line.split()
    if words[0] == "spalf":
        del words[0]
        while hasattr(command, "get_command"):  # of plugins too
            command = command.get_command(None, words.pop(0)) if words else None
        if command is None:
            return False
        held = [*command.params]
    else:
        held = [*command.params, *(p for c in command.commands.values() for p in c.params)]
    named = {name: p for p in held for name in p.opts if name.startswith("--")}
    while words:
        word = words.pop(0)
        if word not in named:
            if not (word.isupper() or word in PRESETS):
                return False
        elif not named[word].is_flag and words and not is_value(named[word], words.pop(0), offered):
            return False
    return True


def is_value(option: Any, value: str, offered: Offered) -> bool:
    if "--set" in option.opts:
        return offered.takes(Recipe, value.split("=")[0].split("."))
    if "--suite" in option.opts:
        return value in offered.registry.names("evaluator")
    kind = option.type_descriptor.annotation
    return value.isupper() or get_origin(kind) is not Literal or value in get_args(kind)


def exists(span: str, offered: Offered) -> bool:
    """Whether a code span names something: a command, an assignment, a file, a path into a recipe, a name."""
    if span.startswith(("spalf ", "--")):
        return is_command(span, offered)
    if " = " in span:
        table = tomli.loads(span)
        if "extends" in table:
            return table["extends"] in PRESETS
        return all(offered.takes(Recipe, path, value) for path, value in leaves(table))
    span = span.removeprefix("pip install ./")
    if "/" in span or re.search(r"\.(json|jsonl|toml|py|html)$", span):
        return (ROOT / span).exists() or span in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    if span.startswith("spalf."):
        return span.removeprefix("spalf.") in spalf.__all__
    if span.startswith("measured."):
        return span.removeprefix("measured.whitener.") in ("raw_variance",)
    known = {*PRESETS, *(ref.use for ref in offered.registry), *(n for n in vars(hooks) if n.startswith("spalf_"))}
    return span in known or offered.takes(Recipe, span.split("."))


# ------------------------------------------------------------------------------------------------------------ spalf
@pytest.mark.parametrize("span", sorted(set(ours())))
def test_what_the_page_names_exists(span: str, offered: Offered) -> None:
    assert exists(span, offered)


@pytest.mark.parametrize(
    "span",
    [
        *("term.l1.wieght", "phase.fit.every", "source.contexts", 'activation = "jumperelu"', "knobs.K"),
        *("stratum.free.unit_norm = 3", "term.l1.warmup = -1", 'whitener = { use = "zca", condition = 2.0 }'),
        *("spalf train RECIPE", "spalf run RECIPE --fast", "spalf run RECIPE --set knobs.K=3", "spalf run topkk"),
        *("spalf eval RUN --suite loss", 'extends = "relu"', "docs/nowhere.md", "spalf.train", "--loud", "relu_l2"),
    ],
)
def test_what_does_not_exist_is_told(span: str, offered: Offered) -> None:
    assert not exists(span, offered)


@pytest.mark.parametrize("row", [r for r in WITH_DEFAULTS if r.code(3)], ids=lambda r: f"{r.section}: {r.cells[0]}")
def test_our_defaults(row: Row, offered: Offered) -> None:
    [cell] = row.code(3)
    wanted = tomli.loads(f"value = {cell}")["value"]
    for path in row.code(2):
        assert wanted in offered.defaults(path.split(".")), path


def test_every_row_says_what_it_is_here() -> None:
    listed = [row for row in ROWS if row.heads[2] == "spalf" and row.part != "Different on purpose"]
    assert [row for row in listed if not (row.cells[2] == "-" or row.code(2))] == []
    assert len(ROWS) > 200


# ----------------------------------------------------------------------------------------------------- their sources
def source_of(file: str, name: str) -> Any:
    """The class or function `name` in a file of the peers' environment, as a syntax tree."""
    found = sorted(PEERS.glob(f"python*/site-packages/{file}"))
    if not found:
        pytest.skip("run make peers")
    tree = ast.parse(found[0].read_text(encoding="utf-8"))
    kinds = (ast.ClassDef, ast.FunctionDef)
    return next(node for node in ast.walk(tree) if isinstance(node, kinds) and node.name == name)


def fields_of(node: Any) -> dict[str, ast.expr | None]:
    """Names and defaults of a dataclass's fields, or of the arguments of a function or of `__init__`."""
    if isinstance(node, ast.ClassDef):
        init = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if not init:
            return {n.target.id: n.value for n in node.body if isinstance(n, ast.AnnAssign)}  # type: ignore[union-attr]
        node = init[0]
    names = [a.arg for a in node.args.args if a.arg != "self"]
    defaults = node.args.defaults
    return {**dict.fromkeys(names), **dict(zip(names[len(names) - len(defaults) :], defaults, strict=True))}


def literal(default: ast.expr | None) -> str:
    """A default as text; that of `field(default=...)` and its like is the keyword's."""
    for keyword in default.keywords if isinstance(default, ast.Call) else ():
        if keyword.arg == "default":
            return ast.unparse(keyword.value)
    return "" if default is None else ast.unparse(default)


SAELENS = {
    "config.py": ("LanguageModelSAERunnerConfig", "LoggingConfig"),
    "saes/sae.py": ("SAEConfig", "TrainingSAEConfig"),
    **{
        f"saes/{kind.lower()}_sae.py": (f"{name}TrainingSAEConfig",)
        for kind, name in (
            *(("standard", "Standard"), ("topk", "TopK"), ("batchtopk", "BatchTopK"), ("jumprelu", "JumpReLU")),
            *(("gated", "Gated"), ("matryoshka_batchtopk", "MatryoshkaBatchTopK")),
            ("matching_pursuit", "MatchingPursuit"),
        )
    },
}
TRAINERS = {
    "trainers/standard.py": ("StandardTrainer", "StandardTrainerAprilUpdate"),
    "trainers/top_k.py": ("TopKTrainer",),
    "trainers/batch_top_k.py": ("BatchTopKTrainer",),
    "trainers/gdm.py": ("GatedSAETrainer",),
    "trainers/jumprelu.py": ("JumpReluTrainer",),
    "trainers/matryoshka_batch_top_k.py": ("MatryoshkaBatchTopKTrainer",),
    "trainers/p_anneal.py": ("PAnnealTrainer",),
    "trainers/gated_anneal.py": ("GatedAnnealTrainer",),
}
LIBRARIES = [
    ("SAELens", None, "sae_lens", SAELENS),
    ("dictionary_learning", "Fields of the trainers", "dictionary_learning", TRAINERS),
    ("dictionary_learning", "ActivationBuffer", "dictionary_learning", {"buffer.py": ("ActivationBuffer",)}),
    ("dictionary_learning", "trainSAE", "dictionary_learning", {"training.py": ("trainSAE",)}),
]


@pytest.mark.parametrize(("section", "part", "package", "files"), LIBRARIES, ids=lambda x: str(x)[:30])
def test_every_option_of_theirs_has_a_row(section: str, part: str | None, package: str, files: Mapping[str, Any]):
    """No option is left out, and a default that the page gives is the default of a class that has the option."""
    theirs: dict[str, set[str]] = {}
    for file, names in files.items():
        for name in names:
            for option, default in fields_of(source_of(f"{package}/{file}", name)).items():
                theirs.setdefault(option, set()).add(literal(default))
    mine = [row for row in WITH_DEFAULTS if row.section == section and part in (None, row.part)]
    assert set(theirs) - {name for row in mine for name in row.names} == set()
    for row in mine:
        for cell in row.code(1):
            wanted = ast.unparse(ast.parse(cell, mode="eval"))
            assert [n for n in row.names if n in theirs and wanted not in theirs[n]] == [], cell


# ---------------------------------------------------------------------------------------------------------- recipes
RECIPES = {r["name"]: t for t in re.findall(r"^```toml\n(.*?)^```$", TEXT, re.M | re.S) if (r := tomli.loads(t))}


@pytest.fixture
def compiled(tmp_path: Path, offered: Offered) -> dict[str, Plan]:
    """The page's recipes; the one on pairs finds some."""
    zero_ND, ids_N = torch.zeros(4_000, 16), torch.arange(4_000)
    facts = Facts(d_model=16, hook="none", model="none")
    held = Pairs(a_ND=zero_ND, b_ND=zero_ND, sentence_a_N=ids_N, sentence_b_N=ids_N + 4_000, facts=facts)
    pairs = write_pairs(tmp_path / "pairs", held)
    out = {}
    for name, text in RECIPES.items():
        file = tmp_path / f"{name}.toml"
        file.write_text(text, encoding="utf-8")
        sets = (f'source.pairs="{pairs}"',) if name == "shifts" else ()
        out[name] = compile(toml.read(file, sets), offered.registry)
    return out


def test_the_recipes_are_the_trainings_beside_them(compiled: Mapping[str, Plan]) -> None:
    assert set(compiled) == {"tiny_stories", "pythia_70m_topk", "pam_gemma", "shifts"}
    tiny, pythia, pam, shifts = (compiled[name] for name in RECIPES)
    assert (tiny.total_steps, tiny.knobs.F, tiny.knobs.lr) == (30_000, 16_384, 5e-5)
    assert (pythia.total_steps, pythia.knobs.F, pythia.recipe.activation.k) == (24_000, 16_384, 64)
    for plan, steps in ((tiny, 6_000), (pythia, 24_000 - 19_200)):
        schedule = plan.recipe.optimizer.schedule
        assert round(schedule.decay * plan.total_steps) == steps
        assert schedule.final == 0.0
        assert plan.recipe.optimizer.max_norm == 1.0
    assert tiny.recipe.term["l1"].target == 1
    assert set(tiny.terms) == {"mse", "l1"}
    solve = pam.recipe.phase["pam"]
    turn = solve.encoder_steps + solve.rows // pam.recipe.budget.batch
    assert (pam.total_steps, solve.rows) == (100 * turn, 10 * pam.knobs.F)
    assert solve.proximity == pytest.approx(0.001 * pam.knobs.F)
    fit = shifts.recipe.phase["fit"]
    assert (fit.warmup, fit.ramp) == (2_000 * 4_000 // 256, 5_000 * 4_000 // 256)


def test_their_code_parses() -> None:
    found = re.findall(r"^```py\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert [ast.parse(text).body for text in found if not ast.parse(text).body] == []
    assert len(found) == 2
