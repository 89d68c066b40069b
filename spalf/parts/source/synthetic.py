"""`synthetic`: a planted dictionary (2602.14687), so that a found feature can be compared with the truth.

    x = (sum_i a_i d_i + bias) M,   a_i = 1[g_i > Phi^-1(1 - p_i)] ReLU(m_i + s eps)

Shapes: B rows, N planted features, D d_model, R rank of the correlation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from attrs import field
from attrs.validators import and_, ge, gt, lt
from torch import Tensor

from spalf.core.protocols import Stream
from spalf.core.slots import source
from spalf.core.values import Batch, Facts, Raw
from spalf.errors import SourceError
from spalf.parts.source.bare import Bare
from spalf.parts.source.blocks import generator


@source("synthetic")
class Synthetic:
    """Sparse sums of planted directions. Rows are independent draws, so there is no block to shuffle."""

    d_model: int = field(default=64, validator=gt(0))
    """Width of a row."""
    features: int = field(default=256, validator=gt(0))
    """Planted directions."""
    world: int = 0
    """Seed of the planted dictionary; the run's seed draws the rows."""
    decorrelate: int = field(default=200, validator=ge(0))
    """Steps towards low coherence; 0 leaves random directions."""
    zipf: float = field(default=0.5, validator=gt(0.0))
    """Firing rate p_r of rank r falls as r ** -zipf, rescaled to run from `most` to `least`."""
    most: float = field(default=0.4, validator=and_(gt(0.0), lt(1.0)))
    """Firing rate of the most frequent feature."""
    least: float = field(default=5e-4, validator=and_(gt(0.0), lt(1.0)))
    """Firing rate of the rarest."""
    rank: int = field(default=8, validator=ge(0))
    """Rank of the firing correlation; 0: features fire independently."""
    correlation: float = field(default=0.3, validator=and_(ge(0.0), lt(1.0)))
    """Share of each Gaussian's variance that the common factors carry."""
    trees: int = field(default=0, validator=ge(0))
    """Roots of the hierarchy; a child fires only with its parent, siblings exclude each other. 0: no hierarchy."""
    branching: int = field(default=4, validator=gt(0))
    """Children of a parent."""
    depth: int = field(default=3, validator=gt(1))
    """Levels of a tree, the roots counted."""
    strongest: float = field(default=5.0, validator=gt(0.0))
    """Mean magnitude m of the most frequent feature; it falls linearly to `weakest`."""
    weakest: float = field(default=4.0, validator=gt(0.0))
    """Mean magnitude of the rarest feature."""
    spread: float = field(default=0.5, validator=ge(0.0))
    """Standard deviation s of a magnitude, before it is rectified."""
    bias: float = field(default=0.5, validator=ge(0.0))
    """Norm of a constant vector."""
    condition: float = field(default=1.0, validator=ge(1.0))
    """Condition number of the symmetric positive M; 1: no mixing."""
    shuffle: int = field(default=8192, validator=gt(0))
    """Rows drawn at once, the unit of the cursor; three matrices [shuffle, features] of float32 are alive meanwhile."""
    labels: bool = False
    """Give the planted codes with training batches too; the held-out stream always does."""

    def facts(self) -> Facts:
        """Raises SourceError where the trees need more features than there are."""
        needed = sum(self.level_sizes())
        if needed > self.features:
            raise SourceError(
                f"source.trees = {self.trees} need {needed} features and there are {self.features} "
                "(raise features, or lower trees, branching or depth)"
            )
        return Facts(
            d_model=self.d_model,
            provides=frozenset({"activations", "truth"}),
            hook="planted",
            model=f"synthetic, {self.features} features",
            bytes_per_activation=4 * self.d_model,
            shuffle=self.shuffle,
        )

    def open(self, seed: int, device: torch.device) -> Stream:
        facts = self.facts()
        return SyntheticStream(self, facts, World(self, device), seed=seed, device=device)

    def level_sizes(self) -> list[int]:
        """Features on each level of the hierarchy, most frequent first: parents fire more often than children."""
        return [self.trees * self.branching**level for level in range(self.depth)] if self.trees else []


