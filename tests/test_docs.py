"""The documentation is true: generated pages are fresh, blocks run, links lead somewhere, the tree is the tree."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import pluggy
import pytest
import tomli
from attrs import frozen

from spalf import hooks, plugins
from spalf.assembly import toml
from spalf.assembly.compile import compile
from spalf.assembly.registry import Registry
from spalf.core.slots import SLOTS
from spalf.testing import conform

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
GENERATED = {*(DOCS / "parts").glob("*.md"), DOCS / "hooks.md"}
PAGES = [README, *sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("plugins/*/README.md"))]
IDS = [p.relative_to(ROOT).as_posix() for p in PAGES]
each_page = pytest.mark.parametrize("page", PAGES, ids=IDS)


@frozen(kw_only=True)
class Block:
    """A fenced block: its page, first line, language, text, and the text of the page before it."""

    page: Path
    line: int
    language: str
    text: str
    before: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        before = text[: found.start()]
        yield Block(page=page, line=before.count("\n") + 1, language=found[1], text=found[2], before=before)


BLOCKS = [block for page in PAGES for block in blocks(page)]


def of(language: str) -> Any:
    wanted = [b for b in BLOCKS if b.language == language]
    return pytest.mark.parametrize("block", wanted, ids=map(str, wanted))


def first(page: Path, language: str, word: str) -> Block:
    """The first block of a page that holds a word."""
    return next(b for b in BLOCKS if b.page == page and b.language == language and word in b.text)


# ------------------------------------------------------------------------------------------------ generated pages
@pytest.fixture(scope="module")
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def registry() -> Registry:
    return plugins.registry()


def test_pages_are_fresh(builder: ModuleType) -> None:
    behind = [p.relative_to(ROOT).as_posix() for p in builder.stale(builder.pages())]
    assert behind == [], "run make docs"


def test_check_tells_a_stale_page(
    builder: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = builder.pages()
    page = DOCS / "parts" / "dual.md"
    monkeypatch.setattr(builder, "pages", lambda: made)
    assert builder.main(["--check"]) == 0
    made[page] += "changed\n"
    assert builder.main(["--check"]) == 1
    assert capsys.readouterr().err == "docs/parts/dual.md: stale (run make docs)\n"


@pytest.mark.parametrize("slot", SLOTS)
def test_every_component_is_described(slot: str, registry: Registry) -> None:
    """Heading, signature, and a row for every option, read from the page as a person would."""
    page = (DOCS / "parts" / f"{slot}.md").read_text(encoding="utf-8")
    sections = dict(zip(*[iter(re.split(r"^## (\w+)\n", page, flags=re.MULTILINE)[1:])] * 2, strict=True))
    mine = [ref for ref in registry if ref.slot == slot and registry.origin(ref).startswith("spalf ")]
    assert page.startswith(f"# {slot}\n")
    assert set(sections) == {ref.use for ref in mine}
    for ref in mine:
        options = [a.name for a in attrs.fields(registry.resolve(slot, ref.use))]
        section = sections[ref.use]
        assert f"`{ref.use}({', '.join(options)})`" in section
        assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == options


def test_every_component_has_a_contract(registry: Registry) -> None:
    """An own docstring; attrs writes none, and a protocol's is no contract of a component."""
    classes = [registry.resolve(ref.slot, ref.use) for ref in registry]
    assert [cls for cls in classes if not (cls.__doc__ or "").strip()] == []


def test_every_hook_is_described() -> None:
    page = (DOCS / "hooks.md").read_text(encoding="utf-8")
    specs = [f for n, f in vars(hooks).items() if n.startswith("spalf_")]
    assert len(specs) == 8
    for f in specs:
        heading = f"## {f.__name__}({', '.join(inspect.signature(f).parameters)})"
        assert heading in page.splitlines()
        assert inspect.getdoc(f), f.__name__


# -------------------------------------------------------------------------------------------------------- TOML
@of("toml")
def test_toml_parses(block: Block) -> None:
    assert tomli.loads(block.text)


def complete(block: Block) -> bool:
    return block.language == "toml" and "extends" in tomli.loads(block.text)


# Those of one page need plugins, and tests/test_coming_from.py compiles them.
COMPLETE = [b for b in BLOCKS if complete(b) and b.page.name != "coming_from.md"]


def offered(*more: type) -> Registry:
    """The components of the built-ins and of `more`, whatever else is installed."""
    known = plugins.registry()
    own = [ref for ref in known if known.origin(ref).startswith("spalf ")]
    return Registry([(known.resolve(ref.slot, ref.use), "spalf") for ref in own] + [(cls, "docs 0") for cls in more])


@pytest.mark.parametrize("block", COMPLETE, ids=map(str, COMPLETE))
def test_recipes_compile(block: Block, tmp_path: Path, load: Callable[[Block], ModuleType]) -> None:
    """A recipe that names no source gets the embedded model."""
    file = tmp_path / "recipe.toml"
    file.write_text(block.text, encoding="utf-8")
    table = toml.read(file)
    if "source" not in tomli.loads(block.text):
        table = toml.merge(table, {"source": {"model": "embedded", "layer": 1, "text": "stdlib"}})
    shrinkage = load(first(README, "python", "Shrinkage")).Shrinkage
    plan = compile(table, offered(shrinkage))
    assert plan.recipe.name == tomli.loads(block.text)["name"]
    assert plan.total_steps > 0


