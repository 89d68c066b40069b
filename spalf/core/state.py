"""Everything that a run changes. What is not in `TrainingState` is not in a checkpoint."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

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


@runtime_checkable
class Packed(Protocol):
    """A moment that a backend keeps in a form of its own."""

    def unpacked(self) -> Tensor:
        """Of its parameter's shape, float32; the backend makes the same numbers of it again."""
        ...

    def clear_(self, rows: Tensor) -> None:
        """Zero these rows."""
        ...


@define(kw_only=True, eq=False)
class Learner:
    """Owns the parameters, their moments and the update: the only place where training changes a parameter."""

    sae: Autoencoder
    optimizer: torch.optim.Optimizer
    rule: Optimizer
    strata: Mapping[str, Stratum]
    rates: tuple[float, ...]
    """Each parameter group's learning rate before scaling."""

    def descend(self, loss: Tensor, clock: Clock, rate: float = 1.0) -> None:
        """Backward, the gradient's projection and clipping, the optimizer's step, the rows' projection.

        The step is at `rate` of the optimizer's schedule; the gradient is clipped where the optimizer has a `max_norm`.
        """
        self.set_rates(clock, rate)
        self.step(loss)

    def step(self, loss: Tensor) -> None:
        """`descend` at the rates that `set_rates` has left."""
        self.optimizer.zero_grad(set_to_none=True)
        # A backend that fuses the update has no gradient whose norm could be known before the step.
        if not self._max_norm and self.sae.machine.ops.update(self, loss):
            return
        loss.backward()  # type: ignore[no-untyped-call]
        self._advance()

    def advance(self, clock: Clock, rate: float = 1.0) -> None:
        """`descend` from the gradients that are there."""
        self.set_rates(clock, rate)
        self._advance()

    def _advance(self) -> None:
        weight_FD, grad_FD = self.sae.W_dec_FD, self.sae.W_dec_FD.grad
        self._widen()
        if grad_FD is not None:
            self._each_stratum(lambda s, rows: s.project_gradient_(weight_FD.data[rows], grad_FD[rows]))
        if self._max_norm:
            groups = zip(self.optimizer.param_groups, self.rates, strict=True)
            parameters = [p for group, peak in groups if peak > 0 for p in group["params"]]  # those that will move
            torch.nn.utils.clip_grad_norm_(parameters, self._max_norm, error_if_nonfinite=False)  # waits for no device
        self.optimizer.step()
        self.project_()

    def set_rates(self, clock: Clock, rate: float = 1.0) -> None:
        """Each parameter group's rate for a step at this time; on the device where the optimizer can be recorded."""
        factor = rate * self.rule.scale(clock)
        for group, peak in zip(self.optimizer.param_groups, self.rates, strict=True):
            if not group.get("capturable"):
                group["lr"] = peak * factor
            elif isinstance(group["lr"], Tensor):
                group["lr"].fill_(peak * factor)
            else:
                group["lr"] = torch.full((), peak * factor, device=group["params"][0].device)

    def _widen(self) -> None:
        """Moments as the optimizer itself keeps them, where a backend whose step it was kept them shorter."""
        for parameter, kept in self.optimizer.state.items():
            for key, value in kept.items():
                if isinstance(value, Tensor):
                    if value.ndim and value.dtype != parameter.dtype:
                        kept[key] = value.to(parameter.dtype)
                elif isinstance(value, Packed):
                    kept[key] = value.unpacked()

    @property
    def _max_norm(self) -> float:
        return float(getattr(self.rule, "max_norm", 0.0))

    def project_(self) -> None:
        """Put every stratum's decoder rows back where its geometry wants them."""
        with torch.no_grad():
            self._each_stratum(lambda s, rows: s.project_(self.sae.W_dec_FD.detach()[rows]))

    def assign(self, name: str, value: Tensor, rows: Tensor | None = None) -> None:
        """The only other way a parameter changes, or these `rows` of it; keeps its place in the optimizer."""
        parameter = dict(self.sae.named_parameters())[name]
        with torch.no_grad():
            if rows is None:
                parameter.copy_(value.to(parameter))
            else:
                parameter[rows] = value.to(parameter)

    def forget(self, features: Tensor) -> None:
        """Zero the moments of these features, in every parameter that has a row per feature.

        Counts of steps stay: they are one number per parameter. With Adam's bias correction long over, the first steps
        of these rows are up to (1 - beta_1) / sqrt(1 - beta_2) = 3.2 times the rate.
        """
        for name, parameter in self.sae.named_parameters():
            if name == "b_dec_D" or parameter.ndim == 0 or parameter.shape[0] != self.sae.width:
                continue
            for value in self.optimizer.state.get(parameter, {}).values():
                if isinstance(value, Packed):
                    value.clear_(features)
                elif isinstance(value, Tensor) and value.shape == parameter.shape:
                    value[features] = 0

    def _each_stratum(self, act: Callable[[Stratum, slice], None]) -> None:
        for name, rows in self.sae.rows.items():
            act(self.strata[name], rows)

    def state_dict(self) -> dict[str, Any]:
        """Parameters, buffers and moments by parameter name, flat; `moments` lists the latter.

        The list is what tells a moment that was lost from one that never was: a parameter without a gradient so far,
        or one that its activation does not use, has none.
        """
        out: dict[str, Any] = {f"model.{k}": v for k, v in self.sae.state_dict().items()}
        moments: dict[str, Any] = {}
        for name, parameter in self.sae.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    moments[f"optimizer.{name}.{key}"] = value.unpacked() if isinstance(value, Packed) else value
        return {**out, **moments, "moments": " ".join(sorted(moments))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Pour `state_dict` back; a moment that it does not list is dropped.

        Raises ValueError that names every leaf of no parameter, every lost moment and every wrong shape.
        """
        problems = list(self._misfits(state))
        model = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        try:
            self.sae.load_state_dict(model, strict=True)
        except RuntimeError as e:
            problems.append(str(e))
        if problems:
            raise ValueError("; ".join(problems))
        for name, parameter in self.sae.named_parameters():
            prefix = f"optimizer.{name}."
            moments = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            self.optimizer.state.pop(parameter, None)
            if moments:
                self.optimizer.state[parameter] = {k: self._placed(v, parameter) for k, v in moments.items()}

    def _misfits(self, state: Mapping[str, Any]) -> Iterator[str]:
        """What is wrong with the leaves of `state` that are not the model's."""
        parameters = dict(self.sae.named_parameters())
        held = {k: v for k, v in state.items() if not k.startswith("model.") and k != "moments"}
        for key, value in held.items():
            kind, _, name = key.rpartition(".")[0].partition(".")
            parameter = parameters.get(name) if kind == "optimizer" else None
            if parameter is None:
                yield f"{key}: belongs to no parameter of this recipe"
            elif isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                yield f"{key}: has shape {tuple(value.shape)}, its parameter's is {tuple(parameter.shape)}"
        listed = set(str(state["moments"]).split())
        yield from (f"{key}: missing" for key in sorted(listed - held.keys()))
        yield from (f"{key}: was not saved with the rest" for key in sorted(held.keys() - listed))

    def _placed(self, value: Any, parameter: Tensor) -> Any:
        """A moment where the optimizer wants it: plain Adam counts steps on the CPU, a fused one on the device."""
        if not isinstance(value, Tensor):
            return value
        fused = bool(self.optimizer.param_groups[0].get("fused"))
        if value.ndim:  # kept shorter by one backend, perhaps, and now read by another
            return value.to(parameter, copy=True)
        return value.to(parameter.device if fused else "cpu", copy=True)


@define(kw_only=True, eq=False)
class Rng:
    """The generator that training draws from, on the device."""

    device: torch.Generator

    def state_dict(self) -> dict[str, Any]:
        """The generator's state as base64 text, for JSON."""
        return {"device": base64.b64encode(bytes(self.device.get_state().tolist())).decode()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bit-exact on one kind of device; on another the draws go on from a seed that is a function of the state.

        A CPU's generator has 5056 bytes of state and a CUDA device's 16, and neither can continue the other.
        """
        saved = base64.b64decode(state["device"], validate=True)
        if len(saved) == self.device.get_state().numel():
            self.device.set_state(torch.tensor(list(saved), dtype=torch.uint8))
        else:
            self.device.manual_seed(int.from_bytes(blake2b(saved, digest_size=8).digest(), "big") >> 1)


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
    """Numbers calibrated on the way (covariance tokens, alpha, budgets), by name."""

    @property
    def sae(self) -> Autoencoder:
        return self.learner.sae

    @property
    def device(self) -> torch.device:
        return self.learner.sae.machine.device
