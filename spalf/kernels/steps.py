"""Adam's step of the two matrices on the GPU, a program per row. Written as `device` is; `update` calls it."""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

FLOOR_BITS = tl.constexpr(113 << 23)
"""2^-14 as the bits of a float32: what codes of 8 bits add before they round, see `moments`."""


@triton.jit
def _gradient(begin, end, row, scales, sources, dim, at, inside, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """(sum of scale[n] source[row[n]] over all terms, sum of the first scale), over entries from `begin` to `end`."""
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    weight = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for n in range(begin, end, BLOCK_N):
        i = n + tl.arange(0, BLOCK_N)
        b = tl.load(row + i, mask=i < end, other=0).to(tl.int64)
        for term in tl.static_range(len(scales)):
            a = tl.load(scales[term] + i, mask=i < end, other=0.0)
            wanted = (a != 0.0)[:, None] & inside[None, :]
            x = tl.load(sources[term] + b[:, None] * dim + at[None, :], mask=wanted, other=0.0).to(tl.float32)
            total += tl.sum(a[:, None] * x, axis=0)
            if term == 0:
                weight += a
    return total, tl.sum(weight, axis=0)


@triton.jit
def _scattered(at, salt):
    """Well mixed uint32 from an index and a step; a number per entry and step, the same in every run."""
    h = (at.to(tl.uint32) ^ salt.to(tl.uint32)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def _rounded(x, bits):
    """float32 to bfloat16, up or down at random so that the mean is x: what is below half a step is not lost."""
    up = x.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)
    return (up & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _power(x):
    """The power of 2 at or below the largest magnitude of a row, as bits."""
    return tl.max(tl.abs(x), axis=0).to(tl.uint32, bitcast=True) & 0x7F800000


@triton.jit
def _coded(x, power, bits, MANTISSA: tl.constexpr):
    """Magnitudes of a row as codes, up or down at random so that the mean is right; the inverse of `_decoded`."""
    unit = (0x7F000000 - power).to(tl.float32, bitcast=True)
    shifted = tl.abs(x) * unit + tl.full((), FLOOR_BITS, tl.uint32).to(tl.float32, bitcast=True)
    # 16 random bits below the last that is kept, and the middle of what is below them.
    random = ((bits & 0xFFFF) << (7 - MANTISSA)) + (1 << (6 - MANTISSA))
    return ((shifted.to(tl.uint32, bitcast=True) + random - FLOOR_BITS) >> (23 - MANTISSA)).to(tl.int32)


@triton.jit
def _decoded(code, scale, MANTISSA: tl.constexpr):
    """(float32 of bits code 2^(23 - MANTISSA) + FLOOR_BITS, less 2^-14) times the row's power of 2; odd in the code."""
    size = (tl.abs(code) << (23 - MANTISSA)) + FLOOR_BITS
    size = (size.to(tl.float32, bitcast=True) - tl.full((), FLOOR_BITS, tl.uint32).to(tl.float32, bitcast=True)) * scale
    return tl.where(code < 0, -size, size)


@triton.jit
def _load_moments(moment1, moment2, scale1, scale2, f, here, mask, BYTES: tl.constexpr):
    """Both moments of row f, float32."""
    m = tl.load(moment1 + here, mask=mask, other=0, eviction_policy="evict_first")
    v = tl.load(moment2 + here, mask=mask, other=0, eviction_policy="evict_first")
    if BYTES == 1:
        m = _decoded(m.to(tl.int32), tl.load(scale1 + f), 3)
        v = _decoded(v.to(tl.int32), tl.load(scale2 + f), 4)
    return m.to(tl.float32), v.to(tl.float32)


@triton.jit
def _store_moments(m, v, moment1, moment2, scale1, scale2, f, here, mask, t, BYTES: tl.constexpr):
    """Both moments of row f; what is shorter than float32 is rounded at random."""
    if BYTES < 4:
        bits = _scattered(here, _scattered(t.to(tl.int32), tl.full((), 0x68E31DA4, tl.uint32)))
    if BYTES == 1:
        power1, power2 = _power(m), _power(v)
        tl.store(scale1 + f, power1.to(tl.float32, bitcast=True))
        tl.store(scale2 + f, power2.to(tl.float32, bitcast=True))
        code = _coded(m, power1, bits, 3)
        m = tl.where(m < 0, -code, code).to(tl.int8)
        # Never 0: a mean of squares that is lost would make the next step as large as 1 / eps.
        v = tl.maximum(_coded(v, power2, bits >> 16, 4), 1).to(tl.uint8)
    if BYTES == 2:
        m, v = _rounded(m, bits), _rounded(v, bits >> 16)
    tl.store(moment1 + here, m, mask=mask, eviction_policy="evict_first")
    tl.store(moment2 + here, v, mask=mask, eviction_policy="evict_first")


@triton.jit
def count_step(step, skip, rate, out, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr):
    """step += 1 where `skip` is 0; out: rate, beta1, beta2, eps, 1 - beta1^t, sqrt(1 - beta2^t), t."""
    t = tl.load(step) + (1.0 - tl.load(skip))
    tl.store(step, t)
    tl.store(out, tl.load(rate).to(tl.float32))
    tl.store(out + 1, BETA1)
    tl.store(out + 2, BETA2)
    tl.store(out + 3, EPS)
    # In float64, for 1 - beta2^t is small at first. In place of a beta of 0 stands one whose powers are 0.
    t64 = t.to(tl.float64)
    left1 = tl.exp(t64 * tl.log(tl.full((), BETA1 if BETA1 > 0 else 1e-300, tl.float64)))
    left2 = tl.exp(t64 * tl.log(tl.full((), BETA2 if BETA2 > 0 else 1e-300, tl.float64)))
    tl.store(out + 4, (1.0 - left1).to(tl.float32))
    tl.store(out + 5, tl.sqrt(1.0 - left2).to(tl.float32))
    tl.store(out + 6, t.to(tl.float32))


# fmt: off
@triton.jit
def update_rows(
    order, starts, row, scales, sources, weight, moment1, moment2, scale1, scale2, low, more, sums, sphere,
    target, strength, away, first, last, hyper, skip, dim,
    MORE: tl.constexpr, LOW: tl.constexpr, BYTES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    # fmt: on
    """One feature's row of one matrix: gradient, its projection, Adam, norm and low-precision copy, in one pass.

    The gradient is the sum of scale[n] source[row[n]] over the feature's entries and all terms, of which `scales` and
    `sources` are tuples; no gradient matrix exists. `more` is added to it, and rows first to last are pulled to
    `target`: strength (row - target); `away` takes the squared distance that is left. `sphere` names the rows that are
    kept at unit norm, `sums` takes each feature's sum of the first scale. Moments have `BYTES` bytes each, those of one
    byte a scale per row. `hyper`: rate, beta1, beta2, eps, 1 - beta1^t, sqrt(1 - beta2^t), t. Nothing is written where
    `skip` is not 0.

    What is read and written once goes first from the cache, so that the rows of `sources`, read many times, stay. A
    thread takes at most WIDE short numbers that are neighbours, and as many weights.
    """
    if tl.load(skip) == 0:
        f = tl.load(order + tl.program_id(0)).to(tl.int64)
        at = tl.arange(0, BLOCK_D)
        inside = at < dim
        here = f * dim + at
        wide = tl.max_contiguous(at, WIDE)
        there = f * dim + wide
        # Asked for first: they arrive while the entries are followed, one load after the other, to their rows.
        w = tl.load(weight + here, mask=inside, other=0.0, eviction_policy="evict_first")
        m, v = _load_moments(moment1, moment2, scale1, scale2, f, there, inside, BYTES)
        begin, end = tl.load(starts + f), tl.load(starts + f + 1)
        g, total = _gradient(begin, end, row, scales, sources, dim, wide, inside, BLOCK_N, BLOCK_D)
        tl.store(sums + f, total)
        if MORE:
            g += tl.load(more + here, mask=inside, other=0.0)
        near = (f >= first) & (f < last)
        if near:
            t = tl.load(target + (f - first) * dim + at, mask=inside, other=0.0).to(tl.float32)
            g += tl.load(strength) * (w - t)
        on_sphere = tl.load(sphere + f) != 0
        if on_sphere:
            # g <- g - w (w'g) / (w'w)
            g -= w * (tl.sum(w * g, axis=0) / tl.maximum(tl.sum(w * w, axis=0), 1.1754944e-38))
        m = m + (g - m) * (1.0 - tl.load(hyper + 1))
        v = tl.load(hyper + 2) * v + (1.0 - tl.load(hyper + 2)) * g * g
        _store_moments(m, v, moment1, moment2, scale1, scale2, f, there, inside, tl.load(hyper + 6), BYTES)
        rate = tl.load(hyper) / tl.load(hyper + 4)
        w = w - rate * m / (tl.sqrt(v) / tl.load(hyper + 5) + tl.load(hyper + 3))
        if on_sphere:
            w = w / tl.maximum(tl.sqrt(tl.sum(w * w, axis=0)), 1.1754944e-38)
        tl.store(weight + here, w, mask=inside, eviction_policy="evict_first")
        if LOW:
            tl.store(low + here, w.to(tl.bfloat16), mask=inside, eviction_policy="evict_first")
        if near:
            t = tl.load(target + (f - first) * dim + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(away + f - first, tl.sum((w - t) * (w - t), axis=0))


@triton.jit
def square_distances(weight, target, away, first, dim, BLOCK_D: tl.constexpr):
    """away[a] = ||weight[first + a] - target[a]||^2, the same bits as `update_rows` leaves there."""
    a = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK_D)
    inside = at < dim
    w = tl.load(weight + (first + a) * dim + at, mask=inside, other=0.0)
    t = tl.load(target + a * dim + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(away + a, tl.sum((w - t) * (w - t), axis=0))
