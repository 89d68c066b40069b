"""The jobs of a suite: what is to be trained, what each one's key is, and what has to be known first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from attrs import field, frozen

from spalf.assembly import toml
from spalf.assembly.toml import Table
from spalf.bench import tables
from spalf.bench.choice import best
from spalf.bench.results import Line
from spalf.bench.suite import LR, Axis, Method, Peers, Suite
from spalf.errors import Problem, RecipeError


@frozen(kw_only=True)
class Job:
    """One line to be made. `kind` is "ours", "peer" or "agreement"."""

    key: str
    name: str
    kind: str
    about: Mapping[str, Any] = field(hash=False)
    """What its line says of it: method, title, axis, setting, lr, seed, share, tokens."""
    work: Table = field(hash=False)
    """Ours: the recipe. A peer's: its order, without paths. An agreement's: keys of two jobs."""
    stream: str = ""
    """Peers of one stream may be fed from one harvest."""


@frozen(kw_only=True)
class Due:
    """The jobs of a suite as far as they are known; those that wait for a choice of rate are told by method."""

    jobs: tuple[Job, ...]
    waiting: tuple[str, ...]


def expand(suite: Suite, base: tables.Base, done: Mapping[str, Line]) -> Due:
    """Every job in the order of the queue: sweeps, then each axis value for all methods, seeds together.

    A method with several rates has its other jobs once its sweep is among `done`. Raises RecipeError with the problems
    of all methods.
    """
    problems: list[Problem] = []
    sweeps: list[Job] = []
    mains: list[tuple[float, Job]] = []
    waiting: list[str] = []
    places = tables.named(suite)
    for method in suite.methods:
        try:
            maker = _Maker(suite, base, method, places)
            own = list(maker.sweep())
            rate, is_known = _rate(method, own, done)
            sweeps += own
            if is_known:
                mains += maker.main(rate)
            else:
                waiting.append(method.name)
        except RecipeError as e:
            problems += [Problem(f"method.{method.name}: {p.path}", p.message, p.hint) for p in e.problems]
    if problems:
        raise RecipeError(problems)
    # By axis value, so that a visit that is cut short leaves whole columns of the table.
    order = {value: i for i, value in enumerate(dict.fromkeys(value for value, _ in mains))}
    mains.sort(key=lambda one: order[one[0]])
    jobs = _unique([*sweeps, *(job for _, job in mains)])
    return Due(jobs=(*jobs, *_agreements(suite, [job for _, job in mains])), waiting=tuple(waiting))


def _rate(method: Method, sweep: Sequence[Job], done: Mapping[str, Line]) -> tuple[float | None, bool]:
    """(the rate, whether it is known yet). A rate whose jobs have all failed is not chosen."""
    if len(method.lr) < 2:
        return (method.lr[0] if method.lr else None), True
    lines = [done.get(job.key) for job in sweep]
    if any(line is None for line in lines):
        return None, False
    assert method.sweep is not None, "suite.read asks for a sweep where there are several rates"
    chosen = best([line for line in lines if line and line["status"] == "done"], method.sweep)
    return chosen, chosen is not None


class _Maker:
    """Makes the jobs of one method."""

    def __init__(self, suite: Suite, base: tables.Base, method: Method, places: Table) -> None:
        self._suite, self._base, self._method, self._places = suite, base, method, places
        self._recipe = {} if method.peer else tables.recipe_of(base, method)
        self._filled: dict[tuple[float, float | None, int], Table] = {}

    def sweep(self) -> Iterator[Job]:
        sweep = self._method.sweep
        if sweep is not None and len(self._method.lr) > 1:
            for lr in self._method.lr:
                for value in sweep.at:
                    yield self._job(value, lr, sweep.seed, sweep.share, f"sweep/lr-{lr:g}/")

    def main(self, lr: float | None) -> Iterator[tuple[float, Job]]:
        for value in self._method.axis.values:
            for seed in self._method.seeds:
                yield value, self._job(value, lr, seed, 1.0, "")

    def _job(self, value: float, lr: float | None, seed: int, share: float, middle: str) -> Job:
        method, base = self._method, self._base
        budget = base.plan.recipe.budget
        tokens = max(1, int(budget.tokens * share) // budget.batch) * budget.batch
        setting = f"{'l0' if method.axis.is_l0 else method.axis.key}-{value:g}"
        about = {
            "method": method.name,
            "title": method.title,
            "axis": method.axis.key,
            "setting": value,
            "lr": lr,
            "seed": seed,
            "share": share,
            "tokens": tokens,
        }
        work, counted = (self._order if method.peer else self._own)(value, lr, seed, tokens)
        evaluated = {"evaluator": base.filled.get("evaluator", {}), "held_out_seed": self._suite.held_out_seed}
        return Job(
            key=key_of({**counted, **evaluated, "places": self._places}),
            name=f"{method.name}/{middle}{setting}/seed-{seed}",
            kind="peer" if method.peer else "ours",
            about=about,
            work=work,
            stream=f"{seed}" if method.peer else "",
        )

    def _own(self, value: float, lr: float | None, seed: int, tokens: int) -> tuple[Table, Table]:
        """A recipe, and what of it determines the numbers: all of it, filled."""
        table = toml.merge(self._recipe, tables.set_to(self._method.axis.key, value))
        table = toml.merge(table, {"seed": seed, "budget": {"tokens": tokens}})
        if lr is not None:
            table = toml.merge(table, tables.set_to(LR, lr))
        same = (value, lr, tokens)
        if same not in self._filled:  # seeds differ in nothing else
            self._filled[same] = tables.without_places(tables.compiled(table)[1])
        return table, {"recipe": {**self._filled[same], "seed": seed}}

    def _order(self, value: float, lr: float | None, seed: int, tokens: int) -> tuple[Table, Table]:
        """What a worker is told, paths left out, and the stream that it is fed from."""
        library, _, kind = self._method.peer.partition(".")
        plan, peers = self._base.plan, self._suite.peers
        order = {
            "library": library,
            "kind": kind,
            "version": peers.versions.get(library, ""),
            "options": {**self._method.options, self._method.axis.key: value},
            "lr": lr,
            "seed": seed,
            "steps": tokens // plan.recipe.budget.batch,
            "batch": plan.recipe.budget.batch,
            "d_model": plan.facts.d_model,
            "width": plan.knobs.F,
            **_shared(peers),
        }
        return order, {"order": order, "source": tables.without_places(self._base.filled)["source"]}


def _shared(peers: Peers) -> Table:
    return {"normalise": peers.normalise, "decay": peers.decay, "autocast": peers.autocast}


def _agreements(suite: Suite, mains: Sequence[Job]) -> Iterator[Job]:
    """A job for every pair of seeds of a method at the axis values that the suite asks for."""
    rows = suite.agreement.rows
    groups: dict[tuple[str, float], list[Job]] = {}
    for job in mains:
        if job.about["setting"] in suite.agreement.at:
            groups.setdefault((job.about["method"], job.about["setting"]), []).append(job)
    for held in groups.values():
        for a, b in combinations(held, 2):
            about = {k: v for k, v in a.about.items() if k != "seed"}
            seeds = [a.about["seed"], b.about["seed"]]
            name = f"{a.name.rpartition('/')[0]}/agreement-{seeds[0]}-{seeds[1]}"
            yield Job(
                key=key_of({"agreement": [a.key, b.key], "rows": rows}),
                name=name,
                kind="agreement",
                about={**about, "seeds": seeds},
                work={"of": [a.key, b.key], "rows": rows},
            )


def _unique(jobs: Sequence[Job]) -> list[Job]:
    """The first job of each key: a sweep over the whole budget shares jobs with what follows it."""
    return list({job.key: job for job in reversed(jobs)}.values())[::-1]


def key_of(table: Table) -> str:
    """A name for all that determines a job's numbers."""
    text = json.dumps(table, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def axis_name(axis: Axis) -> str:
    """What a table's column is called."""
    return "L0" if axis.is_l0 else axis.key


__all__ = ["Due", "Job", "axis_name", "expand", "key_of"]
