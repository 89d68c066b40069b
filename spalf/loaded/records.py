"""What a loaded run answers with.

Shape letters as in spalf/core/values.py; P = T - 1 positions that predict a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from spalf.core.values import Raw
from spalf.engine import language


@frozen(kw_only=True, eq=False, repr=False)
class Codes:
    """What fires on a text. Position 0 is the id that the text begins behind: it has no context and fires nothing.

    `tokens` and `ids_T` are the text's, `x_TD` its raw activations at the hook, `z` a sparse [T, F] tensor of codes.
    """

    tokens: tuple[str, ...]
    ids_T: Tensor
    x_TD: Raw
    z: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, position: int) -> dict[int, float]:
        """What fires at a position: activation by feature, strongest first."""
        values_F = self.z[range(len(self))[position]].coalesce()
        found = zip(values_F.indices()[0].tolist(), values_F.values().tolist(), strict=True)
        return dict(sorted(found, key=lambda one: -abs(one[1])))

    def __iter__(self) -> Iterator[dict[int, float]]:
        return (self[t] for t in range(len(self)))

    def dense(self) -> Tensor:
        """All activations, [T, F]."""
        return self.z.to_dense()

    def of(self, feature: int) -> Tensor:
        """One feature's activations along the text, [T]."""
        return self.z.index_select(1, torch.tensor([feature], device=self.z.device)).to_dense()[:, 0]

    def top(self, n: int = 5) -> list[tuple[str, dict[int, float]]]:
        """Each token with its `n` strongest features."""
        return [(token, dict(list(at.items())[:n])) for token, at in zip(self.tokens, self, strict=True)]

    def __repr__(self) -> str:
        lines = []
        for token, at in self.top(4):
            lines.append(f"{token!r:>16}  " + "  ".join(f"{f}: {value:.3g}" for f, value in at.items()))
        return "\n".join(line.rstrip() for line in lines)


@frozen(kw_only=True, eq=False, repr=False)
class Patched:
    """One text read twice: logits [T, V] of the model `before` and `after` a change."""

    tokens: tuple[str, ...]
    ids_T: Tensor
    before_TV: Tensor
    after_TV: Tensor

    @property
    def kl_T(self) -> Tensor:
        """KL(before || after) of the next token at each position, nats."""
        return language.kl(self.before_TV[None], self.after_TV[None])[0]

    @property
    def change_P(self) -> Tensor:
        """What the change adds to the loss of predicting each token but the first, nats."""
        return self._loss(self.after_TV) - self._loss(self.before_TV)

    def _loss(self, logits_TV: Tensor) -> Tensor:
        return language.cross_entropy(logits_TV[None], self.ids_T[None])[0]

    def __repr__(self) -> str:
        kl, change = (float(x.mean()) if len(x) else 0.0 for x in (self.kl_T, self.change_P))
        return f"{len(self.tokens)} tokens: KL {kl:.4g} nats per position, loss {change:+.4g} nats per token"


@frozen(kw_only=True, repr=False)
class Steered:
    """Two continuations of a prompt, without and with a feature added at every position after the first.

    `unit` is the feature's mean activation where it fires on held-out text; `strength` times that was added. `kl` is
    KL(baseline || steered) of the first token that each continuation chooses, in nats.
    """

    prompt: str
    feature: int
    strength: float
    unit: float
    kl: float
    baseline: str
    steered: str

    def __repr__(self) -> str:
        head = f"feature {self.feature}, strength {self.strength:g} x {self.unit:.3g}; KL {self.kl:.3g} nats"
        return f"{head}\n--- baseline\n{self.prompt}{self.baseline}\n--- steered\n{self.prompt}{self.steered}"


class Told(dict[str, Any]):
    """One feature on held-out text, as plain values: what fires it, what it promotes, what lies near it, contexts."""

    def __repr__(self) -> str:
        fires = " ".join(repr(one["token"]) for one in self["tokens"][:4])
        promotes = " ".join(repr(one["token"]) for one in self["promoted"][:4])
        often = f"{100 * self['density']:.3g} % of tokens, mean {self['mean']:.3g}"
        head = f"feature {self['id']} ({self['stratum']}): {often}"
        lines = [head, f"  fires on  {fires}", f"  promotes  {promotes}"]
        return "\n".join([*(line.rstrip() for line in lines), *(_context(one) for one in self["contexts"][:4])])


def _context(one: dict[str, Any]) -> str:
    """The text around a peak on one line, the peak in brackets."""
    tokens = [repr(token)[1:-1] for token in one["tokens"]]
    tokens[one["peak"]] = f"[{tokens[one['peak']]}]"
    return f"  {one['values'][one['peak']]:8.3g}  {''.join(tokens)}"
