"""How much of a label a few latents know. Shapes: N rows, D d_model, F features, C tasks, U units of resampling."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import deep_iterable, gt, min_len
from torch import Tensor

from spalf.core.recipe import Plan
from spalf.core.slots import evaluator
from spalf.core.state import TrainingState
from spalf.core.values import Raw, Sequences
from spalf.engine.bootstrap import Samples, Tally, Totals, measured
from spalf.engine.evaluate import untouched
from spalf.engine.probing import Contrast, logistic
from spalf.errors import SourceError
from spalf.parts.evaluator.tasks import TASKS, read_labelled, token_labels

CHUNK = 512
LEAST = 20
"""Rows of a side, in training and in testing alike, below which a task is left out."""
TEST_IN_TEN = 5


@frozen(kw_only=True, eq=False)
class Task:
    """A yes-or-no question: the rows that take part, their answers, and which are for testing."""

    name: str
    rows_n: Tensor
    yes_n: Tensor
    is_test_n: Tensor


@frozen(kw_only=True, eq=False)
class Labelled:
    """Rows with activations [N, D], the unit that each belongs to, tasks on them, and their codes a chunk at a time."""

    x_ND: Tensor
    unit_N: Tensor
    tasks: list[Task]
    codes: Callable[[], Iterator[tuple[slice, Tensor]]]


@evaluator("sparse_probing")
class SparseProbing:
    """Accuracy of a linear probe on the K latents that tell two classes apart best (SAEBench, 2503.09532).

    Latents are ranked by difference of means on training rows, and a logistic regression is fitted on the first K;
    `accuracy@K` is its mean accuracy over tasks on held-apart test rows, both classes equally frequent, so that 0.5 is
    chance. `accuracy@dense` probes the activation itself: the ceiling. `<task>.accuracy@K` is one task's.

    With `data`, a JSON-lines file of {"text": ..., "label": ...}, each label against the rest is a task and the row of
    a text is the mean over its tokens. Without it, tokens of held-out text are asked what they are part of: a comment,
    a quotation, a definition, an import, a capitalised word, a number; tasks that the text has too little of are left
    out. Training and test rows share no document, and intervals are over documents (texts, with `data`).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    data: str = ""
    """A JSON-lines file of labelled texts; "": questions about the held-out text's own tokens."""
    k: tuple[int, ...] = field(default=(1, 2, 5, 16), validator=[min_len(1), deep_iterable(gt(0))])
    """How many latents a probe may use."""
    rows: int = field(default=2000, validator=gt(0))
    """Rows of a task, at most."""
    sequences: int = field(default=256, validator=gt(0))
    """Held-out contexts that are searched, without `data`."""

    def __call__(self, plan: Plan, state: TrainingState) -> dict[str, float]:
        with untouched(state):
            labelled = self._texts(plan, state) if self.data else self._tokens(state)
            if not labelled.tasks:
                return {"tasks": 0.0}
            latents, dense = self._latents(state, labelled), labelled.x_ND.cpu()
            tally = Tally()
            for column, task in enumerate(labelled.tasks):
                hits = {f"@{k}": _hits(task, latents[column][:, :k]) for k in self.k}
                hits["@dense"] = _hits(task, dense[task.rows_n])
                here_C = torch.zeros(len(labelled.tasks)).index_fill_(0, torch.tensor(column), 1.0)
                sums = {name: hit_n[:, None] * here_C for name, hit_n in hits.items()}
                count = torch.ones(int(task.is_test_n.sum()), 1)
                tally.add(labelled.unit_N.cpu()[task.rows_n[task.is_test_n]], n=count * here_C, **sums)
        samples = tally.samples(_measure)
        extra = {"tasks": float(len(labelled.tasks)), **_by_task(samples, labelled.tasks)}
        return measured(samples, extra, units="texts" if self.data else "documents")

    def _latents(self, state: TrainingState, labelled: Labelled) -> list[Tensor]:
        """Codes [n, max K] of each task's rows on the latents that are best for it, best first; on the host."""
        count = len(labelled.x_ND)
        inside_NC, outside_NC = (torch.zeros(count, len(labelled.tasks), dtype=torch.bool) for _ in range(2))
        for column, task in enumerate(labelled.tasks):
            inside_NC[task.rows_n[task.yes_n & ~task.is_test_n], column] = True
            outside_NC[task.rows_n[~task.yes_n & ~task.is_test_n], column] = True
        contrast = Contrast(len(labelled.tasks), state.sae.width, state.device)
        for part, z_nF in labelled.codes():
            contrast.add(z_nF, inside_NC[part].to(z_nF.device), outside_NC[part].to(z_nF.device))
        top_CK = contrast.top(max(self.k))
        z_NCK = torch.cat([z_nF[:, top_CK].cpu() for _, z_nF in labelled.codes()])
        return [z_NCK[task.rows_n, column] for column, task in enumerate(labelled.tasks)]

    def _tokens(self, state: TrainingState) -> Labelled:
        """Rows are tokens of held-out text."""
        contexts, tally = state.stream.sequences(self.sequences), Tally()
        real_ST = contexts.real_ST.cpu()[:, 1:]
        unit_N = tally.units(contexts).cpu()[:, 1:][real_ST]
        texts = [state.stream.text(row_T) for row_T in contexts.tokens_ST]
        tasks = []
        for name in TASKS:
            yes_ST = torch.tensor([token_labels(pieces, name) for pieces in texts])
            tasks.append(_balanced(name, yes_ST[:, 1:][real_ST], unit_N % 10 < TEST_IN_TEN, self.rows))
        found = [task for task in tasks if task is not None]
        if not found:
            return Labelled(x_ND=torch.empty(0), unit_N=unit_N[:0], tasks=[], codes=lambda: iter(()))
        needed_N = torch.zeros(len(unit_N), dtype=torch.bool)
        for task in found:
            needed_N[task.rows_n] = True
        place_N = needed_N.cumsum(0) - 1
        parts = zip(contexts.split(16), _places(needed_N, real_ST, 16), strict=True)
        kept = [state.stream.activations(part)[:, 1:][at.to(state.device)].float() for part, at in parts]
        x_ND = torch.cat(kept)
        moved = [
            Task(name=t.name, rows_n=place_N[t.rows_n], yes_n=t.yes_n, is_test_n=t.is_test_n) for t in found
        ]  # rows that no task needs are gone
        return Labelled(x_ND=x_ND, unit_N=unit_N[needed_N], tasks=moved, codes=_encoding(state, x_ND))

    def _texts(self, plan: Plan, state: TrainingState) -> Labelled:
        """Rows are texts: the mean over their tokens of activations and of codes."""
        held = list(read_labelled(Path(self.data)))
        tokens = [state.stream.tokens(text)[: plan.facts.context] for text, _ in held]
        held, tokens = [h for h, t in zip(held, tokens, strict=True) if len(t) > 1], [t for t in tokens if len(t) > 1]
        ids = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1 for text, _ in held]
        unit_N, labels = torch.tensor(ids), sorted({label for _, label in held})
        tasks = [
            _balanced(name, torch.tensor([label == name for _, label in held]), unit_N % 10 < TEST_IN_TEN, self.rows)
            for name in (labels[1:] if len(labels) == 2 else labels)
        ]
        found = [task for task in tasks if task is not None]
        if not found:
            raise SourceError(
                f"{self.data}: no label has {LEAST} texts, nor {LEAST} others against it, in the training and in the "
                f"test part ({len(held)} texts, {len(labels)} labels; give it more of each)"
            )
        means = [_pooled(state, few) for few in _batches(tokens)]
        x_ND, z_NF = torch.cat([x for x, _ in means]), torch.cat([z for _, z in means])

        def codes() -> Iterator[tuple[slice, Tensor]]:
            for begin in range(0, len(z_NF), CHUNK):
                part = slice(begin, min(begin + CHUNK, len(z_NF)))
                yield part, z_NF[part].to(state.device)

        return Labelled(x_ND=x_ND, unit_N=unit_N, tasks=found, codes=codes)


