"""What every source must do."""

from __future__ import annotations

import atexit
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from spalf.core.values import Facts, Raw
from spalf.errors import SourceError
from spalf.testing import Check
from spalf.testing.tiny_model import write_model, write_text

CPU = torch.device("cpu")
CONTEXT = 12
Slot = tuple[str, str]


@cache
def _scratch() -> Path:
    directory = TemporaryDirectory(prefix="spalf-testing-")
    atexit.register(directory.cleanup)
    return Path(directory.name)


@cache
def _language() -> dict[str, Any]:
    text = write_text(_scratch() / "text.jsonl")
    model = write_model(_scratch() / "model")
    small = {"context": CONTEXT, "sequences": 3, "shuffle": 50, "dtype": "float32", "held_out": 0.25}
    return {"model": str(model), "text": str(text), **small}


@cache
def _shards() -> dict[str, Any]:
    from spalf.parts.source.huggingface import Huggingface
    from spalf.parts.source.shards import write_shards

    out = _scratch() / "shards"
    stream = Huggingface(layer=0, **_language()).open(0, CPU)
    write_shards(stream, out, 300, held_out=100, shard_bytes=120 * 64)
    return {"path": str(out), "shuffle": 50}


@cache
def _pairs() -> dict[str, Any]:
    """80 labelled pairs of 96 sentences, in groups that share one."""
    from spalf.parts.source.pairs import Pairs, write_pairs

    draw = torch.Generator().manual_seed(0)
    x_SD = torch.randn(96, 8, generator=draw)
    a_N = torch.arange(80)
    b_N = 80 + torch.arange(80) // 5
    labels_NC = torch.randint(-1, 2, (80, 3), generator=draw, dtype=torch.int8)
    facts = Facts(d_model=8, hook="blocks.0.hook_resid_post", model="drawn")
    pairs = Pairs(
        a_ND=x_SD[a_N],
        b_ND=x_SD[b_N],
        labels_NC=labels_NC,
        concepts=("one", "three", "two"),
        sentence_a_N=a_N,
        sentence_b_N=b_N,
        facts=facts,
    )
    return {"pairs": str(write_pairs(_scratch() / "pairs", pairs)), "held_out": 0.25}


_MAKERS: Mapping[Slot, Callable[[], dict[str, Any]]] = {
    ("source", "huggingface"): lambda: {**_language(), "layer": 0},
    ("source", "transformer_lens"): lambda: {**_language(), "hook": "blocks.0.hook_resid_post"},
    ("source", "activations"): _shards,
    ("source", "difference"): _pairs,
    ("source", "synthetic"): lambda: {"d_model": 12, "features": 20, "shuffle": 64},
}


class _Examples(Mapping[Slot, dict[str, Any]]):
    """Options by (slot, use); files are written when they are first asked for."""

    def __getitem__(self, key: Slot) -> dict[str, Any]:
        return _MAKERS[key]()

    def __iter__(self) -> Iterator[Slot]:
        return iter(_MAKERS)

    def __len__(self) -> int:
        return len(_MAKERS)


EXAMPLES: Mapping[Slot, dict[str, Any]] = _Examples()


# ----------------------------------------------------------------------------------------------------------- the checks
def checks(cls: type, example: Any) -> list[Check]:
    """The named checks of one source."""
    return [*_stream_checks(example), *_cursor_checks(example), *_promise_checks(example)]


def _rows(stream: Any, *sizes: int) -> Tensor:
    return torch.cat([stream.next(n).x_BD for n in sizes])


