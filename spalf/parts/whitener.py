"""Whiteners: model space to whitened space and back, y = (x - mean) W and x = y W^-1 + mean.

W and W^-1 are symmetric, made in float64 from S = U diag(l) U', kept in float32. D d_model, K leading directions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from attrs import field, frozen
from attrs.validators import ge, gt, lt
from torch import Tensor, nn

from spalf.core.built import Metric
from spalf.core.slots import whitener
from spalf.core.values import Facts, Raw, White
from spalf.errors import RunError
from spalf.kernels.squares import quadratic_form, sum_of_squares


@frozen(kw_only=True, eq=False)
class Spectrum:
    """S = U diag(l) U': variances l_1 >= ... >= l_D >= 0 and the directions as columns of U, float64."""

    l_D: Tensor
    U_DD: Tensor

    def leading(self, share: float) -> int:
        """k = min{k : l_1 + ... + l_k >= share * tr S}."""
        cumulative_D = self.l_D.cumsum(0)
        return min(int((cumulative_D < share * cumulative_D[-1]).sum()) + 1, len(self.l_D))


def spectrum(cov_DD: Tensor) -> Spectrum:
    """Raises RunError where the activations vary nowhere or their covariance is not finite."""
    cov_DD = cov_DD.to(torch.float64)
    if not bool(torch.isfinite(cov_DD).all()):
        raise RunError("the covariance of the activations is not finite (look for NaN or overflow at the hook)")
    l_D, U_DD = torch.linalg.eigh((cov_DD + cov_DD.T) / 2)
    l_D, U_DD = l_D.flip(0).clamp(min=0), U_DD.flip(1)
    if float(l_D[0]) == 0:
        raise RunError("all activations are equal, so nothing can be whitened (check the hook and the data)")
    return Spectrum(l_D=l_D, U_DD=U_DD)


class Affine(nn.Module, ABC):
    """What all metrics here share: the mean, the two directions of the map, and the figures of the fit.

    Buffers: mean_D [D] float32; spectrum_D [D] the variances l, and scalars alpha, rank, condition, raw_variance,
    white_variance, float64. Before `fit_` it is the identity. Computes in the input's precision, at least float32.
    """

    mean_D: Tensor
    spectrum_D: Tensor
    alpha: Tensor
    rank: Tensor
    condition: Tensor
    raw_variance: Tensor
    white_variance: Tensor

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.register_buffer("mean_D", torch.zeros(d_model))
        self.register_buffer("spectrum_D", torch.ones(d_model, dtype=torch.float64))
        figures = {"alpha": 0, "rank": d_model, "condition": 1, "raw_variance": d_model, "white_variance": d_model}
        for name, value in figures.items():
            self.register_buffer(name, torch.tensor(float(value), dtype=torch.float64))

    @abstractmethod
    def times_W(self, v: Tensor) -> Tensor:
        """v W."""

    @abstractmethod
    def times_inverse(self, v: Tensor) -> Tensor:
        """v W^-1."""

    def white(self, x: Raw) -> White:
        """Points [..., D]: (x - mean) W."""
        return White(self.times_W(_precise(x) - self.mean_D))

    def raw(self, x: White) -> Raw:
        """Points back: x W^-1 + mean."""
        return Raw(self.times_inverse(_precise(x)) + self.mean_D)

    def white_direction(self, v: Raw) -> White:
        """Rows or differences [..., D]: v W."""
        return White(self.times_W(_precise(v)))

    def raw_direction(self, v: White) -> Raw:
        """Rows or differences back: v W^-1."""
        return Raw(self.times_inverse(_precise(v)))

    def rough_direction(self, v: White) -> Raw:
        return Raw(self.times_inverse(v))

    def raw_square(self, v: White) -> Tensor:
        """||v W^-1||^2, summed over rows [B, D]: a scalar with graph."""
        return sum_of_squares(self.raw_direction(v))

    def variance(self, space: str) -> Tensor:
        """tr S for "raw", tr(W S W) for "white": the total variance on that side, a float32 scalar."""
        if space not in ("raw", "white"):
            raise ValueError(f'variance: there is no space "{space}" (use "raw" or "white")')
        return (self.raw_variance if space == "raw" else self.white_variance).float()

    def report(self) -> dict[str, float]:
        """alpha, rank k, condition of W^-2, and the total variance on both sides, for a run's metadata."""
        names = ("alpha", "rank", "condition", "raw_variance", "white_variance")
        return {name: float(getattr(self, name)) for name in names}

    def _record(self, mean_D: Tensor, l_D: Tensor, floor_D: Tensor, alpha: float, rank: int) -> None:
        """Figures of a fit whose W^-2 has the eigenvalues `floor_D`: d_eff = sum l / floor."""
        self.mean_D.copy_(mean_D)
        self.spectrum_D.copy_(l_D)
        self.alpha.fill_(alpha)
        self.rank.fill_(rank)
        self.condition.copy_(floor_D.max() / floor_D.min())
        self.raw_variance.copy_(l_D.sum())
        self.white_variance.copy_((l_D / floor_D).sum())


