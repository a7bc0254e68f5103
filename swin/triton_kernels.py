"""The programs of :mod:`swin.triton_attention`, in Triton: what one of thousands does for a block of queries or keys of one head.

A window is never cut out. Its token number i is looked up on the grid where it lies, before padding and rolling, and
read and written there. What comes side by side in a program: tokens of a block in rows, channels of a head in columns.

Logits are products of queries and keys as they come, times both inverse lengths: a product of two bf16 numbers is exact
in fp32, so nothing is lost that normalising in fp32 would keep, at the speed of bf16 (arXiv 2205.14135 for the blocks,
2111.09883, equation 2, for the cosine).

``geometry`` is ``(tokens, h, w, nh, nw, sy, sx)``: tokens of all grids, the grid, windows along its axes, the shift.
``T`` is t, the tokens of a window; ``D`` d, the width of a head; heads are the second axis of the programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
PRECISION = tl.constexpr("ieee")  # of products of fp32, which Triton would cut to tf32


@triton.jit
def place(window: tl.tensor, i: tl.tensor, geometry: tl.tuple, TH: tl.constexpr, TW: tl.constexpr) -> tl.tensor:
    """Where tokens i of a window lie on the grids ``(b, h, w)``, and on which side of the roll; -1 for no token.

    The sides are those of :func:`swin.windows.attention_mask`: tokens attend to those of their own side. What is
    padding, or above t, is a side of its own.
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
    """``(block, d)``: d channels from ``start`` of tokens that have ``width`` each; zeros where there is no token."""
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
    """Where :func:`load` would read it."""
    channel = tl.arange(0, BLOCK_D)
    at = index[:, None] * width + (start + channel)[None, :]
    tl.store(x + at, value.to(x.dtype.element_ty), mask=(side >= 0)[:, None] & (channel < D)[None, :])


@triton.jit
def load_bias(bias: tl.tensor, i: tl.tensor, j: tl.tensor, T: tl.constexpr, ACC: tl.constexpr) -> tl.tensor:
    """Of one head, for queries i and keys j."""
    at = bias + tl.program_id(1).to(tl.int64) * T * T + i[:, None] * T + j[None, :]
    return tl.load(at, mask=(i < T)[:, None] & (j < T)[None, :], other=0.0).to(ACC)


@triton.jit
def inverse_length(x: tl.tensor, COSINE: tl.constexpr, ACC: tl.constexpr) -> tl.tensor:
    """What a row is multiplied by to be of length one, as :func:`swin.chunked_attention.scale` does; one for products."""
    x = x.to(ACC)
    if COSINE:
        return 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)
    else:
        return tl.sum(x * 0, axis=1) + 1.0


@triton.jit
def product(a: tl.tensor, b: tl.tensor, ACC: tl.constexpr) -> tl.tensor:
    """``a b``, added up in fp32."""
    if INTERPRETED:  # its dot takes the bits of bf16 for whole numbers
        return tl.dot(a.to(ACC), b.to(ACC), input_precision=PRECISION)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def fine_product(a: tl.tensor, b: tl.tensor, ACC: tl.constexpr) -> tl.tensor:
    """``a b`` for an ``a`` in fp32 whose rows nearly cancel: bf16 alone would leave its rounding instead of the sum."""
    if b.dtype == tl.bfloat16:
        high = a.to(tl.bfloat16)
        low = (a - high.to(ACC)).to(tl.bfloat16)
        return product(high, b, ACC) + product(low, b, ACC)
    else:  # fp16 has not the range of a gradient
        return product(a, b.to(ACC), ACC)


@triton.jit
def logits_of(
    q: tl.tensor,
    k: tl.tensor,
    left: tl.tensor,
    right: tl.tensor,
    bias: tl.tensor,
    side_q: tl.tensor,
    side_k: tl.tensor,
    ACC: tl.constexpr,
) -> tl.tensor:
    """``(queries, keys)``; -inf across sides. ``left`` and ``right`` are what rows of q and k are multiplied by."""
    logits = product(q, tl.trans(k), ACC) * left[:, None] * right[None, :] + bias
    return tl.where(side_q[:, None] == side_k[None, :], logits, float("-inf"))


