"""Backends for encode, decode and coactivation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attrs import define, field
from attrs.validators import in_
from torch import Tensor

from spalf.core.protocols import Autoencoder, Ops
from spalf.core.slots import kernel
from spalf.core.state import Learner
from spalf.core.values import Code, White
from spalf.errors import RunError
from spalf.kernels import compact, reference

# Listed entries per row, as a share of the features, above which a dense product beats gathering (measured on a CPU).
_SPARSE = 1 / 10


@define(kw_only=True)
class TorchOps:
    """Plain torch on any device. `code` says when a code is compact: "dense" never, "compact" wherever it can be,
    "auto" on a CPU while lists stay short; on CUDA a list's length would make the host wait in every step."""

    name: str = "torch"
    compute: str = "float32"
    code: str = "auto"

    def _limit(self, white_BD: Tensor, sae: Autoencoder) -> float:
        """Entries per row up to which a code may be compact; 0 for a dense one."""
        if self.code == "dense" or sae.activator.reach_F() is None:
            return 0.0
        if self.code == "compact":
            return float("inf")
        return 0.0 if white_BD.is_cuda else _SPARSE * sae.width

    def encode(self, white_BD: White, sae: Autoencoder, dense: bool) -> Code:
        """Dense on request, for an activator without a reach, and where more entries matter than a gather is worth."""
        limit = 0.0 if dense else self._limit(white_BD, sae)
        code = compact.encode(white_BD, sae, limit) if limit else None
        return reference.encode(white_BD, sae, self.compute) if code is None else code

    def decode(self, code: Code, sae: Autoencoder) -> White:
        if code.index_BK is None:
            return reference.decode(code, sae, self.compute)
        return compact.decode(code, sae)

    def coactivation(
        self,
        code: Code,
        sae: Autoencoder,
        sample_R: Tensor,
        rows: slice,
        direction: Callable[[White], Tensor],
        draw: torch.Generator,
    ) -> Tensor:
        return reference.coactivation(code, sae, sample_R, rows, direction, draw)

    def update(self, learner: Learner) -> bool:
        return False


@kernel("torch")
class Torch:
    """Plain torch operations: dense products on CUDA, compact lists on a CPU.

    `compute` is the precision of the operands of encode and decode, results being float32 in any case: "bfloat16" (an
    NVIDIA GPU of capability 8 or more, torch 2.8 or more), "float32", or "auto", the first where the device can.
    `code`: "auto", "dense" or "compact".
    """

    compute: str = field(default="auto", validator=in_(("auto", "float32", "bfloat16")))
    code: str = field(default="auto", validator=in_(("auto", "dense", "compact")))

    def ops(self, device: torch.device) -> Ops:
        """Raises RunError where `device` cannot multiply bfloat16 into float32."""
        reduces = reference.reduces(device)
        if self.compute == "bfloat16" and not reduces:
            raise RunError(
                f'kernel.compute: {device} cannot multiply "bfloat16" into float32 (set "float32", or "auto")'
            )
        reduced = reduces and self.compute != "float32"
        return TorchOps(compute="bfloat16" if reduced else "float32", code=self.code)


@kernel("auto")
class Auto:
    """The first backend that can run on the device, fastest first; the run's metadata says which one it was."""

    compute: str = field(default="auto", validator=in_(("auto", "float32", "bfloat16")))

    def ops(self, device: torch.device) -> Ops:
        """Raises RunError with every backend's reason where none can run."""
        reasons: list[str] = []
        for backend in (Torch(compute=self.compute),):
            try:
                return backend.ops(device)
            except RunError as reason:
                reasons.append(str(reason))
        raise RunError(f"kernel: no backend can run on {device}: " + "; ".join(reasons))