def _precise(x: Tensor) -> Tensor:
    """At least float32: bfloat16 has too few digits for W^-1 to undo W."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Dense(Affine):
    """W and W^-1 as two [D, D] matrices."""

    W_DD: Tensor
    inverse_DD: Tensor

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.register_buffer("W_DD", torch.eye(d_model))
        self.register_buffer("inverse_DD", torch.eye(d_model))
        self._form: tuple[tuple[int, int, torch.dtype], Tensor] | None = None

    def raw_square(self, v: White) -> Tensor:
        # W^-2, made anew when a fit or a checkpoint has changed W^-1.
        key = (self.inverse_DD.data_ptr(), self.inverse_DD._version, v.dtype)
        if self._form is None or self._form[0] != key:
            self._form = key, torch.linalg.matrix_power(self.inverse_DD.double(), 2).to(_precise(v).dtype)
        return quadratic_form(_precise(v), self._form[1])

    def times_W(self, v: Tensor) -> Tensor:
        return v @ self.W_DD.to(v.dtype)

    def times_inverse(self, v: Tensor) -> Tensor:
        return v @ self.inverse_DD.to(v.dtype)

    def fit_(self, mean_D: Tensor, s: Spectrum, floor_D: Tensor, alpha: float, rank: int) -> None:
        """W = U diag(floor)^(-1/2) U'."""
        self.W_DD.copy_(_symmetric(s.U_DD, floor_D.rsqrt()))
        self.inverse_DD.copy_(_symmetric(s.U_DD, floor_D.sqrt()))
        self._record(mean_D, s.l_D, floor_D, alpha, rank)


def _symmetric(U_DD: Tensor, gain_D: Tensor) -> Tensor:
    W_DD = (U_DD * gain_D) @ U_DD.T
    return (W_DD + W_DD.T) / 2


