"""Backends for encode, decode and coactivation."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Hashable

import torch
from attrs import define, field
from attrs.validators import in_
from torch import Tensor

from spalf.core.protocols import Autoencoder, Ops
from spalf.core.slots import kernel
from spalf.core.state import Learner
from spalf.core.values import Code, White
from spalf.errors import RunError
from spalf.kernels import coherence, compact, reference

# Listed entries per row, as a share of the features, above which a dense product beats gathering (measured on a CPU).
_SPARSE = 1 / 10


@define(kw_only=True)
class TorchOps:
    """Plain torch on any device. `code` says when a code is compact: "dense" never, "compact" wherever it can be,
    "auto" on a CPU while lists stay short; on CUDA a list's length would make the host wait in every step."""

    name: str = "torch"
    deterministic: bool = False
    bounded: bool = False
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

    def correlate(self, code: Code, v_BD: Tensor, sae: Autoencoder) -> Tensor:
        if code.index_BK is None:
            return reference.correlate(code, v_BD, sae, self.compute)
        return compact.correlate(code, v_BD, sae)

    def refine(self, code: Code, white_BD: White, step_F: Tensor, form_DD: Tensor, sae: Autoencoder) -> Tensor | None:
        return None

    def coactivation(
        self,
        code: Code,
        sae: Autoencoder,
        sample_R: Tensor,
        rows: slice,
        direction: Callable[[White], Tensor],
        draw: torch.Generator,
    ) -> Tensor:
        if sample_R.is_cuda:
            return reference.coactivation(code, sae, sample_R, rows, direction, draw)
        return coherence.coactivation(code, sae, sample_R, rows, direction, draw)

    def distance(self, sae: Autoencoder, target_AD: Tensor, rows: slice) -> Tensor:
        return reference.distance(sae, target_AD, rows)

    def update(self, learner: Learner, loss: Tensor) -> bool:
        return False

    def kind(self, sae: Autoencoder) -> Hashable:
        return None

    def settle(self) -> None:
        """Nothing to do."""


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


@kernel("triton")
class Triton:
    """Triton kernels on lists of a fixed length: no [B, F] tensor, no gradient matrix, no wait in a training step.

    Needs CUDA, or TRITON_INTERPRET=1 for tests on a CPU. Fuses gradient, projection and Adam where the optimizer is
    `adam` without clipping and every stratum says whether its rows are on the unit sphere. `compute` as in `torch`.
    `moments`: the precision in which that step keeps Adam's two moments of the matrices. "bfloat16", rounded at random,
    takes 8 bytes a weight off the 26 that a step moves; "int8", too, with a scale per row (after arXiv 2110.02861),
    takes 12 off. `replay`: record a step whose parts all allow it as a CUDA
    graph; the numbers are the same, and the host no longer launches kernels one by one. `deterministic`: thresholds'
    gradients, too, are summed in one order, so that runs of a plain JumpReLU have the same bits on the same GPU; a step
    sorts its entries once more.
    """

    compute: str = field(default="auto", validator=in_(("auto", "float32", "bfloat16")))
    moments: str = field(default="float32", validator=in_(("float32", "bfloat16", "int8")))
    replay: bool = True
    deterministic: bool = False

    def ops(self, device: torch.device) -> Ops:
        """Raises RunError where Triton cannot run on `device`."""
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device.type != "cuda" and not interpreted:
            raise RunError(f'kernel: "triton" cannot run on {device} (use "torch", or "auto")')
        if importlib.util.find_spec("triton") is None:
            raise RunError('kernel: "triton" is not installed (pip install triton, or use "torch")')
        fused = importlib.import_module("spalf.kernels.fused")
        reduced = self.compute != "float32" and reference.reduces(device)
        if self.compute == "bfloat16" and not reduced:
            raise RunError(
                f'kernel.compute: {device} cannot multiply "bfloat16" into float32 (set "float32", or "auto")'
            )
        ops: Ops = fused.FusedOps(
            compute="bfloat16" if reduced else "float32",
            moments=getattr(torch, self.moments),
            replay=self.replay,
            deterministic=self.deterministic,
        )
        return ops


@kernel("auto")
class Auto:
    """The first backend that can run on the device, fastest first; the run's metadata says which one it was."""

    compute: str = field(default="auto", validator=in_(("auto", "float32", "bfloat16")))

    def ops(self, device: torch.device) -> Ops:
        """Raises RunError with every backend's reason where none can run."""
        reasons: list[str] = []
        backends: list[Triton | Torch] = [Torch(compute=self.compute)]
        if device.type == "cuda":
            backends.insert(0, Triton(compute=self.compute))
        for backend in backends:
            try:
                return backend.ops(device)
            except RunError as reason:
                reasons.append(str(reason))
        raise RunError(f"kernel: no backend can run on {device}: " + "; ".join(reasons))
