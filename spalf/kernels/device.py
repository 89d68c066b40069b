"""What runs on the GPU: Triton kernels, one program per row or per feature. Typed wrappers are in the modules beside.

Written for triton 3.6 and later, and for its interpreter: no block pointers, no bfloat16 arithmetic (operands are
widened after the load). Lists are contiguous from the left of their row; `count` says how many entries a row lists.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def compact_columns(
    product, bias, reach, cut, index, value, count, columns, first, capacity, PARTS: tl.constexpr, PART: tl.constexpr
):
    """Append the entries of a block of columns that exceed `reach` to the list of each row; ascending, hence the same
    list in every run. `count` goes on beyond `capacity`, so that a list that was too short is known.

    `cut` is at or below reach - bias. A row is read whole and compared to it first, one bit for each part of it: no
    load waits for another. Most parts have nothing above it; only the others are looked at, and are in the cache.
    """
    row = tl.program_id(0).to(tl.int64)
    product += row * columns
    part = tl.arange(0, PARTS)
    at = part[:, None] * PART + tl.arange(0, PART)[None, :]
    p = tl.load(product + at, mask=at < columns, other=-float("inf"))
    near = p > tl.load(cut + first + at, mask=at < columns, other=float("inf"))
    found = tl.sum(tl.max(near.to(tl.int32), axis=1) << part, axis=0)
    if found != 0:
        base = tl.load(count + row)
        for i in range(PARTS):
            if (found >> i) & 1 != 0:
                at = i * PART + tl.arange(0, PART)
                inside = at < columns
                p = tl.load(product + at, mask=inside, other=-float("inf"))
                p += tl.load(bias + first + at, mask=inside, other=0.0)
                keep = (p > tl.load(reach + first + at, mask=inside, other=float("inf"))) & inside
                place = base + tl.cumsum(keep.to(tl.int32), axis=0) - 1
                fits = keep & (place < capacity)
                tl.store(index + row * capacity + place, (first + at).to(tl.int64), mask=fits)
                tl.store(value + row * capacity + place, p, mask=fits)
                base += tl.sum(keep.to(tl.int32), axis=0)
        tl.store(count + row, base)


@triton.jit
def pack(index, count, starts, key, place, row, capacity, total, first_place, first_row, BLOCK: tl.constexpr):
    """Write the listed entries of all rows one behind the other: feature, place in the flattened lists, row."""
    b = tl.program_id(0).to(tl.int64)
    listed = tl.minimum(tl.load(count + b), capacity)
    start = tl.load(starts + b)
    for first in range(0, listed, BLOCK):
        k = first + tl.arange(0, BLOCK)
        here = (k < listed) & (start + k < total)
        f = tl.load(index + b * capacity + k, mask=here, other=0)
        tl.store(key + start + k, f.to(tl.int32), mask=here)
        tl.store(place + start + k, (first_place + b * capacity + k).to(tl.int32), mask=here)
        tl.store(row + start + k, (first_row + b + 0 * k).to(tl.int32), mask=here)


@triton.jit
def jump(pre, index, count, theta, z, gate, fired, capacity, BLOCK: tl.constexpr):
    """z = p 1[p > theta] and gate = 1[p > theta] at listed entries, 0 at padding; `fired` counts rows by feature."""
    row = tl.program_id(0).to(tl.int64)
    listed = tl.minimum(tl.load(count + row), capacity)
    for start in range(0, capacity, BLOCK):
        k = start + tl.arange(0, BLOCK)
        here, at = k < listed, row * capacity + k
        f = tl.load(index + at, mask=here, other=0)
        p = tl.load(pre + at, mask=here, other=0.0)
        on = here & (p > tl.load(theta + f, mask=here, other=0.0))
        tl.store(z + at, tl.where(on, p, 0.0), mask=k < capacity)
        tl.store(gate + at, on.to(tl.float32), mask=k < capacity)
        tl.atomic_add(fired + f, on.to(tl.int32), mask=on, sem="relaxed")


@triton.jit
def jump_back(
    pre, index, count, theta, width, grad_z, grad_gate, to_pre, to_log, capacity,
    HAS_Z: tl.constexpr, HAS_GATE: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of `jump`: gz 1[p > theta] at p, and -theta (theta gz + gh) 1[|p - theta| < w/2] / w at log theta;
    `width` is w. With `SUMS` the latter is summed over rows by atomics, else `to_log` takes it entry by entry."""
    row = tl.program_id(0).to(tl.int64)
    listed = tl.minimum(tl.load(count + row), capacity)
    for start in range(0, capacity, BLOCK):
        k = start + tl.arange(0, BLOCK)
        here, at = k < listed, row * capacity + k
        f = tl.load(index + at, mask=here, other=0)
        p = tl.load(pre + at, mask=here, other=0.0)
        edge = tl.load(theta + f, mask=here, other=0.0)
        w = tl.load(width + f, mask=here, other=1.0)
        force = tl.zeros((BLOCK,), dtype=tl.float32)
        if HAS_Z:
            g = tl.load(grad_z + at, mask=here, other=0.0)
            tl.store(to_pre + at, tl.where(here & (p > edge), g, 0.0), mask=k < capacity)
            force += g * edge
        if HAS_GATE:
            force += tl.load(grad_gate + at, mask=here, other=0.0)
        inside = here & (p > edge - w / 2) & (p < edge + w / 2) & (force != 0.0)
        if SUMS:
            tl.atomic_add(to_log + f, -edge / w * force, mask=inside, sem="relaxed")
        else:
            tl.store(to_log + at, tl.where(inside, -edge / w * force, 0.0), mask=k < capacity)