@triton.jit
def attend_program(
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
    """A block of queries over all keys of its window: ``out``, and ``lse``, the logarithm of the softmax's sums."""
    ACC: tl.constexpr = lse.dtype.element_ty
    T: tl.constexpr = TH * TW
    head, heads = tl.program_id(1), tl.num_programs(1)
    window = tl.program_id(0) // tl.cdiv(T, BLOCK_Q)
    i = tl.program_id(0) % tl.cdiv(T, BLOCK_Q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    index_q, side_q = place(window, i, geometry, TH, TW)
    q = load(qkv, index_q, side_q, 3 * heads * D, head * D, D, BLOCK_D)
    left = inverse_length(q, COSINE, ACC) * tl.load(factor + head).to(ACC)
    largest = tl.full((BLOCK_Q,), float("-inf"), ACC)
    total = tl.zeros((BLOCK_Q,), ACC)
    summed = tl.zeros((BLOCK_Q, BLOCK_D), ACC)
    for start in range(0, T, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        index_k, side_k = place(window, j, geometry, TH, TW)
        k = load(qkv, index_k, side_k, 3 * heads * D, (heads + head) * D, D, BLOCK_D)
        v = load(qkv, index_k, side_k, 3 * heads * D, (2 * heads + head) * D, D, BLOCK_D)
        right = inverse_length(k, COSINE, ACC)
        logits = logits_of(q, k, left, right, load_bias(bias, i, j, T, ACC), side_q, side_k, ACC)
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        # A block may hold nothing of the own side yet, and inf - inf is no number.
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
def weights_of(logits: tl.tensor, lse: tl.tensor, dout: tl.tensor, v: tl.tensor, ACC: tl.constexpr) -> tl.tensor:
    """Softmax of the logits again, and the gradient of its weights: ``(queries, keys)`` both."""
    return tl.exp(logits - lse[:, None]), product(dout, tl.trans(v), ACC)


@triton.jit
def queries_program(
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
    """Gradient of a block of queries, its share of the factor's, and ``delta``, which keys and bias will need.

    ``delta`` is the sum of weights times their gradients. ``out dout`` would be the same and need one pass less, but
    where one weight is nearly one its gradient is what differs from delta, and ``out`` has been rounded to bf16.
    """
    ACC: tl.constexpr = lse.dtype.element_ty
    T: tl.constexpr = TH * TW
    head, heads = tl.program_id(1), tl.num_programs(1)
    window = tl.program_id(0) // tl.cdiv(T, BLOCK_Q)
    i = tl.program_id(0) % tl.cdiv(T, BLOCK_Q) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    index_q, side_q = place(window, i, geometry, TH, TW)
    q = load(qkv, index_q, side_q, 3 * heads * D, head * D, D, BLOCK_D)
    do = load(dout, index_q, side_q, heads * D, head * D, D, BLOCK_D)
    by_factor = tl.load(factor + head).to(ACC)
    shorten = inverse_length(q, COSINE, ACC)
    of_row = head.to(tl.int64) * geometry[0] + index_q
    sums = tl.load(lse + of_row, mask=side_q >= 0, other=float("inf"))
    d, total = tl.zeros((BLOCK_Q,), ACC), tl.zeros((BLOCK_Q,), ACC)
    for start in range(0, T, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        index_k, side_k = place(window, j, geometry, TH, TW)
        k = load(qkv, index_k, side_k, 3 * heads * D, (heads + head) * D, D, BLOCK_D)
        v = load(qkv, index_k, side_k, 3 * heads * D, (2 * heads + head) * D, D, BLOCK_D)
        right, scores = inverse_length(k, COSINE, ACC), load_bias(bias, i, j, T, ACC)
        logits = logits_of(q, k, shorten * by_factor, right, scores, side_q, side_k, ACC)
        weights, dweights = weights_of(logits, sums, do, v, ACC)
        d += tl.sum(weights * dweights, axis=1)
        total += tl.sum(weights, axis=1)
    # Weights sum to one but for the rounding of lse, which is that of logits; what dlogits sum to is hurt by it.
    d = d / tl.where(side_q >= 0, total, 1.0)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), ACC)
    for start in range(0, T, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        index_k, side_k = place(window, j, geometry, TH, TW)
        k = load(qkv, index_k, side_k, 3 * heads * D, (heads + head) * D, D, BLOCK_D)
        v = load(qkv, index_k, side_k, 3 * heads * D, (2 * heads + head) * D, D, BLOCK_D)
        right, scores = inverse_length(k, COSINE, ACC), load_bias(bias, i, j, T, ACC)
        logits = logits_of(q, k, shorten * by_factor, right, scores, side_q, side_k, ACC)
        weights, dweights = weights_of(logits, sums, do, v, ACC)
        dq += fine_product(weights * (dweights - d[:, None]) * right[None, :], k, ACC)
    tl.store(delta + of_row, d, mask=side_q >= 0)
    unit = q.to(ACC) * shorten[:, None]
    along = tl.sum(unit * dq, axis=1)
    tl.store(dfactor + head * tl.num_programs(0) + tl.program_id(0), tl.sum(along, axis=0))
    if COSINE:  # lengths do not count
        dq -= unit * along[:, None]
    store(dqkv, index_q, side_q, 3 * heads * D, head * D, dq * (shorten * by_factor)[:, None], D, BLOCK_D)


@triton.jit
def keys_program(
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
    """Gradients of a block of keys and their values, over all queries of the window."""
    ACC: tl.constexpr = lse.dtype.element_ty
    T: tl.constexpr = TH * TW
    head, heads = tl.program_id(1), tl.num_programs(1)
    window = tl.program_id(0) // tl.cdiv(T, BLOCK_K)
    j = tl.program_id(0) % tl.cdiv(T, BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    index_k, side_k = place(window, j, geometry, TH, TW)
    k = load(qkv, index_k, side_k, 3 * heads * D, (heads + head) * D, D, BLOCK_D)
    v = load(qkv, index_k, side_k, 3 * heads * D, (2 * heads + head) * D, D, BLOCK_D)
    by_factor = tl.load(factor + head).to(ACC)
    right = inverse_length(k, COSINE, ACC)
    dk, dv = tl.zeros((BLOCK_K, BLOCK_D), ACC), tl.zeros((BLOCK_K, BLOCK_D), ACC)
    for start in range(0, T, BLOCK_Q):
        i = start + tl.arange(0, BLOCK_Q)
        index_q, side_q = place(window, i, geometry, TH, TW)
        of_row = head.to(tl.int64) * geometry[0] + index_q
        q = load(qkv, index_q, side_q, 3 * heads * D, head * D, D, BLOCK_D)
        do = load(dout, index_q, side_q, heads * D, head * D, D, BLOCK_D)
        sums = tl.load(lse + of_row, mask=side_q >= 0, other=float("inf"))
        d = tl.load(delta + of_row, mask=side_q >= 0, other=0.0)
        left = inverse_length(q, COSINE, ACC) * by_factor
        logits = logits_of(q, k, left, right, load_bias(bias, i, j, T, ACC), side_q, side_k, ACC)
        weights, dweights = weights_of(logits, sums, do, v, ACC)
        dv += product(tl.trans(weights.to(do.dtype)), do, ACC)
        dk += fine_product(tl.trans(weights * (dweights - d[:, None]) * left[:, None]), q, ACC)
    if COSINE:  # lengths do not count
        unit = k.to(ACC) * right[:, None]
        dk -= unit * tl.sum(unit * dk, axis=1)[:, None]
    store(dqkv, index_k, side_k, 3 * heads * D, (heads + head) * D, dk * right[:, None], D, BLOCK_D)
    store(dqkv, index_k, side_k, 3 * heads * D, (2 * heads + head) * D, dv, D, BLOCK_D)


@triton.jit
def bias_program(
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
    """A tile of the bias: its gradient over every n-th window, in an order that is always the same."""
    ACC: tl.constexpr = lse.dtype.element_ty
    T: tl.constexpr = TH * TW
    head, heads = tl.program_id(1), tl.num_programs(1)
    i = tl.program_id(0) // tl.cdiv(T, BLOCK_K) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    j = tl.program_id(0) % tl.cdiv(T, BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    scores = load_bias(bias, i, j, T, ACC)
    by_factor = tl.load(factor + head).to(ACC)
    summed = tl.zeros((BLOCK_Q, BLOCK_K), ACC)
    for window in range(tl.program_id(2), num_windows, tl.num_programs(2)):
        index_q, side_q = place(window, i, geometry, TH, TW)
        index_k, side_k = place(window, j, geometry, TH, TW)
        of_row = head.to(tl.int64) * geometry[0] + index_q
        q = load(qkv, index_q, side_q, 3 * heads * D, head * D, D, BLOCK_D)
        k = load(qkv, index_k, side_k, 3 * heads * D, (heads + head) * D, D, BLOCK_D)
        v = load(qkv, index_k, side_k, 3 * heads * D, (2 * heads + head) * D, D, BLOCK_D)
        do = load(dout, index_q, side_q, heads * D, head * D, D, BLOCK_D)
        sums = tl.load(lse + of_row, mask=side_q >= 0, other=float("inf"))
        d = tl.load(delta + of_row, mask=side_q >= 0, other=0.0)
        left, right = inverse_length(q, COSINE, ACC) * by_factor, inverse_length(k, COSINE, ACC)
        logits = logits_of(q, k, left, right, scores, side_q, side_k, ACC)
        weights, dweights = weights_of(logits, sums, do, v, ACC)
        summed += weights * (dweights - d[:, None])
    at = (tl.program_id(2) * heads + head).to(tl.int64) * T * T + i[:, None] * T + j[None, :]
    tl.store(dbias + at, summed, mask=(i < T)[:, None] & (j < T)[None, :])