class LowRank(Affine):
    """W = tail I + U_k diag(gain - tail) U_k', stored as [D, K] and two [K]: K leading directions, one tail.

    The inverse has 1 / gain and 1 / tail in their places. Storage is O(D K) instead of O(D^2); the product costs
    4 D K instead of 2 D^2 operations a row.
    """

    U_DK: Tensor
    gain_K: Tensor
    tail: Tensor

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.register_buffer("U_DK", torch.zeros(d_model, 0))
        self.register_buffer("gain_K", torch.zeros(0))
        self.register_buffer("tail", torch.ones(()))

    def times_W(self, v: Tensor) -> Tensor:
        return self._spread(v, self.gain_K.to(v.dtype), self.tail.to(v.dtype))

    def times_inverse(self, v: Tensor) -> Tensor:
        # Reciprocals in the input's precision: taken in float32 the pair would not be inverse in float64.
        return self._spread(v, 1 / self.gain_K.to(v.dtype), 1 / self.tail.to(v.dtype))

    def _spread(self, v: Tensor, gain_K: Tensor, tail: Tensor) -> Tensor:
        U_DK = self.U_DK.to(v.dtype)
        return tail * v + ((v @ U_DK) * (gain_K - tail)) @ U_DK.T

    def fit_(self, mean_D: Tensor, s: Spectrum, alpha: float, rank: int) -> None:
        """gain = (l_i + alpha)^(-1/2) for i <= k, tail = (lbar + alpha)^(-1/2), lbar the mean of the other l_i."""
        floor_D = s.l_D.clone()
        if rank < self.d_model:
            floor_D[rank:] = s.l_D[rank:].mean()
        floor_D += alpha
        self.U_DK = s.U_DD[:, :rank].to(self.mean_D).contiguous()
        self.gain_K = floor_D[:rank].rsqrt().to(self.mean_D)
        self.tail = floor_D[-1].rsqrt().to(self.mean_D)
        self._record(mean_D, s.l_D, floor_D, alpha, rank)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        # k is known only after a fit, so a checkpoint brings its own shapes.
        for name in ("U_DK", "gain_K"):
            saved = state_dict.get(prefix + name)
            if isinstance(saved, Tensor) and saved.shape[:-1] == getattr(self, name).shape[:-1]:
                setattr(self, name, getattr(self, name).new_zeros(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Scaled(Affine):
    """W = I / scale."""

    scale: Tensor

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.register_buffer("scale", torch.ones(()))

    def times_W(self, v: Tensor) -> Tensor:
        return v / self.scale.to(v.dtype)

    def times_inverse(self, v: Tensor) -> Tensor:
        return v * self.scale.to(v.dtype)

    def raw_square(self, v: White) -> Tensor:
        return self.scale.square() * sum_of_squares(_precise(v))


@whitener("soft_zca")
class SoftZca:
    """W = (S + alpha I)^(-1/2) with alpha = l_k / condition, k the fewest directions with a share `variance` of tr S.

    The k leading whitened variances lie in [c / (1 + c), 1], c = `condition`, and no direction is amplified more than
    sqrt(1 + c) times as much as direction k; the condition of S + alpha I is at most 1 + c d / (1 - variance). Above
    `low_rank_above` dimensions only k directions are kept and the others share their mean variance. ZCA stays closest
    to the original axes (arXiv 1804.08450); softened: arXiv 2411.17538.
    """

    condition: float = field(default=100.0, validator=gt(0.0))
    variance: float = field(default=0.99, validator=[gt(0.0), lt(1.0)])
    low_rank_above: int = field(default=4096, validator=ge(0))

    def build(self, facts: Facts) -> Metric:
        return LowRank(facts.d_model) if facts.d_model > self.low_rank_above else Dense(facts.d_model)

    def fit_(self, metric: Metric, mean_D: Tensor, cov_DD: Tensor) -> None:
        """Raises RunError at a covariance that is zero or not finite."""
        s = spectrum(cov_DD)
        rank = s.leading(self.variance)
        alpha = float(s.l_D[rank - 1]) / self.condition
        if isinstance(metric, LowRank):
            metric.fit_(mean_D, s, alpha, rank)
        else:
            assert isinstance(metric, Dense)
            metric.fit_(mean_D, s, s.l_D + alpha, alpha, rank)


@whitener("zca")
class Zca:
    """W = U diag(max(l, floor * l_1))^(-1/2) U': unit variance wherever S has any.

    A direction whose variance is below `floor` times the largest, a zero one included, is scaled as if it had that
    much: W^-1 stays exact, and W amplifies nothing more than floor^(-1/2) times as much as the first direction.
    """

    floor: float = field(default=1e-6, validator=[gt(0.0), lt(1.0)])

    def build(self, facts: Facts) -> Metric:
        return Dense(facts.d_model)

    def fit_(self, metric: Metric, mean_D: Tensor, cov_DD: Tensor) -> None:
        """Raises RunError at a covariance that is zero or not finite."""
        assert isinstance(metric, Dense)
        s = spectrum(cov_DD)
        floor = self.floor * float(s.l_D[0])
        metric.fit_(mean_D, s, s.l_D.clamp(min=floor), 0.0, int((s.l_D > floor).sum()))


@whitener("identity")
class Identity:
    """W = I / scale with scale = sqrt(tr S / d): no whitening, but centred, and of mean square 1 per coordinate.

    The scale is kept because thresholds, bandwidths and unit-norm rows start from activations of order one; it is one
    number, so angles and relative errors are those of model space.
    """

    def build(self, facts: Facts) -> Metric:
        return Scaled(facts.d_model)

    def fit_(self, metric: Metric, mean_D: Tensor, cov_DD: Tensor) -> None:
        """Raises RunError at a covariance that is zero or not finite."""
        assert isinstance(metric, Scaled)
        l_D = spectrum(cov_DD).l_D
        square = l_D.mean()
        metric.scale.copy_(square.sqrt())
        metric._record(mean_D, l_D, square.expand_as(l_D), 0.0, metric.d_model)
