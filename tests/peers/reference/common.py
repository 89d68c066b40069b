"""What the reference scripts share: stand-ins, weights and a batch, and a record of one training step.

Shape letters: B rows, F features, D d_model. A feature is a row, here as in spalf; each script turns a library's
matrices around. All of it is float64, so that two programs can agree to more digits than either works with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

B, D, F = 64, 12, 40
DEAD = slice(28, 36)  # eight features: more than D / 2, so that k_aux binds
Weights = dict[str, Tensor]
Names = Mapping[str, tuple[str, bool]]  # our name -> (the library's name, whether it keeps the transpose)


def stand_in(name: str, **attributes: object) -> None:
    """An empty module for a package that a library imports and these scripts never call."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(attributes)
    sys.modules[name] = module


def weights(seed: int, biases: tuple[str, ...] = ("b_enc",)) -> Weights:
    """Unit decoder rows and an encoder near them; the DEAD features have a small row, so that others win over them."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    W_dec_FD = torch.nn.functional.normalize(normal(F, D), dim=1)
    W_enc_FD = 1.3 * W_dec_FD + 0.1 * normal(F, D)
    W_enc_FD[DEAD] *= 0.02
    return {
        "W_enc": W_enc_FD,
        "W_dec": W_dec_FD,
        "b_dec": 0.3 * normal(D),
        **{name: 0.1 * normal(F) for name in biases},
    }


def batch(seed: int) -> Tensor:
    """Rows with directions of unequal variance and a mean, [B, D]."""
    draw = torch.Generator().manual_seed(1000 + seed)
    scale_D = torch.linspace(2.0, 0.3, D, dtype=torch.float64)
    return scale_D * torch.randn(B, D, generator=draw, dtype=torch.float64) + 0.2


def pour(module: nn.Module, held: Weights, names: Names) -> None:
    """Give a library's parameters these numbers."""
    own = dict(module.named_parameters())
    with torch.no_grad():
        for ours, (theirs, turned) in names.items():
            own[theirs].copy_(held[ours].T if turned else held[ours])


def drawn(module: nn.Module, names: Names, what: Callable[[Tensor], Tensor]) -> Weights:
    """`what` of each parameter, a feature as a row."""
    own = dict(module.named_parameters())
    out = {ours: what(own[theirs]) for ours, (theirs, _) in names.items()}
    return {ours: (value.T if names[ours][1] else value) for ours, value in out.items()}


@contextmanager
def recorded(module: nn.Module, names: Names) -> Iterator[dict[str, Tensor]]:
    """The loss and each gradient as the library's own `backward` leaves them, before it clips or projects any."""
    out: dict[str, Tensor] = {}
    original = torch.Tensor.backward

    def backward(self: Tensor, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)
        assert "loss" not in out, "one step has one backward pass"
        out["loss"] = self.detach().clone()
        grads = drawn(module, names, lambda p: torch.zeros_like(p) if p.grad is None else p.grad.clone())
        out.update({f"grad.{name}": value for name, value in grads.items()})

    torch.Tensor.backward = backward
    try:
        yield out
    finally:
        torch.Tensor.backward = original


def write(directory: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """One file per step; safetensors wants contiguous tensors that share nothing."""
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, directory / f"{name}.safetensors")