@triton.jit
def gather_sum(index, z, count, weight, out, capacity, dim, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[b] = sum_k z[b, k] weight[index[b, k]], a slice of columns per program.

    Rows are the fast axis of the grid: all programs at work read one slice of the weights, which stays in the cache.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = at < dim
    listed = tl.minimum(tl.load(count + row), capacity)
    acc = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    for start in range(0, listed, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        here = k < listed
        f = tl.load(index + row * capacity + k, mask=here, other=0)
        scale = tl.load(z + row * capacity + k, mask=here, other=0.0)
        wanted = (scale != 0.0)[:, None] & inside[None, :]
        w = tl.load(weight + f[:, None] * dim + at[None, :], mask=wanted, other=0.0).to(tl.float32)
        acc += scale[:, None] * w
    tl.store(out + row * dim + at, tl.sum(acc, axis=0), mask=inside)


@triton.jit
def gather_dots(
    index,
    count,
    grad,
    weight,
    out,
    rows,
    capacity,
    dim,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAD: tl.constexpr,
):  # fmt: skip
    """out[s, b, k] = <grad[b], weight[index[b, k]]> over slice s of the columns, 0 beyond a list.

    Slices apart, so that their sum has one order; rows are the fast axis of the grid, as in `gather_sum`.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = at < dim
    listed = tl.minimum(tl.load(count + row), capacity)
    g = tl.load(grad + row * dim + at, mask=inside, other=0.0).to(tl.float32)
    here_out = out + (tl.program_id(1).to(tl.int64) * rows + row) * capacity
    for start in range(0, listed, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        here = k < listed
        f = tl.load(index + row * capacity + k, mask=here, other=0)
        w = tl.load(weight + f[:, None] * dim + at[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        tl.store(here_out + k, tl.sum(w.to(tl.float32) * g[None, :], axis=1), mask=here)
    for start in range(listed, capacity, PAD):
        k = start + tl.arange(0, PAD)
        tl.store(here_out + k, tl.zeros((PAD,), dtype=tl.float32), mask=k < capacity)


@triton.jit
def sum_by_feature(starts, row, value, x, out, order, total, dim, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[f] = sum of value * x[row] over the entries of feature f, which lie at starts[f] to starts[f + 1]."""
    f = tl.load(order + tl.program_id(0)).to(tl.int64)
    begin = tl.load(starts + f)
    end = tl.load(starts + f + 1)
    at = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = at < dim
    acc = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for n in range(begin, end, BLOCK_N):
        i = n + tl.arange(0, BLOCK_N)
        here = i < end
        scale = tl.load(value + i, mask=here, other=0.0)
        b = tl.load(row + i, mask=here, other=0).to(tl.int64)
        wanted = (scale != 0.0)[:, None] & inside[None, :]
        acc += scale[:, None] * tl.load(x + b[:, None] * dim + at[None, :], mask=wanted, other=0.0).to(tl.float32)
    tl.store(out + f * dim + at, tl.sum(acc, axis=0), mask=inside)


@triton.jit
def _gradient(begin, end, row, scale, source, dim, at, inside, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """(sum of scale[n] source[row[n]], sum of scale[n]) over the entries from `begin` to `end`."""
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    weight = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for n in range(begin, end, BLOCK_N):
        i = n + tl.arange(0, BLOCK_N)
        a = tl.load(scale + i, mask=i < end, other=0.0)
        b = tl.load(row + i, mask=i < end, other=0).to(tl.int64)
        wanted = (a != 0.0)[:, None] & inside[None, :]
        x = tl.load(source + b[:, None] * dim + at[None, :], mask=wanted, other=0.0).to(tl.float32)
        total += tl.sum(a[:, None] * x, axis=0)
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
def _adam(w, g, m, v, moment1, moment2, here, mask, hyper, SHORT: tl.constexpr):
    """The row after one Adam step; `hyper`: rate, beta1, beta2, eps, 1 - beta1^t, sqrt(1 - beta2^t), t.

    With `SHORT` the moments are kept in bfloat16, rounded at random.
    """
    beta1, beta2 = tl.load(hyper + 1), tl.load(hyper + 2)
    m = m + (g - m) * (1.0 - beta1)
    v = beta2 * v + (1.0 - beta2) * g * g
    if SHORT:
        bits = _scattered(here, _scattered(tl.load(hyper + 6).to(tl.int32), tl.full((), 0x68E31DA4, tl.uint32)))
        tl.store(moment1 + here, _rounded(m, bits), mask=mask, eviction_policy="evict_first")
        tl.store(moment2 + here, _rounded(v, bits >> 16), mask=mask, eviction_policy="evict_first")
    else:
        tl.store(moment1 + here, m, mask=mask, eviction_policy="evict_first")
        tl.store(moment2 + here, v, mask=mask, eviction_policy="evict_first")
    rate = tl.load(hyper) / tl.load(hyper + 4)
    return w - rate * m / (tl.sqrt(v) / tl.load(hyper + 5) + tl.load(hyper + 3))


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
    order, starts, row, scale, source, weight, moment1, moment2, low, more, sums, sphere, target, strength, away,
    first, last, hyper, skip, dim,
    MORE: tl.constexpr, LOW: tl.constexpr, SHORT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    # fmt: on
    """One feature's row of one matrix: gradient, its projection, Adam, norm and low-precision copy, in one pass.

    The gradient is the sum of scale[n] source[row[n]] over the feature's entries; no gradient matrix exists. `more` is
    added to it, and rows first to last are pulled to `target`: strength (row - target); `away` takes the squared
    distance that is left. `sphere` names the rows that are kept at unit norm, `sums` takes each feature's sum of
    `scale`. Nothing is written where `skip` is not 0.

    What is read and written once goes first from the cache, so that the rows of `source`, read many times, stay.
    """
    if tl.load(skip) == 0:
        f = tl.load(order + tl.program_id(0)).to(tl.int64)
        at = tl.arange(0, BLOCK_D)
        inside = at < dim
        here = f * dim + at
        # Asked for first: they arrive while the entries are followed, one load after the other, to their rows.
        w = tl.load(weight + here, mask=inside, other=0.0, eviction_policy="evict_first")
        m = tl.load(moment1 + here, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        v = tl.load(moment2 + here, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        begin, end = tl.load(starts + f), tl.load(starts + f + 1)
        g, total = _gradient(begin, end, row, scale, source, dim, at, inside, BLOCK_N, BLOCK_D)
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
        w = _adam(w, g, m, v, moment1, moment2, here, inside, hyper, SHORT)
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
