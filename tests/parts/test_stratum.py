"""Strata: the kit's checks, which tokens become anchors, and what projection leaves."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spalf.core.built import Stream
from spalf.core.recipe import Knobs, Plan
from spalf.core.values import Clock, Facts, Raw, Sequences, White
from spalf.errors import ComponentError, RecipeError, SourceError
from spalf.parts.optimizer import Adam
from spalf.parts.schedule import Constant
from spalf.parts.stratum import Anchored, Free
from spalf.parts.whitener import SoftZca
from spalf.testing import conform
from spalf.testing.optimizer import learner
from spalf.testing.primal_linear import FACTS, D, F, V, Vocabulary, fitted, sample


@pytest.mark.parametrize("check", [check for cls in (Anchored, Free) for check in conform(cls)])
def test_conforms(check) -> None:
    check()


class Words(Vocabulary):
    """A vocabulary given by hand."""

    def __init__(self, rows_VD: Tensor, count_V: Tensor) -> None:
        self.rows_VD, self.count_V = rows_VD, count_V

    def unembedding(self) -> Raw:
        return Raw(self.rows_VD)

    def token_counts(self) -> Tensor:
        return self.count_V


@pytest.mark.parametrize(
    ("cap", "n_vocab", "width", "wanted"),
    [(0, 40, 96, 24), (0, 40, 1000, 40), (30, 40, 96, 30), (48, 60, 96, 48), (99, 40, 96, 40), (0, 0, 96, 0)],
)
def test_rows(cap: int, n_vocab: int, width: int, wanted: int) -> None:
    assert Anchored(cap=cap).rows(evolve(FACTS, n_vocab=n_vocab), width, width) == wanted


def test_more_than_half_is_refused_with_a_remedy() -> None:
    with pytest.raises(RecipeError, match=r"cap: 49 anchors .* half of the 96 rows .*lower cap to 24 or raise"):
        Anchored(cap=49).rows(evolve(FACTS, n_vocab=60), 96, 96)


def test_without_an_unembedding_there_are_no_anchors() -> None:
    with pytest.raises(RecipeError, match="take the stratum out of `strata`"):
        Anchored().rows(Facts(d_model=D), F, F)


def test_settle_fills_the_cap_in() -> None:
    settled = Anchored().settle(plan(96))
    assert settled.cap == 24
    assert settled.settle(plan(200)).cap == 24


def plan(width: int) -> Plan:
    """As much of a plan as a stratum asks for."""
    return cast(Plan, SimpleNamespace(facts=FACTS, knobs=Knobs(F=width)))


def test_anchors_are_the_most_frequent_real_tokens() -> None:
    rows_VD = torch.randn(8, D) + 2
    rows_VD[[2, 7]] = 0  # padding
    counts_V = torch.tensor([5, 9, 100, 5, 0, 7])  # shorter than the unembedding
    anchor = Anchored().anchor(Words(rows_VD, counts_V).stream(), 5)
    assert anchor.ids_A.tolist() == [1, 5, 0, 3, 4]  # ties by id, the unseen last, padding never
    real_VD = rows_VD[[0, 1, 3, 4, 5, 6]]
    wanted = torch.nn.functional.normalize(rows_VD[anchor.ids_A] - real_VD.mean(0), dim=1)
    torch.testing.assert_close(anchor.directions_AD, Raw(wanted), rtol=1e-5, atol=1e-6)


def test_the_shared_direction_is_taken_off() -> None:
    """With it, all anchors point the same way."""
    vocabulary = Vocabulary()
    anchor = Anchored().anchor(vocabulary.stream(), 20)
    kept = torch.nn.functional.normalize(vocabulary.unembedding()[anchor.ids_A], dim=1)

    def mean_cosine(rows_AD: Tensor) -> float:
        return float((rows_AD @ rows_AD.T).fill_diagonal_(0).sum() / (20 * 19))

    assert mean_cosine(kept) > 0.8
    assert abs(mean_cosine(anchor.directions_AD)) < 0.1


def test_a_row_at_the_mean_has_no_direction() -> None:
    rows_VD = torch.cat([torch.eye(D), -torch.eye(D), torch.full((1, D), 0.0)]) + 3
    counts_V = torch.zeros(len(rows_VD), dtype=torch.int64)
    counts_V[-1] = 99
    assert 2 * D not in Anchored().anchor(Words(rows_VD, counts_V).stream(), 2 * D).ids_A
    with pytest.raises(SourceError, match=f"has {2 * D} distinct rows .*cap to {2 * D} or less"):
        Anchored().anchor(Words(rows_VD, counts_V).stream(), 2 * D + 1)


def test_counts_of_another_tokenizer_are_refused() -> None:
    with pytest.raises(SourceError, match="tokenizer that belongs to the model"):
        Anchored().anchor(Words(torch.randn(8, D), torch.ones(9, dtype=torch.int64)).stream(), 2)


def test_half_precision_unembeddings_are_raised() -> None:
    rows_VD = (torch.randn(V, D) + 3).bfloat16()
    anchor = Anchored().anchor(Words(rows_VD, torch.arange(V)).stream(), 10)
    assert anchor.directions_AD.dtype == torch.float32


def test_an_anchored_row_is_the_matched_filter() -> None:
    """W a, as an encoder row: its response is proportional to a' (S + alpha I)^-1 (x - mean)."""
    x_BD = sample(512)
    metric = fitted(SoftZca(), x_BD)
    anchor = Anchored().anchor(Vocabulary().stream(), 6)
    rows_AD = Anchored().start(6, metric, anchor, torch.Generator())
    response = metric.white(Raw(x_BD.float())) @ rows_AD.T
    soft_DD = torch.cov(x_BD.T, correction=0) + float(metric.report()["alpha"]) * torch.eye(D)  # type: ignore[attr-defined]
    filtered = (x_BD - x_BD.mean(0)) @ torch.linalg.solve(soft_DD, anchor.directions_AD.double().T)
    cosine = torch.nn.functional.cosine_similarity(response.double(), filtered, dim=0)
    torch.testing.assert_close(cosine, torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-6)


