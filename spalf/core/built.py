"""Protocols of what components build: the things that hold tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from spalf.core.state import Learner
from spalf.core.values import Batch, Code, Facts, Machine, Raw, Sequences, White


class Stream(Protocol):
    """An open source: activations in shuffled blocks, and the model behind them where there is one.

    Everything it gives is a function of (options, seed, cursor); `state_dict` is the cursor.
    """

    facts: Facts

    def next(self, n: int) -> Batch:
        """The next `n` activations of the current shuffled block, float32 on the stream's device."""
        ...

    def sequences(self, n: int) -> Sequences:
        """The next `n` whole contexts, by a cursor of their own."""
        ...

    def activations(self, sequences: Sequences) -> Raw:
        """Activations [S, T, D] of whole contexts at the hook."""
        ...

    def logits(self, sequences: Sequences, patch: Callable[[Raw], Raw] | None = None) -> Tensor:
        """Logits [S, T, V], the hooked activation [S, T, D] replaced by `patch` of it; gradients flow through it."""
        ...

    def unembedding(self) -> Raw:
        """Rows of the unembedding [V, D]."""
        ...

    def token_counts(self) -> Tensor:
        """How often each token occurs in a sample of the training text, int64 [V]."""
        ...

    def text(self, tokens: Tensor) -> list[str]:
        """Each token id of a 1-d tensor as readable text."""
        ...

    def tokens(self, text: str) -> Tensor:
        """Ids of a text, int64 [T] on the stream's device, after the one id that a document begins behind in training.

        So position 0, which is never patched, is no part of the text. Raises SourceError where there is no tokenizer.
        """
        ...

    def truth(self) -> Raw:
        """The planted directions [N, D] of a synthetic source, unit rows."""
        ...

    def held_out(self) -> Stream:
        """A fresh stream over documents that training never sees; it shares the model and starts at cursor 0."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Metric(Protocol):
    """The border between model space and whitened space: W and its exact inverse, both symmetric."""

    d_model: int

    def white(self, x: Raw) -> White:
        """Points [..., D]: (x - mu) W."""
        ...

    def raw(self, x: White) -> Raw:
        """Points back: x W^-1 + mu."""
        ...

    def white_direction(self, v: Raw) -> White:
        """Dictionary rows or differences [..., D], without the mean: v W."""
        ...

    def raw_direction(self, v: White) -> Raw:
        """Rows or differences back: v W^-1."""
        ...

    def rough_direction(self, v: White) -> Raw:
        """`raw_direction` in the precision of `v`, bfloat16 too: angles between rows outlive the rounding."""
        ...

    def raw_square(self, v: White) -> Tensor:
        """Sum of the squares of all entries of `raw_direction(v)` for rows [B, D], a scalar with graph."""
        ...

    def variance(self, space: str) -> Tensor:
        """Total variance, a scalar: tr S for "raw", d_eff = sum l_i / (l_i + alpha) for "white"."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> Any: ...


