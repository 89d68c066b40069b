"""From what a user asked for to options, and from documents to files."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spalf.bench.speed import page, peers, run
from spalf.bench.speed.ours import kernel_sets
from spalf.bench.speed.run import Document, Keep, Options
from spalf.bench.speed.scaling import AXES, Shape
from spalf.errors import Problem, RecipeError
from spalf.launch import compile_recipe, device_of
from spalf.record import write_json, write_whole

GPU_SHAPE = Shape(d=2048, width=65_536, l0=64, batch=4096)
CPU_SHAPE = Shape(d=192, width=2048, l0=20, batch=512)
"""Without --shape and --recipe: the quickstart's."""


def refused(option: str, message: str, hint: str) -> RecipeError:
    """A user's mistake in an option."""
    return RecipeError([Problem(option, message, hint)])


def shape(text: str, batch: int) -> Shape:
    """D,F,L0 as a shape. Raises RecipeError for anything else."""
    parts = text.replace("_", "").split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise refused("--shape", f'"{text}" is not d_model, features and active ones', "write 2048,65536,64")
    d, width, l0 = (int(part) for part in parts)
    if l0 >= width:
        raise refused("--shape", f'"{text}" asks for {l0} active ones of {width} features', "ask for fewer")
    return Shape(d=d, width=width, l0=l0, batch=batch)


def shapes(texts: Iterable[str], batch: int | None, recipe: str, cuda: bool) -> tuple[Shape, ...]:
    """Those asked for; else that of the recipe's own source; else the device's usual one."""
    usual = GPU_SHAPE if cuda else CPU_SHAPE
    asked = tuple(shape(text, batch or usual.batch) for text in texts)
    if asked:
        return asked
    if recipe == "spalf":
        return (Shape(d=usual.d, width=usual.width, l0=usual.l0, batch=batch or usual.batch),)
    plan = compile_recipe(recipe)
    rows = batch or plan.recipe.budget.batch
    return (Shape(d=plan.facts.d_model, width=plan.knobs.F, l0=plan.knobs.L0_target, batch=rows),)


def axes(texts: Iterable[str]) -> tuple[str, ...]:
    """The axes of a scaling grid. Raises RecipeError for one that there is not."""
    out: list[str] = []
    for text in texts:
        if text != "all" and text not in AXES:
            raise refused("--scaling", f'there is no axis "{text}"', f"one of {', '.join(AXES)}, or all")
        out += AXES if text == "all" else (text,)
    return tuple(out)


def chosen(asked: Mapping[str, Any]) -> Options:
    """Options from the command's parameters by name. Raises RecipeError for what cannot be done, before any of it."""
    device = device_of(asked["device"])
    cuda = device.type == "cuda"
    kernels = tuple(k.strip() for k in (asked["kernels"] or ("triton,torch" if cuda else "torch")).split(","))
    for kernel in kernels:
        kernel_sets(kernel)
    precision = asked["dtype"] if asked["dtype"] != "auto" else ("bf16" if cuda else "fp32")
    return Options(
        shapes=shapes(asked["shapes"], asked["batch"], asked["recipe"], cuda),
        kernels=kernels,
        device=str(device) if cuda else "cpu",
        precision=precision,
        steps=asked["steps"],
        rounds=asked["rounds"],
        threads=asked["threads"],
        recipe=asked["recipe"],
        sets=tuple(asked["sets"]),
        only=asked["only"],
        python=None if asked["without_peers"] else peers.interpreter(asked["peers"]),
        peers=not asked["without_peers"],
        ceilings=asked["ceilings"],
        profile=asked["profile"],
        share=asked["share"],
        start=asked["start"],
        axes=axes(asked["scaling"]),
        commit=asked["commit"],
        command=" ".join(["spalf", *map(shlex.quote, sys.argv[1:])]),
    )


def keeper(path: Path | None) -> Keep:
    """Writes a document where it is wanted, whole each time. Raises RecipeError where that cannot be."""
    if path is None:
        return lambda document: None
    _refuse_missing("--json", path)
    return lambda document: write_json(path, document)


def written(path: Path, documents: list[Document], remarks: Path | None = None) -> None:
    """The page of these documents. Raises OSError where it cannot be written, or the remarks not be read."""
    text = "" if remarks is None else remarks.read_text(encoding="utf-8")
    write_whole(path, page.page(documents, text))


def _refuse_missing(option: str, path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise refused(option, f"{path}: there is no such directory", "make it first")


def documents(paths: Iterable[Path]) -> list[Document]:
    """Those of these files, joined by machine and commit. Raises RecipeError for a file that is no such document."""
    found = []
    for path in paths:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            known = {"machine", "command", "shapes", "scaling"} <= set(document)
        except (OSError, ValueError) as e:
            reason = e.strerror if isinstance(e, OSError) else "is not JSON"
            raise refused("--from", f"{path}: {reason}", "name what --json has written") from None
        if not known:
            raise refused("--from", f"{path}: is not of this benchmark", "name what --json has written")
        found.append(document)
    return run.merged(found)


def run_or_read(asked: Mapping[str, Any], tell: run.Tell) -> list[Document]:
    """The documents that a call is about: read where files are named, else measured."""
    if asked["render"] is not None:
        _refuse_missing("--render", asked["render"])
    if asked["read"]:
        return documents(asked["read"])
    options = chosen(asked)
    return run.merged([run.speed(options, tell, keeper(asked["write"]))])
