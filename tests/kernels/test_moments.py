"""Moments in 8 bits: the code, its random rounding in the kernel, and that a state goes on bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spalf.core.state import Learner
from spalf.core.values import Clock, Machine
from spalf.nn import StratifiedAutoencoder
from spalf.parts.activation.jumprelu import JumpReLU
from spalf.parts.kernel import Triton
from spalf.parts.optimizer.adam import Adam, OneCall
from spalf.parts.stratum import Anchored, Free
from spalf.testing import example, toy_plan
from spalf.testing.whole import started

fused = pytest.importorskip("spalf.kernels.fused", reason="triton is not installed")
moments = pytest.importorskip("spalf.kernels.moments")
steps = pytest.importorskip("spalf.kernels.steps")
update = pytest.importorskip("spalf.kernels.update")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = {torch.int8: 3, torch.uint8: 4}
RATE, BETA1, BETA2, EPS = 1e-2, 0.9, 0.999, 1e-8


class Rows:
    """A matrix whose rows take Adam steps in the kernel, by given gradients; moments in 8 bits."""

    def __init__(self, weight_FD: Tensor) -> None:
        self.weight_FD = weight_FD.clone().to(DEVICE)
        self.mean = moments.Coded.zeros(self.weight_FD, torch.int8)
        self.square = moments.Coded.zeros(self.weight_FD, torch.uint8)
        self.done = 0

    def step(self, grad_FD: Tensor, betas: tuple[float, float] = (BETA1, BETA2)) -> None:
        self.done += 1
        (width, dim), (beta1, beta2) = grad_FD.shape, betas
        left = (1 - beta1**self.done, (1 - beta2**self.done) ** 0.5)
        hyper = torch.tensor([RATE, beta1, beta2, EPS, *left, self.done], device=DEVICE)
        every, zero = torch.arange(width + 1, dtype=torch.int32, device=DEVICE), torch.zeros((), device=DEVICE)
        ones_F, free_F = torch.ones(width, device=DEVICE), torch.zeros(width, dtype=torch.int8, device=DEVICE)
        steps.update_rows[(width,)](
            every, every, every, (ones_F,), (grad_FD.to(DEVICE),), self.weight_FD,
            self.mean.code_FD, self.square.code_FD, self.mean.scale_F, self.square.scale_F,
            self.weight_FD, self.weight_FD, torch.zeros_like(ones_F), free_F, self.weight_FD, zero, zero, 0, 0,
            hyper, zero, dim, MORE=False, LOW=False, BYTES=1, BLOCK_N=1, WIDE=update.WIDE, **update.row_block(dim),
        )  # fmt: skip


def adam(weight_FD: Tensor, grads: list[Tensor]) -> Tensor:
    """The same in float64."""
    w, m, v = weight_FD.double(), torch.zeros(()).double(), torch.zeros(()).double()
    for t, g in enumerate(grads, 1):
        m, v = BETA1 * m + (1 - BETA1) * g.double(), BETA2 * v + (1 - BETA2) * g.double() ** 2
        w = w - RATE * m / (1 - BETA1**t) / ((v / (1 - BETA2**t)).sqrt() + EPS)
    return w


# ---------------------------------------------------------------------------------------------------------------- code
@pytest.mark.parametrize("dtype", KINDS)
def test_the_nearest_code_is_near(dtype: torch.dtype) -> None:
    """To half a step of its binade over 14 octaves, and below that to half the last one's."""
    x_FD = torch.randn(20, 50, generator=torch.Generator().manual_seed(1)) * 10.0 ** -torch.linspace(0, 8, 50)
    x_FD = x_FD * 10.0 ** torch.linspace(-15, 15, 20)[:, None]
    x_FD = x_FD.abs() if dtype == torch.uint8 else x_FD
    made = moments.Coded.of(x_FD, dtype)
    allowed_FD = 2.0 ** -(1 + KINDS[dtype]) * (x_FD.abs() + 2.0**-14 * made.scale_F[:, None])
    if dtype == torch.uint8:
        allowed_FD += 2.0**-18 * made.scale_F[:, None]  # what is no mean of nothing is not kept as 0
        assert bool((made.code_FD > 0).all())
    assert bool(((made.unpacked() - x_FD).abs() <= allowed_FD).all())


