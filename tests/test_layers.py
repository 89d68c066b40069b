"""The tree keeps its layers: a module imports its own layer or a lower one, and a neighbour only inside one package.

At the end of the file: what else is true of every module of spalf/, and of the top level of the repository.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPALF = ROOT / "spalf"
FILES = sorted(path for path in SPALF.rglob("*.py") if "assets" not in path.relative_to(SPALF).parts)
IDS = [path.relative_to(ROOT).as_posix() for path in FILES]
each_file = pytest.mark.parametrize("path", FILES, ids=IDS)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One row of the table of layers; the name is the module or package directly under spalf/."""

    layer: int
    third_party: frozenset[str]  # importable at the top of a module
    lazy: frozenset[str] = frozenset()  # importable inside a function only
    must_not: frozenset[str] = frozenset()  # units of lower layers that are closed to it
    also: frozenset[str] = frozenset()  # neighbours that are open to it


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


TENSORS = names("attrs attr torch")
ENGINE = TENSORS | names("safetensors")
VERBS = names("launch exchange reporting evaluation sweeping bench")
UNITS = {
    "errors": Unit(layer=0, third_party=names("attrs attr")),
    "core": Unit(layer=1, third_party=TENSORS),
    "hooks": Unit(layer=2, third_party=TENSORS | {"pluggy"}),
    "kernels": Unit(layer=2, third_party=TENSORS | {"numpy"}, lazy=names("triton")),
    "nn": Unit(layer=3, third_party=TENSORS),
    "assembly": Unit(layer=3, third_party=TENSORS | names("cattrs cattr tomli tomli_w")),
    "engine": Unit(layer=4, third_party=ENGINE, lazy=names("scipy"), must_not=names("parts assembly")),
    "parts": Unit(
        layer=5,
        third_party=ENGINE | {"numpy"},
        lazy=names("transformers transformer_lens datasets pyarrow h5py scipy tokenizers huggingface_hub"),
    ),
    "record": Unit(layer=5, third_party=ENGINE),
    "report": Unit(layer=5, third_party=names("attrs"), must_not=names("assembly kernels nn")),
    "plugins": Unit(layer=6, third_party=TENSORS | {"pluggy"}, must_not=names("parts record")),
    "track": Unit(layer=6, third_party=TENSORS | {"pluggy"}, must_not=names("parts plugins loaded")),
    "training": Unit(layer=6, third_party=TENSORS, must_not=names("parts plugins loaded track")),
    "loaded": Unit(layer=6, third_party=TENSORS, must_not=names("parts record plugins")),
    "testing": Unit(layer=7, third_party=ENGINE, lazy=names("pytest hypothesis"), also=names("__init__")),
    "launch": Unit(layer=7, third_party=ENGINE),
    "sweeping": Unit(layer=7, third_party=names("attrs"), also=names("launch")),
    "evaluation": Unit(layer=7, third_party=TENSORS, also=names("launch")),
    "reporting": Unit(layer=7, third_party=names("attrs"), also=names("launch evaluation")),
    "exchange": Unit(layer=7, third_party=ENGINE, lazy=names("huggingface_hub"), also=names("launch")),
    "bench": Unit(
        layer=7,
        third_party=ENGINE,
        lazy=names("sae_lens dictionary_learning sparsify schedulefree numpy transformers transformer_lens datasets"),
        also=names("__init__ launch exchange sweeping"),
    ),
    "cli": Unit(layer=7, third_party=ENGINE | names("typer rich"), also=VERBS | {"__init__"}),
    "__init__": Unit(layer=7, third_party=TENSORS, also=VERBS),
    "__main__": Unit(layer=7, third_party=frozenset(), also=names("cli __init__")),
}
# `@triton.jit` needs triton where a kernel is written. Such a module is itself lazy: imported inside functions only.
EAGER_KERNELS = names(
    "spalf.kernels spalf.kernels.reference spalf.kernels.compact spalf.kernels.layout spalf.kernels.screen "
    "spalf.kernels.coherence spalf.kernels.squares"
)


@dataclass(frozen=True, kw_only=True)
class Import:
    module: str  # absolute and, inside spalf, an existing module
    line: int
    lazy: bool  # inside a function


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


MODULES = frozenset(module_name(path) for path in FILES)


def is_type_checking(node: ast.AST) -> bool:
    if not isinstance(node, ast.If):
        return False
    test = node.test
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def children(node: ast.AST) -> list[ast.AST]:
    """What a walk visits below `node`: all of it, but of `if TYPE_CHECKING` the other branch only."""
    if isinstance(node, ast.If) and is_type_checking(node):
        return list(node.orelse)
    return list(ast.iter_child_nodes(node))