def _balanced(name: str, yes_N: Tensor, is_test_N: Tensor, rows: int) -> Task | None:
    """As many rows of either answer on each side, at most `rows` in all; None where a side has too few."""
    draw = torch.Generator().manual_seed(0)
    chosen = []
    for is_test, share in ((False, 1 - TEST_IN_TEN / 10), (True, TEST_IN_TEN / 10)):
        sides = [((yes_N == answer) & (is_test_N == is_test)).nonzero()[:, 0] for answer in (True, False)]
        count = min(*(len(side) for side in sides), int(rows * share / 2))
        if count < LEAST:
            return None
        chosen += [side[torch.randperm(len(side), generator=draw)[:count]] for side in sides]
    rows_n = torch.cat(chosen).sort().values
    return Task(name=name, rows_n=rows_n, yes_n=yes_N[rows_n], is_test_n=is_test_N[rows_n])


def _places(needed_N: Tensor, real_ST: Tensor, n: int) -> list[Tensor]:
    """`needed_N`, which numbers the real positions, as a mask of contexts [S, T], `n` contexts at a time."""
    at_ST = torch.zeros_like(real_ST)
    at_ST[real_ST] = needed_N
    return list(torch.split(at_ST, n))


def _encoding(state: TrainingState, x_ND: Tensor) -> Callable[[], Iterator[tuple[slice, Tensor]]]:
    def codes() -> Iterator[tuple[slice, Tensor]]:
        for begin in range(0, len(x_ND), CHUNK):
            part = slice(begin, min(begin + CHUNK, len(x_ND)))
            yield part, state.sae.encode(state.metric.white(Raw(x_ND[part]))).dense()

    return codes