@given(data=st.data(), dtype=st.sampled_from([*KINDS]), power=st.integers(-120, 120))
def test_every_row_that_the_kernel_leaves_comes_back(data: st.DataObject, dtype: torch.dtype, power: int) -> None:
    """Its largest code stands for 1 - 2^-14 to 2 and a step above it, in units of the row's power of 2."""
    one = 14 << KINDS[dtype]
    largest = data.draw(st.integers(one, one + (1 << KINDS[dtype]) + 1))
    others = data.draw(st.lists(st.integers(0, largest), min_size=3, max_size=3))
    code_FD = torch.tensor([[largest, *others]]).to(dtype)
    if dtype == torch.int8:
        code_FD *= torch.tensor([[-1, 1, -1, 1]], dtype=torch.int8)
    held = moments.Coded(code_FD, torch.tensor([2.0**power]))
    again = moments.Coded.of(held.unpacked(), dtype)
    assert torch.equal(again.unpacked(), held.unpacked())
    if 0 not in others:
        assert torch.equal(again.code_FD, code_FD)


@pytest.mark.parametrize("dtype", KINDS)
def test_nothing_is_kept_as_nothing(dtype: torch.dtype) -> None:
    made = moments.Coded.of(torch.zeros(3, 4), dtype)
    assert not bool(made.unpacked().any())
    rest = moments.Coded.of(torch.ones(3, 4), dtype)
    rest.clear_(torch.tensor([1]))
    assert rest.unpacked().bool().tolist() == [[True] * 4, [False] * 4, [True] * 4]


def test_large_matrices_are_turned_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x_FD = torch.randn(9, 5)
    whole = moments.Coded.of(x_FD, torch.int8)
    monkeypatch.setattr(moments, "_AT_ONCE", 11)
    parts = moments.Coded.of(x_FD, torch.int8)
    assert torch.equal(parts.code_FD, whole.code_FD)
    assert torch.equal(parts.unpacked(), whole.unpacked())


# -------------------------------------------------------------------------------------------------------------- kernel
def test_rounding_is_right_on_average() -> None:
    """After one step both moments are known; each number is one of its two neighbours, and their mean is the moment."""
    dim, shares = 2048, torch.tensor([1.0, 0.77, 0.03, 0.004, 2e-5, 0.0])
    grad_FD = shares[:, None].expand(-1, dim).clone()
    grad_FD[:, 0] = 1.3
    rows = Rows(torch.zeros_like(grad_FD))
    rows.step(grad_FD)
    found = {"mean": (rows.mean, (1 - BETA1) * grad_FD), "square": (rows.square, (1 - BETA2) * grad_FD**2)}
    for name, (kept, exact_FD) in found.items():
        got_FD = kept.unpacked().cpu()
        mantissa = KINDS[kept.code_FD.dtype]
        scale_F1 = kept.scale_F.cpu()[:, None]
        gap_FD = 2.0**-mantissa * (exact_FD + 2.0**-14 * scale_F1)
        lowest = 2.0**-18 if name == "square" else 0.0
        above = exact_FD > lowest * scale_F1
        assert bool(((got_FD - exact_FD).abs() <= torch.where(above, gap_FD, lowest * scale_F1)).all()), name
        off_F = (got_FD - exact_FD)[:, 1:].mean(1).abs()
        assert bool((off_F < 5 * gap_FD[:, 1] / dim**0.5)[above[:, 1]].all()), name


@pytest.mark.slow
def test_steps_follow_adam_in_float64() -> None:
    """Of gradients whose coordinates differ a thousandfold in size: to a sixth of the way that each row goes."""
    width, dim, draw = 5, 64, torch.Generator().manual_seed(4)
    weight_FD = torch.randn(width, dim, generator=draw)
    size_D = 10.0 ** (-3 * torch.rand(dim, generator=draw))
    grads = [size_D * (torch.randn(width, dim, generator=draw) + 0.5) for _ in range(12)]
    for g in grads:
        g[1] = 0.0
        g[2, 5] *= 1e6
    rows = Rows(weight_FD)
    for g in grads:
        rows.step(g)
    found_FD, wanted_FD = rows.weight_FD.cpu().double(), adam(weight_FD, grads)
    assert torch.equal(found_FD[1], weight_FD[1].double()), "a row of zeros moves"
    way_F = (wanted_FD - weight_FD).norm(dim=1)
    error_F = (found_FD - wanted_FD).norm(dim=1) / way_F.clamp(min=1e-9)
    plain = torch.tensor([0, 3, 4])
    assert bool((error_F[plain] < 1 / 6).all()), error_F
    # Beside an outlier the others' squares are lost; they then stand still, and none of them runs away.
    assert float((found_FD - weight_FD)[2].abs().max()) < 1.1 * RATE * len(grads)
    assert float((found_FD - wanted_FD)[2, 5].abs()) < 0.1 * way_F[2]


@pytest.mark.slow
def test_what_is_below_a_step_adds_up() -> None:
    """A square's mean moves by a thousandth of what it is; to the nearest code it would never move."""
    rows = Rows(torch.zeros(2, 256))
    rows.step(torch.ones(2, 256))
    before = rows.square.unpacked().mean()
    for _ in range(30):
        rows.step(torch.zeros(2, 256))
    ratio = float(rows.square.unpacked().mean() / before)
    assert ratio == pytest.approx(BETA2**30, rel=0.01)