def _stream_checks(source: Any) -> list[Check]:
    def facts_agree_with_the_rows() -> None:
        facts = source.facts()
        stream = source.open(0, CPU)
        x_BD = stream.next(7).x_BD
        assert x_BD.shape == (7, facts.d_model), f"7 rows asked, {tuple(x_BD.shape)} given, d_model is {facts.d_model}"
        assert x_BD.dtype == torch.float32, f"rows are {x_BD.dtype}, not float32"
        assert bool(x_BD.isfinite().all()), "rows are not finite"
        assert float(x_BD.std(0).max()) > 0, "all rows are equal"
        assert stream.facts == facts == source.facts(), "facts() and the stream's facts differ"
        assert "activations" in facts.provides, "every source provides activations"

    def same_seed_same_batches() -> None:
        one, two, other = source.open(3, CPU), source.open(3, CPU), source.open(4, CPU)
        x_BD = _rows(one, 40)
        assert torch.equal(x_BD, _rows(two, 40)), "the same seed gives other rows"
        assert not torch.equal(x_BD, _rows(other, 40)), "another seed gives the same rows"

    def the_unit_is_rows() -> None:
        whole, pieces = source.open(0, CPU), source.open(0, CPU)
        n = _crossing(source) + 9
        assert torch.equal(_rows(whole, n), _rows(pieces, 1, n - 9, 3, 5)), "rows depend on the sizes asked for"

    def held_out_is_another_stream() -> None:
        stream, plain = source.open(0, CPU), source.open(0, CPU)
        stream.next(5)
        held = _rows(stream.held_out(), 20)
        assert torch.equal(held, _rows(stream.held_out(), 20)), "a held-out stream does not start at its beginning"
        assert not torch.equal(held, _rows(source.open(0, CPU), 20)), "the held-out stream gives the training rows"
        assert torch.equal(_rows(stream, 20), _rows(plain, 5, 20)[5:]), "held_out() moved the training stream"

    return [facts_agree_with_the_rows, same_seed_same_batches, the_unit_is_rows, held_out_is_another_stream]


def _crossing(source: Any) -> int:
    """Rows enough to leave the first block, where blocks are small."""
    shuffle: int = source.facts().shuffle
    return shuffle + 11 if 0 < shuffle <= 1 << 14 else 100


def _cursor_checks(source: Any) -> list[Check]:
    def the_cursor_is_flat_and_plain() -> None:
        state = source.open(0, CPU).state_dict()
        assert all(isinstance(k, str) and isinstance(v, str | int | float) for k, v in state.items()), state
        assert json.loads(json.dumps(state)) == state, "the cursor does not survive JSON"

    def a_restored_cursor_continues_exactly() -> None:
        n = _crossing(source)
        for sizes in ((), (7,), (n - 11,), (n, 13), (3, n, n, 2)):
            stream, resumed = source.open(5, CPU), source.open(5, CPU)
            for size in sizes:
                stream.next(size)
            resumed.next(4)  # what a stream has done before must not matter
            resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
            assert resumed.state_dict() == stream.state_dict(), f"the cursor after {sizes} rows changes when restored"
            assert torch.equal(_rows(stream, 6, n), _rows(resumed, 6, n)), f"restored after {sizes}, it goes astray"
            assert resumed.state_dict() == stream.state_dict()

    def a_held_out_cursor_continues_exactly() -> None:
        stream, resumed = (source.open(0, CPU).held_out() for _ in range(2))
        stream.next(17)
        resumed.load_state_dict(stream.state_dict())
        assert torch.equal(_rows(stream, 30), _rows(resumed, 30))

    return [the_cursor_is_flat_and_plain, a_restored_cursor_continues_exactly, a_held_out_cursor_continues_exactly]


def _promise_checks(source: Any) -> list[Check]:
    provides = source.facts().provides
    kept = {
        "logits": _language_checks,
        "unembedding": _unembedding_checks,
        "truth": _truth_checks,
        "labels": _label_checks,
    }
    calls: dict[str, Callable[[Any], Any]] = {
        "tokens": lambda s: s.sequences(1),
        "logits": lambda s: s.logits(s.sequences(1)),
        "unembedding": lambda s: s.unembedding(),
        "truth": lambda s: s.truth(),
    }

    def what_is_not_provided_is_refused() -> None:
        stream = source.open(0, CPU)
        for name in sorted(set(calls) - set(provides)):
            try:
                calls[name](stream)
            except SourceError:
                continue
            raise AssertionError(f'"{name}" is not in facts().provides, and asking for it raises no SourceError')

    checks = [check for name, make in kept.items() if name in provides for check in make(source)]
    return [what_is_not_provided_is_refused, *checks]