def walk(node: ast.AST, *, lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node with whether it runs only when a function is called; decorators and defaults run at import."""
    for child in children(node):
        yield child, lazy
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            body = child.body if isinstance(child.body, list) else [child.body]
            for part in children(child):
                inside = lazy or part in body
                yield part, inside
                yield from walk(part, lazy=inside)
        else:
            yield from walk(child, lazy=lazy)


def targets(node: ast.AST, path: Path) -> Iterator[str]:
    """The modules that one node imports; `from a import b` means `a.b` where that is a module of ours."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = path.relative_to(ROOT).parent.parts
            base = ".".join([*package[: len(package) - node.level + 1], *base.split(".")]).rstrip(".")
        for alias in node.names:
            yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in {"import_module", "__import__"}:
            yield str(node.args[0].value)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> Iterator[Import]:
    for node, lazy in walk(parse(path)):
        for target in targets(node, path):
            yield Import(module=target, line=getattr(node, "lineno", 0), lazy=lazy)


def scope(module: str) -> str:
    """The one package inside which neighbours may import each other; in parts that is the slot."""
    parts = module.split(".")
    return ".".join(parts[: 3 if unit_of(module) == "parts" else 2])


def inside_problem(importer: str, found: Import) -> str | None:
    """What is wrong with an import of one of our own modules."""
    unit, target = unit_of(importer), unit_of(found.module)
    if target not in UNITS:
        return f"{found.module} is not in the table of layers"
    row = UNITS[unit]
    if target in row.must_not:
        return f"{unit} must not import {target}"
    if target != unit and target not in row.also and UNITS[target].layer >= row.layer:
        return f"layer {row.layer} ({unit}) must not import layer {UNITS[target].layer} ({target})"
    if target == unit and scope(importer) != scope(found.module) and importer != f"spalf.{unit}":
        return f"parts must not import each other: {found.module}"
    if target == "kernels" and found.module not in EAGER_KERNELS and not found.lazy:
        is_kernel = unit == "kernels" and importer not in EAGER_KERNELS
        return None if is_kernel else f"{found.module} imports triton: import it inside a function"
    return None


def outside_problem(importer: str, found: Import) -> str | None:
    """What is wrong with an import of a third-party package."""
    package = found.module.split(".")[0]
    row = UNITS[unit_of(importer)]
    if package in sys.stdlib_module_names or package in row.third_party:
        return None
    if package not in row.lazy:
        return f"{unit_of(importer)} must not import {package}"
    is_kernel = unit_of(importer) == "kernels" and importer not in EAGER_KERNELS
    return None if found.lazy or is_kernel else f"{package} is imported inside functions only"


def problem(importer: str, found: Import) -> str | None:
    ours = found.module.split(".")[0] == "spalf"
    return inside_problem(importer, found) if ours else outside_problem(importer, found)


@each_file
def test_layer(path: Path) -> None:
    importer = module_name(path)
    assert unit_of(importer) in UNITS, f"{importer} has no row in the table of layers"
    found = [(one.line, problem(importer, one)) for one in imports(path)]
    assert [f"line {line}: {text}" for line, text in found if text] == []


IMPORT_SPALF = """
import sys, torch
before = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
import spalf
after = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
assert torch.equal(before[0], after[0]) and before[1:] == after[1:], "import spalf changed the seed or a flag of torch"
assert not torch.cuda.is_initialized(), "import spalf touched a device"
heavy = "transformer_lens transformers triton typer rich datasets pyarrow scipy wandb".split()
sys.exit(" ".join(name for name in heavy if name in sys.modules) or 0)
"""


def test_import_is_light() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_SPALF], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"import spalf loads, or fails with: {done.stderr}"


@pytest.mark.parametrize(
    ("importer", "module", "lazy", "is_wrong"),
    [
        ("spalf.core.values", "torch", False, False),
        ("spalf.core.values", "pluggy", True, True),
        ("spalf.errors", "torch", False, True),
        ("spalf.hooks", "spalf.kernels", False, True),
        ("spalf.core.tree", "spalf.core.values", False, False),
        ("spalf.core.tree", "spalf", True, True),
        ("spalf.engine.step", "spalf.assembly.toml", True, True),
        ("spalf.parts.term", "spalf.parts.constraint", True, True),
        ("spalf.parts.source.blocks", "spalf.parts.source.synthetic", False, False),
        ("spalf.parts", "spalf.parts.term", False, False),
        ("spalf.parts.source.huggingface", "transformers", False, True),
        ("spalf.parts.source.huggingface", "transformers", True, False),
        ("spalf.kernels.encode", "triton.language", False, False),
        ("spalf.kernels", "spalf.kernels.encode", False, True),
        ("spalf.parts.kernel", "spalf.kernels.encode", True, False),
        ("spalf.plugins", "spalf.parts", True, True),
        ("spalf", "typer", True, True),
        ("spalf.__main__", "spalf.cli", False, False),
    ],
)
def test_the_rules_themselves(importer: str, module: str, lazy: bool, is_wrong: bool) -> None:
    assert (problem(importer, Import(module=module, line=1, lazy=lazy)) is not None) == is_wrong