def test_there_are_recipes_to_compile() -> None:
    assert {b.page.name for b in COMPLETE} >= {"README.md", "recipes.md", "plugins.md"}


# ------------------------------------------------------------------------------------------------------ Python
@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[Block], ModuleType]:
    """Run a block as the module that the line before it names, `like_this.py`."""

    def run(block: Block) -> ModuleType:
        named = re.findall(r"`(\w+)\.py`", block.before.rstrip().splitlines()[-1])
        module = ModuleType(named[-1] if named else "block")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(_code(block), module.__dict__)
        return module

    return run


def _code(block: Block) -> Any:
    return __builtins__["compile"](block.text, str(block), "exec")  # type: ignore[index]


@of("python")
def test_python_compiles(block: Block) -> None:
    assert _code(block)


WRITTEN = [b for b in BLOCKS if b.language == "python" and b.page not in GENERATED]


@pytest.mark.parametrize("block", WRITTEN, ids=map(str, WRITTEN))
def test_python_runs(block: Block, load: Callable[[Block], ModuleType]) -> None:
    """What it imports from an earlier block of the page is there; its hooks fit ours."""
    for earlier in WRITTEN:
        if earlier.page == block.page and earlier.line < block.line:
            load(earlier)
    module = load(block)
    manager = pluggy.PluginManager("spalf")
    manager.add_hookspecs(hooks)
    manager.register(module)
    manager.check_pending()
    if "hookimpl" in block.text:
        assert manager.get_hookcallers(module)


def test_the_readmes_plugin_conforms(load: Callable[[Block], ModuleType]) -> None:
    checks = conform(load(first(README, "python", "Shrinkage")).Shrinkage)
    assert checks
    for check in checks:
        check()


def test_the_readmes_plugin_is_short_and_the_tutorials() -> None:
    printed = first(README, "python", "Shrinkage").text
    assert printed == first(DOCS / "plugins.md", "python", "Shrinkage").text
    assert len(printed.splitlines()) <= 25


def test_the_tutorials_dual_is_the_plugins() -> None:
    printed = first(DOCS / "plugins.md", "python", "OptimisticState").text
    assert printed == (ROOT / "plugins/spalf-density/spalf_density/optimistic.py").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- README
@each_page
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [t.split("#")[0] for t in targets if not t.startswith(("http", "#"))]
    assert [t for t in local if not (page.parent / t).exists()] == []


@each_page
def test_plain_text(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.isascii()
    assert text.count("```") % 2 == 0
    assert "TODO" not in text


def tree(text: str) -> Iterator[str]:
    """Paths of a drawn tree: two spaces a level, a comment after each."""
    parents: list[str] = []
    for line in text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        parents = [*parents[:depth], name.rstrip("/")]
        yield "/".join(parents) + ("/" if name.endswith("/") else "")


def test_the_tree_is_true() -> None:
    drawn = list(tree(first(README, "", "spalf/\n").text))
    assert [p for p in drawn if not ((ROOT / p).is_dir() if p.endswith("/") else (ROOT / p).is_file())] == []
    there = {p for p in (ROOT / "spalf").iterdir() if p.name not in {"__pycache__", "py.typed"} and p.name[:2] != "__"}
    packages = {p.parent for p in ROOT.glob("plugins/*/pyproject.toml")}
    folders = {ROOT / name for name in ("spalf", "plugins", "recipes", "tests", "docs", ".ci")}
    assert {ROOT / p for p in drawn} == there | packages | folders


def test_the_tree_has_comments() -> None:
    lines = first(README, "", "spalf/\n").text.splitlines()
    assert [line for line in lines[1:] if not re.search(r"\S  +\S", line)] == []


def commands() -> Mapping[str, Any]:
    from typer.main import get_command

    from spalf.cli import app

    found: Any = get_command(app)
    return dict(found.commands)


def test_the_commands_exist() -> None:
    listed = set(re.findall(r"^\| `spalf (\w+)", README.read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == set(commands())


def test_named_commands_and_targets_exist() -> None:
    """Wherever a page names `spalf word` or `make word`."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):", makefile, re.MULTILINE))
    known = {*commands(), "pam", "shift"}  # those of plugins/, which tests/test_coming_from.py looks up
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"(?:^|`)spalf ([a-z]+)\b", text, re.MULTILINE)) <= known, page
        assert set(re.findall(r"(?:^|`)make ([a-z]+)\b", text, re.MULTILINE)) <= targets, page


def test_the_demos_numbers_have_a_place() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count("<!-- demo:begin -->") == text.count("<!-- demo:end -->") == 1
    assert text.index("<!-- demo:begin -->") < text.index("<!-- demo:end -->")