class Activator(Protocol):
    """A module with the activation's own parameters (thresholds). Subclass it beside `nn.Module` for its defaults.

    In training mode it may select over the batch; in evaluation mode a row's code depends on that row alone.
    """

    pre_bias: bool = False
    """Whether the encoder reads y - b_dec instead of y."""
    owns_bias: bool = False
    """Whether its own biases stand in for `b_enc_F`, which then stays at zero."""
    k: int = 0
    """How many entries a row keeps, the largest ones, at inference too; 0 where thresholds alone decide."""
    signed: bool = False
    """Whether z is odd in the pre-activation, hence negative below -threshold: such a code has no folded form."""

    def __call__(self, pre_BK: Tensor, index_BK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(z_BK, gate_BK); `index_BK` names the feature of each entry, None means all features in order."""
        ...

    def calibrate_(self, pre_BC: Tensor, density: float, rows: slice) -> None:
        """Set thresholds and bandwidths of features `rows` so that a share `density` of the entries is active.

        Called with consecutive `rows` from 0 on; 0 asks for the activator as it was built. One without a state of its
        own has nothing to set.
        """
        ...

    def observe_(self, code: Code) -> None:
        """Update running statistics, such as an inference threshold, from a training batch's code.

        Called once per training step, after it, and by nothing else.
        """
        return None

    def reach_F(self) -> Tensor | None:
        """The pre-activation at or below which an entry has neither value nor gradient; None: dense only."""
        ...

    def threshold_F(self) -> Tensor:
        """Inference thresholds: an entry is active where its pre-activation exceeds this (and is among the `k`).

        With their graph where they are trained.
        """
        ...

    def refinement_F(self) -> Tensor | None:
        """Step [F] by which each selected coefficient moves towards least squares; None: codes are what is selected."""
        return None

    def rectangle_F(self) -> tuple[Tensor, Tensor] | None:
        """(log theta, window) [F] of a plain JumpReLU, z = p 1[p > theta] with the rectangle as its gradient.

        A backend may then compute codes itself, without a call. None: it has to call.
        """
        return None

    def affine_F(self) -> tuple[Tensor, Tensor] | None:
        """(slope, shift) [F], slope > 0: at inference an active entry's z is slope * pre + shift. None: z is pre."""
        return None


class Autoencoder(Protocol):
    """Encoder and decoder, both in whitened coordinates, rows grouped into named strata."""

    W_enc_FD: nn.Parameter
    W_dec_FD: nn.Parameter
    b_enc_F: nn.Parameter
    b_dec_D: nn.Parameter
    log_gain: nn.Parameter
    form_DD: Tensor
    """By which errors are weighed, e A e'; only where codes are refined."""
    width: int
    machine: Machine

    @property
    def rows(self) -> Mapping[str, slice]:
        """Row range of each stratum, in order."""
        ...

    @property
    def activator(self) -> Activator: ...

    def encode(self, white_BD: White, dense: bool = False) -> Code:
        """A code; `dense` asks for every entry, for terms that look beyond the surrogate's window."""
        ...

    def decode(self, code: Code) -> White: ...

    def refined(self, white_BD: White, code: Code) -> Code:
        """A code with its coefficients refined, where the activator has that; else as it is. Which are on stays."""
        ...

    def measure_by(self, metric: Metric) -> None:
        """Take over by what form errors count in model space."""
        ...

    def weigh_by(self, form_DD: Tensor) -> None:
        """Take another form for it, [D, D], where codes are refined."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Training or evaluation mode, of the activator too. An autoencoder starts in evaluation mode."""
        ...

    @property
    def training(self) -> bool: ...

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Any: ...


class Ops(Protocol):
    """A backend's surface; kernels/reference.py is the oracle of each."""

    name: str
    deterministic: bool
    """Whether it is asked to sum in one order, the same in every run."""
    bounded: bool
    """Whether its lists have a fixed length, so that a training step may overflow; `update` then changes nothing."""

    def encode(self, white_BD: White, sae: Autoencoder, dense: bool) -> Code: ...

    def decode(self, code: Code, sae: Autoencoder) -> White:
        """z @ W_dec without gain and bias: this shard's part of the sum, [B, D]."""
        ...

    def correlate(self, code: Code, v_BD: Tensor, sae: Autoencoder) -> Tensor:
        """<v_b, w_k> with the decoder's row of each entry of the code, [B, K]; 0 at padding."""
        ...

    def refine(self, code: Code, white_BD: White, step_F: Tensor, form_DD: Tensor, sae: Autoencoder) -> Tensor | None:
        """z [B, K] of the refined code (`StratifiedAutoencoder.refined`); None where this backend leaves it to `decode`
        and `correlate`."""
        ...

    def coactivation(
        self,
        code: Code,
        sae: Autoencoder,
        sample_R: Tensor,
        rows: slice,
        direction: Callable[[White], Tensor],
        draw: torch.Generator,
    ) -> Tensor:
        """Mean over the sampled rows of the mean squared cosine between co-active features of `rows`; never F x F.

        `direction` is linear; a backend may hand it rows in bfloat16, and it may answer in either precision.
        `draw` thins a row that has more active features than a Gram matrix is worth: a uniform subset, without bias.
        """
        ...

    def distance(self, sae: Autoencoder, target_AD: Tensor, rows: slice) -> Tensor:
        """Sum of squared differences between the decoder's `rows` and their targets [A, D], a scalar."""
        ...

    def update(self, learner: Learner, loss: Tensor) -> bool:
        """Backward pass of `loss`, optimizer's rule and projections in one; False, and nothing done, where this backend
        leaves them to the learner."""
        ...

    def kind(self, sae: Autoencoder) -> Hashable:
        """What the launches of a training step depend on here, such as the lists' length; equal means the same ones.

        None where a step cannot be recorded as a CUDA graph: it waits for the device, or its launches vary.
        """
        ...

    def settle(self) -> None:
        """Called after every training step, outside of what is recorded."""
        ...