class Contexts(Vocabulary):
    """Token t stands at t e_t plus 7 in every direction, and each context begins with a token of its own."""

    def __init__(self, tokens_ST: Tensor) -> None:
        self.tokens_ST, self.asked = tokens_ST, 0

    def sequences(self, n: int) -> Sequences:
        self.asked += 1
        real_ST = torch.ones_like(self.tokens_ST, dtype=torch.bool)
        real_ST[:, -1] = False
        return Sequences(tokens_ST=self.tokens_ST, real_ST=real_ST)

    def activations(self, sequences: Sequences) -> Raw:
        return Raw(sequences.tokens_ST[..., None] * torch.eye(V)[sequences.tokens_ST][..., :D] + 7.0)


def test_a_mean_activation_is_that_of_a_token_less_that_of_all() -> None:
    # Position 0 has no context, and the last one is padding: neither counts.
    stream = Contexts(torch.tensor([[9, 1, 1, 2, 5], [9, 1, 2, 3, 5]]))
    anchor = Anchored(of="activation", samples=8).anchor(stream.stream(), 2)
    assert anchor.ids_A.tolist() == [1, 2]
    raw_VD = torch.arange(V)[:, None] * torch.eye(V)[:, :D]
    mean_D = (3 * raw_VD[1] + 2 * raw_VD[2] + raw_VD[3]) / 6
    wanted_AD = torch.nn.functional.normalize(raw_VD[[1, 2]] - mean_D, dim=1)
    torch.testing.assert_close(anchor.directions_AD, Raw(wanted_AD))


def test_mean_activations_are_taken_over_as_many_tokens_as_asked() -> None:
    stream = Contexts(torch.tensor([[9, 1, 2, 3, 4, 0]]))
    Anchored(of="activation", samples=11).anchor(stream.stream(), 2)
    assert stream.asked == 3
    with pytest.raises(
        SourceError, match=r"4 tokens occur in a sample of 10, 5 anchors .*cap to 4 or less, or raise its samples"
    ):
        Anchored(of="activation", samples=10).anchor(stream.stream(), 5)


def test_mean_activations_of_the_block_ask_for_no_context() -> None:
    """All of its rows count, in the block's precision, whatever `samples` says."""

    class Block(Contexts):
        def block(self) -> tuple[Raw, Tensor]:
            id_N = self.tokens_ST.repeat(4000, 1).flatten()  # more than are widened at a time
            return Raw((id_N[:, None] * torch.eye(V)[id_N][:, :D] + 7.0).bfloat16()), id_N

    stream = Block(torch.tensor([[1, 1, 2, 3]]))
    anchor = Anchored(of="activation", samples=1, sampled="block").anchor(cast(Stream, stream), 2)
    assert anchor.ids_A.tolist() == [1, 2]
    assert stream.asked == 0
    raw_VD = (torch.arange(V)[:, None] * torch.eye(V)[:, :D]).float()
    mean_D = (2 * raw_VD[1] + raw_VD[2] + raw_VD[3]) / 4
    wanted_AD = torch.nn.functional.normalize(raw_VD[[1, 2]] - mean_D, dim=1)
    torch.testing.assert_close(anchor.directions_AD, Raw(wanted_AD), rtol=1e-2, atol=1e-2)