def firing_rates(options: Synthetic) -> Tensor:
    """[N]: p_r = least + (most - least) (r^-z - N^-z) / (1 - N^-z), before any hierarchy."""
    n = options.features
    rank_N = torch.arange(1, n + 1, dtype=torch.float64)
    fall_N = rank_N.pow(-options.zipf)
    last = float(n) ** -options.zipf
    share_N = (fall_N - last) / (1 - last) if n > 1 else torch.ones_like(fall_N)
    return options.least + (options.most - options.least) * share_N


def directions(options: Synthetic, device: torch.device) -> Tensor:
    """[N, D] unit rows: Gaussian, then descent on sum_{i != j} cos_ij^4 along the sphere.

    The descent runs on `device`, whose work grows with the square of N (2,048 features are half a minute of a CPU): the
    world is the same on every device up to rounding.
    """
    draw = generator("directions", options.world)
    gaussian_ND = torch.randn(options.features, options.d_model, generator=draw, dtype=torch.float32)
    d_ND = torch.nn.functional.normalize(gaussian_ND.to(device), dim=1)
    for _ in range(options.decorrelate if options.features > 1 else 0):
        cosine_NN = (d_ND @ d_ND.T).fill_diagonal_(0.0)
        push_ND = cosine_NN.pow(3) @ d_ND
        push_ND -= (push_ND * d_ND).sum(1, keepdim=True) * d_ND
        # Each row moves by a tenth of a radian at most, less where little is left to push away from.
        norm_N1 = push_ND.norm(dim=1, keepdim=True)
        top = norm_N1.max().clamp_min(1e-12)
        d_ND = torch.nn.functional.normalize(d_ND - 0.1 * push_ND / top, dim=1)
    return d_ND


def mixing(options: Synthetic) -> Tensor:
    """[D, D] symmetric positive, eigenvalues geometric with product 1 and ratio `condition`, axes at random."""
    d = options.d_model
    draw = generator("mixing", options.world)
    q_DD, _ = torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64))
    exponent_D = torch.linspace(0.5, -0.5, d, dtype=torch.float64) if d > 1 else torch.zeros(1, dtype=torch.float64)
    scale_D = torch.tensor(options.condition, dtype=torch.float64).pow(exponent_D)
    mix_DD: Tensor = (q_DD * scale_D) @ q_DD.T
    return mix_DD.float()


