"""Conformance of terms and constraints (next door: activations, kernels): what every one of them must do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

from spalf.core.slots import label
from spalf.core.values import View
from spalf.testing.toy import toy_view

Check = Callable[[], None]

OF_A_GATE = frozenset({("term", "gated_aux")})
"""Parts that read the gate of an activation."""

EXAMPLES = {
    ("constraint", "causal"): {"calibration": 8},
    ("term", "aux_k"): {"window": 1000},
    ("term", "pre_activation"): {"window": 1000},
}


def checks(cls: type, component: Any) -> list[Check]:
    """The checks of the slot that `cls` is labelled with."""
    from spalf.testing import primal_activation, primal_kernel

    own = {
        "activation": primal_activation.checks,
        "term": _term,
        "constraint": _constraint,
        "kernel": primal_kernel.checks,
    }
    return own[label(cls).slot](component)


def close(a: Tensor, b: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Asserts equality within `tolerance` of the larger one's greatest entry."""
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    apart = float((a.detach() - b.detach()).abs().max()) if a.numel() else 0.0
    size = float(b.detach().abs().max()) if b.numel() else 0.0
    assert apart <= tolerance * (size + 1e-6), f"{what}: apart by {apart:.2e} at size {size:.2e}"


def gradients(sae: Any) -> dict[str, Tensor]:
    """Each parameter's gradient by name, zero where there is none."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in sae.named_parameters()}


# ------------------------------------------------------------------------------------------------ term, constraint
def _view(part: Any, **options: Any) -> View:
    """`toy_view` with the activation that the part asks for; jumprelu where it asks for none."""
    from spalf.parts.activation import Gated

    ref = label(type(part))
    return toy_view(**{**({"activation": Gated()} if (ref.slot, ref.use) in OF_A_GATE else {}), **options})


def _reaches_a_parameter(part: Any) -> None:
    view = _view(part)
    value = part.value(view)
    assert value.ndim == 0, f"value is {value}"
    assert math.isfinite(float(value.detach())), f"value is {value}"
    value.backward()
    assert any(bool(g.any()) for g in gradients(view.sae).values()), "no parameter has a gradient"


def _mean_value(part: Any, n: int = 64, **view: Any) -> tuple[float, float]:
    """Mean over draws and its standard error; one draw where a second one is equal."""
    values = [float(part.value(_view(part, seed=0, **view)).detach())]
    first = _view(part, seed=0, **view)
    for seed in range(1, n):
        values.append(float(part.value(evolve(first, draw=torch.Generator().manual_seed(seed))).detach()))
        if seed == 1 and values[0] == values[1]:
            return values[0], 0.0
    sample = torch.tensor(values, dtype=torch.float64)
    return float(sample.mean()), float(sample.std()) / math.sqrt(n)


def _repeated_rows_change_nothing(part: Any) -> None:
    (once, error_once), (twice, error_twice) = (_mean_value(part, repeat=r) for r in (1, 2))
    allowed = 1e-4 * abs(once) + 5 * (error_once + error_twice)
    assert abs(once - twice) <= allowed, f"{once} on the rows, {twice} on the rows twice"


def _only(view: View, rows: slice) -> View:
    """The view of a shard: entries of other features are as if they were not there."""
    code = view.forward.code
    keep_F = torch.zeros(code.width)
    keep_F[rows] = 1
    masked = evolve(code, pre_BK=code.pre_BK * keep_F, gate_BK=code.gate_BK * keep_F, z_BK=code.z_BK * keep_F)
    silent_F = (view.silent_F * keep_F).to(view.silent_F.dtype)
    return evolve(view, forward=evolve(view.forward, code=masked), silent_F=silent_F)


def _term(component: Any) -> list[Check]:
    def a_finite_scalar_whose_gradient_reaches_a_parameter() -> None:
        _reaches_a_parameter(component)

    def unchanged_when_rows_are_repeated() -> None:
        _repeated_rows_change_nothing(component)

    def unchanged_by_the_unit_of_model_space() -> None:
        other, own = (component.value(_view(component, scale=scale)) for scale in (20.0, 1.0))
        close(other, own, "value in another unit", 1e-3)

    def equal_on_a_list() -> None:
        if not component.dense:
            from spalf.parts.kernel import TorchOps

            listed = _view(component, dense=False, ops=TorchOps(code="compact"))
            assert listed.forward.code.index_BK is not None
            close(component.value(listed), component.value(_view(component)), "value of a compact code")

    def shards_add_up() -> None:
        if component.partial:
            view, cut = _view(component), 19
            parts = [component.value(_only(view, rows)) for rows in (slice(0, cut), slice(cut, view.sae.width))]
            close(parts[0] + parts[1], component.value(view), "sum over shards")

    return [
        a_finite_scalar_whose_gradient_reaches_a_parameter,
        unchanged_when_rows_are_repeated,
        unchanged_by_the_unit_of_model_space,
        equal_on_a_list,
        shards_add_up,
    ]


def _constraint(component: Any) -> list[Check]:
    def a_finite_scalar_whose_gradient_reaches_a_parameter() -> None:
        _reaches_a_parameter(component)

    def unchanged_when_rows_are_repeated() -> None:
        _repeated_rows_change_nothing(component)

    def the_budget_is_positive_and_carries_no_graph() -> None:
        budget = component.budget(_view(component))
        assert budget.ndim == 0, f"budget is {budget}"
        assert 0 < float(budget) < math.inf, f"budget is {budget}"
        assert not budget.requires_grad

    def value_and_budget_share_a_unit() -> None:
        ratios = [component.value(v) / component.budget(v) for v in (_view(component), _view(component, scale=20.0))]
        close(ratios[1], ratios[0], "value / budget in another unit of model space", 1e-2)

    def a_step_against_the_gradient_lowers_it() -> None:
        view = _view(component)
        before = component.value(view)
        before.backward()
        found = gradients(view.sae)
        squared = sum(float(g.square().sum()) for g in found.values())
        after = float(before.detach())
        # A value that counts active features is a step function: a small step may flip no gate.
        for share in (1e-3, 1e-2, 1e-1):
            step = share * float(before.detach().abs()) / squared
            with torch.no_grad():
                for name, p in view.sae.named_parameters():
                    p.sub_(step * found[name])
            after = min(after, float(component.value(_view(component, sae=view.sae)).detach()))
        assert after < float(before.detach()), f"from {float(before.detach())} to {after}"

    return [
        a_finite_scalar_whose_gradient_reaches_a_parameter,
        unchanged_when_rows_are_repeated,
        the_budget_is_positive_and_carries_no_graph,
        value_and_budget_share_a_unit,
        a_step_against_the_gradient_lowers_it,
    ]
