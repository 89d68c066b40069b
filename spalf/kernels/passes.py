"""Small passes on the GPU: over all of [B, D] at the speed of memory, and over the parameters that are vectors.

Written as `device` is. Torch's own kernels for these broadcast a scalar that lies on the device, without vector loads,
and its fused Adam gives one block of threads 65,536 elements.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from spalf.kernels.steps import count_step


@triton.jit
def scale(v, by, out, total, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    """out = FACTOR by v for a scalar `by` on the device."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    tl.store(out + at, tl.load(v + at, mask=inside, other=0.0) * (FACTOR * tl.load(by)), mask=inside)


@triton.jit
def affine(v, gain, shift, out, rows, dim, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    """out = gain v + shift, gain a scalar on the device and shift a row."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    at = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (b < rows)[:, None] & (at < dim)[None, :]
    here = b.to(tl.int64)[:, None] * dim + at[None, :]
    add = tl.load(shift + at, mask=at < dim, other=0.0)
    tl.store(out + here, add[None, :] + tl.load(gain) * tl.load(v + here, mask=inside, other=0.0), mask=inside)


@triton.jit
def residual(x, v, gain, shift, out, rows, dim, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    """out = x - gain v - shift, in the type of `out`."""
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    at = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (b < rows)[:, None] & (at < dim)[None, :]
    here = b.to(tl.int64)[:, None] * dim + at[None, :]
    left = tl.load(x + here, mask=inside, other=0.0) - tl.load(shift + at, mask=at < dim, other=0.0)[None, :]
    left -= tl.load(gain) * tl.load(v + here, mask=inside, other=0.0)
    tl.store(out + here, left.to(out.dtype.element_ty), mask=inside)


@triton.jit
def affine_back(
    grad, v, gain, to_v, sums, dots, rows, dim,
    ROWS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of `affine` in one pass: to_v = gain grad, and over ROWS rows and a slice of columns, for `fold`,
    the sum of each column of `grad` and of grad v."""
    at = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    times = tl.load(gain)
    column = tl.zeros((BLOCK_B, BLOCK_D), dtype=tl.float32)
    dot = tl.zeros((BLOCK_B, BLOCK_D), dtype=tl.float32)
    for start in range(0, ROWS, BLOCK_B):
        b = tl.program_id(0) * ROWS + start + tl.arange(0, BLOCK_B)
        inside = (b < rows)[:, None] & (at < dim)[None, :]
        here = b.to(tl.int64)[:, None] * dim + at[None, :]
        g = tl.load(grad + here, mask=inside, other=0.0)
        x = tl.load(v + here, mask=inside, other=0.0)
        tl.store(to_v + here, g * times, mask=inside)
        column += g
        dot += g * x
    tl.store(sums + tl.program_id(0).to(tl.int64) * dim + at, tl.sum(column, axis=0), mask=at < dim)
    part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(dots + part, tl.sum(tl.sum(dot, axis=0), axis=0))


@triton.jit
def fold(sums, dots, to_shift, to_gain, parts, products, dim, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sum of what `affine_back` left, in one order: `parts` rows of column sums, `products` dots."""
    at = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < parts)[:, None] & (at < dim)[None, :]
        total += tl.load(sums + p.to(tl.int64)[:, None] * dim + at[None, :], mask=inside, other=0.0)
    tl.store(to_shift + at, tl.sum(total, axis=0), mask=at < dim)
    if tl.program_id(0) == 0:
        dot = tl.zeros((BLOCK_P * BLOCK_D,), dtype=tl.float32)
        for start in range(0, products, BLOCK_P * BLOCK_D):
            n = start + tl.arange(0, BLOCK_P * BLOCK_D)
            dot += tl.load(dots + n, mask=n < products, other=0.0)
        tl.store(to_gain, tl.sum(dot, axis=0))


@triton.jit
def cosines(gram, on, out, force, samples, size, BLOCK_S: tl.constexpr):
    """Of each Gram matrix [S, S], a program each: the mean squared cosine of its pairs that are on, how many such means
    there are (0 or 1), and the gradient of the mean at the matrix.

    With u = on / G_ii it is the mean over i != j of P_ij = G_ij^2 u_i u_j, whose gradient at G_ij is 2 G_ij u_i u_j and
    at G_ii -2 u_i sum_j P_ij, over the number of pairs.
    """
    r = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_S)
    inside = at < size
    here = r * size * size + at[:, None] * size + at[None, :]
    both = inside[:, None] & inside[None, :]
    is_on = (tl.load(on + r * size + at, mask=inside, other=0) != 0).to(tl.float32)
    square = tl.load(gram + r * size * size + at * (size + 1), mask=inside, other=1.0)
    u = is_on / tl.maximum(tl.where(is_on > 0, square, 1.0), 1e-24)
    g = tl.load(gram + here, mask=both & (at[:, None] != at[None, :]), other=0.0)
    k = tl.sum(is_on, axis=0)
    share = 1.0 / tl.maximum(k * (k - 1.0), 1.0)
    slope = g * u[:, None] * u[None, :]
    sum_of = tl.sum(g * slope, axis=1)
    tl.store(out + r, tl.sum(sum_of, axis=0) * share)
    tl.store(out + samples + r, (k > 1.0).to(tl.float32))
    down = tl.where(at[:, None] == at[None, :], (u * sum_of)[:, None], 0.0)
    tl.store(force + here, 2.0 * share * (slope - down), mask=both)


@triton.jit
def _entry(index, gate, k, here, capacity, first, last):
    """(feature, whether it is on and of [first, last)) of entries `k` of a row."""
    inside = k < capacity
    f = tl.load(index + here + k, mask=inside, other=0)
    on = inside & (tl.load(gate + here + k, mask=inside, other=0.0) > 0) & (f >= first) & (f < last)
    return f, on


@triton.jit
def pick(
    index, gate, sample, key, index_out, listed_out, on_out, one_out, capacity, keep, width, first, last,
    KEYED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of each sampled row, a program each, the entries that are on and of features [first, last): the `keep` with the
    largest keys, by falling key; the first ones, in order, without KEYED.

    Out of [R, keep]: the feature (0 where nothing is left), the same with the width there, and 1 or 0 twice.
    """
    r = tl.program_id(0).to(tl.int64)
    here = tl.load(sample + r) * capacity
    k = tl.arange(0, BLOCK_K)
    f, on = _entry(index, gate, k, here, capacity, first, last)
    rank = tl.zeros([BLOCK_K], dtype=tl.int32)
    # Padding lies behind all entries: most of a list is that.
    for start in range(0, tl.sum(((k < capacity) & (f < width)).to(tl.int32), axis=0), CHUNK):
        j = start + tl.arange(0, CHUNK)
        _, other_on = _entry(index, gate, j, here, capacity, first, last)
        is_before = j[None, :] < k[:, None]
        if KEYED:  # without, `key` may be shorter than what would be read
            mine = tl.load(key + r * capacity + k, mask=k < capacity, other=0.0)
            other = tl.load(key + r * capacity + j, mask=j < capacity, other=0.0)
            tied = (other[None, :] == mine[:, None]) & is_before
            is_before = (other[None, :] > mine[:, None]) | tied
        rank += tl.sum((is_before & other_on[None, :]).to(tl.int32), axis=1)
    kept, to = on & (rank < keep), r * keep + rank
    tl.store(index_out + to, f, mask=kept)
    tl.store(listed_out + to, f, mask=kept)
    tl.store(on_out + to, kept.to(tl.int32), mask=kept)
    tl.store(one_out + to, kept.to(tl.float32), mask=kept)
    s = tl.arange(0, BLOCK_S)
    empty, nothing = (s < keep) & (s >= tl.sum(on.to(tl.int32), axis=0)), tl.zeros([BLOCK_S], dtype=tl.int32)
    tl.store(index_out + r * keep + s, nothing.to(tl.int64), mask=empty)
    tl.store(listed_out + r * keep + s, (nothing + width).to(tl.int64), mask=empty)
    tl.store(on_out + r * keep + s, nothing, mask=empty)
    tl.store(one_out + r * keep + s, nothing.to(tl.float32), mask=empty)


@triton.jit
def count_steps(steps, rates, skip, hyper, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr):
    """`count_step` for a tuple of parameters, a program each; `hyper` takes 7 numbers a parameter."""
    for i in tl.static_range(len(steps)):
        if tl.program_id(0) == i:
            count_step(steps[i], skip, rates[i], hyper + 7 * i, BETA1, BETA2, EPS)


@triton.jit
def adam_vectors(
    weights, grads, moments1, moments2, sizes, hyper, skip,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One Adam step of a tuple of parameters, which `hyper` describes one after the other; none where `skip` is not 0.

    The second axis of the grid is the parameter. The constants are the compiler's, so that 1 - beta is rounded once.
    """
    if tl.load(skip) == 0:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        for i in tl.static_range(len(weights)):
            if tl.program_id(1) == i:
                inside = at < sizes[i]
                w = tl.load(weights[i] + at, mask=inside, other=0.0)
                g = tl.load(grads[i] + at, mask=inside, other=0.0)
                m = tl.load(moments1[i] + at, mask=inside, other=0.0)
                v = tl.load(moments2[i] + at, mask=inside, other=0.0)
                # Whichever way the smaller number is added: with a beta of 0 the mean is g itself.
                m = g - (g - m) * BETA1 if BETA1 < 0.5 else m + (g - m) * (1.0 - BETA1)
                v = BETA2 * v + (1.0 - BETA2) * g * g
                rate = tl.load(hyper + 7 * i) / tl.load(hyper + 7 * i + 4)
                w -= rate * m / (tl.sqrt(v) / tl.load(hyper + 7 * i + 5) + EPS)
                tl.store(weights[i] + at, w, mask=inside)
                tl.store(moments1[i] + at, m, mask=inside)
                tl.store(moments2[i] + at, v, mask=inside)
