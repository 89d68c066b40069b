"""The one traversal: saving, restoring, masking, moving and comparing all walk a state this way.

A leaf is a tensor, a number or a text. A branch is an attrs record, a mapping with text keys, a tuple, or an object
with torch's `state_dict` pair; such a dict is flat (dotted text keys to leaves), as a module's is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from spalf.errors import CheckpointError

Leaf = Tensor | bool | int | float | str
_SCALARS = (bool, int, float, str)


def _holds_state(x: Any) -> bool:
    """Asked of the class before its fields: attrs records such as Learner may speak `state_dict` for themselves."""
    return hasattr(type(x), "state_dict") and hasattr(type(x), "load_state_dict")


def _children(x: Any) -> Iterator[tuple[str, Any]] | None:
    if isinstance(x, Mapping):
        return ((str(k), v) for k, v in x.items())
    if isinstance(x, tuple | list):
        return ((str(i), v) for i, v in enumerate(x))
    if attrs.has(type(x)):
        return ((a.name, getattr(x, a.name)) for a in attrs.fields(type(x)))
    return None


def flatten(tree: Any, prefix: str = "") -> dict[str, Leaf]:
    """Every leaf by its dotted path. Raises TypeError at a value that is neither leaf nor branch."""
    if isinstance(tree, Tensor):
        return {prefix: tree}
    if isinstance(tree, _SCALARS):
        return {prefix: tree}
    if tree is None:
        return {}
    if _holds_state(tree):
        tree = tree.state_dict()
    children = _children(tree)
    if children is None:
        raise TypeError(f"state at {prefix or 'the root'!s} is a {type(tree).__name__}, which cannot be saved")
    out: dict[str, Leaf] = {}
    for name, child in children:
        out.update(flatten(child, f"{prefix}.{name}" if prefix else name))
    return out


def restore(tree: Any, flat: Mapping[str, Leaf]) -> Any:
    """A tree like `tree` with every leaf taken from `flat`; objects with `load_state_dict` are filled in place.

    Raises CheckpointError that lists every missing leaf, spare leaf and wrong shape.
    """
    problems: list[str] = []
    used: set[str] = set()
    out = _restore(tree, flat, "", problems, used)
    problems += [f"{k}: not part of this recipe's state" for k in flat if k not in used]
    if problems:
        raise CheckpointError("the checkpoint does not fit this recipe:\n" + "\n".join(sorted(problems)))
    return out


def _below(flat: Mapping[str, Leaf], prefix: str) -> dict[str, Leaf]:
    start = f"{prefix}." if prefix else ""
    return {k.removeprefix(start): v for k, v in flat.items() if k.startswith(start)}


def _leaf(old: Any, flat: Mapping[str, Leaf], prefix: str, problems: list[str], used: set[str]) -> Any:
    if prefix not in flat:
        problems.append(f"{prefix}: missing")
        return old
    used.add(prefix)
    new = flat[prefix]
    if isinstance(old, Tensor):
        if not isinstance(new, Tensor) or new.shape != old.shape:
            shape = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            problems.append(f"{prefix}: has shape {shape}, this recipe's is {tuple(old.shape)}")
            return old
        return new.to(device=old.device, dtype=old.dtype).clone()
    if isinstance(old, float) and isinstance(new, int) and not isinstance(new, bool):
        return float(new)
    if type(new) is not type(old):
        problems.append(f"{prefix}: is a {type(new).__name__}, this recipe's is a {type(old).__name__}")
    return new


def _restore(tree: Any, flat: Mapping[str, Leaf], prefix: str, problems: list[str], used: set[str]) -> Any:
    if tree is None:
        return None
    if isinstance(tree, Tensor | bool | int | float | str):
        return _leaf(tree, flat, prefix, problems, used)
    if _holds_state(tree):
        mine = _below(flat, prefix)
        used.update(f"{prefix}.{k}" if prefix else k for k in mine)
        try:
            tree.load_state_dict(mine)
        except (KeyError, RuntimeError, ValueError) as e:
            problems.append(f"{prefix}: {e}")
        return tree
    children = _children(tree)
    assert children is not None, type(tree)
    new = {
        name: _restore(child, flat, f"{prefix}.{name}" if prefix else name, problems, used) for name, child in children
    }
    if isinstance(tree, dict):
        tree.update(new)
        return tree
    if isinstance(tree, tuple | list):
        return type(tree)(new.values())
    return _rebuild(tree, new)


def _rebuild(record: Any, values: Mapping[str, Any]) -> Any:
    """A frozen record is made anew, a mutable one is changed in place."""
    try:
        for name, value in values.items():
            setattr(record, name, value)
    except attrs.exceptions.FrozenInstanceError:
        return attrs.evolve(record, **values)
    return record


def _map2(f: Callable[[Tensor, Tensor], Tensor], a: Any, b: Any) -> Any:
    if isinstance(a, Tensor):
        return f(a, b)
    children = _children(a)
    if children is None:
        return a
    others = _children(b) or ()
    pairs = {name: _map2(f, child, other) for (name, child), (_, other) in zip(children, others, strict=True)}
    if isinstance(a, Mapping):
        return pairs
    if isinstance(a, tuple | list):
        return type(a)(pairs.values())
    return attrs.evolve(a, **pairs)


def where(mask_M: Tensor, new: Any, old: Any) -> Any:
    """`new` where `mask_M` holds, `old` elsewhere, for two records of tensors whose first axis is M.

    A tensor whose first axis is not M is state that constraints share; it is taken from `new`.
    """
    m = mask_M.shape[0]

    def pick(a: Tensor, b: Tensor) -> Tensor:
        if a.ndim == 0 or a.shape[0] != m:
            return a
        return torch.where(mask_M.reshape(m, *([1] * (a.ndim - 1))), a, b)

    return _map2(pick, new, old)


def choose(flag: Tensor, yes: Any, no: Any) -> Any:
    """`yes` where a boolean scalar holds, else `no`, for two records of tensors; decided on the device."""
    return _map2(lambda a, b: torch.where(flag, a, b), yes, no)


def apply(f: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """A record like `tree` with `f` of every tensor."""
    return _map2(lambda a, _: f(a), tree, tree)


def to(tree: Any, device: torch.device) -> Any:
    """A record of tensors, on `device`."""
    return apply(lambda a: a.to(device), tree)
