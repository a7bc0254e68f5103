"""Triton kernels of :mod:`swin.triton_attention`. Each program processes a block of queries or keys of one head.

Windows are not partitioned in memory: the position of token i of a window on the grid, before padding and rolling, is
computed, and the token is read and written there. Blocks have one token per row and one channel of the head per column.

Logits are products of the unnormalized queries and keys, multiplied by both inverse norms. A product of two bf16 values
is exact in fp32, so this is as precise as normalizing in fp32 first, at the speed of bf16 (arXiv 2205.14135 for the
blocks, 2111.09883, equation 2, for the cosine).

``geometry`` is ``(tokens, h, w, nh, nw, sy, sx)``: number of tokens of all grids, grid size, number of windows along
both axes, shift. ``T`` is t, the number of tokens of a window; ``D`` is d, the width of a head. The second axis of the
launch grid is the head. ``ACC`` is the type of sums, at least fp32.

The derivation of the gradients is in :class:`swin.chunked_attention.ChunkedAttention`.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
PRECISION = tl.constexpr("ieee")  # for products of fp32; the default of Triton is tf32


@triton.jit
def locate_tokens(window: tl.tensor, i: tl.tensor, geometry: tl.tuple, TH: tl.constexpr, TW: tl.constexpr) -> tl.tensor:
    """Compute the index of tokens i of a window in the grids ``(b, h, w)``, and their side of the roll.

    The sides are those of :func:`swin.windows.attention_mask`: tokens attend to tokens of the same side. Padding, and
    i >= t, have side -1.
    """
    _, h, w, nh, nw, sy, sx = geometry
    y = window // nw % nh * TH + i // TW + sy
    x = window % nw * TW + i % TW + sx
    y = tl.where(y >= nh * TH, y - nh * TH, y)
    x = tl.where(x >= nw * TW, x - nw * TW, x)
    real = (i < TH * TW) & (y < h) & (x < w)
    side = tl.where(real, (y < sy) * 2 + (x < sx), -1)
    return (window // (nh * nw)).to(tl.int64) * h * w + y * w + x, side


@triton.jit
def load(
    x: tl.tensor,
    index: tl.tensor,
    side: tl.tensor,
    width: tl.tensor,
    start: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Load ``(block, d)``: d channels from ``start`` of tokens with ``width`` channels each; 0 where side is -1."""
    channel = tl.arange(0, BLOCK_D)
    at = index[:, None] * width + (start + channel)[None, :]
    return tl.load(x + at, mask=(side >= 0)[:, None] & (channel < D)[None, :], other=0.0)


