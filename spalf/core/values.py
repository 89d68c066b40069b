"""The nouns that travel through one training step.

Shape letters, here and in every file: B rows, S sequences, T positions, D d_model, F features, K listed entries per
row, M constraints, V vocabulary, N planted features. `z_BK` names its axes. A feature is a row, in both matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NewType

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from spalf.core.mesh import Mesh

if TYPE_CHECKING:
    from spalf.core.built import Autoencoder, Metric, Ops, Stream
    from spalf.core.state import Anchor

Raw = NewType("Raw", Tensor)
"""Activations, directions or dictionary rows in the model's own coordinates."""

White = NewType("White", Tensor)
"""The same in whitened coordinates. Only a `Metric` turns one into the other."""


@frozen(kw_only=True)
class Facts:
    """What a source knows before it loads a weight.

    `provides` names what its stream can give: "activations" always; "tokens", "logits" and "unembedding" with a
    language model; "truth" with planted features; "labels" where rows are labelled by concept. FLOPs are per activation
    (one token).
    """

    d_model: int
    n_vocab: int = 0
    provides: frozenset[str] = frozenset({"activations"})
    hook: str = ""
    model: str = ""
    context: int = 0
    n_parameters: int = 0
    flops_to_hook: float = 0.0
    flops_full: float = 0.0
    bytes_per_activation: int = 0
    shuffle: int = 0


@frozen(kw_only=True)
class Clock:
    """Training time: steps done of steps in all, the phase, and the step at which that phase was entered."""

    step: int = 0
    total: int = 1
    phase: str = ""
    entered: int = 0

    @property
    def progress(self) -> float:
        """Share of the budget spent, in [0, 1]."""
        return min(1.0, self.step / max(1, self.total))

    @property
    def exhausted(self) -> bool:
        return self.step >= self.total

    def due(self, every: int) -> bool:
        """Whether the step that now ends is one of every `every`, counted from the phase's first."""
        return every > 0 and (self.step + 1 - self.entered) % every == 0

    def next(self) -> Clock:
        return evolve(self, step=self.step + 1)

    def next_phase(self, name: str) -> Clock:
        return evolve(self, phase=name, entered=self.step)


@frozen(kw_only=True, eq=False)
class Batch:
    """Rows of one shuffled block; `truth_BN` holds planted codes, or labels by concept, where a source has them."""

    x_BD: Raw
    truth_BN: Tensor | None = None


@frozen(kw_only=True, eq=False)
class Sequences:
    """Whole contexts of token ids. `real_ST` is False at padding; position 0 has no context and is never patched.

    `document_ST` names the document of each token by an int64 id, the same wherever the document is met again; None
    where a source does not know, and then each context counts as a document. `is_padded` is False where the maker
    knows that all is real: to find out from the tensor is to wait for the device.
    """

    tokens_ST: Tensor
    real_ST: Tensor
    document_ST: Tensor | None = None
    is_padded: bool = True

    def split(self, n: int) -> Iterator[Sequences]:
        """The same contexts, `n` at a time."""
        for begin in range(0, self.tokens_ST.shape[0], n):
            part = slice(begin, begin + n)
            document_ST = None if self.document_ST is None else self.document_ST[part]
            yield evolve(self, tokens_ST=self.tokens_ST[part], real_ST=self.real_ST[part], document_ST=document_ST)


def per_feature(value_BK: Tensor, index_BK: Tensor | None, width: int, in_order: bool = False) -> Tensor:
    """Sum over rows of one value per entry, [width]; what stands at padding is dropped.

    On CUDA by atomics, whose order changes the last bit of a float from run to run; not so `in_order`, or where torch's
    deterministic algorithms are on, at the price of a sort.
    """
    if index_BK is None:
        return value_BK.sum(0)
    index_N, spare = index_BK.reshape(-1), 1
    if value_BK.is_cuda:
        if value_BK.is_floating_point() and (in_order or torch.are_deterministic_algorithms_enabled()):
            return sorted_sums(value_BK.reshape(-1), index_N, width)
        # Padding is most of a list: spread over many sums, for the atomics of a single one would queue.
        spare = 1024
        index_N = index_N + (index_N == width) * (torch.arange(len(index_N), device=index_N.device) % spare)
    return value_BK.new_zeros(width + spare).index_add_(0, index_N, value_BK.reshape(-1))[:width]


def sorted_sums(value_N: Tensor, index_N: Tensor, width: int) -> Tensor:
    """out[f] = sum of the values whose index is f, each in the order of the list; an index of `width` is dropped."""
    sorted_N, from_N = torch.sort(index_N, stable=True)
    edges_F1 = torch.searchsorted(sorted_N, torch.arange(width + 1, device=index_N.device))
    # Unsafe: what it leaves out is a look at the offsets, for which it would wait.
    return torch.segment_reduce(value_N[from_N], "sum", offsets=edges_F1, initial=0.0, unsafe=True)


