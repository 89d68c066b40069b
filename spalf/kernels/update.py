"""What the gradients of the two matrices are made of, kept until one pass turns it into an Adam step."""

from __future__ import annotations

import math
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from spalf.core.state import Learner
from spalf.kernels import device
from spalf.kernels.lists import ByFeature, power_of_2, turn_over


@define(eq=False)
class Share:
    """One code's share of both gradients: dec += z grad_hat and enc += force white, over its listed entries."""

    index_BK: Tensor
    overflow: Tensor | None = None
    z_BK: Tensor | None = None
    grad_BD: Tensor | None = None
    force_BK: Tensor | None = None
    white_BD: Tensor | None = None


@define(eq=False)
class Pull:
    """A gradient strength (W_dec[rows] - target) on a range of rows, strength a scalar on the device."""

    rows: slice
    target_AD: Tensor
    strength: Tensor


@define(eq=False)
class Shares:
    """The shares of one backward pass, by the list they belong to; `open` while that pass runs."""

    open: bool = False
    by_list: dict[int, Share] = field(factory=dict)
    pull: Pull | None = None

    def of(self, index_BK: Tensor) -> Share:
        """The share of the code that has this list."""
        return self.by_list.setdefault(index_BK.data_ptr(), Share(index_BK))

    def take(self) -> tuple[list[Share], Pull | None]:
        """All of them, which are then forgotten."""
        out = list(self.by_list.values()), self.pull
        self.by_list.clear()
        self.pull = None
        return out


def fits(learner: Learner) -> bool:
    """Whether one pass can do what this learner's rule and strata ask: plain Adam on rows that are free or unit."""
    known = all(hasattr(s, "sphere") for s in learner.strata.values())
    fused = all(bool(g.get("fused")) for g in learner.optimizer.param_groups)
    return learner.rule.rule == "adam" and known and fused


