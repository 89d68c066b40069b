"""What is said of a feature, against the dense codes and matrices that it is said of."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from spalf.core.recipe import Plan
from spalf.core.state import TrainingState
from spalf.engine.atlas import DECADES, Atlas, Feature, Firings, atlas, firings, usage
from spalf.engine.evaluate import untouched
from spalf.errors import SourceError
from spalf.testing import toy_plan
from spalf.testing.whole import language_plan, moved, snapshot, stage_for, started

pytestmark = pytest.mark.slow  # together more than `make check` has time for

S = 40


@pytest.fixture(scope="module")
def stage() -> tuple[Plan, TrainingState]:
    return stage_for(frozenset({"tokens"}))


@pytest.fixture(scope="module")
def seen(stage: tuple[Plan, TrainingState]) -> Atlas:
    return atlas(*stage, sequences=S, contexts=4)


@pytest.fixture(scope="module")
def codes(stage: tuple[Plan, TrainingState]) -> tuple[Tensor, Tensor]:
    return dense(stage[1])


def dense(state: TrainingState) -> tuple[Tensor, Tensor]:
    """Tokens [S, T] and codes [S, T - 1, F] of the same contexts; the first position has no code."""
    with untouched(state):
        tokens_ST = state.stream.sequences(S).tokens_ST
    with untouched(state):
        x_STD = state.stream.activations(state.stream.sequences(S))[:, 1:]
        z_BF = state.sae.encode(state.metric.white(x_STD.flatten(0, 1))).dense()
    return tokens_ST, z_BF.reshape(*x_STD.shape[:2], -1)


def busy(seen: Atlas) -> list[Feature]:
    """Features that fire often, of every stratum."""
    found = [f for f in seen.features if f.fired >= 12]
    assert {f.stratum for f in found} == {"anchored", "free"}
    return found[:: max(1, len(found) // 12)]


def test_counts_and_levels(seen: Atlas, codes: tuple[Tensor, Tensor]) -> None:
    _, z_STF = codes
    fires_F = (z_STF > 0).flatten(0, 1).sum(0)
    assert seen.rows == S * z_STF.shape[1]
    assert [f.fired for f in seen.features] == fires_F.tolist()
    assert seen.silent == int((fires_F == 0).sum())
    for f in busy(seen):
        z_N = z_STF[..., f.id][z_STF[..., f.id] > 0]
        assert f.peak == pytest.approx(float(z_N.max()), rel=1e-5)
        assert f.mean == pytest.approx(float(z_N.mean()), rel=1e-5)
        bars = torch.histc(z_N, bins=usage.BARS, min=0.0, max=float(z_N.max()))
        assert sum(f.histogram) == f.fired
        # A value on an edge may fall on either side of it.
        assert sum(abs(a - b) for a, b in zip(f.histogram, bars.tolist(), strict=True)) <= 2


def test_densities_of_the_whole_dictionary(seen: Atlas) -> None:
    assert list(seen.rows_of) == ["anchored", "free"]
    for counts, rows in zip(seen.density, seen.rows_of.values(), strict=True):
        assert len(counts) == len(DECADES) - 1
        assert sum(counts) <= rows
    assert sum(map(sum, seen.density)) + seen.silent == seen.width
    assert usage.decades(torch.tensor([1, 10, 100, 0, 100]), 100) == tuple(
        {12: 1, 16: 1, 19: 2}.get(i, 0) for i in range(len(DECADES) - 1)
    )


def test_tokens_share_out_the_activation(seen: Atlas, codes: tuple[Tensor, Tensor]) -> None:
    tokens_ST, z_STF = codes
    for f in busy(seen):
        mass: Counter[int] = Counter()
        for token, z in zip(tokens_ST[:, 1:].flatten().tolist(), z_STF[..., f.id].flatten().tolist(), strict=True):
            mass[token] += z
        best = mass.most_common(len(f.tokens))
        assert [x for _, x in f.tokens] == pytest.approx([x / sum(mass.values()) for _, x in best], rel=1e-4)
        assert all(mass[v] / sum(mass.values()) == pytest.approx(x, rel=1e-4) for v, x in f.tokens)


def test_partners_fire_on_the_same_rows(seen: Atlas, codes: tuple[Tensor, Tensor]) -> None:
    on_BF = (codes[1] > 0).flatten(0, 1).double()
    count_F = on_BF.sum(0)
    few = [f for f in busy(seen) if f.fired <= usage.SAMPLE]
    assert len(few) > 3, "counted in full, not on a sample"
    for f in few:
        together_F = on_BF[:, f.id] @ on_BF
        score_F = together_F / (count_F[f.id] * count_F).clamp(min=1).sqrt()
        score_F[together_F < 3] = 0.0
        score_F[f.id] = 0.0
        best = score_F.topk(len(f.partners)).values
        assert [score_F[j] for j, _ in f.partners] == pytest.approx(best.tolist())
        assert [x for _, x in f.partners] == pytest.approx([float(together_F[j]) / f.fired for j, _ in f.partners])


def test_partners_on_a_sample_are_close(codes: tuple[Tensor, Tensor]) -> None:
    """One feature fires on every second row, its partner on three of four of those."""
    rows = 4000
    on = torch.arange(0, rows, 2)
    with_it = on[torch.arange(len(on)) % 4 != 0]
    held = Firings(
        width=3,
        rows=rows,
        row_N=torch.cat([on, with_it]),
        feature_N=torch.cat([torch.zeros(len(on)), torch.ones(len(with_it))]).long(),
        value_N=torch.ones(len(on) + len(with_it)),
        tokens_ST=None,
    )
    first, second, third = usage.partners(held, torch.arange(3), most=3)
    [(mate, share)] = first
    assert mate == 1
    assert share == pytest.approx(0.75, abs=0.15)
    assert second == ((0, 1.0),)
    assert third == ()


def test_places_are_the_strongest_of_as_many_sequences(seen: Atlas, codes: tuple[Tensor, Tensor]) -> None:
    _, z_STF = codes
    for f in busy(seen):
        z_ST = z_STF[..., f.id]
        best = z_ST.max(1).values.sort(descending=True).values
        found = [dict(p.activations)[p.position] for p in f.places[:4]]
        assert found == pytest.approx(best[best > 0][:4].tolist(), rel=1e-4)
        assert len({p.sequence for p in f.places}) == len(f.places) <= 6
        assert [p.rank for p in f.places[:4]] == sorted(p.rank for p in f.places[:4])
        assert f.places[0].rank == 0.0
        for p in f.places:
            row = {t: z for t, z in enumerate([0.0, *z_ST[p.sequence].tolist()]) if z > 0}
            assert dict(p.activations) == pytest.approx(row, rel=1e-4)
    middle = [p.rank for f in busy(seen) for p in f.places[4:]]
    assert middle
    assert min(middle) > 0.05


def test_directions(seen: Atlas, stage: tuple[Plan, TrainingState]) -> None:
    _, state = stage
    with torch.no_grad():
        rows_FD = normalize(state.metric.raw_direction(state.sae.W_dec_FD), dim=-1)
        W_VD = state.stream.unembedding()
        logit_FV = rows_FD @ W_VD.T
        logit_FV = logit_FV - logit_FV.mean(1, keepdim=True)
        cosine_FF = rows_FD @ rows_FD.T
    for f in busy(seen):
        others = torch.cat([cosine_FF[f.id, : f.id], cosine_FF[f.id, f.id + 1 :]])
        assert [x for _, x in f.neighbours] == pytest.approx(others.topk(6).values.tolist(), abs=1e-5)
        assert f.id not in dict(f.neighbours)
        assert [x for _, x in f.promoted] == pytest.approx(logit_FV[f.id].topk(6).values.tolist(), abs=1e-4)
        assert [x for _, x in f.suppressed] == pytest.approx(
            logit_FV[f.id].topk(6, largest=False).values.tolist(), abs=1e-4
        )
        assert all(float(logit_FV[f.id, v]) == pytest.approx(x, abs=1e-4) for v, x in f.promoted)


def test_anchored_ones_know_their_token(seen: Atlas, stage: tuple[Plan, TrainingState]) -> None:
    _, state = stage
    anchor = state.anchors["anchored"]
    tied = [f for f in seen.features if f.anchored is not None]
    assert [f.id for f in tied] == list(range(state.sae.rows["anchored"].stop))
    assert [f.anchored.token for f in tied if f.anchored] == anchor.ids_A.tolist()
    drifts = torch.tensor([f.anchored.drift for f in tied if f.anchored])
    value = float(drifts.square().sum())
    start_AD = normalize(state.metric.white_direction(anchor.directions_AD), dim=-1)
    assert value == pytest.approx(float((state.sae.W_dec_FD.detach()[: len(tied)] - start_AD).square().sum()), rel=1e-4)
    assert all(f.anchored.cosine <= 1.0001 for f in tied if f.anchored)


def test_every_token_has_a_text(seen: Atlas, stage: tuple[Plan, TrainingState]) -> None:
    told = {v for f in seen.features for pairs in (f.tokens, f.promoted, f.suppressed) for v, _ in pairs}
    told |= {v for s in seen.sequences for v in s}
    assert told <= set(seen.text)
    some = sorted(told)[:50]
    assert [seen.text[v] for v in some] == stage[1].stream.text(torch.tensor(some))


def test_fewer_features_are_spread_over_the_densities(stage: tuple[Plan, TrainingState], seen: Atlas) -> None:
    few = atlas(*stage, sequences=S, features=16, contexts=1)
    ordered = sorted((f.fired for f in seen.features), reverse=True)
    assert sorted((f.fired for f in few.features), reverse=True) == ordered[8::16]
    assert few.width == len(seen.features)
    assert few.density == seen.density
    known = {f.id: f for f in seen.features}
    assert all(f.neighbours == known[f.id].neighbours for f in few.features)


def places_of(tokens_ST: Tensor, token: int, of: str) -> list[tuple[int, int]]:
    """(sequence, row of the codes) of each place where a token stands, or comes next; the first has no code."""
    shift = {"activation": 1, "unembedding": 2}[of]
    return (tokens_ST[:, shift:] == token).nonzero().tolist()


def test_named_features_of_what_was_looked_at(stage: tuple[Plan, TrainingState], seen: Atlas) -> None:
    plan, state = stage
    with untouched(state):
        held = firings(plan, state, S)
    few = atlas(plan, state, contexts=4, only=(9, 4), held=held)
    for one, same in zip(few.features, (f for f in seen.features if f.id in (4, 9)), strict=True):
        for name in ("id", "fired", "peak", "histogram", "tokens", "partners", "anchored", "places"):
            assert getattr(one, name) == getattr(same, name), name
        assert [i for i, _ in one.neighbours] == [i for i, _ in same.neighbours]
        assert dict(one.promoted) == pytest.approx(dict(same.promoted), rel=1e-4)
    assert (few.rows, few.silent, few.density) == (seen.rows, seen.silent, seen.density)


@pytest.mark.parametrize("of", ["activation", "unembedding"])
def test_absorption_of_anchored_ones(of: str, stage: tuple[Plan, TrainingState]) -> None:
    """Place by place, without the shortcuts."""
    if of == "unembedding":
        plan = language_plan(stratum__anchored__of=f'"{of}"')
        stage = plan, started(plan)
    assert getattr(stage[0].recipe.stratum["anchored"], "of", "") == of
    seen, state = atlas(*stage, sequences=S, contexts=1), stage[1]
    tokens_ST, z_STF = dense(state)
    raw_FD = state.metric.raw_direction(state.sae.W_dec_FD.detach())
    anchor = state.anchors["anchored"]
    told = 0
    for f, direction_D in zip(seen.features, normalize(anchor.directions_AD, dim=-1), strict=False):
        assert f.anchored is not None
        along_F = raw_FD @ direction_D
        cosine_F = along_F / raw_FD.norm(dim=1)
        counted = absorbed = 0
        for s, t in places_of(tokens_ST, f.anchored.token, of):
            put_F = z_STF[s, t] * along_F
            if (total := float(put_F.sum())) <= 0:
                continue
            counted += 1
            put_F[f.id] = -torch.inf
            best = int(put_F.argmax())
            absorbed += bool(z_STF[s, t, f.id] == 0 and put_F[best] >= 0.4 * total and cosine_F[best] >= 0.025)
        if counted < 5 or counted > 250:
            assert counted > 250 or f.absorption is None
        else:
            assert f.absorption == pytest.approx(absorbed / counted, abs=1e-6), f.id
            told += 1
    assert told >= 10
    assert len({f.absorption for f in seen.features}) > 3
    assert all(f.absorption is None for f in seen.features if f.anchored is None)


def test_no_trace(stage: tuple[Plan, TrainingState], seen: Atlas) -> None:
    before = snapshot(stage[1])
    assert atlas(*stage, sequences=S, contexts=4) == seen
    assert moved(before, snapshot(stage[1])) == []


def test_without_tokens() -> None:
    plan = toy_plan()
    state = started(plan, steps=12)
    found = atlas(plan, state, sequences=4)
    assert found.sequences == ()
    assert found.text == {}
    assert len(found.features) == plan.knobs.F
    f = max(found.features, key=lambda f: f.fired)
    assert f.fired > 0
    assert f.tokens == f.promoted == f.places == ()
    assert len(f.neighbours) == 6
    [(planted, cosine)] = f.planted
    truth_ND = normalize(state.stream.truth(), dim=-1)
    row_D = normalize(state.metric.raw_direction(state.sae.W_dec_FD), dim=-1)[f.id].detach()
    assert (planted, cosine) == (int((truth_ND @ row_D).argmax()), pytest.approx(float((truth_ND @ row_D).max())))


class Short:
    """A stream that repeats itself, and ends."""

    def __init__(self, stream: object, left: int) -> None:
        self._stream, self._left = stream, left

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def sequences(self, n: int) -> object:
        if self._left < n:
            raise SourceError("the text ended")
        self._left -= n
        return self._stream.held_out().sequences(n)  # type: ignore[attr-defined]


def test_a_text_that_ends_or_repeats(stage: tuple[Plan, TrainingState]) -> None:
    plan, state = stage
    with untouched(state):
        whole = state.stream
        state.stream = Short(whole, left=40)  # type: ignore[assignment]
        held = firings(plan, state, 64)
        assert held.tokens_ST is not None
        assert len(held.tokens_ST) == 16, "the second sixteen are the first again, and eight are too few for a third"
        assert held.rows == 16 * held.span
        state.stream = Short(whole, left=0)  # type: ignore[assignment]
        with pytest.raises(SourceError, match="the text ended"):
            firings(plan, state, 64)
