"""A suite file: which dictionaries are trained on which stream, ours and other libraries', and what is varied.

Read strictly: every mistake of a file is told at once, with its place. Paths count from the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attrs import evolve, field, frozen

from spalf.assembly import toml
from spalf.assembly.toml import Table
from spalf.bench.fields import REQUIRED, Fields
from spalf.errors import Problem, RecipeError

PEERS: Mapping[str, str] = {
    "saelens.topk": "k",
    "saelens.batchtopk": "k",
    "saelens.jumprelu": "target_l0",
    "saelens.matryoshka": "k",
    "dictionary_learning.topk": "k",
    "dictionary_learning.batchtopk": "k",
    "dictionary_learning.jumprelu": "target_l0",
    "dictionary_learning.gated": "",
}
"""What a peer's trainer is called here -> its option that takes an L0; "" where it has none."""
L0, LR = "knobs.L0_target", "knobs.lr"
VARIED = "__varied__"  # the key of a method's table that says which value is to be multiplied; no recipe has it


@frozen(kw_only=True)
class Axis:
    """What a method is run at: values of one option of its trainer, or of one key of its recipe."""

    key: str
    values: tuple[float, ...]
    is_l0: bool
    """Whether the values are L0s."""


@frozen(kw_only=True)
class Sweep:
    """How a learning rate is chosen: at these values of the axis, one seed, a share of the budget.

    The best rate has the most MCC where features are planted, else the least FVU at `l0` (on the line of its points).
    """

    at: tuple[float, ...]
    l0: float
    seed: int
    share: float


@frozen(kw_only=True)
class Method:
    """One way of training, at every value of its axis and every seed."""

    name: str
    title: str
    peer: str
    """A key of PEERS, or "" for one of ours."""
    recipe: str
    """A preset, a file, or "" for the suite's base; of ours only."""
    table: Table = field(hash=False)
    """What is merged over the recipe; of ours only."""
    options: Table = field(hash=False)
    """Options of a peer's trainer or configuration."""
    lr: tuple[float, ...]
    """Learning rates to choose from; () keeps the recipe's, or the library's own."""
    axis: Axis
    sweep: Sweep | None
    seeds: tuple[int, ...]


@frozen(kw_only=True)
class Peers:
    """What all peers have in common; part of what their numbers are made of."""

    versions: Mapping[str, str] = field(hash=False)
    autocast: bool
    """bfloat16 autocast on CUDA, as each library does it."""
    normalise: int
    """Batches from which a library estimates the scale of activations."""
    decay: float
    """Share of the steps over which the learning rate falls to 0 at the end."""


@frozen(kw_only=True)
class Agreement:
    """Where PW-MCC across seeds is measured: axis values (() is nowhere), and rows that are matched to all others."""

    at: tuple[float, ...]
    rows: int


@frozen(kw_only=True)
class Suite:
    """All of a suite file."""

    name: str
    path: Path
    about: str
    base: str
    table: Table = field(hash=False)
    """What is merged over the base recipe."""
    evaluators: Table = field(hash=False)
    """Of every method alike, by name; {} takes what the source allows, with defaults."""
    held_out_seed: int
    silent: int
    """Activations of the training documents on which a silent feature never fires; 0: not measured."""
    peers: Peers
    agreement: Agreement
    methods: tuple[Method, ...]