def _language_checks(source: Any) -> list[Check]:
    def sequences_have_a_cursor_of_their_own() -> None:
        stream, plain = source.open(0, CPU), source.open(0, CPU)
        s = stream.sequences(3)
        assert s.tokens_ST.shape == (3, stream.facts.context), s.tokens_ST.shape
        assert s.tokens_ST.dtype == torch.int64
        assert s.real_ST.dtype == torch.bool
        assert int(s.tokens_ST.min()) >= 0
        assert int(s.tokens_ST.max()) < stream.facts.n_vocab
        assert torch.equal(_rows(stream, 9), _rows(plain, 9)), "sequences() moved the rows"
        plain.load_state_dict(stream.state_dict())
        assert torch.equal(stream.sequences(2).tokens_ST, plain.sequences(2).tokens_ST), "the cursor forgets sequences"
        assert len(stream.text(s.tokens_ST[0])) == stream.facts.context

    def logits_follow_the_patch() -> None:
        stream = source.open(0, CPU)
        s = stream.sequences(2)
        clean_STV = stream.logits(s)
        assert clean_STV.shape == (*s.tokens_ST.shape, stream.facts.n_vocab), clean_STV.shape
        seen: list[Tensor] = []

        def keep(x: Raw) -> Raw:
            seen.append(x)
            return x

        assert torch.allclose(stream.logits(s, keep), clean_STV, atol=1e-5), "a patch that keeps all changes the logits"
        assert torch.allclose(seen[0], stream.activations(s), atol=1e-5), "the patch sees other activations"
        scale = torch.ones((), requires_grad=True)
        patched_STV = stream.logits(s, lambda x: Raw(x * scale))
        (slope,) = torch.autograd.grad(patched_STV.logsumexp(-1).sum() - patched_STV[..., 0].sum(), scale)
        assert float(slope) != 0.0, "no gradient flows through the patch"
        half = stream.logits(s, lambda x: Raw(0.5 * x))
        assert not torch.allclose(half, clean_STV), "the patch does not reach the logits"

    def activations_may_enter_a_graph() -> None:
        stream = source.open(0, CPU)
        x_STD = stream.activations(stream.sequences(1))
        weight = torch.ones(x_STD.shape[-1], requires_grad=True)
        (x_STD * weight).sum().backward()
        assert weight.grad is not None

    return [sequences_have_a_cursor_of_their_own, logits_follow_the_patch, activations_may_enter_a_graph]


def _unembedding_checks(source: Any) -> list[Check]:
    def unembedding_and_counts_cover_the_vocabulary() -> None:
        stream = source.open(0, CPU)
        facts, counts_V = stream.facts, stream.token_counts()
        assert stream.unembedding().shape == (facts.n_vocab, facts.d_model)
        assert counts_V.shape == (facts.n_vocab,)
        assert counts_V.dtype == torch.int64
        assert int(counts_V.min()) >= 0
        assert int(counts_V.sum()) > 0

    return [unembedding_and_counts_cover_the_vocabulary]


def _truth_checks(source: Any) -> list[Check]:
    def planted_codes_explain_the_rows() -> None:
        stream = source.open(0, CPU)
        truth_ND = stream.truth()
        assert torch.allclose(truth_ND.norm(dim=1), torch.ones(len(truth_ND)), atol=1e-5), "rows are not unit"
        batch = stream.held_out().next(500)
        assert batch.truth_BN is not None, "the held-out stream gives no planted codes"
        assert batch.truth_BN.shape == (500, len(truth_ND))
        assert bool((batch.truth_BN >= 0).all())
        rest_BD = batch.x_BD - batch.truth_BN @ truth_ND
        assert float(rest_BD.var(0).sum()) < 0.5 * float(batch.x_BD.var(0).sum()), "codes explain less than half"

    return [planted_codes_explain_the_rows]


def _label_checks(source: Any) -> list[Check]:
    def rows_come_with_a_label_per_concept() -> None:
        stream = source.open(0, CPU)
        for part in (stream, stream.held_out()):
            labels_BC = part.next(9).truth_BN
            assert labels_BC is not None, "a source that provides labels fills truth_BN, held out and in training"
            assert labels_BC.shape == (9, len(part.concepts)), tuple(labels_BC.shape)
            assert bool((labels_BC.abs() <= 1).all()), "a label is -1, 0 or 1"

    return [rows_come_with_a_label_per_concept]
