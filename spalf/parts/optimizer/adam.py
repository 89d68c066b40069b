"""Adam, and Adam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import unwrap
from typing import Any, ClassVar

import torch
from attrs import field
from attrs.validators import deep_iterable, ge, gt, instance_of, lt
from torch import Tensor, nn

from spalf.core.slots import optimizer
from spalf.parts.optimizer.rates import FUSED_ON, Bounded, options


class OneCall(torch.optim.Adam):
    """torch's fused Adam on a CPU in one call for all parameters of one rate, where torch makes one for each group.

    Same rule, options, groups and state; for parameters in float32 that have a gradient of their layout.
    """

    # torch hides these from its compiler, and imports the compiler to do so: longer than many steps take.
    add_param_group = unwrap(torch.optim.Adam.add_param_group)
    state_dict = unwrap(torch.optim.Adam.state_dict)
    load_state_dict = unwrap(torch.optim.Adam.load_state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes no closure."""
        assert closure is None, "the loss has been computed"
        by_rate: dict[float, list[tuple[Tensor, ...]]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    s = self.state[p] or self._begin(p)
                    moments = (s["exp_avg"], s["exp_avg_sq"], s["step"])
                    by_rate.setdefault(float(group["lr"]), []).append((p, p.grad, *moments))
        beta1, beta2 = self.defaults["betas"]
        # As torch reads it off itself: where it is 1 the step is not taken.
        skipped: Tensor | None = getattr(self, "found_inf", None)
        for rate, rows in by_rate.items():
            weights, grads, means, squares, steps = map(list, zip(*rows, strict=True))
            torch._foreach_add_(steps, 1)
            torch._fused_adam_(
                *(weights, grads, means, squares, [], steps),
                lr=rate,
                beta1=beta1,
                beta2=beta2,
                weight_decay=0.0,
                eps=self.defaults["eps"],
                amsgrad=False,
                maximize=False,
                found_inf=skipped,
            )
            if skipped is not None:
                torch._foreach_sub_(steps, [skipped] * len(steps))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, without its bookkeeping where gradients are dropped."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def _begin(self, p: Tensor) -> dict[str, Tensor]:
        """Moments of a parameter at its first step, as torch makes them."""
        made = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
        self.state[p] = made
        return made


@options
class Moments(Bounded):
    """The options of Adam's rule."""

    betas: tuple[float, float] = field(default=(0.9, 0.999), validator=deep_iterable([ge(0.0), lt(1.0)]))
    """Memory of the mean of the gradient and of its square."""
    eps: float = field(default=1e-8, validator=gt(0.0))
    """Added to the root of the mean square."""
    fused: bool = field(default=True, validator=instance_of(bool))
    """Take torch's fused form where it has one for the device: the same numbers up to rounding, in fewer passes."""

    def _is_fused(self, groups: list[dict[str, Any]]) -> bool:
        return self.fused and all(g["params"][0].device.type in FUSED_ON for g in groups)


@optimizer("adam")
class Adam(Moments):
    """Adam (arXiv 1412.6980), with a rate per parameter."""

    rule: ClassVar[str] = "adam"

    @property
    def capturable(self) -> bool:
        return self.fused

    def build(self, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """One group per parameter, with its name. Fused where torch has that for the parameters' device."""
        groups = self.groups(named)
        fused = self._is_fused(groups)
        on_cuda = all(g["params"][0].is_cuda for g in groups)
        if fused and all(g["params"][0].device.type == "cpu" for g in groups):
            return OneCall(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
        return torch.optim.Adam(
            groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused, capturable=fused and on_cuda
        )


@optimizer("adamw")
class Adamw(Moments):
    """Adam with decoupled weight decay (arXiv 1711.05101), which falls on the encoder's rows alone.

    A decoder row's length is its stratum's affair; bias, thresholds (kept as logarithms) and gain have a zero that
    means nothing, so that a pull towards it would be a pull towards an arbitrary value.
    """

    rule: ClassVar[str] = ""

    weight_decay: float = field(default=0.01, validator=ge(0.0))
    """Share of an encoder row that a step takes off, times the rate."""

    def build(self, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """One group per parameter, with its name. Fused where torch has that for the parameters' device."""
        groups = self.groups(named)
        for group in groups:
            group["weight_decay"] = self.weight_decay if group["name"] == "W_enc_FD" else 0.0
        fused = self._is_fused(groups)
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)