@pytest.mark.slow
def test_squares_wander_by_a_sixth() -> None:
    """As random rounding adds up over a memory of a thousand steps, whatever the coordinate's size."""
    draw, size_FD = torch.Generator().manual_seed(2), (10.0 ** -torch.linspace(0, 2, 512))[None]
    rows, exact_FD = Rows(torch.zeros_like(size_FD)), size_FD.double() ** 2
    rows.square = moments.Coded.of(exact_FD.to(DEVICE), torch.uint8)
    for _ in range(500):
        grad_FD = size_FD * torch.randn(size_FD.shape, generator=draw)
        rows.step(grad_FD)
        exact_FD = BETA2 * exact_FD + (1 - BETA2) * grad_FD.double() ** 2
    ratio_FD = rows.square.unpacked().cpu() / exact_FD
    assert 0.1 < float(ratio_FD.log().std()) < 0.2
    assert float(ratio_FD.mean()) == pytest.approx(1, abs=0.04)


@pytest.mark.slow
def test_a_regression_ends_where_float32_does() -> None:
    """Rows fitted to a noisy linear map, by minibatches: the loss lies among those of other noise in float32."""
    width, dim, total = 2, 32, 120

    def ended(seed: int, short: bool) -> float:
        truth_FD = torch.randn(width, dim, generator=torch.Generator().manual_seed(0))
        draw = torch.Generator().manual_seed(seed)
        size_D = 10.0 ** -torch.linspace(0, 2, dim)
        rows, full_FD = Rows(torch.zeros(width, dim)), torch.zeros(width, dim, requires_grad=True)
        rule = torch.optim.Adam([full_FD], lr=RATE)
        for _ in range(total):
            x_BD = size_D * torch.randn(64, dim, generator=draw)
            w_FD = rows.weight_FD.cpu() if short else full_FD.detach()
            error_BF = x_BD @ (w_FD - truth_FD).T + 0.1 * torch.randn(64, width, generator=draw)
            grad_FD = error_BF.T @ x_BD / 64
            if short:
                rows.step(grad_FD)
            else:
                full_FD.grad = grad_FD
                rule.step()
        w_FD = rows.weight_FD.cpu() if short else full_FD.detach()
        return float(((w_FD - truth_FD) * size_D).square().sum())

    full = [ended(seed, short=False) for seed in range(6)]
    spread = max(full) - min(full)
    for seed in range(2):
        assert abs(ended(seed, short=True) - full[seed]) < spread


def rounded(x_FD: Tensor, dtype: torch.dtype, draw: torch.Generator) -> Tensor:
    """What the kernel keeps of a moment, in torch: a test that trains has no time for the interpreter."""
    shift, least = 23 - KINDS[dtype], int(dtype == torch.uint8)
    scale_F = (x_FD.abs().amax(1).view(torch.int32) & 0x7F800000).view(torch.float32)
    shifted_FD = torch.where(scale_F[:, None] > 0, x_FD.abs() / scale_F[:, None], 0.0) + 2.0**-14
    random_FD = torch.randint(1 << shift, x_FD.shape, generator=draw, dtype=torch.int32)
    code_FD = ((shifted_FD.view(torch.int32) + random_FD - moments._FLOOR_BITS) >> shift).clamp(min=least)
    code_FD = torch.where(x_FD < 0, -code_FD, code_FD).to(dtype)
    return moments.Coded(code_FD, scale_F).unpacked()


@pytest.mark.slow
def test_a_dictionary_trained_in_8_bits_is_one_of_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Error and L0 on fresh rows after 100 steps lie nearer to float32's than those of other seeds do."""

    def ended(seed: int, short: bool) -> tuple[float, float]:
        plain, draw = OneCall.step, torch.Generator().manual_seed(9)

        def step(self: OneCall) -> None:
            plain(self)
            for parameter, kept in self.state.items():
                if short and parameter.ndim == 2:
                    kept["exp_avg"].copy_(rounded(kept["exp_avg"], torch.int8, draw))
                    kept["exp_avg_sq"].copy_(rounded(kept["exp_avg_sq"], torch.uint8, draw))

        with monkeypatch.context() as patch:
            patch.setattr(OneCall, "step", step)
            state = started(toy_plan(seed=str(seed)), steps=100)
        x_BD = state.stream.next(2048).x_BD
        with torch.no_grad():
            code = state.sae.encode(state.metric.white(x_BD))
            error_BD = state.metric.raw(state.sae.decode(code)) - x_BD
        return float(error_BD.square().mean() / x_BD.var(0).mean()), float(code.l0_B().mean())

    full = [ended(seed, short=False) for seed in (1, 2, 3)]
    short = [ended(seed, short=True) for seed in (1, 2, 3)]
    for of_full, of_short in zip(zip(*full, strict=True), zip(*short, strict=True), strict=True):
        spread = max(of_full) - min(of_full)
        assert abs(sum(of_short) - sum(of_full)) / 3 < spread / 4, (full, short)


