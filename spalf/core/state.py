"""Everything that a run changes. What is not in `TrainingState` is not in a checkpoint."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, frozen
from torch import Tensor

from spalf.core.values import Clock, Raw

if TYPE_CHECKING:
    from spalf.core.protocols import Autoencoder, Metric, Optimizer, Stratum, Stream


@frozen(kw_only=True, eq=False)
class Anchor:
    """Directions in model space that a stratum is tied to, unit rows [A, D], and the token id of each [A]."""

    directions_AD: Raw
    ids_A: Tensor


@frozen(kw_only=True, eq=False)
class ControlState:
    """The dual side: one entry per constraint, in the plan's order."""

    budget_M: Tensor
    on_M: Tensor
    filter: Any
    dual: Any
    penalty: Any

    @property
    def lam_M(self) -> Tensor:
        lam: Tensor = self.dual.lam_M
        return lam

    @property
    def rho_M(self) -> Tensor:
        rho: Tensor = self.penalty.rho_M
        return rho


@define(kw_only=True, eq=False)
class Learner:
    """Owns the parameters, their moments and the update: the only place where a parameter changes."""

    sae: Autoencoder
    optimizer: torch.optim.Optimizer
    rule: Optimizer
    strata: Mapping[str, Stratum]
    rates: tuple[float, ...]
    """Each parameter group's learning rate before scaling."""

    def descend(self, loss: Tensor, clock: Clock, rate: float = 1.0) -> None:
        """Backward, projection of the gradient, the optimizer's step at `rate` of its schedule, projection of the rows."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        factor = rate * self.rule.scale(clock)
        for group, peak in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = peak * factor
        if self.sae.machine.ops.update(self):
            return
        weight_FD, grad_FD = self.sae.W_dec_FD, self.sae.W_dec_FD.grad
        if grad_FD is not None:
            self._each_stratum(lambda s, rows: s.project_gradient_(weight_FD.data[rows], grad_FD[rows]))
        self.optimizer.step()
        self.project_()

    def project_(self) -> None:
        """Put every stratum's decoder rows back where its geometry wants them."""
        with torch.no_grad():
            self._each_stratum(lambda s, rows: s.project_(self.sae.W_dec_FD.data[rows]))

    def assign(self, name: str, value: Tensor) -> None:
        """The only other way a parameter changes; keeps its place in the optimizer."""
        parameter = dict(self.sae.named_parameters())[name]
        with torch.no_grad():
            parameter.copy_(value.to(parameter))

    def _each_stratum(self, act: Callable[[Stratum, slice], None]) -> None:
        for name, rows in self.sae.rows.items():
            act(self.strata[name], rows)

    def state_dict(self) -> dict[str, Any]:
        """Parameters, buffers and moments by parameter name, flat."""
        out: dict[str, Any] = {f"model.{k}": v for k, v in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                out[f"optimizer.{name}.{key}"] = value
        return out

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Pour `state_dict` back; a moment that is not in `state` is dropped."""
        model = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        self.sae.load_state_dict(model, strict=True)
        for name, parameter in self.sae.named_parameters():
            prefix = f"optimizer.{name}."
            moments = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            self.optimizer.state.pop(parameter, None)
            if moments:
                self.optimizer.state[parameter] = {k: self._placed(v, parameter) for k, v in moments.items()}

    def _placed(self, value: Any, parameter: Tensor) -> Any:
        """A moment where the optimizer wants it: plain Adam counts steps on the CPU, a fused one on the device."""
        if not isinstance(value, Tensor):
            return value
        fused = bool(self.optimizer.param_groups[0].get("fused"))
        return value.to(parameter.device if fused or value.ndim else "cpu", copy=True)


@define(kw_only=True, eq=False)
class Rng:
    """The generators that training draws from: one on the CPU, one on the device."""

    cpu: torch.Generator
    device: torch.Generator

    def state_dict(self) -> dict[str, Any]:
        """Generator states as base64 text, for JSON."""
        return {
            name: base64.b64encode(bytes(g.get_state().tolist())).decode()
            for name, g in (("cpu", self.cpu), ("device", self.device))
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, g in (("cpu", self.cpu), ("device", self.device)):
            g.set_state(torch.tensor(list(base64.b64decode(state[name])), dtype=torch.uint8))


@define(kw_only=True, eq=False)
class TrainingState:
    """One tree: what a step reads, changes, and a checkpoint holds."""

    clock: Clock
    metric: Metric
    anchors: dict[str, Anchor]
    learner: Learner
    control: ControlState
    phase: Any
    """The current phase's own state."""
    stream: Stream
    rng: Rng
    silent_F: Tensor
    """Activations since each feature last fired, int64: what "dead" is judged by."""
    measured: dict[str, float]
    """Numbers calibrated on the way (covariance tokens, alpha, baseline losses), by name."""

    @property
    def sae(self) -> Autoencoder:
        return self.learner.sae

    @property
    def device(self) -> torch.device:
        return self.learner.sae.machine.device