def _moments(learner: Learner, parameter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(steps done, first moment, second moment), made where there are none, as torch's Adam makes them."""
    state: dict[str, Any] = learner.optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state["step"], state["exp_avg"], state["exp_avg_sq"]


def _joined(shares: list[Share], by: ByFeature, like_FD: Tensor, low: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(z_N, force_N, grad_BD, white_BD) of all shares, those with a `white_BD` being first.

    A part that no gradient reached has zeros for weights, and an entry of weight 0 is never followed to its row: so
    `white_BD` may end before the rows of the last shares.
    """
    dtype = torch.bfloat16 if low else torch.float32
    z, force, grad, white = [], [], [], []
    for share in shares:
        rows, dim = share.index_BK.shape[0], like_FD.shape[1]
        nothing_BK = torch.zeros(share.index_BK.shape, device=like_FD.device)
        z.append((nothing_BK if share.z_BK is None else share.z_BK.detach()).reshape(-1))
        force.append((nothing_BK if share.force_BK is None else share.force_BK).reshape(-1))
        grad.append(like_FD.new_zeros((rows, dim), dtype=dtype) if share.grad_BD is None else share.grad_BD.to(dtype))
        if share.white_BD is not None:
            white.append(share.white_BD.detach().to(dtype))
    if not white:
        white.append(like_FD.new_zeros((1, like_FD.shape[1]), dtype=dtype))
    z_N, force_N, grad_BD, white_BD = (p[0] if len(p) == 1 else torch.cat(p) for p in (z, force, grad, white))
    return by.take(z_N), by.take(force_N), grad_BD.contiguous(), white_BD.contiguous()


def _hyper(learner: Learner, step: Tensor) -> Tensor:
    """Rates, betas, eps and bias corrections of the two matrices as one float32 tensor on the device."""
    groups = {id(g["params"][0]): g for g in learner.optimizer.param_groups}
    dec, enc = groups[id(learner.sae.W_dec_FD)], groups[id(learner.sae.W_enc_FD)]
    beta1, beta2 = dec["betas"]
    t = step.double()
    corrections = [1 - torch.exp(t * math.log(beta1)), torch.sqrt(1 - torch.exp(t * math.log(beta2)))]
    # Filled on the device: a copy from the host would wait for it.
    fixed = [torch.full_like(t, value) for value in (dec["lr"], enc["lr"], beta1, beta2, dec["eps"])]
    return torch.stack(fixed + corrections).float()


def sphere_of(learner: Learner) -> Tensor:
    """int8 [F], 1 for rows that their stratum keeps at unit norm."""
    sphere_F = torch.zeros(learner.sae.width, dtype=torch.int8)
    for name, rows in learner.sae.rows.items():
        sphere_F[rows] = int(learner.strata[name].sphere)  # type: ignore[attr-defined]
    return sphere_F.to(learner.sae.W_dec_FD.device)


def _skip(shares: list[Share], device: torch.device) -> Tensor:
    """Whether any list was cut, float32 scalar in {0, 1}."""
    flags = [s.overflow for s in shares if s.overflow is not None]
    return torch.stack(flags).any().float() if flags else torch.zeros((), device=device)


def update_(
    learner: Learner,
    shares: list[Share],
    pull: Pull | None,
    sphere_F: Tensor,
    shadows: tuple[Tensor, Tensor] | None,
) -> None:
    """One Adam step of both matrices and of everything else; on the device a no-op where a list was cut.

    `shadows` are bfloat16 copies of W_dec and W_enc, written along. A `.grad` that other terms left is added.
    """
    sae = learner.sae
    dec, enc, bias = sae.W_dec_FD, sae.W_enc_FD, sae.b_enc_F
    if not shares:  # a dense code: all there is lies in `.grad`
        shares = [Share(torch.zeros((0, 1), dtype=torch.int64, device=dec.device))]
    shares = sorted(shares, key=lambda s: s.white_BD is None)
    skip = _skip(shares, dec.device)
    by = turn_over([s.index_BK for s in shares], sae.width)
    z_N, force_N, grad_BD, white_BD = _joined(shares, by, dec, shadows is not None)
    step_d, dec_m, dec_v = _moments(learner, dec)
    step_e, enc_m, enc_v = _moments(learner, enc)
    step_d += 1.0 - skip
    step_e += 1.0 - skip
    more_dec, more_enc = dec.grad, enc.grad
    bias_grad = torch.zeros_like(bias)
    low_dec, low_enc = shadows if shadows is not None else (dec.data, enc.data)
    device.update_rows[(sae.width,)](
        by.order_F,
        by.starts_F1,
        by.row_N,
        z_N,
        force_N,
        grad_BD,
        white_BD,
        dec.data,
        dec_m,
        dec_v,
        low_dec,
        dec.data if more_dec is None else more_dec,
        enc.data,
        enc_m,
        enc_v,
        low_enc,
        enc.data if more_enc is None else more_enc,
        bias_grad,
        sphere_F,
        dec.data if pull is None else pull.target_AD,
        skip if pull is None else pull.strength,
        0 if pull is None else pull.rows.start,
        0 if pull is None else pull.rows.stop,
        _hyper(learner, step_d),
        skip,
        dec.shape[1],
        MORE_DEC=more_dec is not None,
        MORE_ENC=more_enc is not None,
        LOW=shadows is not None,
        BLOCK_N=4,
        BLOCK_D=power_of_2(dec.shape[1], 16, 1 << 16),
        num_warps=power_of_2(dec.shape[1] // 256, 1, 8),
    )
    dec.grad = enc.grad = None
    bias.grad = bias_grad if bias.grad is None else bias.grad + bias_grad
    _others(learner, skip)


def _others(learner: Learner, skip: Tensor) -> None:
    """The optimizer's own step on what has a gradient left; torch's fused Adam takes the no-op flag too."""
    optimizer: Any = learner.optimizer
    optimizer.found_inf, optimizer.grad_scale = skip, None
    optimizer.step()
    del optimizer.found_inf, optimizer.grad_scale
