"""A trained dictionary beside its language model, for a notebook: encode, decode, patch, steer, ablate.

Shape letters as in spalf/core/values.py; P = T - 1 positions that predict a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import torch
from attrs import frozen
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.core.values import Raw
from spalf.engine import intervene, language
from spalf.engine.atlas import Atlas, Firings, atlas, firings
from spalf.engine.evaluate import untouched
from spalf.engine.intervene import Ablation
from spalf.errors import Problem, RecipeError, SourceError
from spalf.loaded.records import Codes, Patched, Steered, Told
from spalf.report import SORTS, words
from spalf.report import search as lookup

SEQUENCES = 256
"""Held-out contexts that a feature's scale and effects are measured on, unless said otherwise."""
FEATURES = 4096
"""Features of a dictionary that are looked through, spread over the densities of a wider one."""


@frozen(kw_only=True, eq=False, repr=False)
class Loaded:
    """A run's plan and state, for looking, measuring and changing. `spalf.load` makes it.

    Features are ids 0 to F - 1. `sequences` is how many held-out contexts scales and effects are measured on. With
    `error` (the default) whatever the dictionary does not explain stays in the activation as it was, so that a change
    changes its feature alone; without it the model reads reconstructions, before the change and after it.
    """

    plan: Plan
    state: TrainingState
    sequences: int = SEQUENCES

    def __repr__(self) -> str:
        facts = self.plan.facts
        place = f" at {facts.hook} of {facts.model}" if "logits" in facts.provides else ""
        clock = self.state.clock
        return f"{self.plan.recipe.name}: {self.state.sae.width} features{place}, {clock.phase} step {clock.step}"

    # ------------------------------------------------------------------------------------------------- features
    @cached_property
    def firings(self) -> Firings:
        """What fires where on held-out data; looked at once."""
        with untouched(self.state):
            return firings(self.plan, self.state, self.sequences)

    @cached_property
    def atlas(self) -> Atlas:
        """All features, or 4096 spread over the densities of a wider dictionary: the records behind `features`."""
        return atlas(self.plan, self.state, features=FEATURES, held=self.firings)

    def features(self, search: str = "", *, stratum: str = "", sort: str = "density") -> list[Told]:
        """Features that fire on, promote or show a text, most remarkable first.

        Sorted by density, id, stratum, token, focus, peak, likeness, drift or absorption. Raises RecipeError for
        another order and for a stratum that is not there.
        """
        if sort not in SORTS:
            raise RecipeError([Problem("sort", f'"{sort}" is no order of features', f"one of {', '.join(SORTS)}")])
        return [Told(words(self.atlas, one)) for one in lookup(self.atlas, search, stratum, sort)]

    def feature(self, feature: int) -> Told:
        """One feature in full. Raises RecipeError where there is none."""
        seen = atlas(self.plan, self.state, only=(self._known(feature),), held=self.firings)
        return Told(words(seen, seen.features[0]))

    def unit(self, feature: int) -> float:
        """A feature's mean activation where it fires on held-out data: what a strength of 1 means.

        Raises RecipeError for a feature that does not exist or never fires.
        """
        _, value_N = self.firings.of(self._known(feature))
        if not len(value_N):
            rows = self.firings.rows
            message = f"{feature} fires on none of {rows} held-out tokens, so it has no scale of its own"
            raise RecipeError([Problem("feature", message, "take another, or look at more sequences")])
        return float(value_N.abs().mean())

    @torch.no_grad()
    def direction(self, feature: int) -> Raw:
        """What one unit of a feature's activation adds to the model's activation, [D]."""
        return intervene.direction(self.state, self._known(feature))

    # ---------------------------------------------------------------------------------------------------- texts
    @torch.no_grad()
    def encode(self, text: str) -> Codes:
        """The codes of a text. Raises SourceError where it is longer than a context of the run, or without a model."""
        ids_T = self._tokens(text)
        x_TD = Raw(self.state.stream.activations(intervene.whole(ids_T[None]))[0])
        z_TF = intervene.encode(self.state, x_TD)
        z_TF[0] = 0
        tokens = tuple(self.state.stream.text(ids_T.cpu()))
        return Codes(tokens=tokens, ids_T=ids_T, x_TD=x_TD, z=z_TF.to_sparse())

    @torch.no_grad()
    def decode(self, codes: Codes | Tensor) -> Raw:
        """Raw activations [T, D] of codes, or of any [T, F] tensor of activations."""
        z_TF = codes.dense() if isinstance(codes, Codes) else codes
        return intervene.decode(self.state, z_TF.to(self.state.device, torch.float32))

    @torch.no_grad()
    def patch(self, text: str, fn: Callable[[Tensor], Tensor], *, error: bool = True) -> Patched:
        """Read a text as it is, and again with fn(z) for its codes z [P, F], one row per position after the first.

        `fn` gets a copy, which it may change and return. Raises ValueError where it gives no tensor of that shape.
        """
        ids_T = self._tokens(text)
        edit = intervene.patch(self.state, intervene.edited(self.state, _checked(fn), error=error))
        base = intervene.unchanged(self.state, error=error)
        one = intervene.whole(ids_T[None])
        before_TV, after_TV = (self.state.stream.logits(one, each)[0] for each in (base, edit))
        tokens = tuple(self.state.stream.text(ids_T.cpu()))
        return Patched(tokens=tokens, ids_T=ids_T, before_TV=before_TV, after_TV=after_TV)

    @torch.no_grad()
    def steer(
        self,
        prompt: str,
        *,
        feature: int,
        strength: float,
        tokens: int = 40,
        temperature: float = 0.0,
        seed: int = 0,
        error: bool = True,
    ) -> Steered:
        """Continue a prompt by `tokens` tokens, without and with `strength` units of a feature added.

        Greedy at temperature 0, else sampled, both continuations by the same draws. Raises RecipeError for a feature
        without a unit and for a number out of its range.
        """
        self._refuse(strength, tokens, temperature)
        ids_T = self._tokens(prompt)
        unit = self.unit(feature)
        stream = self.state.stream
        base = intervene.unchanged(self.state, error=error)
        edit = intervene.patch(self.state, intervene.added(self.state, feature, strength * unit, error=error))
        told = []
        for fn in (base, edit):
            new_T = intervene.generate(stream, ids_T, tokens, fn, temperature=temperature, seed=seed)
            told.append("".join(stream.text(new_T.cpu())))
        one = intervene.whole(ids_T[None])
        kl_ST = language.kl(stream.logits(one, base), stream.logits(one, edit))
        return Steered(
            prompt=prompt,
            feature=feature,
            strength=strength,
            unit=unit,
            kl=float(kl_ST[0, -1]),
            baseline=told[0],
            steered=told[1],
        )

    @torch.no_grad()
    def ablate(self, feature: int, *, error: bool = True) -> Ablation:
        """What the model loses on held-out text where a feature is set to 0: where it fires, and where it does not."""
        self._needs_model()
        held = self.firings
        assert held.tokens_ST is not None
        row_N, _ = held.of(self._known(feature))
        chosen_S = torch.unique(row_N // held.span)
        return intervene.ablate(
            self.state, feature, held.tokens_ST[chosen_S], looked_at=len(held.tokens_ST), error=error
        )

    # --------------------------------------------------------------------------------------------------- inside
    def _tokens(self, text: str) -> Tensor:
        self._needs_model()
        ids_T = self.state.stream.tokens(text)
        context = self.plan.facts.context
        if len(ids_T) > context:
            raise SourceError(f"the text has {len(ids_T) - 1} tokens, and this run read {context - 1} at once (cut it)")
        return ids_T

    def _needs_model(self) -> None:
        if "logits" not in self.plan.facts.provides:
            gives = ", ".join(sorted(self.plan.facts.provides))
            raise SourceError(
                f"this run's source gives {gives}: text can be read and changed only with a language model "
                "(train with the source huggingface or transformer_lens)"
            )

    def _known(self, feature: int) -> int:
        if not 0 <= feature < self.state.sae.width:
            raise RecipeError([Problem("feature", f"there is no {feature}", f"0 to {self.state.sae.width - 1}")])
        return feature

    @staticmethod
    def _refuse(strength: float, tokens: int, temperature: float) -> None:
        problems = []
        if not math.isfinite(strength):
            problems.append(Problem("strength", f"{strength} is not finite", "negative ones push the other way"))
        if tokens < 1:
            problems.append(Problem("tokens", f"{tokens} is less than 1"))
        if not (math.isfinite(temperature) and temperature >= 0):
            problems.append(Problem("temperature", f"{temperature} is no temperature", "0 is greedy"))
        if problems:
            raise RecipeError(problems)


def _checked(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` of [P, F] as a function of [1, P, F]."""

    def checked(z_SPF: Tensor) -> Tensor:
        shape = z_SPF[0].shape
        after_PF = fn(z_SPF[0])
        if not isinstance(after_PF, Tensor) or after_PF.shape != shape:
            given = tuple(after_PF.shape) if isinstance(after_PF, Tensor) else type(after_PF).__name__
            raise ValueError(f"fn(z) gave {given}, not codes of shape {tuple(shape)} (return the tensor it was given)")
        return after_PF[None]

    return checked
