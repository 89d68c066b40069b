"""Built-ins and entry points by the same hooks; errors that name the distribution. About ten seconds."""

import importlib
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from spalf import plugins
from spalf.core.slots import SLOTS, ComponentRef
from spalf.errors import ComponentError
from spalf.parts import spalf_components

GOOD = """
from spalf import hookimpl, lagrangian

@lagrangian("bare_{name}")
class Bare:
    '''The objective alone.'''

    def __call__(self, objective, violations, control):
        return objective

@hookimpl
def spalf_components():
    return [Bare]
"""
Install = Callable[..., str]
COUNT = itertools.count()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a distribution with one module and one entry point on the path; returns the module's name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def put(text: str, *, distribution: str = "acme-spalf", version: str = "1.2", point: str = "") -> str:
        name = f"spalf_test_plugin_{next(COUNT)}"
        (tmp_path / f"{name}.py").write_text(text.replace("{name}", name))
        info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[spalf]\n{point or name} = {name}\n")
        importlib.invalidate_caches()
        return name

    return put


def refused() -> str:
    with pytest.raises(ComponentError) as caught:
        plugins.load()
    return str(caught.value)


# ---------------------------------------------------------------------------------------------- what loads
def test_built_ins_come_through_the_hook() -> None:
    manager, registry = plugins.load()
    assert manager.has_plugin("spalf.parts")
    assert manager.has_plugin("spalf.record")
    own = f"spalf {importlib.metadata.version('spalf')}"
    for cls in spalf_components():
        assert registry.origin(cls.__spalf__) == own  # type: ignore[attr-defined]


def test_built_ins_fill_every_slot_in_order() -> None:
    refs = [cls.__spalf__ for cls in spalf_components()]  # type: ignore[attr-defined]
    order = list(SLOTS)
    assert refs == sorted(refs, key=lambda r: (order.index(r.slot), r.use))
    assert {r.slot for r in refs} == set(SLOTS)


def test_a_plugin_is_found_with_its_origin(install: Install) -> None:
    name = install(GOOD)
    manager, registry = plugins.load()
    ref = ComponentRef("lagrangian", f"bare_{name}")
    assert registry.origin(ref) == "acme-spalf 1.2"
    assert manager.get_plugin(name) is sys.modules[name]
    assert plugins.origin_of(name) == "acme-spalf 1.2"
    assert plugins.origin_of("spalf.parts").startswith("spalf ")
    assert plugins.origin_of("nobody") == ""


def test_each_load_is_a_value_of_its_own() -> None:
    assert plugins.manager() is not plugins.manager()
    assert list(plugins.registry()) == list(plugins.registry())


def test_a_plugin_may_only_observe(install: Install) -> None:
    name = install("from spalf import hookimpl\n\n@hookimpl\ndef spalf_saved(run, path):\n    pass\n")
    manager, _ = plugins.load()
    assert name in [i.plugin_name for i in manager.hook.spalf_saved.get_hookimpls()]


# --------------------------------------------------------------------------------------------- what does not
IMPORTS = "from spalf import hookimpl\n\n"


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("import not_installed_anywhere", "cannot be imported: ModuleNotFoundError: No module named"),
        ("raise RuntimeError('boom')", "cannot be imported: RuntimeError: boom (update or uninstall acme-spalf)"),
        (
            IMPORTS + "@hookimpl\ndef spalf_component():\n    return []",
            "does not fit the hooks of spalf: PluginValidationError: unknown hook 'spalf_component'",
        ),
        (
            IMPORTS + "@hookimpl\ndef spalf_saved(run, path, extra):\n    pass",
            "does not fit the hooks of spalf: PluginValidationError",
        ),
        (IMPORTS + "@hookimpl\ndef spalf_components():\n    return [int]", "builtins.int carries no label"),
        (IMPORTS + "@hookimpl\ndef spalf_components():\n    return [3]", "offers 3, which is no class"),
        (IMPORTS + "@hookimpl\ndef spalf_components():\n    return 3", "returns int, not a list of classes"),
        (
            IMPORTS + "@hookimpl\ndef spalf_components():\n    return 1 / 0",
            "failed: ZeroDivisionError: division by zero",
        ),
        (
            "from spalf import dual\n\n@dual('half')\nclass Half:\n    def init(self, m):\n        return None\n",
            "has no method step(state, signal)",
        ),
    ],
)
def test_a_broken_plugin_is_named_with_its_version(install: Install, text: str, fragment: str) -> None:
    install(text)
    message = refused()
    assert message.startswith("acme-spalf 1.2: ")
    assert fragment in message
    assert "\n" not in message


def test_two_owners_of_one_component_are_both_named(install: Install) -> None:
    install(GOOD.replace("bare_{name}", "al_cole"))
    own = importlib.metadata.version("spalf")
    assert refused() == (
        f'lagrangian "al_cole" is offered twice: by spalf {own} and by acme-spalf 1.2 (rename one of them)'
    )


def test_two_owners_of_one_plugin_name_are_both_named(install: Install) -> None:
    install(GOOD, distribution="acme-one", version="1", point="same")
    install(GOOD, distribution="acme-two", version="2", point="same")
    message = refused()
    assert 'the plugin name "same" is taken twice' in message
    assert "acme-one 1" in message
    assert "acme-two 2" in message


# ------------------------------------------------------------------------------------------------- lightness
def test_the_built_ins_load_nothing_heavy() -> None:
    code = (
        "import sys; from spalf.plugins import load; load(); "
        "heavy = {'transformers', 'transformer_lens', 'triton', 'datasets', 'typer', 'pyarrow', 'scipy'}; "
        "sys.exit(' '.join(sorted(heavy & sys.modules.keys())) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
