"""Everything installed that adds to spalf: built-ins and entry points of the group "spalf", by the same hooks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pluggy

from spalf import hooks
from spalf.assembly.hints import suggest
from spalf.assembly.registry import Registry
from spalf.core.recipe import Plan
from spalf.core.slots import label
from spalf.errors import ComponentError, Problem, RecipeError

Tracker = Callable[[Plan, Path], object]

GROUP = "spalf"
BUILT_IN = ("spalf.parts", "spalf.record", "spalf.track")


def load() -> tuple[pluggy.PluginManager, Registry]:
    """A fresh manager with every plugin registered, and the registry of the components they offer.

    Raises ComponentError, with distribution and version, for a plugin that cannot be imported, has a hook that spalf
    does not have, or offers what is no component.
    """
    manager = hooks.manager()
    origins: dict[str, str] = {}
    for name in BUILT_IN:
        origins[name] = _own()
        _register(manager, importlib.import_module(name), name, origins[name])
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda p: (p.name, p.value)):
        origin = _origin(point)
        if point.name in origins:
            raise ComponentError(
                f'the plugin name "{point.name}" is taken twice: by {origins[point.name]} and by {origin} '
                "(uninstall or rename one of them)"
            )
        origins[point.name] = origin
        _register(manager, _imported(point, origin), point.name, origin)
    return manager, Registry(_offers(manager, origins))


def trackers(manager: pluggy.PluginManager, names: Iterable[str]) -> dict[str, Tracker]:
    """The trackers of these names, in this order. Raises RecipeError for a name that nobody offers, ComponentError for
    a plugin whose trackers are no dictionary of functions and for one that offers a name again.
    """
    offered: dict[str, Tracker] = {}
    for implementation in manager.hook.spalf_trackers.get_hookimpls():
        plugin = implementation.plugin_name
        try:
            found = implementation.function()
        except Exception as e:
            raise ComponentError(
                f'{origin_of(plugin)}: spalf_trackers() of plugin "{plugin}" failed: {_told(e)}'
            ) from e
        if not isinstance(found, dict) or not all(isinstance(k, str) and callable(v) for k, v in found.items()):
            raise ComponentError(
                f'{origin_of(plugin)}: spalf_trackers() of plugin "{plugin}" returns no dictionary of functions by name'
            )
        twice = sorted(found.keys() & offered.keys())
        if twice:
            raise ComponentError(
                f'{origin_of(plugin)}: tracker "{twice[0]}" is offered twice (rename or uninstall one)'
            )
        offered |= found
    problems = [
        Problem("record.track", f'no tracker is called "{n}"', suggest(n, offered)) for n in names if n not in offered
    ]
    if problems:
        raise RecipeError(problems)
    return {name: offered[name] for name in names}


def manager() -> pluggy.PluginManager:
    """The manager of `load`."""
    return load()[0]


def registry() -> Registry:
    """The registry of `load`."""
    return load()[1]


def origin_of(plugin: str) -> str:
    """Distribution and version of a plugin by the name it is registered under; "" for one that nobody installed."""
    if plugin in BUILT_IN:
        return _own()
    points = metadata.entry_points(group=GROUP, name=plugin)
    return _origin(next(iter(points))) if points else ""


def _own() -> str:
    try:
        return f"spalf {metadata.version('spalf')}"
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return f"spalf {sys.modules['spalf'].__dict__['__version__']}"


def _origin(point: metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else f"an unknown distribution ({point.value})"


def _imported(point: metadata.EntryPoint, origin: str) -> Any:
    try:
        return point.load()
    except Exception as e:
        raise ComponentError(
            f'{origin}: plugin "{point.name}" ({point.value}) cannot be imported: {_told(e)} '
            f"(update or uninstall {origin.split()[0]})"
        ) from e


def _register(manager: pluggy.PluginManager, plugin: object, name: str, origin: str) -> None:
    """Checked one by one, so that an error can say whose it is."""
    try:
        manager.register(plugin, name=name)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as e:
        raise ComponentError(
            f'{origin}: plugin "{name}" does not fit the hooks of spalf: {_told(e)} (see spalf/hooks.py)'
        ) from e


def _offers(manager: pluggy.PluginManager, origins: dict[str, str]) -> Iterator[tuple[type, str]]:
    for implementation in manager.hook.spalf_components.get_hookimpls():
        name = implementation.plugin_name
        origin = origins[name]
        try:
            offered = implementation.function()
        except ComponentError as e:
            raise ComponentError(f"{origin}: {e}") from e
        except Exception as e:
            raise ComponentError(f'{origin}: spalf_components() of plugin "{name}" failed: {_told(e)}') from e
        if not isinstance(offered, list | tuple):
            raise ComponentError(
                f'{origin}: spalf_components() of plugin "{name}" returns {type(offered).__name__}, '
                "not a list of classes"
            )
        for cls in offered:
            _check(cls, origin)
            yield cls, origin


def _check(cls: object, origin: str) -> None:
    if not isinstance(cls, type):
        raise ComponentError(f"{origin}: offers {cls!r}, which is no class (return the class, not an instance of it)")
    try:
        label(cls)
    except ComponentError as e:
        raise ComponentError(f"{origin}: {e}") from e


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