def read(path: str | Path) -> Suite:
    """Read a suite file. Raises RecipeError with all of its problems."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        said = e.strerror if isinstance(e, OSError) else "it is not UTF-8 text"
        raise RecipeError([Problem(str(file), f"cannot be read: {said}", "name a suite file")]) from None
    problems: list[Problem] = []
    top = Fields(toml.parse(text, str(file)), "", problems)
    suite = _suite(top, file)
    top.close()
    if problems:
        raise RecipeError(problems)
    return suite


def _suite(top: Fields, file: Path) -> Suite:
    about, base, table = top.text("about", ""), top.text("base", REQUIRED), top.table("with", {})
    seeds, l0 = top.integers("seeds", (0,)), top.numbers("l0", ())
    evaluators = top.table("evaluator", {})
    held_out_seed, silent = top.integer("held_out_seed", 0), top.integer("silent", 0)
    peers, agreement = _peers(top.inner("peers")), _agreement(top.inner("agreement"))
    drafts: dict[str, Method] = {}
    given = top.table("method", REQUIRED)
    for name in given:
        inner = top.under("method", name)
        parent = inner.text("from", "")
        if parent and parent not in drafts:
            inner.wrong("from", f'"{parent}" is no method above it', f"there are: {', '.join(drafts) or 'none'}")
        drafts[name] = _method(name, inner, drafts.get(parent), seeds, l0, file)
        inner.close()
    methods = list(drafts.values())
    for i, held in enumerate(top.tables("vary")):
        inner = Fields(held, f"vary[{i}]", top.problems)
        methods += _varied(inner, drafts)
        inner.close()
    return Suite(
        name=file.stem,
        path=file,
        about=about,
        base=_beside(base, file),
        table=table,
        evaluators=evaluators,
        held_out_seed=held_out_seed,
        silent=silent,
        peers=peers,
        agreement=agreement,
        methods=tuple(methods),
    )


def _peers(inner: Fields) -> Peers:
    versions = inner.table("versions", {})
    for name, version in versions.items():
        if name not in ("saelens", "dictionary_learning") or not isinstance(version, str):
            inner.wrong(f"versions.{name}", "is not a library and its version", 'write saelens = "6.54.12"')
    peers = Peers(
        versions=versions,
        autocast=inner.boolean("autocast", True),
        normalise=inner.integer("normalise", 100, least=1),
        decay=inner.number("decay", 0.2, low=0.0, high=0.9),
    )
    inner.close()
    return peers


def _agreement(inner: Fields) -> Agreement:
    agreement = Agreement(at=inner.numbers("at", ()), rows=inner.integer("rows", 2048, least=2))
    inner.close()
    return agreement


def _method(
    name: str, inner: Fields, parent: Method | None, seeds: tuple[int, ...], l0: tuple[float, ...], file: Path
) -> Method:
    title = inner.text("title", name)
    peer = inner.text("peer", parent.peer if parent else "")
    if peer and peer not in PEERS:
        inner.wrong("peer", f'"{peer}" is no trainer', f"there are: {', '.join(PEERS)}")
        peer = ""
    recipe = _beside(inner.text("recipe", ""), file) or (parent.recipe if parent else "")
    table, options = inner.table("with", {}), inner.table("options", {})
    for key, held in (("recipe", recipe), ("with", table)):
        if peer and held:
            inner.wrong(key, "is for methods of ours", "a peer takes options")
    if options and not peer:
        inner.wrong("options", "are a peer's", 'write with = { knobs = { lr = 1e-3 } }, or name a peer = "..."')
    lr = inner.numbers("lr", parent.lr if parent else ())
    axis = _axis(inner, peer, parent, l0)
    return Method(
        name=name,
        title=title,
        peer=peer,
        recipe=recipe,
        table=toml.merge(parent.table, table) if parent else table,
        options={**(parent.options if parent else {}), **options},
        lr=lr,
        axis=axis,
        sweep=_sweep(inner, axis, lr, parent, seeds),
        seeds=inner.integers("seeds", parent.seeds if parent else seeds),
    )


def _axis(inner: Fields, peer: str, parent: Method | None, l0: tuple[float, ...]) -> Axis:
    """`over = { key, values }`, else the L0s of the method, of its parent, of the suite."""
    own = PEERS[peer] if peer else L0
    held, over = inner.numbers("l0", ()), inner.optional("over")
    if over is not None:
        axis = Axis(key=over.text("key", REQUIRED), values=over.numbers("values", REQUIRED), is_l0=False)
        over.close()
        if held:
            inner.wrong("over", "stands beside l0", "give one of the two")
        return axis
    if not held and parent is not None:
        return parent.axis
    if not own:
        inner.wrong(
            "over", "is missing: this trainer takes no L0", 'write over = { key = "l1_penalty", values = [...] }'
        )
    if not (held or l0):
        inner.wrong("l0", "is missing here and at the top", "write l0 = [16, 32, 64, 128]")
    return Axis(key=own, values=held or l0, is_l0=True)


def _sweep(
    inner: Fields, axis: Axis, lr: tuple[float, ...], parent: Method | None, seeds: tuple[int, ...]
) -> Sweep | None:
    given = inner.optional("sweep")
    if given is None:
        if parent is not None and len(lr) > 1:
            return parent.sweep
        if len(lr) > 1:
            inner.wrong("sweep", f"is missing: there are {len(lr)} rates", "write sweep = { l0 = 64, seed = 0 }")
        return None
    l0 = given.number("l0", REQUIRED, low=0.0)
    at = given.numbers("at", (l0,) if axis.is_l0 else REQUIRED)
    sweep = Sweep(
        at=at,
        l0=l0,
        seed=given.integer("seed", seeds[0] if seeds else 0),
        share=given.number("share", 1.0, low=1e-3, high=1.0),
    )
    if not axis.is_l0 and len(at) < 2:
        given.wrong("at", "has one value: at unequal L0 no rate can be compared", "give two or more")
    given.close()
    return sweep


def _varied(inner: Fields, drafts: Mapping[str, Method]) -> list[Method]:
    """A method for each key and factor: the value is filled in where the recipe is known (`jobs.filled`)."""
    name, keys = inner.text("method", REQUIRED), inner.texts("keys", REQUIRED)
    factors = inner.numbers("factors", (0.5, 2.0))
    at, seeds = inner.numbers("at", ()), inner.integers("seeds", ())
    method = drafts.get(name)
    if method is None:
        inner.wrong("method", f'"{name}" is no method', f"there are: {', '.join(drafts) or 'none'}")
        return []
    if method.peer:
        inner.wrong("method", f'"{name}" is a peer\'s', "name a method of ours")
        return []
    return [
        evolve(
            method,
            name=f"{name}.{key}.x{factor:g}",
            title=f"{key} x {factor:g}",
            table=toml.merge(method.table, {VARIED: {"key": key, "factor": factor}}),
            axis=evolve(method.axis, values=at or method.axis.values),
            seeds=seeds or method.seeds,
        )
        for key in keys
        for factor in factors
    ]


def _beside(name: str, file: Path) -> str:
    """A preset's name as it is; a path counts from the suite's file."""
    if not name or ("/" not in name and not name.endswith(".toml")):
        return name
    return str(file.parent / name)


__all__ = ["L0", "LR", "PEERS", "VARIED", "Agreement", "Axis", "Method", "Peers", "Suite", "Sweep", "read"]