def _batches(tokens: list[Tensor]) -> Iterator[list[Tensor]]:
    for begin in range(0, len(tokens), 16):
        yield tokens[begin : begin + 16]


def _pooled(state: TrainingState, tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Means over each text's tokens of activations [S, D] and codes [S, F], on the host."""
    tokens_ST = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    length_S = torch.tensor([len(t) for t in tokens], device=tokens_ST.device)
    real_ST = torch.arange(tokens_ST.shape[1], device=tokens_ST.device) < length_S[:, None]
    x_STD = state.stream.activations(Sequences(tokens_ST=tokens_ST, real_ST=real_ST))
    real_SP = real_ST[:, 1:]
    x_ND = x_STD[:, 1:][real_SP].float()
    z_NF = torch.cat([z_nF for _, z_nF in _encoding(state, x_ND)()])
    counts = real_SP.sum(1).tolist()
    pooled = [torch.stack([part.mean(0) for part in torch.split(rows, counts)]) for rows in (x_ND, z_NF)]
    return pooled[0].cpu(), pooled[1].cpu()


def _hits(task: Task, inputs_nK: Tensor) -> Tensor:
    """Whether a probe fitted on the training rows is right on each test row, 0 or 1."""
    train_n = ~task.is_test_n
    probe = logistic(inputs_nK[train_n], task.yes_n[train_n, None], l2=1e-3)
    said_n = probe.score(inputs_nK[task.is_test_n])[:, 0] > 0
    return (said_n == task.yes_n[task.is_test_n]).double()


def _measure(totals: Totals) -> dict[str, Tensor]:
    """Mean accuracy over the tasks that this resample has, per K."""
    n_RC = totals["n"]
    share = {k: torch.where(n_RC > 0, v / n_RC.clamp(min=1), torch.nan) for k, v in totals.items() if k != "n"}
    return {f"accuracy{k}": value_RC.nanmean(-1) for k, value_RC in share.items()}


def _by_task(samples: Samples, tasks: list[Task]) -> dict[str, float]:
    n_C = samples.sums["n"].sum(0)
    return {
        f"{task.name}.accuracy{k}": float(sums_UC.sum(0)[column] / n_C[column])
        for column, task in enumerate(tasks)
        for k, sums_UC in samples.sums.items()
        if k != "n"
    }
