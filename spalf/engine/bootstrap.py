"""Intervals by resampling whole documents: seeded, vectorised, paired where two states met the same documents.

Tokens of one document are alike, so positions are no independent draws and their count says little about noise.
Shapes: U units (documents), N positions, R resamples, D any further axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from attrs import field, frozen
from torch import Tensor

from spalf.core.values import Sequences

RESAMPLES = 1000
LEVEL = 0.95
LOW, HIGH = ".ci_low", ".ci_high"
"""What the ends of a measure's interval are called: `ce_gap`, `ce_gap.ci_low`, `ce_gap.ci_high`."""

Totals = Mapping[str, Tensor]
"""Sums over units, by name: [R] or [R, D], float64."""


@frozen(kw_only=True, eq=False)
class Samples:
    """Float64 sums per unit, and what any totals of them measure.

    `unit_U` are the units' ids, rising; each of `sums` is [U] or [U, D]. `measure` takes totals [R] or [R, D] and
    gives [R] by name, NaN where a measure means nothing. Ratios are formed there, of totals and never of means.
    """

    unit_U: Tensor
    sums: Totals
    measure: Callable[[Totals], dict[str, Tensor]]

    def weighed(self, weight_RU: Tensor) -> dict[str, Tensor]:
        """Each measure [R] with units counted `weight_RU` times."""
        return self.measure({k: torch.tensordot(weight_RU, v, dims=1) for k, v in self.sums.items()})

    def values(self) -> dict[str, float]:
        """Each measure on every unit once; one that means nothing is left out."""
        ones_RU = torch.ones(1, len(self.unit_U), dtype=torch.float64)
        return {k: float(v) for k, v in self.weighed(ones_RU).items() if bool(v.isfinite())}


class Tally:
    """Sums values of positions by unit, on the host."""

    def __init__(self) -> None:
        self._units: list[Tensor] = []
        self._sums: dict[str, list[Tensor]] = {}
        self._contexts = 0

    def units(self, sequences: Sequences) -> Tensor:
        """The unit of each token [S, T]: its document, or its context where the source knows no documents."""
        if sequences.document_ST is not None:
            return sequences.document_ST
        count = sequences.tokens_ST.shape[0]
        unit_S = torch.arange(self._contexts, self._contexts + count, device=sequences.tokens_ST.device)
        self._contexts += count
        return unit_S[:, None].expand_as(sequences.tokens_ST)

    def add(self, unit_N: Tensor, **values: Tensor) -> None:
        """Add values [N] or [N, D] of positions to the sums of their units. Every call names the same values."""
        unit_U, index_N = _grouped(unit_N)
        self._units.append(unit_U.cpu())
        for name, value in values.items():
            sums = torch.zeros(len(unit_U), *value.shape[1:], dtype=torch.float64, device=value.device)
            self._sums.setdefault(name, []).append(sums.index_add_(0, index_N, value.double()).cpu())

    def samples(self, measure: Callable[[Totals], dict[str, Tensor]]) -> Samples:
        """All that was added."""
        unit_U, index_N = _grouped(torch.cat(self._units))
        sums = {}
        for name, parts in self._sums.items():
            whole = torch.cat(parts)
            sums[name] = torch.zeros(len(unit_U), *whole.shape[1:], dtype=torch.float64).index_add_(0, index_N, whole)
        return Samples(unit_U=unit_U, sums=sums, measure=measure)


def _grouped(id_N: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct ids [U], rising, and the place of each id among them [N]."""
    unit_U, index_N = id_N.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    return unit_U, index_N


class Measured(dict[str, float]):
    """Numbers that remember what they were made of, so that two states can be compared document by document."""

    def __init__(self, numbers: Mapping[str, float], samples: Samples | None = None) -> None:
        super().__init__(numbers)
        self.samples = samples


def measured(samples: Samples, extra: Mapping[str, float] | None = None, units: str = "documents") -> Measured:
    """Each measure with the ends of its 95 % interval, then `extra`, then how many units there were, as `units`."""
    out: dict[str, float] = {}
    ends = intervals(samples)
    for name, value in samples.values().items():
        out[name] = value
        if name in ends:
            out[name + LOW], out[name + HIGH] = ends[name]
    counted = {units: float(len(samples.unit_U))} if units else {}
    return Measured({**out, **(extra or {}), **counted}, samples)


def draws(units: int, seed: int = 0, resamples: int = RESAMPLES) -> Tensor:
    """[R, U] how often each unit is in each resample; a function of (units, seed)."""
    generator = torch.Generator().manual_seed(seed)
    drawn_RU = torch.randint(units, (resamples, units), generator=generator)
    weight_RU = torch.zeros(resamples, units, dtype=torch.float64)
    return weight_RU.scatter_add_(1, drawn_RU, torch.ones_like(drawn_RU, dtype=torch.float64))


def intervals(samples: Samples, seed: int = 0) -> dict[str, tuple[float, float]]:
    """The 95 % interval of each measure, left out where there are fewer than two units or a resample means nothing.

    Percentiles of the resamples, widened for few units as in 1411.5279.
    """
    units = len(samples.unit_U)
    if units < 2:
        return {}
    return _between(samples.weighed(draws(units, seed)), units)


@frozen(kw_only=True)
class Difference:
    """b - a of one measure with its 95 % interval.

    `paired` where both saw the same units; `exceeds_noise` where the interval leaves 0 out.
    """

    value: float
    low: float
    high: float
    paired: bool
    exceeds_noise: bool = field(init=False)

    @exceeds_noise.default
    def _leaves_zero_out(self) -> bool:
        return self.low > 0.0 or self.high < 0.0


def differences(a: Samples, b: Samples, seed: int = 0) -> dict[str, Difference]:
    """b - a of every measure that both have.

    Over the same units both are resampled together, so that what makes a document hard for both cancels; over other
    units each is resampled for itself.
    """
    if min(len(a.unit_U), len(b.unit_U)) < 2:
        return {}
    paired = torch.equal(a.unit_U, b.unit_U)
    first = a.weighed(draws(len(a.unit_U), seed))
    second = b.weighed(draws(len(b.unit_U), seed if paired else seed + 1))
    both = {name: second[name] - first[name] for name in first if name in second}
    ends = _between(both, min(len(a.unit_U), len(b.unit_U)))
    before, after = a.values(), b.values()
    return {
        name: Difference(value=after[name] - before[name], low=low, high=high, paired=paired)
        for name, (low, high) in ends.items()
        if name in before and name in after
    }


def _between(resampled: Mapping[str, Tensor], units: int) -> dict[str, tuple[float, float]]:
    tail = _tail(units)
    at = torch.tensor([tail, 1.0 - tail], dtype=torch.float64)
    out = {}
    for name, value_R in resampled.items():
        if bool(value_R.isfinite().all()):
            low, high = value_R.quantile(at).tolist()
            out[name] = (low, high)
    return out


def _tail(units: int) -> float:
    """Share of resamples outside on either side: Phi(sqrt(n / (n - 1)) t), t the (1 - LEVEL) / 2 quantile of Student's.

    A resample of n units varies by (n - 1) / n too little, and its percentiles are normal where Student's are due.
    """
    from scipy.special import ndtr, stdtrit

    t = stdtrit(units - 1, (1.0 - LEVEL) / 2.0)
    return float(ndtr((units / (units - 1)) ** 0.5 * t))
