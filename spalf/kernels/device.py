"""What runs on the GPU: Triton kernels, one program per row or per feature. Typed wrappers are in the modules beside.

Written for triton 3.6 and later, and for its interpreter: no block pointers, no bfloat16 arithmetic (operands are
widened after the load). Lists are contiguous from the left of their row; `count` says how many entries a row lists.
"""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def compact_columns(product, bias, reach, index, value, count, columns, first, capacity, BLOCK: tl.constexpr):
    """Append the entries of a block of columns that exceed `reach` to the list of each row; ascending, hence the same
    list in every run. `count` goes on beyond `capacity`, so that a list that was too short is known."""
    row = tl.program_id(0).to(tl.int64)
    base = tl.load(count + row)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        p = tl.load(product + row * columns + at, mask=inside, other=-float("inf"))
        p += tl.load(bias + first + at, mask=inside, other=0.0)
        keep = (p > tl.load(reach + first + at, mask=inside, other=float("inf"))) & inside
        found = tl.sum(keep.to(tl.int32), axis=0)
        if found > 0:
            place = base + tl.cumsum(keep.to(tl.int32), axis=0) - 1
            fits = keep & (place < capacity)
            tl.store(index + row * capacity + place, (first + at).to(tl.int64), mask=fits)
            tl.store(value + row * capacity + place, p, mask=fits)
            base += found
    tl.store(count + row, base)


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
def gather_dots(index, count, grad, weight, out, capacity, dim, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[b, k] = <grad[b], weight[index[b, k]]> for every listed entry; what lies beyond a list is left alone."""
    row = tl.program_id(0).to(tl.int64)
    listed = tl.minimum(tl.load(count + row), capacity)
    for start in range(0, listed, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        here = k < listed
        f = tl.load(index + row * capacity + k, mask=here, other=0)
        acc = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
        for first in range(0, dim, BLOCK_D):
            at = first + tl.arange(0, BLOCK_D)
            inside = at < dim
            g = tl.load(grad + row * dim + at, mask=inside, other=0.0).to(tl.float32)
            w = tl.load(weight + f[:, None] * dim + at[None, :], mask=here[:, None] & inside[None, :], other=0.0)
            acc += w.to(tl.float32) * g[None, :]
        tl.store(out + row * capacity + k, tl.sum(acc, axis=1), mask=here)


@triton.jit
def add_per_feature(index, value, out, total, width, BLOCK: tl.constexpr):
    """out[index] += value over listed entries whose value is not 0: padding and silent entries cost no atomic."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    v = tl.load(value + at, mask=inside, other=0.0)
    f = tl.load(index + at, mask=inside & (v != 0.0), other=width)
    tl.atomic_add(out + f, v, mask=inside & (v != 0.0) & (f < width), sem="relaxed")


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
def _adam(w, g, m_at, v_at, mask, rate, beta1, beta2, eps, correction1, root2):
    m = tl.load(m_at, mask=mask, other=0.0)
    v = tl.load(v_at, mask=mask, other=0.0)
    m = m + (g - m) * (1.0 - beta1)
    v = beta2 * v + (1.0 - beta2) * g * g
    tl.store(m_at, m, mask=mask)
    tl.store(v_at, v, mask=mask)
    return w - (rate / correction1) * m / (tl.sqrt(v) / root2 + eps)


@triton.jit
def update_rows(
    order,
    starts,
    row,
    z,
    force,
    grad,
    white,
    dec,
    dec_m,
    dec_v,
    dec_low,
    dec_more,
    enc,
    enc_m,
    enc_v,
    enc_low,
    enc_more,
    bias_grad,
    sphere,
    target,
    strength,
    first,
    last,
    hyper,
    skip,
    dim,
    MORE_DEC: tl.constexpr,
    MORE_ENC: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Both gradients of one feature, their projection, Adam, the row's norm and the low-precision copies, in one pass.

    Per entry n of the feature: dec += z[n] grad[row[n]], enc += force[n] white[row[n]], bias += force[n]. Rows first to
    last are pulled to `target`: dec += strength (dec - target). No gradient matrix exists. `hyper`: rate of dec, rate
    of enc, beta1, beta2, eps, 1 - beta1^t, sqrt(1 - beta2^t). `skip`: nothing is written where it is not 0.
    """
    if tl.load(skip) == 0:
        f = tl.load(order + tl.program_id(0)).to(tl.int64)
        begin = tl.load(starts + f)
        end = tl.load(starts + f + 1)
        at = tl.arange(0, BLOCK_D)
        inside = at < dim
        g_dec = tl.zeros((BLOCK_D,), dtype=tl.float32)
        g_enc = tl.zeros((BLOCK_D,), dtype=tl.float32)
        g_bias = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for n in range(begin, end, BLOCK_N):
            i = n + tl.arange(0, BLOCK_N)
            here = i < end
            b = tl.load(row + i, mask=here, other=0).to(tl.int64)
            a = tl.load(z + i, mask=here, other=0.0)
            c = tl.load(force + i, mask=here, other=0.0)
            source = b[:, None] * dim + at[None, :]
            in_dec, in_enc = (a != 0.0)[:, None] & inside[None, :], (c != 0.0)[:, None] & inside[None, :]
            g_dec += tl.sum(a[:, None] * tl.load(grad + source, mask=in_dec, other=0.0).to(tl.float32), axis=0)
            g_enc += tl.sum(c[:, None] * tl.load(white + source, mask=in_enc, other=0.0).to(tl.float32), axis=0)
            g_bias += c
        tl.store(bias_grad + f, tl.sum(g_bias, axis=0))
        rate_dec, rate_enc = tl.load(hyper), tl.load(hyper + 1)
        beta1, beta2, eps = tl.load(hyper + 2), tl.load(hyper + 3), tl.load(hyper + 4)
        correction1, root2 = tl.load(hyper + 5), tl.load(hyper + 6)
        here_D = f * dim + at
        w = tl.load(dec + here_D, mask=inside, other=0.0)
        g = g_dec
        if MORE_DEC:
            g += tl.load(dec_more + here_D, mask=inside, other=0.0)
        if (f >= first) & (f < last):
            t = tl.load(target + (f - first) * dim + at, mask=inside, other=0.0).to(tl.float32)
            g += tl.load(strength) * (w - t)
        on_sphere = tl.load(sphere + f) != 0
        if on_sphere:
            # g <- g - w (w'g) / (w'w)
            g -= w * (tl.sum(w * g, axis=0) / tl.maximum(tl.sum(w * w, axis=0), 1.1754944e-38))
        w = _adam(w, g, dec_m + here_D, dec_v + here_D, inside, rate_dec, beta1, beta2, eps, correction1, root2)
        if on_sphere:
            w = w / tl.maximum(tl.sqrt(tl.sum(w * w, axis=0)), 1.1754944e-38)
        tl.store(dec + here_D, w, mask=inside)
        if LOW:
            tl.store(dec_low + here_D, w.to(tl.bfloat16), mask=inside)
        w = tl.load(enc + here_D, mask=inside, other=0.0)
        g = g_enc
        if MORE_ENC:
            g += tl.load(enc_more + here_D, mask=inside, other=0.0)
        w = _adam(w, g, enc_m + here_D, enc_v + here_D, inside, rate_enc, beta1, beta2, eps, correction1, root2)
        tl.store(enc + here_D, w, mask=inside)
        if LOW:
            tl.store(enc_low + here_D, w.to(tl.bfloat16), mask=inside)
