"""One dictionary, fitted in two ways that differ in the decoder alone.

Both minimise  mean ||y - y_hat||^2 / D + lambda * mean sum_i z_i ||w_i|| / D  on rows that are centred and have mean
square 1 per dimension, by Adam on the same batches at the same rate with the same clipping; neither ties encoder and
decoder. `sgd` moves all parameters at every step. `pam` moves the encoder, and after every `every` steps solves for the
decoder on all of its rows.

Shape letters: N rows, B rows of a batch, D dimensions, F features.
"""

from __future__ import annotations

import torch
from attrs import frozen
from torch import Tensor
from torch.nn.functional import normalize

from spalf_pam.solver import Penalties, majorant, solve
from spalf_pam.sums import empty
from spalf_pam.write import balance


@frozen(kw_only=True)
class Settings:
    """What is the same for both methods; `k` > 0 is TopK (then ReLU), else ReLU with the penalty `weight`."""

    features: int
    k: int = 0
    weight: float = 0.0
    steps: int = 300
    batch: int = 128
    every: int = 30
    lr: float = 3e-3
    clip: float = 1.0


@frozen(kw_only=True)
class Method:
    """How the decoder is found: by the same gradient steps, or solved for with a relative `ridge`.

    `majorised`: the solve knows of the penalty on codes, whose share ||w_i|| it would otherwise ignore.
    """

    name: str
    solves: bool
    ridge: float = 0.0
    majorised: bool = True


SGD = Method(name="SGD", solves=False)
PUBLISHED = Method(name="PAM as published", solves=True, ridge=1e-10, majorised=False)
"""A ridge of 1e-5 on unscaled sums, as published, is about 1e-10 of their diagonal."""
PAM = Method(name="PAM, ridge 0.1", solves=True, ridge=0.1)
LIGHT = Method(name="PAM, ridge 0.01", solves=True, ridge=0.01)
METHODS = (SGD, PUBLISHED, PAM)
AT_EQUAL_ERROR = (SGD, LIGHT, PAM)
"""With twice as many rows as features a smaller ridge does no harm, and shrinks less."""


@frozen(kw_only=True)
class Score:
    """Unexplained variance of training and test rows, and active features per test row."""

    train: float
    test: float
    l0: float


@frozen(kw_only=True, eq=False)
class Model:
    """Encoder rows and bias, decoder rows and bias: y_hat = code(y e' + b) w + c."""

    e_FD: Tensor
    b_F: Tensor
    w_FD: Tensor
    c_D: Tensor
    k: int

    def code(self, y_BD: Tensor) -> Tensor:
        """z [B, F]."""
        p_BF = y_BD @ self.e_FD.T + self.b_F
        if not self.k:
            return p_BF.relu()
        kept = p_BF.topk(self.k, dim=1)
        return torch.zeros_like(p_BF).scatter(1, kept.indices, kept.values.relu())

    def decode(self, z_BF: Tensor) -> Tensor:
        """y_hat [B, D]."""
        return z_BF @ self.w_FD + self.c_D


def fit(method: Method, x_ND: Tensor, test_ND: Tensor, settings: Settings, seed: int) -> Score:
    """Train on x_ND and measure on test_ND, alike for every method. Equal seeds start and draw alike."""
    draw = torch.Generator().manual_seed(seed)
    mean_D = x_ND.mean(0)
    scale = (x_ND - mean_D).square().mean().sqrt().clamp(min=1e-12)
    y_ND = (x_ND - mean_D) / scale
    model = _start(y_ND, settings, draw)
    trained = [model.e_FD, model.b_F] if method.solves else [model.e_FD, model.b_F, model.w_FD, model.c_D]
    for parameter in trained:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(trained, lr=settings.lr)
    for step in range(1, settings.steps + 1):
        at = torch.randint(len(y_ND), (min(settings.batch, len(y_ND)),), generator=draw)
        loss = _objective(model, y_ND[at], settings.weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        if method.solves and (step % settings.every == 0 or step == settings.steps):
            _solve_(model, y_ND, method, settings.weight)
    with torch.no_grad():
        train, _ = _measure(model, y_ND)
        test, l0 = _measure(model, (test_ND - mean_D) / scale)
    return Score(train=train, test=test, l0=l0)


def _start(y_ND: Tensor, settings: Settings, draw: torch.Generator) -> Model:
    """Random unit rows, the decoder equal to them times the best single gain."""
    d = y_ND.shape[1]
    e_FD = normalize(torch.randn(settings.features, d, generator=draw), dim=1)
    model = Model(e_FD=e_FD, b_F=torch.zeros(settings.features), w_FD=e_FD.clone(), c_D=torch.zeros(d), k=settings.k)
    hat_ND = model.decode(model.code(y_ND))
    model.w_FD.mul_((y_ND * hat_ND).sum() / hat_ND.square().sum().clamp(min=1e-12))
    return model


def _objective(model: Model, y_BD: Tensor, weight: float) -> Tensor:
    z_BF = model.code(y_BD)
    error: Tensor = (y_BD - model.decode(z_BF)).square().mean()
    if not weight:
        return error
    penalty: Tensor = z_BF.mean(0) @ model.w_FD.norm(dim=1) / y_BD.shape[1]
    return error + weight * penalty


@torch.no_grad()
def _solve_(model: Model, y_ND: Tensor, method: Method, weight: float) -> None:
    """The decoder of all rows. Under ReLU lengths go into the encoder, whose rows keep a mean length of 1."""
    sums = empty(*model.e_FD.shape).add_(model.code(y_ND), y_ND)
    # The penalty over all rows is weight * sum_i s_i ||w_i||: as for the error, times N D.
    ridge_F = majorant(sums, model.w_FD.norm(dim=1), weight) if method.majorised else None
    found = solve(sums, model.w_FD, model.c_D, Penalties(ridge=method.ridge), ridge_F=ridge_F)
    model.w_FD.copy_(found.w_FD)
    model.c_D.copy_(found.b_D)
    if not model.k:
        c_F, _ = balance(model.w_FD.norm(dim=1), model.e_FD.norm(dim=1), found.live_F)
        model.w_FD.div_(c_F[:, None])
        model.e_FD.mul_(c_F[:, None])
        model.b_F.mul_(c_F)


def _measure(model: Model, y_ND: Tensor) -> tuple[float, float]:
    """(unexplained variance, active features per row)."""
    z_NF = model.code(y_ND)
    error = (y_ND - model.decode(z_NF)).square().sum(dtype=torch.float64)
    total = (y_ND - y_ND.mean(0)).square().sum(dtype=torch.float64).clamp(min=1e-30)
    return float(error / total), float((z_NF > 0).sum(1).double().mean())
