"""The study: do differences identify concepts better? The same data to every method, several seeds, intervals.

Shapes: F features, C concepts.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from attrs import field, frozen

import spalf
from spalf import Pairs, SourceError, read_pairs, write_pairs
from spalf_shift import mcc
from spalf_shift.evaluator import concept_scores, probe_scores, steering_scores
from spalf_shift.representation import Representation, linear, mean_shifts, of_state, principal, random_rows
from spalf_shift.sentences import text_pairs, write_text
from spalf_shift.split import by_sentence

RECIPES = Path(__file__).with_name("recipes")
KS = (1, 5)
FEATURES = 64
"""Of the baselines; the recipes' own."""
QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t at 97.5 % for n seeds."""


@frozen(kw_only=True)
class Trained:
    """A recipe of this package with settings on top, on differences or on their `ends`."""

    recipe: str
    ends: bool = False
    sets: tuple[str, ...] = ()


ON_ENDS = ('whitener={use="identity"}',)
AFFINE = (
    'activation={use="soft_threshold",learned=false}',
    'dual={use="ascent"}',
    'phase.fit={use="constrained",terms=["error"],gate="exhausted"}',
)
WIDE = ("knobs.F=512", "knobs.L0_target=12")
"""For activations themselves: a sentence has many concepts at once, and content besides."""

TRAINED: Mapping[str, Trained] = {
    "shift, L1": Trained(recipe="shift_l1"),
    "shift, L0": Trained(recipe="shift_l0"),
    "shift, min L0": Trained(recipe="shift_min_l0"),
    "shift, L1 as published": Trained(recipe="shift_published"),
    "shift, jumprelu": Trained(recipe="shift_jumprelu"),
    "shift, relu + L1": Trained(recipe="shift_relu"),
    "shift, affine": Trained(recipe="shift_l1", sets=AFFINE),
    "ends, L1": Trained(recipe="shift_l1", ends=True, sets=ON_ENDS),
    "ends, L1, wide": Trained(recipe="shift_l1", ends=True, sets=(*ON_ENDS, *WIDE)),
    "ends, jumprelu, wide": Trained(recipe="shift_jumprelu", ends=True, sets=(*WIDE, "knobs.R2_target=0.9")),
    "ends, relu + L1, wide": Trained(recipe="shift_relu", ends=True, sets=WIDE),
}


@frozen(kw_only=True)
class Row:
    """One method: every number by seed, and how much the dictionaries of different seeds agree."""

    name: str
    numbers: Mapping[str, tuple[float, ...]]
    consistency: tuple[float, ...] = field(default=())

    def mean(self, key: str) -> float:
        return fmean(self.numbers[key])

    def half_width(self, key: str) -> float:
        """Of the 95 % interval of the mean over seeds (Student's t); 0 for a single seed."""
        return half_width(self.numbers[key])


def half_width(values: Sequence[float]) -> float:
    """t(n - 1, 97.5 %) s / sqrt(n), 0 for a single value."""
    n = len(values)
    return QUANTILE.get(n, 1.96) * stdev(values) / math.sqrt(n) if n > 1 else 0.0


def scores(this: Representation, pairs: Pairs, seed: int) -> dict[str, float]:
    """What the table is made of, on pairs that training has not seen."""
    out = concept_scores(this, pairs, seed)
    out.update(probe_scores(this, pairs, KS, seed))
    out.update({f"steering.{k}": v for k, v in steering_scores(this, pairs, seed).items()})
    code_NF = this.code(pairs)
    out["l0"] = float((code_NF != 0).float().sum(1).mean())
    return out


def baselines(train: Pairs, features: int, seed: int) -> dict[str, Representation]:
    """What needs no training by gradient; the first sees the labels."""
    return {
        "mean difference (sees labels)": linear(mean_shifts(train)),
        "PCA": principal(train, features),
        "random directions": linear(random_rows(features, train.a_ND.shape[1], seed)),
    }


def trained(method: Trained, pairs: Path, seed: int, out: Path, sets: Sequence[str] = ()) -> Representation:
    """Train a method's recipe on a directory of pairs, and take its codes."""
    source = "endpoints" if method.ends else "difference"
    settings = [f'source={{use="{source}",pairs="{pairs}"}}', f"seed={seed}", *method.sets, *sets]
    result = spalf.run(RECIPES / f"{method.recipe}.toml", sets=settings, out=out, device="cpu", force=True)
    loaded = spalf.load(result.directory, device="cpu")
    return of_state(loaded.plan, loaded.state)


def study(
    pairs: Pairs,
    seeds: int = 3,
    *,
    only: Sequence[str] = (),
    sets: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[Row]:
    """A row per method, each with `seeds` trainings, splits and floors.

    Three fifths of the pairs are trained on, the rest, which shares no sentence with them, is measured on; `only` names
    methods, `sets` are further settings of every recipe, `tell` hears what is being done.
    """
    train, test = by_sentence(pairs, (0.6, 0.4), seed=0)
    with tempfile.TemporaryDirectory(prefix="spalf-shift-") as folder:
        where = write_pairs(Path(folder) / "pairs", train)
        names = [*baselines(train, FEATURES, 0), *TRAINED]
        unknown = sorted(set(only) - set(names))
        if unknown:
            raise SourceError(f"there is no method {unknown[0]!r} (there are: {'; '.join(names)})")
        for name in names:
            if only and name not in only:
                continue
            tell(name)
            found: list[Representation] = []
            for seed in range(seeds):
                if name in TRAINED:
                    found.append(trained(TRAINED[name], where, seed, Path(folder) / "runs", sets))
                    shutil.rmtree(Path(folder) / "runs")
                else:
                    found.append(baselines(train, FEATURES, seed)[name])
            yield row(name, found, test)


def row(name: str, found: Sequence[Representation], test: Pairs) -> Row:
    """Scores of each seed's representation, its splits drawn by its own seed, and their agreement two by two."""
    each = [scores(this, test, seed) for seed, this in enumerate(found)]
    shared = set(each[0]).intersection(*each)
    agree = [
        mcc.dictionary_mcc(a.rows_FD, b.rows_FD) for i, a in enumerate(found) for b in found[:i] if name in TRAINED
    ]
    return Row(name=name, numbers={k: tuple(one[k] for one in each) for k in sorted(shared)}, consistency=tuple(agree))


COLUMNS: Mapping[str, str] = {
    "l0": "L0",
    "c_one_to_one": "(c)",
    "b_signed": "(b)",
    "auc@1": "AUC, K=1",
    "accuracy@1": "acc., K=1",
    "accuracy@5": "acc., K=5",
    "steering.accuracy": "steering",
    "steering.accuracy_at_length": "at full length",
}


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Heads and cells: means, with the half-width of their 95 % interval over seeds."""
    heads = ["method", *COLUMNS.values(), "(a) seeds"]
    body = [
        [one.name, *(cell(one.numbers.get(k, ()), 1 if k == "l0" else 3) for k in COLUMNS), cell(one.consistency)]
        for one in rows
    ]
    return [heads, *body]


def cell(values: Sequence[float], digits: int = 3) -> str:
    """mean +- half-width; - where nothing was measured."""
    if not values:
        return "-"
    spread = half_width(values)
    return f"{fmean(values):.{digits}f}" + (f" +-{spread:.{digits}f}" if round(spread, digits) else "")


def floors(rows: Sequence[Row]) -> dict[str, float]:
    """What chance alone reaches, means over all methods and seeds."""
    keys = ("c_permuted", "c_random", "b_signed_random", "steering.accuracy_random", "steering.probe")
    return {key: fmean(v for one in rows for v in one.numbers[key]) for key in keys}


def floor_of_consistency(features: int, d_model: int) -> float:
    """(a) of two random dictionaries."""
    return mcc.dictionary_mcc(random_rows(features, d_model, 1), random_rows(features, d_model, 2))


def harvested(recipe: str, position: str, groups: int, tell: Callable[[str], None]) -> Pairs:
    """The labelled sentences through a recipe's language model."""
    tell(f"reading {groups} groups of sentences")
    with tempfile.TemporaryDirectory(prefix="spalf-shift-") as folder:
        texts = write_text(Path(folder) / "pairs.jsonl", text_pairs(groups))
        where = spalf.harvest(recipe, Path(folder) / "pairs", pairs=texts, position=position, device="cpu")
        return read_pairs(where)


def as_json(rows: Sequence[Row]) -> dict[str, object]:
    """Every number by method, name and seed, and the floors."""
    methods = {one.name: {**one.numbers, "consistency": one.consistency} for one in rows}
    return {"methods": methods, "floors": floors(rows)}