def test_a_source_without_tokens_beside_its_block_is_told_of_contexts() -> None:
    with pytest.raises(SourceError, match=r'no tokens beside its block .*sampled = "contexts"'):
        Anchored(of="activation", sampled="block").anchor(cast(Stream, SimpleNamespace(facts=FACTS)), 2)


def test_mean_activations_need_tokens_and_no_unembedding() -> None:
    component = Anchored(of="activation")
    assert component.rows(evolve(FACTS, provides=frozenset({"activations", "tokens"})), F, F) == F // 4
    with pytest.raises(RecipeError, match='anchors of the activation need "tokens"'):
        component.rows(evolve(FACTS, provides=frozenset({"activations", "unembedding"})), F, F)


def test_anchored_rows_need_an_anchor() -> None:
    with pytest.raises(ComponentError, match="without an anchor"):
        Anchored().start(2, fitted(SoftZca(), sample(64)), None, torch.Generator())


def test_anchored_norms_are_free() -> None:
    weight_FD, grad_FD = torch.randn(3, D), torch.randn(3, D)
    before = weight_FD.clone(), grad_FD.clone()
    Anchored().project_gradient_(weight_FD, grad_FD)
    Anchored().project_(weight_FD)
    assert torch.equal(weight_FD, before[0])
    assert torch.equal(grad_FD, before[1])


@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 10**6))
def test_free_gradients_are_tangent_and_rows_unit(scale: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight_FD = torch.randn(5, D, generator=draw)
    Free().project_(weight_FD)
    torch.testing.assert_close(weight_FD.norm(dim=1), torch.ones(5), rtol=0, atol=1e-6)
    grad_FD = torch.randn(5, D, generator=draw) * scale
    size_F = grad_FD.norm(dim=1)
    Free().project_gradient_(weight_FD, grad_FD)
    assert float(((weight_FD * grad_FD).sum(1).abs() / size_F).max()) < 1e-6


def test_free_rows_may_keep_their_norm() -> None:
    weight_FD, grad_FD = torch.randn(3, D), torch.randn(3, D)
    before = weight_FD.clone(), grad_FD.clone()
    Free(unit_norm=False).project_gradient_(weight_FD, grad_FD)
    Free(unit_norm=False).project_(weight_FD)
    assert torch.equal(weight_FD, before[0])
    assert torch.equal(grad_FD, before[1])


def test_free_rows_are_uniform_on_the_sphere() -> None:
    rows_FD = Free().start(4000, fitted(SoftZca(), sample(64)), None, torch.Generator().manual_seed(1))
    assert float(rows_FD.mean(0).abs().max()) < 0.02
    torch.testing.assert_close(torch.cov(rows_FD.T), White(torch.eye(D) / D), rtol=0, atol=0.006)


def test_norms_hold_after_every_step() -> None:
    built = learner(Adam(lr=0.05, schedule=Constant()))
    for step in range(100):
        built.descend((built.sae.W_dec_FD * torch.randn(6, 4)).sum(), Clock(step=step, total=100))
        torch.testing.assert_close(built.sae.W_dec_FD.detach().norm(dim=1), torch.ones(6), rtol=0, atol=1e-6)


def test_the_first_moment_needs_no_projection() -> None:
    """What Free's docstring claims: little of it is radial, and rows settle where they do with a tangent moment."""
    plain, projected = (learner(Adam(lr=0.003, schedule=Constant())) for _ in range(2))
    target_FD = torch.randn(6, 4)
    for step in range(900):
        for built in (plain, projected):
            weight_FD = built.sae.W_dec_FD
            built.descend((weight_FD * target_FD).sum() + (weight_FD**4).sum(), Clock(step=step, total=100_000))
        moment_FD = plain.optimizer.state[plain.sae.W_dec_FD]["exp_avg"]
        radial_F = (moment_FD * plain.sae.W_dec_FD.detach()).sum(1).abs()
        assert float((radial_F / moment_FD.norm(dim=1).clamp(min=1e-2)).max()) < 0.1
        Free().project_gradient_(weight_FD.detach(), projected.optimizer.state[weight_FD]["exp_avg"])
    ends = (plain.sae.W_dec_FD.detach(), projected.sae.W_dec_FD.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-3)