# --------------------------------------------------------------------------------------------------------------- state
def learner(kept: torch.dtype, seed: int = 0) -> Learner:
    """Four features, whose two matrices are updated by the backend."""
    ops = fused.FusedOps(compute="float32", moments=kept)
    sae = StratifiedAutoencoder(8, {"a": 1, "b": 3}, JumpReLU().build(4), Machine(device=DEVICE, ops=ops))
    draw = torch.Generator(sae.W_enc_FD.device)
    torch.nn.init.normal_(sae.W_enc_FD, generator=draw.manual_seed(seed))
    torch.nn.init.normal_(sae.W_dec_FD, generator=draw.manual_seed(seed + 1))
    sae, rule = sae.to(DEVICE).train(), example(Adam, lr=RATE)
    optimizer = rule.build(sae.named_parameters())
    rates = tuple(group["lr"] for group in optimizer.param_groups)
    strata: Any = {"a": Anchored(), "b": Free()}
    return Learner(sae=sae, optimizer=optimizer, rule=rule, strata=strata, rates=rates)


def descend(one: Learner, first: int, count: int) -> None:
    """Steps whose gradients are a function of their number and of the weights."""
    for step in range(first, first + count):
        dec_FD, enc_FD = one.sae.W_dec_FD, one.sae.W_enc_FD
        size_FD = torch.linspace(-1, 1, dec_FD.numel(), device=DEVICE).reshape(dec_FD.shape)
        loss = ((size_FD + 0.1 * step) * dec_FD).sum() + 0.1 * (enc_FD - size_FD).pow(4).sum()
        one.descend(loss, Clock(step=step, total=100))


def leaves(one: Learner) -> dict[str, Tensor]:
    return {k: v for k, v in one.state_dict().items() if isinstance(v, Tensor)}


def test_a_state_goes_on_bit_for_bit() -> None:
    one, other = learner(torch.int8), learner(torch.int8, seed=5)
    descend(one, 0, 2)
    one.forget(torch.tensor([2], device=DEVICE))
    saved = one.state_dict()
    assert saved["optimizer.W_enc_FD.exp_avg"].dtype == torch.float32
    assert saved["optimizer.W_enc_FD.exp_avg_sq"].any()
    assert not saved["optimizer.W_enc_FD.exp_avg"][2].any()
    other.load_state_dict({k: v.clone() if isinstance(v, Tensor) else v for k, v in saved.items()})
    for each in (one, other):
        descend(each, 2, 1)
        kept = each.optimizer.state[each.sae.W_enc_FD]
        assert kept["exp_avg"].code_FD.dtype == torch.int8
        assert kept["exp_avg_sq"].code_FD.dtype == torch.uint8
    for name, value in leaves(one).items():
        assert torch.equal(value, leaves(other)[name]), name


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16])
def test_moments_move_between_types(to: torch.dtype) -> None:
    """There and back they are what they were, to the longer one's neighbour."""
    one = learner(torch.int8)
    descend(one, 0, 2)
    before = one.optimizer.state[one.sae.W_dec_FD]["exp_avg"].unpacked()
    _, mean, _ = moments.full(one, one.sae.W_dec_FD, to)
    assert mean.dtype == to
    torch.testing.assert_close(mean.float(), before, rtol=2.0**-8, atol=0)
    _, again, _ = moments.coded(one, one.sae.W_dec_FD)
    torch.testing.assert_close(again.unpacked(), before, rtol=2.0**-8, atol=2.0**-17 * float(before.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("kept", [torch.int8, torch.bfloat16])
def test_an_optimizer_s_own_step_finds_moments_of_its_own(kept: torch.dtype) -> None:
    """As where a matrix is held, which the backend leaves to the optimizer; then the backend goes on."""
    one, plain = learner(kept), learner(torch.float32)
    for each in (one, plain):
        descend(each, 0, 2)
        each.sae.W_enc_FD.requires_grad_(False)
        descend(each, 2, 1)
    assert one.optimizer.state[one.sae.W_dec_FD]["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(one.sae.W_dec_FD, plain.sae.W_dec_FD, rtol=0, atol=RATE / 4)
    one.sae.W_enc_FD.requires_grad_(True)
    descend(one, 3, 1)
    assert bool(one.sae.W_dec_FD.isfinite().all())


def test_the_option_says_how_moments_are_kept() -> None:
    ops: Any = Triton(compute="float32", moments="int8").ops(DEVICE)
    assert ops.moments == torch.int8