class _PerEntry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value_F: Tensor, index_BK: Tensor, in_order: bool) -> Tensor:
        ctx.save_for_backward(index_BK)
        ctx.width, ctx.in_order = value_F.shape[0], in_order
        return torch.cat([value_F, value_F.new_zeros(1)])[index_BK]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return per_feature(grads[0], ctx.saved_tensors[0], ctx.width, ctx.in_order), None, None


def per_entry(value_F: Tensor, index_BK: Tensor | None, in_order: bool = False) -> Tensor:
    """One value per feature, at every entry: [F] for a dense code, [B, K] for a compact one, 0 at padding.

    Its gradient is `per_feature`: that of an indexing by torch takes a second where padding is most of a list.
    """
    if index_BK is None:
        return value_F
    out: Tensor = _PerEntry.apply(value_F, index_BK, in_order)  # type: ignore[no-untyped-call]
    return out


@frozen(kw_only=True, eq=False)
class Code:
    """A sparse code, dense (`index_BK` is None and K = F) or compact.

    A compact code lists every active entry and every entry that the surrogate's window can reach; padding points at
    `width` and has gate 0 and z 0. `overflow` is a boolean scalar on the device: a compact list was too short.
    """

    pre_BK: Tensor
    gate_BK: Tensor
    z_BK: Tensor
    index_BK: Tensor | None
    width: int
    overflow: Tensor
    counted_F: Tensor | None = None
    """How many rows fired each feature, where the backend has counted along."""

    def l0_B(self) -> Tensor:
        """Active features per row; differentiable through the gate's surrogate."""
        return self.gate_BK.sum(-1)

    def scatter(self, value_BK: Tensor) -> Tensor:
        """[B, F] from one value per listed entry; entries that are not listed are 0."""
        if self.index_BK is None:
            return value_BK
        out = value_BK.new_zeros((value_BK.shape[0], self.width + 1))
        return out.scatter_add(1, self.index_BK, value_BK)[:, : self.width]

    def dense(self) -> Tensor:
        """z as [B, F]."""
        return self.scatter(self.z_BK)

    def fired_F(self) -> Tensor:
        """How many rows of this batch fired each feature, int64."""
        if self.counted_F is not None:
            return self.counted_F.to(torch.int64)
        on = (self.gate_BK.detach() > 0).to(torch.int64)
        return per_feature(on, self.index_BK, self.width)


@frozen(kw_only=True, eq=False)
class Forward:
    """One pass through the autoencoder, all in whitened coordinates."""

    white_BD: White
    code: Code
    white_hat_BD: White


@frozen(kw_only=True, eq=False)
class View:
    """All that a term or a constraint may look at; it carries the autograd graph."""

    batch: Batch
    forward: Forward
    sae: Autoencoder
    metric: Metric
    anchors: Mapping[str, Anchor]
    stream: Stream
    clock: Clock
    draw: torch.Generator
    reconstruct: Callable[[Raw], Raw]
    """A second pass over any raw activations [..., D], as at inference and with graph, for patched models."""
    silent_F: Tensor
    """Activations since each feature last fired, int64, as of before this batch."""


def _detached(instance: Any, attribute: Any, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(f"Signal.{attribute.name} carries a graph: controllers take detached values only")


@frozen(kw_only=True, eq=False)
class Violations:
    """Dimensionless violations g = value / budget - 1 of this batch, with their graph; 0 where a constraint is off."""

    names: tuple[str, ...]
    g_M: Tensor


@frozen(kw_only=True, eq=False)
class Signal:
    """What a controller sees of the violations: this batch's, two filtered ones, and the fast one of the last tick.

    `rho_M` are the penalties in force, for laws whose gain follows them.
    """

    g_M: Tensor = field(validator=_detached)
    fast_M: Tensor = field(validator=_detached)
    slow_M: Tensor = field(validator=_detached)
    previous_M: Tensor = field(validator=_detached)
    on_M: Tensor = field(validator=_detached)
    rho_M: Tensor = field(factory=lambda: torch.ones(()), validator=_detached)


@frozen(kw_only=True, eq=False)
class Reading:
    """What one step tells its observers. Tensors stay on the device until `scalars` is called."""

    step: int
    phase: str
    names: tuple[str, ...] = ()
    values: Mapping[str, Tensor] = field(factory=dict)
    per_constraint: Mapping[str, Tensor] = field(factory=dict)

    def scalars(self) -> dict[str, Any]:
        """Plain numbers, nested as metrics.jsonl holds them. Waits for the device: call it rarely."""
        out: dict[str, Any] = {"step": self.step, "phase": self.phase}
        out.update({k: float(v) for k, v in self.values.items()})
        rows = {k: v.tolist() for k, v in self.per_constraint.items()}
        if self.names:
            out["constraints"] = {n: {k: rows[k][i] for k in rows} for i, n in enumerate(self.names)}
        return out


@frozen(kw_only=True, eq=False)
class Machine:
    """Where an autoencoder computes: the device, its mesh and the kernels' operations.

    `replay` keeps recorded steps; a step is recorded where the operations and all parts in it allow that.
    """

    device: torch.device
    ops: Ops
    mesh: Mesh = field(factory=Mesh)
    replay: Any = None
