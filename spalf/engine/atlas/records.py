"""What is said of a feature, and of a dictionary's features together. Plain numbers: no tensor."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

Pairs = tuple[tuple[int, float], ...]
"""(id of a token or a feature, number), most remarkable first."""


@frozen(kw_only=True)
class Anchored:
    """What ties a feature to a token: its id, the distance from the anchor, and the cosine with it.

    `drift` is |d - d0| in whitened coordinates, the unit of `within` of the constraint drift; `cosine` is in model
    space.
    """

    token: int
    drift: float
    cosine: float


@frozen(kw_only=True)
class Place:
    """One context of a feature: sequence, position of the peak, and each position near it with its activation.

    `rank` is where the peak stands among all firings of the feature: 0 the strongest, 1 the weakest.
    """

    sequence: int
    position: int
    rank: float
    activations: Pairs


@frozen(kw_only=True)
class Feature:
    """One feature on held-out data. A list is empty where the source cannot tell.

    fired: rows that fire it. peak, mean: of its activations. histogram: activations in equal bars from 0 to `peak`.
    tokens: those it fires on, with their share of its summed activation. promoted, suppressed: tokens with the logit
    that the unit decoder row gives them through the centred unembedding, the model's final norm left out. neighbours:
    features with the cosine of the decoder rows in model space. partners: features that fire on the same rows, with
    the share of this feature's firings on which they do. planted: the nearest planted direction of a synthetic source
    with its cosine. absorption: of an anchored one, the share of its token's places at which another feature speaks for
    it. places: strongest contexts first, then some from the middle of its range.
    """

    id: int
    stratum: str
    fired: int
    peak: float = 0.0
    mean: float = 0.0
    histogram: tuple[int, ...] = ()
    tokens: Pairs = ()
    promoted: Pairs = ()
    suppressed: Pairs = ()
    neighbours: Pairs = ()
    partners: Pairs = ()
    planted: Pairs = ()
    anchored: Anchored | None = None
    absorption: float | None = None
    places: tuple[Place, ...] = ()


@frozen(kw_only=True)
class Atlas:
    """`features` of the `width` that the dictionary has, seen on `rows` rows.

    rows_of: rows of each stratum. silent: features of the whole dictionary that fired on no row. density: for each
    stratum, its features by log10 of their density, in the bars of `DECADES`. sequences: token ids. text: what each id
    that is mentioned anywhere reads as.
    """

    width: int
    rows: int
    rows_of: Mapping[str, int]
    silent: int
    density: tuple[tuple[int, ...], ...]
    features: tuple[Feature, ...]
    sequences: tuple[tuple[int, ...], ...]
    text: Mapping[int, str]

    def share(self, feature: Feature) -> float:
        """The share of rows that fire a feature."""
        return feature.fired / self.rows


DECADES = tuple(e / 4 for e in range(-20, 1))
"""Edges of the bars of log10 density: 1e-5 to 1, four a decade. What is rarer and fires lies in the first bar."""
