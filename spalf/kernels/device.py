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
                # A thread takes every 32nd column: what is stored has to lie so, and need not be exchanged before.
                few = i * PART + tl.max_contiguous(tl.arange(0, PART), 1)
                inside = few < columns
                q = tl.load(product + few, mask=inside, other=-float("inf"))
                q += tl.load(bias + first + few, mask=inside, other=0.0)
                keep = (q > tl.load(reach + first + few, mask=inside, other=float("inf"))) & inside
                place = base + tl.cumsum(keep.to(tl.int32), axis=0) - 1
                fits = keep & (place < capacity)
                tl.store(index + row * capacity + place, (first + few).to(tl.int64), mask=fits)
                tl.store(value + row * capacity + place, q, mask=fits)
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
    index, count, only, grad, weight, out, rows, capacity, dim,
    ONLY: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[s, b, k] = <grad[b], weight[index[b, k]]> over slice s of the columns; beyond a list nothing is written.

    With `ONLY`, entries where `only` is 0 are not followed to their rows and give 0. Slices apart, so that their sum,
    which is for `fold_dots`, has one order; rows are the fast axis of the grid, as in `gather_sum`.
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
        follow = here
        if ONLY:
            follow = tl.load(only + row * capacity + k, mask=here, other=0.0) != 0.0
        w = tl.load(weight + f[:, None] * dim + at[None, :], mask=follow[:, None] & inside[None, :], other=0.0)
        tl.store(here_out + k, tl.sum(w.to(tl.float32) * g[None, :], axis=1), mask=here)


@triton.jit
def _folded(parts, here, at, slices, size):
    """The sum over slices of what `gather_dots` left at entries that are listed."""
    total = tl.load(parts + at, mask=here, other=0.0)
    for s in range(1, slices):
        total += tl.load(parts + s * size + at, mask=here, other=0.0)
    return total


@triton.jit
def fold_dots(parts, add, count, out, slices, size, capacity, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """out = sum over slices of `parts`, plus `add` with `ADD`; 0 beyond a list."""
    row = tl.program_id(0).to(tl.int64)
    listed = tl.minimum(tl.load(count + row), capacity)
    for start in range(0, capacity, BLOCK):
        k = start + tl.arange(0, BLOCK)
        here, at = k < listed, row * capacity + k
        total = _folded(parts, here, at, slices, size)
        if ADD:
            total += tl.load(add + at, mask=here, other=0.0)
        tl.store(out + at, total, mask=k < capacity)


@triton.jit
def refine(parts, index, count, z, gate, step, gain, out, pull, slices, size, capacity, BLOCK: tl.constexpr):
    """pull = <v, w> / gain from the parts of `gather_dots`, and out = [z + step pull]+ where an entry is on, else z."""
    row = tl.program_id(0).to(tl.int64)
    listed = tl.minimum(tl.load(count + row), capacity)
    over = 1.0 / tl.load(gain)
    for start in range(0, capacity, BLOCK):
        k = start + tl.arange(0, BLOCK)
        here, at = k < listed, row * capacity + k
        f = tl.load(index + at, mask=here, other=0)
        p = _folded(parts, here, at, slices, size) * over
        x = tl.load(z + at, mask=here, other=0.0)
        on = tl.load(gate + at, mask=here, other=0.0) != 0.0
        moved = tl.maximum(x + tl.load(step + f, mask=here, other=0.0) * p, 0.0)
        tl.store(out + at, tl.where(on, moved, x), mask=k < capacity)
        tl.store(pull + at, p, mask=k < capacity)


@triton.jit
def refine_back(
    grad, index, count, gate, moved, step, gain, pull, to_z, force, to_step, dots, capacity,
    SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of `refine`: to_z directly, `force` at <v, w>, to_step, and of each row what `gain` gets through
    the pull, times -gain. With `SUMS` to_step is summed over rows by atomics, else it is taken entry by entry."""
    row = tl.program_id(0).to(tl.int64)
    listed = tl.minimum(tl.load(count + row), capacity)
    over = 1.0 / tl.load(gain)
    dot = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, capacity, BLOCK):
        k = start + tl.arange(0, BLOCK)
        here, at = k < listed, row * capacity + k
        f = tl.load(index + at, mask=here, other=0)
        g = tl.load(grad + at, mask=here, other=0.0)
        on = tl.load(gate + at, mask=here, other=0.0) != 0.0
        taken = on & (tl.load(moved + at, mask=here, other=0.0) > 0.0)
        a = tl.where(taken, g, 0.0)
        s = tl.load(step + f, mask=here, other=0.0)
        p = tl.load(pull + at, mask=here, other=0.0)
        tl.store(to_z + at, tl.where(on, a, g), mask=k < capacity)
        tl.store(force + at, a * s * over, mask=k < capacity)
        dot += a * s * p
        if SUMS:
            tl.atomic_add(to_step + f, a * p, mask=taken, sem="relaxed")
        else:
            tl.store(to_step + at, a * p, mask=k < capacity)
    tl.store(dots + row, tl.sum(dot, axis=0))


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
