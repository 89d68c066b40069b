"""The Triton backend against the oracle: values, every gradient, whole optimizer steps, and what happens to long lists.

On a CPU the kernels run in Triton's interpreter, slowly, hence on small shapes; on CUDA the same tests are compiled.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from spalf.core.state import Learner
from spalf.core.values import Clock, Machine, White
from spalf.kernels import reference
from spalf.nn import StratifiedAutoencoder
from spalf.parts.activation.jumprelu import JumpReLU
from spalf.parts.optimizer.adam import Adam
from spalf.parts.stratum import Anchored, Free
from spalf.testing import example

fused = pytest.importorskip("spalf.kernels.fused", reason="triton is not installed")
lists = pytest.importorskip("spalf.kernels.lists")
capacity = pytest.importorskip("spalf.kernels.capacity")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# rows, d_model, features: no number is a multiple of a block
SHAPES = [(5, 12, 70), (9, 33, 130), *([(257, 100, 3001), (512, 512, 16_384), (64, 2048, 9000)] if CUDA else [])]
DENSITY = 0.02  # of the entries are active, give or take the input's norm
BIG = [((257, 100, 3001), (0.9, 0.999)), ((512, 512, 16_384), (0.9, 0.999))] if CUDA else []
TRACED = ("W_enc_FD", "W_dec_FD", "b_enc_F", "b_dec_D", "log_gain", "_activator.log_threshold_F")


def built(
    ops: Any, shape: tuple[int, int, int], seed: int, dtype: torch.dtype, refine: bool = False
) -> tuple[StratifiedAutoencoder, Tensor]:
    """Random rows in two strata; row 0 of the input fires nothing.

    Inputs and weights lie on grids, so that pre-activations are exact in float32, and thresholds and windows end
    between the grid's points: no entry changes sides by rounding.
    """
    rows, dim, width = shape
    draw = torch.Generator().manual_seed(seed)
    activator = JumpReLU(bandwidth=0.5, refine=refine).build(width)
    machine = Machine(device=DEVICE, ops=ops)
    sae = StratifiedAutoencoder(dim, {"a": width // 3, "b": width - width // 3}, activator, machine)
    for weight_FD in (sae.W_enc_FD, sae.W_dec_FD):
        unit_FD = torch.nn.functional.normalize(torch.randn(width, dim, generator=draw), dim=1)
        weight_FD.data.copy_((256 * unit_FD).round() / 256)
    sae.b_enc_F.data.copy_((64 * 0.1 * torch.randn(width, generator=draw)).round() / 64)
    quantile = math.sqrt(2) * float(torch.erfinv(torch.tensor(1 - 2 * DENSITY)))
    activator.log_threshold_F.data.fill_(math.log((math.floor(quantile * 4096) + 0.5) / 4096))  # type: ignore[attr-defined]
    activator.bandwidth_F.fill_(512 / 4096)  # type: ignore[attr-defined]
    if refine:
        activator.step_F.data.copy_(torch.rand(width, generator=draw) / 4)  # type: ignore[attr-defined]
        root_DD = torch.randn(dim, dim, generator=draw) / dim**0.5
        sae.form_DD.copy_(root_DD @ root_DD.T)
        sae.log_gain.data.fill_(0.3)
    x_BD = (16 * torch.randn(rows, dim, generator=draw)).round() / 16
    x_BD[0] = 0.0
    return sae.to(DEVICE, dtype).train(), x_BD.to(DEVICE, dtype)


def loss_of(sae: StratifiedAutoencoder, x_BD: Tensor) -> Tensor:
    """Everything that training asks of a backend: error, L0, distance to targets, co-activation."""
    ops = sae.machine.ops
    code = sae.encode(White(x_BD))
    target_AD = torch.linspace(-1, 1, sae.rows["a"].stop * x_BD.shape[1]).reshape(-1, x_BD.shape[1])
    distance = ops.distance(sae, target_AD.to(x_BD), sae.rows["a"])
    sample_R = torch.arange(0, x_BD.shape[0], 2, device=DEVICE)
    draw = torch.Generator(DEVICE).manual_seed(0)
    cosine = ops.coactivation(code, sae, sample_R, slice(0, sae.width), lambda v: 2 * v, draw)
    error = (sae.decode(code) - x_BD).square().sum(1).mean()
    return error + 0.1 * code.l0_B().mean() + 1e-3 * distance + cosine + 1e-2 * sae.W_dec_FD[:3].pow(4).sum()


def gradients(
    ops: Any, shape: tuple[int, int, int], seed: int, dtype: torch.dtype, refine: bool = False
) -> dict[str, Tensor]:
    sae, x_BD = built(ops, shape, seed, dtype, refine)
    if isinstance(ops, fused.FusedOps):
        ops._capacity.take_note(int(fused._SPARSE * shape[2]) // 2, shape[0] * int(fused._SPARSE * shape[2]))
    x_BD.requires_grad_(True)
    loss = loss_of(sae, x_BD)
    loss.backward()
    assert x_BD.grad is not None
    return {
        "loss": loss.detach(),
        "input": x_BD.grad,
        **{n: p.grad for n, p in sae.named_parameters() if p.grad is not None},
    }


@pytest.mark.parametrize(("shape", "refine"), [*((shape, False) for shape in SHAPES), (SHAPES[-1], True)])
def test_every_gradient_equals_the_oracle_in_float64(shape: tuple[int, int, int], refine: bool) -> None:
    seed = int(torch.randint(2**31, ()))  # fresh inputs in every run
    ours = gradients(fused.FusedOps(compute="float32"), shape, seed, torch.float32, refine)
    oracle = gradients(reference.ReferenceOps(), shape, seed, torch.float64, refine)
    assert set(ours) == set(oracle) >= {*TRACED, *(["_activator.step_F"] if refine else [])}
    for name, value in oracle.items():
        error = float((ours[name].double() - value).norm() / value.norm().clamp(min=1e-12))
        assert error < 1e-5, f"{name}: {error:.1e} with seed {seed}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "compute", ["float32", pytest.param("bfloat16", marks=pytest.mark.skipif(not CUDA, reason="CUDA"))]
)
def test_refining_at_once_is_refining_by_decode_and_correlate(compute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = int(torch.randint(2**31, ()))
    at_once = gradients(fused.FusedOps(compute=compute), SHAPES[-1], seed, torch.float32, refine=True)
    monkeypatch.setattr(fused.FusedOps, "refine", lambda *_: None)
    in_pieces = gradients(fused.FusedOps(compute=compute), SHAPES[-1], seed, torch.float32, refine=True)
    assert set(at_once) == set(in_pieces)
    for name, value in in_pieces.items():
        error = float((at_once[name] - value).norm() / value.norm().clamp(min=1e-12))
        assert error < (1e-5 if compute == "float32" else 2e-2), f"{name}: {error:.1e} with seed {seed}"


def learner(ops: Any, shape: tuple[int, int, int], refine: bool = False, **options: Any) -> tuple[Learner, Tensor]:
    sae, x_BD = built(ops, shape, 7, torch.float32, refine)
    rule = example(Adam, lr=1e-2, **options)
    optimizer = rule.build(sae.named_parameters())
    rates = tuple(group["lr"] for group in optimizer.param_groups)
    made = Learner(sae=sae, optimizer=optimizer, rule=rule, strata={"a": Anchored(), "b": Free()}, rates=rates)  # type: ignore[arg-type]
    made.project_()
    return made, x_BD


def trained(ops: Any, shape: tuple[int, int, int], steps: int = 3, **options: Any) -> dict[str, Tensor]:
    """Parameters and moments after some steps."""
    made, x_BD = learner(ops, shape, **options)
    for step in range(steps):
        made.descend(loss_of(made.sae, x_BD), Clock(step=step, total=10))  # type: ignore[arg-type]
    moments = {
        f"{name}.{key}": value
        for name, p in made.sae.named_parameters()
        for key, value in made.optimizer.state[p].items()  # type: ignore[index]
    }
    return {**{n: p.detach() for n, p in made.sae.named_parameters()}, **moments}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "betas", "refine"),
    [
        (SHAPES[0], (0.9, 0.999), False),
        (SHAPES[1], (0.0, 0.999), False),
        (SHAPES[0], (0.9, 0.999), True),
        *((shape, betas, False) for shape, betas in BIG),
    ],
)
def test_a_fused_step_is_the_optimizer_s_step(
    shape: tuple[int, int, int], betas: tuple[float, float], refine: bool
) -> None:
    # On large shapes one step: from the second on, a rounding may move an entry over its threshold.
    steps = 1 if shape[2] > 1000 else 3
    ours = trained(fused.FusedOps(compute="float32"), shape, steps, refine=refine, betas=betas)
    plain = trained(reference.ReferenceOps(), shape, steps, refine=refine, betas=betas)
    assert set(ours) == set(plain)
    for name, value in plain.items():
        error = float((ours[name] - value).norm() / value.norm().clamp(min=1e-9))
        # Adam's first steps are signs of gradients: where one is but a rounding error, the weight differs by the rate.
        allowed = 2e-4 if "." in name.removeprefix("_activator.") else 5e-3
        assert error < allowed, f"{name}: {error:.1e}"


@pytest.mark.slow
def test_a_backward_pass_that_fails_leaves_nothing_for_the_next() -> None:
    def stepped(fails: bool) -> Tensor:
        made, x_BD = learner(fused.FusedOps(compute="float32"), SHAPES[0])
        if fails:
            code = made.sae.encode(White(x_BD))
            code.pre_BK.register_hook(lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                made.descend((made.sae.decode(code) - x_BD).square().mean(), Clock(step=0, total=10))  # type: ignore[arg-type]
            made.optimizer.zero_grad()
        made.descend((made.sae.decode(made.sae.encode(White(x_BD))) - x_BD).square().mean(), Clock(step=0, total=10))  # type: ignore[arg-type]
        return made.optimizer.state[made.sae.W_dec_FD]["exp_avg"]

    torch.testing.assert_close(stepped(True), stepped(False))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SHAPES[1], *(shape for shape, _ in BIG)])
def test_deterministic_sums_have_one_order(shape: tuple[int, int, int]) -> None:
    one, two = (trained(fused.FusedOps(compute="float32", deterministic=True), shape, refine=True) for _ in range(2))
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.slow
def test_the_sums_of_the_matrices_have_one_order_in_any_case() -> None:
    one, two = (trained(fused.FusedOps(compute="float32"), SHAPES[1], steps=1) for _ in range(2))
    for name in ("W_enc_FD", "W_dec_FD", "b_enc_F"):
        assert torch.equal(one[name], two[name]), name


@pytest.mark.slow
def test_a_threshold_s_gradient_is_the_same_sum_in_order() -> None:
    atomics, ordered = (
        gradients(fused.FusedOps(compute="float32", deterministic=mode), SHAPES[1], 5, torch.float32)
        for mode in (False, True)
    )
    name = "_activator.log_threshold_F"
    assert atomics[name].any()
    torch.testing.assert_close(ordered[name], atomics[name])


@pytest.mark.slow
def test_a_step_leaves_the_distances_that_a_pass_over_the_rows_would_find() -> None:
    ops = fused.FusedOps(compute="float32")
    made, x_BD = learner(ops, SHAPES[1])
    rows = made.sae.rows["a"]
    target_AD = torch.rand(rows.stop, x_BD.shape[1], device=DEVICE)

    def distance() -> Tensor:
        return ops.distance(made.sae, target_AD, rows)

    def passed_over() -> Tensor:
        return (made.sae.W_dec_FD[rows] - target_AD).square().sum()

    for step in range(2):
        loss = (made.sae.decode(made.sae.encode(White(x_BD))) - x_BD).square().mean() + 0.1 * distance()
        made.descend(loss, Clock(step=step, total=10))  # type: ignore[arg-type]
    assert ops._shares.away is not None
    kept = distance()
    torch.testing.assert_close(kept, passed_over())
    ops._shares.away = None
    assert torch.equal(distance(), kept)
    with torch.no_grad():
        made.sae.W_dec_FD.mul_(1.5)  # by somebody else
    torch.testing.assert_close(distance(), passed_over())
    made.descend((made.sae.decode(made.sae.encode(White(x_BD))) - x_BD).square().mean(), Clock(step=2, total=10))  # type: ignore[arg-type]
    torch.testing.assert_close(distance(), passed_over())


@pytest.mark.slow
def test_a_list_that_is_cut_changes_nothing_and_the_next_is_longer() -> None:
    ops = fused.FusedOps(compute="float32")
    made, x_BD = learner(ops, SHAPES[1])
    made.descend(loss_of(made.sae, x_BD), Clock(step=0, total=10))  # type: ignore[arg-type]
    before = {name: p.detach().clone() for name, p in made.sae.named_parameters()}
    steps = {name: float(made.optimizer.state[p]["step"]) for name, p in made.sae.named_parameters()}  # type: ignore[index]
    ops._capacity.row.limit = 1
    code = made.sae.encode(White(x_BD))
    assert bool(code.overflow)
    loss = (made.sae.decode(code) - x_BD).square().mean()
    made.descend(loss, Clock(step=1, total=10))  # type: ignore[arg-type]
    for name, p in made.sae.named_parameters():
        assert torch.equal(before[name], p), name
        assert steps[name] == float(made.optimizer.state[p]["step"]), name  # type: ignore[index]
    for _ in range(capacity.LAG + 2):
        last = made.sae.encode(White(x_BD))
        ops.settle()
    assert not bool(last.overflow)


def test_what_a_code_counts_along_is_what_fired() -> None:
    ops = fused.FusedOps(compute="float32")
    sae, x_BD = built(ops, SHAPES[1], 3, torch.float32)
    ops._capacity.take_note(10, 90)
    sae.activator.log_threshold_F.data.fill_(math.log(2.5))  # type: ignore[attr-defined]
    code = sae.encode(White(x_BD))
    assert code.counted_F is not None
    assert not bool(code.overflow)
    fired_F = reference.encode(White(x_BD), sae).fired_F()
    assert fired_F.any()
    assert torch.equal(code.fired_F(), fired_F)


def test_outside_training_no_list_is_cut() -> None:
    ops = fused.FusedOps(compute="float32")
    sae, x_BD = built(ops, SHAPES[1], 3, torch.float32)
    ops._capacity.row.limit = 1
    with torch.no_grad():
        code = sae.encode(White(x_BD))
        oracle = reference.encode(White(x_BD), sae)
    assert not bool(code.overflow)
    torch.testing.assert_close(code.dense(), oracle.dense())


def test_lists_that_would_be_long_give_way_to_a_dense_code() -> None:
    ops = fused.FusedOps(compute="float32")
    sae, x_BD = built(ops, SHAPES[1], 3, torch.float32)
    sae.activator.log_threshold_F.data.fill_(-9.0)  # type: ignore[attr-defined]
    assert sae.encode(White(x_BD)).index_BK is None


def test_low_precision_copies_follow_whoever_writes() -> None:
    ops = fused.FusedOps(compute="bfloat16")
    weight = torch.nn.Parameter(torch.randn(4, 3))
    first = ops._low("W_enc_FD", weight)
    assert ops._low("W_enc_FD", weight) is first
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(ops._low("W_enc_FD", weight), weight.detach().bfloat16())


def test_turning_lists_over_is_a_transpose() -> None:
    width = 11
    draw = torch.Generator().manual_seed(2)
    features, rows, values, parts = [], [], [], []
    for first, n in ((0, 3), (3, 5)):
        count_B = torch.randint(0, 5, (n,), generator=draw).to(DEVICE, torch.int32)
        index_BK = torch.randint(0, width, (n, 4), generator=draw).to(DEVICE)
        listed_BK = torch.arange(4, device=DEVICE) < count_B[:, None]
        parts.append(
            lists.Lists(
                index_BK=torch.where(listed_BK, index_BK, width),
                pre_BK=torch.rand((n, 4), generator=draw).to(DEVICE),
                count_B=count_B,
                total=int(count_B.sum()) + 2,  # with room to spare
            )
        )
        features.append(index_BK[listed_BK])
        rows.append((first + torch.arange(n, device=DEVICE))[:, None].expand(n, 4)[listed_BK])
        values.append(parts[-1].pre_BK[listed_BK])
    by = lists.turn_over(parts, width)
    feature_N, row_N, value_N = (torch.cat(part) for part in (features, rows, values))
    taken_N = by.take(torch.cat([part.pre_BK.reshape(-1) for part in parts]))
    for f in range(width):
        begin, end = int(by.starts_F1[f]), int(by.starts_F1[f + 1])
        assert torch.equal(by.row_N[begin:end].long(), row_N[feature_N == f])
        assert torch.equal(taken_N[begin:end], value_N[feature_N == f])
    counts_F = torch.bincount(feature_N, minlength=width)
    assert torch.equal(counts_F[by.order_F.long()], counts_F.sort(descending=True).values)


def test_lists_that_hold_more_than_their_total_overflow() -> None:
    ops = fused.FusedOps(compute="float32")
    made, x_BD = learner(ops, SHAPES[1])
    made.sae.activator.log_threshold_F.data.fill_(math.log(2.5))  # type: ignore[attr-defined]
    ops._capacity.take_note(10, 90)
    assert not bool(made.sae.encode(White(x_BD)).overflow)
    ops._capacity.total.limit = 3
    code = made.sae.encode(White(x_BD))
    assert bool(code.overflow)
    before = made.sae.W_dec_FD.detach().clone()
    made.descend((made.sae.decode(code) - x_BD).square().mean(), Clock(step=0, total=10))  # type: ignore[arg-type]
    assert torch.equal(made.sae.W_dec_FD, before)


@pytest.mark.parametrize("frozen", ["W_enc_FD", "W_dec_FD"])
def test_a_matrix_that_is_held_is_left_to_the_optimizer(frozen: str) -> None:
    made, x_BD = learner(fused.FusedOps(compute="float32"), (3, 4, 40))
    getattr(made.sae, frozen).requires_grad_(False)
    before = getattr(made.sae, frozen).clone()
    made.descend((made.sae.decode(made.sae.encode(White(x_BD))) - x_BD).square().mean(), Clock(step=0, total=10))  # type: ignore[arg-type]
    torch.testing.assert_close(getattr(made.sae, frozen), before, rtol=0, atol=1e-6)  # rows are projected all the same


@pytest.mark.slow
def test_moments_in_bfloat16_are_right_on_average() -> None:
    """With an unchanging gradient the moments are known; rounded to nearest, the second would stop at a tenth of it."""
    made, _ = learner(fused.FusedOps(compute="float32", moments=torch.bfloat16), (3, 8, 24), betas=(0.9, 0.99))
    exact, _ = learner(fused.FusedOps(compute="float32"), (3, 8, 24), betas=(0.9, 0.99))
    weight_FD = torch.linspace(-1, 1, made.sae.W_dec_FD.numel(), device=DEVICE).reshape(made.sae.W_dec_FD.shape)
    for step in range(8):
        for one in (made, exact):
            one.descend((one.sae.W_dec_FD * weight_FD).sum(), Clock(step=step, total=100))  # type: ignore[arg-type]
    for key, tolerance in (("exp_avg", 1e-3), ("exp_avg_sq", 5e-3)):
        short, full = (one.optimizer.state[one.sae.W_dec_FD][key] for one in (made, exact))
        assert short.dtype == torch.bfloat16
        assert full.dtype == torch.float32
        ratio_FD = short.double() / full.double().where(full != 0, torch.ones_like(full, dtype=torch.float64))
        assert abs(float(ratio_FD[full != 0].mean()) - 1) < tolerance
        assert float((ratio_FD[full != 0] - 1).abs().quantile(0.95)) < 0.02
    rows = made.sae.rows["b"]
    torch.testing.assert_close(made.sae.W_dec_FD[rows], exact.sae.W_dec_FD[rows], rtol=0, atol=5e-3)


def test_moments_are_read_back_in_either_precision() -> None:
    made, x_BD = learner(fused.FusedOps(compute="float32", moments=torch.bfloat16), (3, 4, 40))
    made.descend(loss_of(made.sae, x_BD), Clock(step=0, total=10))  # type: ignore[arg-type]
    other, _ = learner(fused.FusedOps(compute="float32"), (3, 4, 40))
    other.load_state_dict(made.state_dict())
    saved = made.optimizer.state[made.sae.W_dec_FD]["exp_avg_sq"]
    read = other.optimizer.state[other.sae.W_dec_FD]["exp_avg_sq"]
    assert read.dtype == torch.float32
    assert torch.equal(read, saved.float())
