"""Strata: named ranges of dictionary rows, each with a geometry of its own.

Shape letters: F rows of this stratum, D d_model, V vocabulary, A anchors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from attrs import evolve, field
from attrs.validators import ge, in_
from torch import Tensor
from torch.nn.functional import normalize

from spalf.core.built import Metric, Stream
from spalf.core.recipe import Plan
from spalf.core.slots import stratum
from spalf.core.state import Anchor
from spalf.core.values import Facts, Raw, White
from spalf.errors import ComponentError, Problem, RecipeError, SourceError

CONTEXTS = 64
"""Contexts per pass of the model while mean activations are taken."""

CHUNK = 8192
"""Rows of a block that are widened to float32 at a time."""

PER_ANCHOR = 200
"""Tokens sampled for each anchor: the rarest of 4,096 in a text of 24 M tokens occurs 28 times then."""


@stratum("anchored")
class Anchored:
    """Rows that start at the directions of the most frequent tokens and may drift, within a `drift` constraint.

    `of` "unembedding" takes a token's row of the unembedding: what the model writes to say that it comes next.
    "activation" takes its mean activation at the hook less the mean of all: what the model holds where it stands.
    Inside a model few features lie along the first, and many along the second.

    `cap`: most anchors there may be; 0 derives min(n_vocab, F / 4). More than F / 2 is refused: in one-seed runs a
    dictionary half made of unembedding rows paid for them with 20 to 60 percent more active features.

    Neither gradient nor norm is projected: how far a row has moved, its norm included, is what `drift` measures.
    """

    cap: int = field(default=0, validator=ge(0))
    of: str = field(default="unembedding", validator=in_(("unembedding", "activation")))
    """What a token's direction is."""
    samples: int = field(default=0, validator=ge(0))
    """Tokens that mean activations are taken over; 0: 200 for each anchor."""
    sampled: str = field(default="contexts", validator=in_(("contexts", "block")))
    """Where those tokens come from: "contexts" that are read for them, or all of the shuffled "block" that calibration
    has ended in, `samples` or not, which takes no further pass of the model."""

    def settle(self, plan: Plan) -> Anchored:
        """With the cap and the samples filled in."""
        cap = self._anchors(plan.facts, plan.knobs.F)
        settled: Anchored = evolve(cast(Any, self), cap=cap, samples=self.samples or max(1, PER_ANCHOR * cap))
        return settled

    def rows(self, facts: Facts, remaining: int, width: int) -> int:
        """min(n_vocab, cap or F / 4): one per anchor. Raises RecipeError above F / 2, or without what `of` needs."""
        wanted = {"unembedding": "unembedding", "activation": "tokens"}[self.of]
        if wanted not in facts.provides:
            message = f'anchors of the {self.of} need "{wanted}", which this source does not provide'
            hint = "use huggingface or transformer_lens, or take the stratum out of `strata`"
            raise RecipeError([Problem("", message, hint)])
        anchors = self._anchors(facts, width)
        if anchors > width // 2:
            raise RecipeError(
                [
                    Problem(
                        "cap",
                        f"{anchors} anchors are more than half of the {width} rows of the dictionary",
                        f"lower cap to {width // 4} or raise knobs.F to {4 * anchors}",
                    )
                ]
            )
        return anchors

    def _anchors(self, facts: Facts, width: int) -> int:
        return min(facts.n_vocab, self.cap or width // 4)

    def anchor(self, stream: Stream, rows: int) -> Anchor:
        """Unit directions [A, D] of the `rows` most frequent tokens. Raises SourceError where there are too few."""
        return self._means(stream, rows) if self.of == "activation" else self._unembedded(stream, rows)

    @torch.no_grad()
    def _means(self, stream: Stream, rows: int) -> Anchor:
        """Mean activation of each token less that of all, over tokens with a context before them."""
        vocabulary, seen = stream.facts.n_vocab, 0
        sum_VD, count_V = None, None
        for x_ND, id_N in self._block(stream) if self.sampled == "block" else self._contexts(stream, rows):
            if sum_VD is None or count_V is None:
                sum_VD = x_ND.new_zeros(vocabulary + 1, x_ND.shape[1])
                count_V = x_ND.new_zeros(vocabulary + 1)
            sum_VD.index_add_(0, id_N, x_ND)
            count_V.index_add_(0, id_N, torch.ones_like(x_ND[:, 0]))
            seen += id_N.numel()
        assert sum_VD is not None
        assert count_V is not None
        sum_VD, count_V = sum_VD[:vocabulary], count_V[:vocabulary]
        found = int((count_V > 0).sum())
        if found < rows:
            raise SourceError(
                f"{found} tokens occur in a sample of {seen}, {rows} anchors were asked for "
                f"(set the stratum's cap to {found} or less, or raise its samples)"
            )
        ids_A = torch.sort(count_V, descending=True, stable=True).indices[:rows]
        mean_AD = sum_VD[ids_A] / count_V[ids_A, None] - sum_VD.sum(0) / count_V.sum()
        return Anchor(directions_AD=Raw(normalize(mean_AD, dim=1)), ids_A=ids_A)

    def _contexts(self, stream: Stream, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Activations and token ids, the vocabulary's size at padding, of `samples` tokens or a few more."""
        seen = 0
        while seen < (self.samples or PER_ANCHOR * rows):
            sequences = stream.sequences(CONTEXTS)
            x_ND = stream.activations(sequences)[:, 1:].reshape(-1, stream.facts.d_model).float()
            id_N, real_N = sequences.tokens_ST[:, 1:].reshape(-1), sequences.real_ST[:, 1:].reshape(-1)
            yield x_ND, torch.where(real_N, id_N, stream.facts.n_vocab)
            seen += id_N.numel()

    @staticmethod
    def _block(stream: Stream) -> Iterator[tuple[Tensor, Tensor]]:
        """Activations and token ids of the shuffled block. Raises SourceError where a source does not know them."""
        read = getattr(stream, "block", None)
        if read is None:
            raise SourceError('stratum: this source keeps no tokens beside its block (set sampled = "contexts")')
        x_ND, id_N = read()
        for begin in range(0, len(id_N), CHUNK):
            yield x_ND[begin : begin + CHUNK].float(), id_N[begin : begin + CHUNK]

    def _unembedded(self, stream: Stream, rows: int) -> Anchor:
        """Unit unembedding rows [A, D] of the `rows` most frequent tokens, without the mean row of the vocabulary.

        The rows are taken as the model stores them: the final norm's gain is not folded in.

        The mean is taken off because all rows share it: with it, all anchors fire together. Rows that pad the matrix
        (zero) count neither for the mean nor as candidates. Raises SourceError where too few are left.
        """
        unembedding_VD = stream.unembedding()
        real_V = unembedding_VD.ne(0).any(1)
        mean_D = unembedding_VD.sum(0, dtype=torch.float64) / real_V.sum().clamp(min=1)
        centred_VD = unembedding_VD.float() - mean_D.float()
        norm_V = centred_VD.norm(dim=1)
        usable_V = real_V & (norm_V > 1e-6 * norm_V.max())
        found = int(usable_V.sum())
        if found < rows:
            raise SourceError(
                f"the unembedding has {found} distinct rows besides padding, {rows} anchors were asked for "
                f"(set the stratum's cap to {found} or less)"
            )
        ids_A = self._most_frequent(stream.token_counts().to(usable_V.device), usable_V, rows)
        return Anchor(directions_AD=Raw(normalize(centred_VD[ids_A], dim=1)), ids_A=ids_A)

    @staticmethod
    def _most_frequent(count_V: Tensor, usable_V: Tensor, rows: int) -> Tensor:
        """Usable ids by falling count, ties by rising id; tokens that were never seen come last."""
        if len(count_V) > len(usable_V):
            raise SourceError(
                f"the tokenizer counts {len(count_V)} tokens, the unembedding has {len(usable_V)} rows "
                "(use the tokenizer that belongs to the model)"
            )
        rank_V = torch.full((len(usable_V),), -1, dtype=torch.int64, device=usable_V.device)
        rank_V[usable_V] = 0
        rank_V[: len(count_V)] += torch.where(usable_V[: len(count_V)], count_V, 0)
        return torch.sort(rank_V, descending=True, stable=True).indices[:rows]

    def start(self, rows: int, metric: Metric, anchor: Anchor | None, draw: torch.Generator) -> White:
        """W a / ||W a||: proportional, as an encoder row, to the matched filter a' (S + alpha I)^-1 (x - mean)."""
        if anchor is None:
            raise ComponentError("anchored rows cannot start without an anchor (anchor() makes it from the stream)")
        return White(normalize(metric.white_direction(anchor.directions_AD), dim=1))

    @property
    def sphere(self) -> bool:
        """Rows may have any norm: a backend that fuses the update has nothing to project."""
        return False

    def project_gradient_(self, weight_FD: Tensor, grad_FD: Tensor) -> None:
        """Leaves the gradient as it is."""

    def project_(self, weight_FD: Tensor) -> None:
        """Leaves the rows as they are."""


@stratum("free")
class Free:
    """Rows that start at random and go where training takes them, on the unit sphere if `unit_norm`.

    The gradient is made tangent before the optimizer's step, and rows are renormalised after it, because Adam's
    elementwise scaling leaves the tangent space again. Its first moment is not projected: as rows turn, the part of it
    that becomes radial is about the angle of the last 1 / (1 - beta_1) steps, and it vanishes where they settle.
    """

    unit_norm: bool = True

    def rows(self, facts: Facts, remaining: int, width: int) -> int:
        """F - rows of the strata before it."""
        return remaining

    def anchor(self, stream: Stream, rows: int) -> None:
        """Tied to nothing."""

    def start(self, rows: int, metric: Metric, anchor: Anchor | None, draw: torch.Generator) -> White:
        """Uniform on the unit sphere of whitened space, on the generator's device."""
        return White(normalize(torch.randn(rows, metric.d_model, generator=draw, device=draw.device), dim=1))

    @property
    def sphere(self) -> bool:
        """What a backend that fuses the update needs to know of the two projections."""
        return self.unit_norm

    def project_gradient_(self, weight_FD: Tensor, grad_FD: Tensor) -> None:
        """g <- g - w (w'g) / (w'w), row by row."""
        if not self.unit_norm:
            return
        square_F = torch.linalg.vecdot(weight_FD, weight_FD).clamp(min=torch.finfo(weight_FD.dtype).tiny)
        radial_F = torch.linalg.vecdot(weight_FD, grad_FD) / square_F
        grad_FD.addcmul_(weight_FD, radial_F.unsqueeze(1), value=-1)

    def project_(self, weight_FD: Tensor) -> None:
        """w <- w / ||w||, row by row; a zero row stays zero."""
        if self.unit_norm:
            norm_F1 = torch.linalg.vector_norm(weight_FD, dim=1, keepdim=True)
            weight_FD.div_(norm_F1.clamp(min=torch.finfo(weight_FD.dtype).tiny))