@triton.jit
def store(
    x: tl.tensor,
    index: tl.tensor,
    side: tl.tensor,
    width: tl.tensor,
    start: tl.tensor,
    value: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Store ``value`` where :func:`load` with the same arguments reads."""
    channel = tl.arange(0, BLOCK_D)
    at = index[:, None] * width + (start + channel)[None, :]
    tl.store(x + at, value.to(x.dtype.element_ty), mask=(side >= 0)[:, None] & (channel < D)[None, :])


@triton.jit
def load_bias(bias: tl.tensor, i: tl.tensor, j: tl.tensor, T: tl.constexpr, ACC: tl.constexpr) -> tl.tensor:
    """Load the bias of the head of this program for queries i and keys j."""
    at = bias + tl.program_id(1).to(tl.int64) * T * T + i[:, None] * T + j[None, :]
    return tl.load(at, mask=(i < T)[:, None] & (j < T)[None, :], other=0.0).to(ACC)


@triton.jit
def inverse_norm(x: tl.tensor, COSINE: tl.constexpr, ACC: tl.constexpr) -> tl.tensor:
    """Compute the inverse norm of each row as in :func:`swin.chunked_attention.scale`; 1 for the dot product."""
    x = x.to(ACC)
    if COSINE:
        return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)
    else:
        return tl.sum(x * 0, axis=1) + 1.0


@triton.jit
def product(a: tl.tensor, b: tl.tensor, ACC: tl.constexpr) -> tl.tensor:
    """Compute the matrix product ``a b`` with fp32 sums."""
    if INTERPRETED:  # the interpreter's dot treats the bits of bf16 as integers
        return tl.dot(a.to(ACC), b.to(ACC), input_precision=PRECISION)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def split_product(a: tl.tensor, b: tl.tensor, ACC: tl.constexpr) -> tl.tensor:
    """Compute ``a b`` for fp32 ``a`` with rows that sum to nearly 0; rounding ``a`` to bf16 would dominate the result.

    ``a`` is split into two bf16 terms, whose products are added.
    """
    if b.dtype == tl.bfloat16:
        high = a.to(tl.bfloat16)
        low = (a - high.to(ACC)).to(tl.bfloat16)
        return product(high, b, ACC) + product(low, b, ACC)
    else:  # the range of fp16 is too small for gradients
        return product(a, b.to(ACC), ACC)


@triton.jit
def block_logits(
    q: tl.tensor,
    k: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    bias: tl.tensor,
    side_q: tl.tensor,
    side_k: tl.tensor,
    ACC: tl.constexpr,
) -> tl.tensor:
    """Compute logits ``(queries, keys)``, -inf across sides. ``left`` and ``right`` multiply the rows of q and k."""
    logits = product(q, tl.trans(k), ACC) * left[:, None] * right[None, :] + bias
    return tl.where(side_q[:, None] == side_k[None, :], logits, float("-inf"))


@triton.jit
def attention_kernel(
    qkv: tl.tensor,
    factor: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    geometry: tl.tuple,
    TH: tl.constexpr,
    TW: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COSINE: tl.constexpr,
) -> None:
    """Compute ``out``, the attention of a block of queries over all keys, and ``lse``, the log-sum-exp of each row.

    The softmax is computed online: the sums so far are rescaled whenever a larger logit appears.
    """
    ACC: tl.constexpr = lse.dtype.element_ty
    T: tl.constexpr = TH * TW
    head, heads = tl.program_id(1), tl.num_programs(1)
    window = tl.program_id(0) // tl.cdiv(T, BLOCK_Q)
    i = tl.program_id(0) % tl.cdiv(T, BLOCK_Q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    index_q, side_q = locate_tokens(window, i, geometry, TH, TW)
    q = load(qkv, index_q, side_q, 3 * heads * D, head * D, D, BLOCK_D)
    left = inverse_norm(q, COSINE, ACC) * tl.load(factor + head).to(ACC)
    largest = tl.full((BLOCK_Q,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_Q,), ACC)
    summed = tl.zeros((BLOCK_Q, BLOCK_D), ACC)
    for start in range(0, T, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        index_k, side_k = locate_tokens(window, j, geometry, TH, TW)
        k = load(qkv, index_k, side_k, 3 * heads * D, (heads + head) * D, D, BLOCK_D)
        v = load(qkv, index_k, side_k, 3 * heads * D, (2 * heads + head) * D, D, BLOCK_D)
        right = inverse_norm(k, COSINE, ACC)
        logits = block_logits(q, k, left, right, load_bias(bias, i, j, T, ACC), side_q, side_k, ACC)
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        # If all keys so far are of another side, -inf - (-inf) would be NaN.
        origin = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp(logits - origin[:, None])
        shrink = tl.exp(largest - origin)
        total = total * shrink + tl.sum(weights, axis=1)
        summed = summed * shrink[:, None] + product(weights.to(v.dtype), v, ACC)
        largest = larger
    total = tl.where(side_q >= 0, total, 1.0)
    store(out, index_q, side_q, heads * D, head * D, summed / total[:, None], D, BLOCK_D)
    tl.store(lse + head.to(tl.int64) * geometry[0] + index_q, largest + tl.log(total), mask=side_q >= 0)


@triton.jit
def softmax_and_gradient(
    logits: tl.tensor, lse: tl.tensor, dout: tl.tensor, v: tl.tensor, ACC: tl.constexpr
) -> tl.tensor:
    """Recompute the softmax weights P and compute their gradient ``dP = dO V^T``, ``(queries, keys)`` each."""
    return tl.exp(logits - lse[:, None]), product(dout, tl.trans(v), ACC)


@triton.jit
def query_gradient_kernel(
    qkv: tl.tensor,
    factor: tl.tensor,
    bias: tl.tensor,
    lse: tl.tensor,
    dout: tl.tensor,
    delta: tl.tensor,
    dqkv: tl.tensor,
    dfactor: tl.tensor,
    geometry: tl.tuple,
    TH: tl.constexpr,
    TW: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COSINE: tl.constexpr,
) -> None:
    """Compute the gradient of a block of queries, its part of the factor's gradient, and ``delta``.

    ``delta_i = sum_j P_ij dP_ij`` is also read by the other gradient kernels. ``sum(out_i * dout_i)`` is equal and
    would save one pass, but ``out`` has been rounded to bf16, and the gradient ``P (dP - delta)`` of a weight close
    to 1 is a small difference.
    """
    ACC: tl.constexpr = lse.dtype.element_ty
    T: tl.constexpr = TH * TW
    head, heads = tl.program_id(1), tl.num_programs(1)
    window = tl.program_id(0) // tl.cdiv(T, BLOCK_Q)
    i = tl.program_id(0) % tl.cdiv(T, BLOCK_Q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    index_q, side_q = locate_tokens(window, i, geometry, TH, TW)
    q = load(qkv, index_q, side_q, 3 * heads * D, head * D, D, BLOCK_D)
    do = load(dout, index_q, side_q, heads * D, head * D, D, BLOCK_D)
    head_factor = tl.load(factor + head).to(ACC)
    inverse_q = inverse_norm(q, COSINE, ACC)
    row = head.to(tl.int64) * geometry[0] + index_q
    row_lse = tl.load(lse + row, mask=side_q >= 0, other=float("inf"))
    row_delta, total = tl.zeros((BLOCK_Q,), ACC), tl.zeros((BLOCK_Q,), ACC)
    for start in range(0, T, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        index_k, side_k = locate_tokens(window, j, geometry, TH, TW)
        k = load(qkv, index_k, side_k, 3 * heads * D, (heads + head) * D, D, BLOCK_D)
        v = load(qkv, index_k, side_k, 3 * heads * D, (2 * heads + head) * D, D, BLOCK_D)
        right, bias_tile = inverse_norm(k, COSINE, ACC), load_bias(bias, i, j, T, ACC)
        logits = block_logits(q, k, inverse_q * head_factor, right, bias_tile, side_q, side_k, ACC)
        weights, dweights = softmax_and_gradient(logits, row_lse, do, v, ACC)
        row_delta += tl.sum(weights * dweights, axis=1)
        total += tl.sum(weights, axis=1)
    # Because lse is rounded, the weights do not sum to exactly 1. Dividing by their sum corrects delta, so that the
    # gradients of the logits in a row sum to 0.
    row_delta = row_delta / tl.where(side_q >= 0, total, 1.0)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), ACC)
    for start in range(0, T, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        index_k, side_k = locate_tokens(window, j, geometry, TH, TW)
        k = load(qkv, index_k, side_k, 3 * heads * D, (heads + head) * D, D, BLOCK_D)
        v = load(qkv, index_k, side_k, 3 * heads * D, (2 * heads + head) * D, D, BLOCK_D)
        right, bias_tile = inverse_norm(k, COSINE, ACC), load_bias(bias, i, j, T, ACC)
        logits = block_logits(q, k, inverse_q * head_factor, right, bias_tile, side_q, side_k, ACC)
        weights, dweights = softmax_and_gradient(logits, row_lse, do, v, ACC)
        dq += split_product(weights * (dweights - row_delta[:, None]) * right[None, :], k, ACC)
    tl.store(delta + row, row_delta, mask=side_q >= 0)
    # dq is the gradient of f u, with u = q / |q|. The factor has the gradient sum u . dq.
    unit = q.to(ACC) * inverse_q[:, None]
    u_dot_dq = tl.sum(unit * dq, axis=1)
    tl.store(dfactor + head * tl.num_programs(0) + tl.program_id(0), tl.sum(u_dot_dq, axis=0))
    if COSINE:  # gradient of the normalization
        dq -= unit * u_dot_dq[:, None]
    store(dqkv, index_q, side_q, 3 * heads * D, head * D, dq * (inverse_q * head_factor)[:, None], D, BLOCK_D)


@triton.jit
def key_gradient_kernel(
    qkv: tl.tensor,
    factor: tl.tensor,
    bias: tl.tensor,
    lse: tl.tensor,
    dout: tl.tensor,
    delta: tl.tensor,
    dqkv: tl.tensor,
    geometry: tl.tuple,
    TH: tl.constexpr,
    TW: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COSINE: tl.constexpr,
) -> None:
    """Compute the gradients of a block of keys and values over all queries of the window."""
    ACC: tl.constexpr = lse.dtype.element_ty
    T: tl.constexpr = TH * TW
    head, heads = tl.program_id(1), tl.num_programs(1)
    window = tl.program_id(0) // tl.cdiv(T, BLOCK_K)
    j = tl.program_id(0) % tl.cdiv(T, BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    index_k, side_k = locate_tokens(window, j, geometry, TH, TW)
    k = load(qkv, index_k, side_k, 3 * heads * D, (heads + head) * D, D, BLOCK_D)
    v = load(qkv, index_k, side_k, 3 * heads * D, (2 * heads + head) * D, D, BLOCK_D)
    head_factor = tl.load(factor + head).to(ACC)
    right = inverse_norm(k, COSINE, ACC)
    dk, dv = tl.zeros((BLOCK_K, BLOCK_D), ACC), tl.zeros((BLOCK_K, BLOCK_D), ACC)
    for start in range(0, T, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        index_q, side_q = locate_tokens(window, i, geometry, TH, TW)
        row = head.to(tl.int64) * geometry[0] + index_q
        q = load(qkv, index_q, side_q, 3 * heads * D, head * D, D, BLOCK_D)
        do = load(dout, index_q, side_q, heads * D, head * D, D, BLOCK_D)
        row_lse = tl.load(lse + row, mask=side_q >= 0, other=float("inf"))
        row_delta = tl.load(delta + row, mask=side_q >= 0, other=0.0)
        left = inverse_norm(q, COSINE, ACC) * head_factor
        logits = block_logits(q, k, left, right, load_bias(bias, i, j, T, ACC), side_q, side_k, ACC)
        weights, dweights = softmax_and_gradient(logits, row_lse, do, v, ACC)
        dv += product(tl.trans(weights.to(do.dtype)), do, ACC)
        dk += split_product(tl.trans(weights * (dweights - row_delta[:, None]) * left[:, None]), q, ACC)
    if COSINE:  # gradient of the normalization
        unit = k.to(ACC) * right[:, None]
        dk -= unit * tl.sum(unit * dk, axis=1)[:, None]
    store(dqkv, index_k, side_k, 3 * heads * D, (heads + head) * D, dk * right[:, None], D, BLOCK_D)
    store(dqkv, index_k, side_k, 3 * heads * D, (2 * heads + head) * D, dv, D, BLOCK_D)


@triton.jit
def bias_gradient_kernel(
    qkv: tl.tensor,
    factor: tl.tensor,
    bias: tl.tensor,
    lse: tl.tensor,
    dout: tl.tensor,
    delta: tl.tensor,
    dbias: tl.tensor,
    num_windows: tl.tensor,
    geometry: tl.tuple,
    TH: tl.constexpr,
    TW: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COSINE: tl.constexpr,
) -> None:
    """Sum the gradient of a tile of the bias over every n-th window, in a fixed order, so that it is deterministic."""
    ACC: tl.constexpr = lse.dtype.element_ty
    T: tl.constexpr = TH * TW
    head, heads = tl.program_id(1), tl.num_programs(1)
    i = tl.program_id(0) // tl.cdiv(T, BLOCK_K) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    j = tl.program_id(0) % tl.cdiv(T, BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    bias_tile = load_bias(bias, i, j, T, ACC)
    head_factor = tl.load(factor + head).to(ACC)
    summed = tl.zeros((BLOCK_Q, BLOCK_K), ACC)
    for window in range(tl.program_id(2), num_windows, tl.num_programs(2)):
        index_q, side_q = locate_tokens(window, i, geometry, TH, TW)
        index_k, side_k = locate_tokens(window, j, geometry, TH, TW)
        row = head.to(tl.int64) * geometry[0] + index_q
        q = load(qkv, index_q, side_q, 3 * heads * D, head * D, D, BLOCK_D)
        k = load(qkv, index_k, side_k, 3 * heads * D, (heads + head) * D, D, BLOCK_D)
        v = load(qkv, index_k, side_k, 3 * heads * D, (2 * heads + head) * D, D, BLOCK_D)
        do = load(dout, index_q, side_q, heads * D, head * D, D, BLOCK_D)
        row_lse = tl.load(lse + row, mask=side_q >= 0, other=float("inf"))
        row_delta = tl.load(delta + row, mask=side_q >= 0, other=0.0)
        left, right = inverse_norm(q, COSINE, ACC) * head_factor, inverse_norm(k, COSINE, ACC)
        logits = block_logits(q, k, left, right, bias_tile, side_q, side_k, ACC)
        weights, dweights = softmax_and_gradient(logits, row_lse, do, v, ACC)
        summed += weights * (dweights - row_delta[:, None])
    at = (tl.program_id(2) * heads + head).to(tl.int64) * T * T + i[:, None] * T + j[None, :]
    tl.store(dbias + at, summed, mask=(i < T)[:, None] & (j < T)[None, :])