class World:
    """The planted dictionary on a device: one per source, shared by its streams."""

    def __init__(self, options: Synthetic, device: torch.device) -> None:
        n, d = options.features, options.d_model
        mix_DD = mixing(options) if options.condition > 1 else torch.eye(d)
        mixed_ND = directions(options, device) @ mix_DD.to(device)
        self.scale_N = mixed_ND.norm(dim=1)  # a code in units of the mixed, unit directions
        self.directions_ND = torch.nn.functional.normalize(mixed_ND, dim=1)
        bias_D = torch.randn(d, generator=generator("bias", options.world))
        self.bias_D = (options.bias * bias_D / bias_D.norm() @ mix_DD).to(device)
        rates_N = firing_rates(options)
        # Phi^-1(1 - p)
        self.bar_N = (math.sqrt(2.0) * torch.erfinv(1 - 2 * rates_N)).float().to(device)
        self.mean_N = torch.linspace(options.strongest, options.weakest, n).to(device)
        loads_NR = torch.randn(n, max(1, options.rank), generator=generator("loads", options.world))
        self.loads_NR = torch.nn.functional.normalize(loads_NR, dim=1).to(device)
        self.is_correlated = options.rank > 0 and options.correlation > 0
        self._options = options

    def draw(self, draw: torch.Generator, *, codes: bool = True) -> tuple[Tensor, Tensor | None]:
        """One chunk of rows [B, D] and, where asked for, their codes [B, N] in units of the true directions."""
        options, device, rows = self._options, draw.device, self._options.shuffle
        g_BN = torch.randn(rows, options.features, generator=draw, device=device)
        if self.is_correlated:
            common_BR = torch.randn(rows, options.rank, generator=draw, device=device)
            # g = sqrt(1 - c) eps + sqrt(c) f . load, with unit loads: each g stays a standard normal
            g_BN *= math.sqrt(1 - options.correlation)
            g_BN.addmm_(common_BR, self.loads_NR.T, alpha=math.sqrt(options.correlation))
        g_BN -= self.bar_N
        on_BN = g_BN > 0
        if options.trees:
            self._prune_(on_BN, g_BN)
        row_E, feature_E = on_BN.nonzero(as_tuple=True)
        noise_E = torch.randn(len(row_E), generator=draw, device=device)
        code_E = (self.mean_N[feature_E] + options.spread * noise_E).relu() * self.scale_N[feature_E]
        # What fires is a few in a thousand: no product over all of N.
        first_B = torch.searchsorted(row_E, torch.arange(rows, device=device))
        x_BD = torch.nn.functional.embedding_bag(
            feature_E, self.directions_ND, first_B, mode="sum", per_sample_weights=code_E
        )
        if not codes:
            return x_BD + self.bias_D, None
        code_BN = torch.zeros_like(g_BN)
        code_BN[row_E, feature_E] = code_E
        return x_BD + self.bias_D, code_BN

    def _prune_(self, on_BN: Tensor, g_BN: Tensor) -> None:
        """A child stays on only with its parent, and of firing siblings only the one that is furthest above its bar."""
        sizes = self._options.level_sizes()
        start = 0
        for parents, children in pairwise(sizes):
            first = start + parents
            parent_BP = on_BN[:, start:first]
            child_BPC = on_BN[:, first : first + children].reshape(-1, parents, self._options.branching)
            score_BPC = g_BN[:, first : first + children].reshape(-1, parents, self._options.branching)
            best_BP1 = score_BPC.argmax(2, keepdim=True)
            is_best_BPC = torch.zeros_like(child_BPC).scatter_(2, best_BP1, True)
            on_BN[:, first : first + children] = (child_BPC & is_best_BPC & parent_BP[:, :, None]).flatten(1)
            start = first


class SyntheticStream(Bare):
    """Chunks of independent rows; chunk c of a split is a function of (seed, split, c) and the device's generator."""

    source = "synthetic"

    def __init__(
        self,
        options: Synthetic,
        facts: Facts,
        world: World,
        *,
        seed: int,
        device: torch.device,
        held_out: bool = False,
    ) -> None:
        self.facts = facts
        self._options, self._world = options, world
        self._seed, self._device = seed, device
        self._split = "held_out" if held_out else "training"
        self._labels = held_out or options.labels
        self._chunk, self._offset = 0, 0
        self._drawn: tuple[Tensor, Tensor | None] | None = None

    def next(self, n: int) -> Batch:
        rows, codes = [], []
        missing = n
        while missing > 0:
            if self._drawn is None:
                draw = generator("rows", self._seed, self._split, self._chunk, device=self._device)
                self._drawn = self._world.draw(draw, codes=self._labels)
            taken = slice(self._offset, self._offset + missing)
            x_BD, code_BN = self._drawn[0][taken], self._drawn[1]
            rows.append(x_BD)
            if code_BN is not None:
                codes.append(code_BN[taken])
            missing -= len(x_BD)
            self._offset += len(x_BD)
            if self._offset == self._options.shuffle:
                self._chunk, self._offset, self._drawn = self._chunk + 1, 0, None
        truth_BN = torch.cat(codes) if self._labels else None
        return Batch(x_BD=Raw(torch.cat(rows)), truth_BN=truth_BN)

    def truth(self) -> Raw:
        return Raw(self._world.directions_ND)

    def held_out(self) -> SyntheticStream:
        return SyntheticStream(
            self._options, self.facts, self._world, seed=self._seed, device=self._device, held_out=True
        )

    def state_dict(self) -> dict[str, Any]:
        return {"chunk": self._chunk, "offset": self._offset}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._chunk, self._offset = int(state["chunk"]), int(state["offset"])
        self._drawn = None