def test_the_walk_knows_what_runs_at_import() -> None:
    source = "if TYPE_CHECKING: import a\nelse: import b\nclass C:\n    import c\n    def f(self): import d\n"
    seen = [(name, lazy) for node, lazy in walk(ast.parse(source)) for name in targets(node, SPALF / "x.py")]
    assert seen == [("b", False), ("c", False), ("d", True)]


# What touches a seed, a flag or a device, as the full name of what is called or assigned. A star stands for any value.
EFFECTS = names(
    "torch.manual_seed torch.seed torch.set_* torch.use_deterministic_algorithms torch.cuda.* torch.accelerator.* "
    "torch.backends.* torch._dynamo.config.* torch._inductor.config.* torch.random.* torch.get_default_device "
    "random.seed numpy.random.* os.environ.[*] os.environ.setdefault os.environ.update os.putenv "
    "warnings.filterwarnings warnings.simplefilter logging.basicConfig *.cuda *.to"
)


def aliases(tree: ast.Module) -> dict[str, str]:
    """Local name -> full name, of everything imported."""
    found: dict[str, str] = {}
    for node, _ in walk(tree):
        if isinstance(node, ast.Import):
            found.update({one.asname: one.name for one in node.names if one.asname})
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update({one.asname or one.name: f"{node.module}.{one.name}" for one in node.names})
    return found


def full_name(node: ast.AST, known: dict[str, str]) -> str:
    """`a.b.c` of an expression, by the names under which its parts were imported; a value of a call is a star."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, known)}.{node.attr}"
    if isinstance(node, ast.Subscript):
        return f"{full_name(node.value, known)}.*"
    return "*"


def effects(tree: ast.Module) -> Iterator[str]:
    known = aliases(tree)
    for node, lazy in walk(tree):
        if lazy:
            continue
        touched: list[ast.AST] = []
        if isinstance(node, ast.Call):
            touched = [node.func]
        elif isinstance(node, ast.Assign):
            touched = [one for one in node.targets if not isinstance(one, ast.Name)]
        for one in touched:
            name = full_name(one, known)
            if any(fnmatchcase(name, pattern) for pattern in EFFECTS):
                yield f"line {getattr(node, 'lineno', 0)}: {name}"


@each_file
def test_importing_changes_nothing(path: Path) -> None:
    assert list(effects(parse(path))) == []


def test_effects_are_seen() -> None:
    source = (
        "import torch as t, os\nfrom torch import manual_seed as m\nm(1)\nt.backends.cudnn.benchmark = True\n"
        "os.environ['A'] = 'b'\nX = t.zeros(3).cuda()\ndef f(y=t.set_num_threads(1)): t.manual_seed(0)\n"
        "if __name__ == '__main__': pass\nY = t.zeros(3)\n@t.no_grad()\ndef g(): X.cuda()\n"
    )
    assert [text.split(":")[0] for text in effects(ast.parse(source))] == [f"line {n}" for n in (3, 4, 5, 6, 7)]


@each_file
def test_no_print(path: Path) -> None:
    calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
    assert [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"] == []


@each_file
def test_sizes(path: Path) -> None:
    functions = [node for node in ast.walk(parse(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [(node.name, (node.end_lineno or 0) - node.lineno + 1) for node in functions]
    assert [one for one in lengths if one[1] > 60] == [], "functions above 60 lines"
    length = len(path.read_text(encoding="utf-8").splitlines())
    assert length <= 300, f"a module of {length} lines: above 300 it becomes a package of the same name"


PLUGIN_FILES = sorted(ROOT.glob("plugins/*/spalf_*/**/*.py"))


@pytest.mark.parametrize("path", PLUGIN_FILES, ids=[path.relative_to(ROOT).as_posix() for path in PLUGIN_FILES])
def test_plugins_use_the_public_names(path: Path) -> None:
    ours = [(one.line, one.module) for one in imports(path) if one.module.split(".")[0] == "spalf"]
    assert [one for one in ours if one[1] not in {"spalf", "spalf.testing"}] == []


TOP_LEVEL = names(
    "pyproject.toml README.md LICENSE CHANGELOG.md Makefile constraints.txt .gitignore "
    "spalf plugins recipes tests docs .ci"
)


def tracked() -> frozenset[str]:
    """The top-level entries that git tracks; a copy of the tree without git has nothing to say here."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        listed = subprocess.run(git, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return frozenset(path.split("/")[0] for path in listed.split("\0") if path)


def test_nothing_else_at_the_top() -> None:
    assert tracked() - TOP_LEVEL == set()


def test_nothing_missing_at_the_top() -> None:
    present = tracked()
    if "README.md" not in present:
        pytest.skip("the tree is still being written: there is no README.md, which comes last")
    assert TOP_LEVEL - present == set()
