"""Attention computed chunk by chunk: the same results with the logits of only one chunk in memory at a time.

An image of 1536 px has 2.4 billion logits in every block of the first stage of 3b with windows of 32 tokens, so Swin V2
computes its attention sequentially there (arXiv 2111.09883, section 3.5). On a CPU, chunks that fit into its cache are
also the fastest. Only the inputs are saved for the backward pass, which recomputes the attention weights of each chunk
from its queries and keys.

Letters: b batch, n windows, t tokens per window, c channels, m heads, d head width, g windows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Chunk = tuple[slice, slice]
"""The windows and the heads of one chunk."""
CACHE_BYTES = 2**20
"""Size of the logits of a chunk on a CPU. They are read several times, so they should stay in the cache."""
SMALLEST_NORM = 1e-12  # the eps of torch.nn.functional.normalize


def attend(qkv: Tensor, factor: Tensor, bias: Tensor, mask: Tensor | None, *, cosine: bool, chunks: int = 1) -> Tensor:
    """Compute ``softmax(factor * similarity(q, k) + bias) v`` with logits and softmax in at least fp32.

    Args:
        qkv: queries, keys and values, concatenated: ``(b n, t, 3 c)``.
        factor: scale of the similarities per head, ``(m, 1, 1)``.
        bias: position bias, ``(m, t, t)``.
        mask: bool ``(n, t, t)``, True where attention is allowed; None allows everything.
        cosine: similarity is the cosine (Swin V2) instead of the dot product (V1).
        chunks: minimum number of chunks. Windows are split first, then heads if there are fewer windows than chunks.

    Returns:
        ``(b n, t, c)``, the heads concatenated.
    """
    with no_autocast(qkv.device.type):
        factor, bias = at_least_fp32(factor), at_least_fp32(bias)  # a model may be entirely in half precision
        attended: Tensor = ChunkedAttention.apply(qkv, factor, bias, mask, cosine, chunks)
    return attended


def split_chunks(windows: int, heads: int, chunks: int) -> Iterator[Chunk]:
    """Split all windows and heads into at least ``chunks`` chunks, at most one per window and head."""
    window_parts = min(chunks, windows)
    head_parts = min(-(-chunks // window_parts), heads)
    for i in range(window_parts):
        chunk_windows = slice(i * windows // window_parts, (i + 1) * windows // window_parts)
        for j in range(head_parts):
            yield chunk_windows, slice(j * heads // head_parts, (j + 1) * heads // head_parts)


def chunks_in_cache(windows: int, bias: Tensor) -> int:
    """Return the number of chunks at which the fp32 logits of one chunk fit into ``CACHE_BYTES``."""
    return -(-windows * bias.numel() * max(bias.element_size(), 4) // CACHE_BYTES)


def no_autocast(device_type: str) -> AbstractContextManager:
    """Disable autocast; a device that has none, such as meta, needs nothing."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def at_least_fp32(x: Tensor) -> Tensor:
    """Convert half precision to fp32, because it cannot represent small differences between large logits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def split_heads(x: Tensor, parts: int, heads: int) -> Tensor:
    """View ``(b n, t, parts m d)`` as ``(parts, b n, m, t, d)``; the three parts are queries, keys and values."""
    windows, tokens, width = x.shape
    return x.view(windows, tokens, parts, heads, width // parts // heads).permute(2, 0, 3, 1, 4)


class Scaled(NamedTuple):
    """Queries or keys after scaling."""

    x: Tensor
    """Scaled queries or keys ``(g, m, t, d)``, contiguous. Products of scaled queries and keys are the logits."""
    multiplier: Tensor
    """The factor they were multiplied by, ``(g, m, t, 1)`` or ``(m, 1, 1)``."""


def scale(x: Tensor, factor: Tensor | float, cosine: bool) -> Scaled:
    """Multiply queries or keys by ``factor``, after normalizing them to length 1 if ``cosine``.

    Scaling them touches t x d numbers per head; scaling the logits instead would touch t x t.
    """
    x = at_least_fp32(x).contiguous()
    multiplier = x.norm(dim=-1, keepdim=True).clamp(min=SMALLEST_NORM).reciprocal() if cosine else x.new_ones(())
    multiplier = multiplier * factor
    return Scaled(x * multiplier, multiplier)


def masked_logits(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None, windows: slice) -> Tensor:
    """Compute the logits ``(g, m, t, t)`` of a slice of windows from scaled q and k; -inf where the mask is False."""
    bias = at_least_fp32(bias)
    logits = bias.new_empty(len(q), *bias.shape)
    if mask is None:
        logits.copy_(bias)
    else:
        # Windows of all images are concatenated, and every image has the same n masks.
        mask_index = torch.arange(windows.start, windows.stop, device=mask.device) % len(mask)
        # 1 - 1/1 = 0 and 1 - 1/0 = -inf: the same as filling with -inf, in a fifth of the time on a CPU.
        torch.add(bias, (1 - mask[mask_index].to(bias.dtype).reciprocal())[:, None], out=logits)
    flat = logits.flatten(0, 1)
    torch.baddbmm(flat, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), out=flat)
    return logits


class ChunkedAttention(torch.autograd.Function):
    """Attention over chunks of windows and heads, with a backward pass that recomputes the weights of each chunk.

    Forward, for one window and one head, with f the factor of the head and B its bias::

        q' = f q / |q|,  k' = k / |k|      (cosine)
        q' = f q,        k' = k            (dot product)
        S  = q' k'^T + B                   (logits, -inf where the mask is False)
        P  = softmax(S)                    (over the keys j of every query i)
        O  = P V

    Backward, with dX the gradient of the loss with respect to X:

    1. Values: ``dV = P^T dO`` and ``dP = dO V^T``.
    2. Softmax: ``∂P_ij / ∂S_il = P_ij (1[j = l] - P_il)``, hence ``dS_ij = P_ij (dP_ij - sum_l P_il dP_il)``.
       Where the mask is False, P and thus dS are 0.
    3. Bias: B is added to the logits of every window, hence ``dB = sum over windows of dS``.
    4. Scaled queries and keys: ``dq' = dS k'`` and ``dk' = dS^T q'``.
    5. Factor: with ``q' = f u``, ``df = sum u . dq' = sum (q' . dq') / f``, over all windows and queries.
    6. Normalization: with ``u = q / |q|``, ``∂q'/∂q = f / |q| (I - u u^T)``, because scaling q does not change u; hence
       ``dq = f / |q| (dq' - u (u . dq'))``, where ``u (u . dq') = q' (q' . dq') / f^2``, as ``u = q' / f``. For keys
       f = 1. With the dot product the second term is absent: ``dq = f dq'``, ``dk = dk'``. A query of length 0 has
       q' = 0, so its second term is 0, as in the gradient of ``torch.nn.functional.normalize``.

    Every window belongs to one chunk per head, so dq, dk and dV are written once; dB and df sum over chunks.
    """

    @staticmethod
    def forward(
        context: Any, qkv: Tensor, factor: Tensor, bias: Tensor, mask: Tensor | None, cosine: bool, chunks: int
    ) -> Tensor:
        q, k, v = split_heads(qkv, 3, len(bias))
        out = qkv.new_empty(len(qkv), qkv.shape[1], qkv.shape[2] // 3)
        out_heads = split_heads(out, 1, len(bias))[0]
        for windows, heads in split_chunks(len(qkv), len(bias), chunks):
            chunk = windows, heads
            scaled_q, scaled_k = scale(q[chunk], factor[heads], cosine).x, scale(k[chunk], 1.0, cosine).x
            weights = masked_logits(scaled_q, scaled_k, bias[heads], mask, windows).softmax(dim=-1)
            out_heads[chunk] = weights.to(v.dtype) @ v[chunk]
        context.save_for_backward(qkv, factor, bias, mask)
        context.cosine, context.chunks = cosine, chunks
        return out

    @staticmethod
    @once_differentiable
    def backward(context: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, factor, bias, mask = context.saved_tensors
        dqkv, dfactor, dbias = torch.empty_like(qkv), torch.zeros_like(factor), torch.zeros_like(bias)
        (q, k, v), (dq, dk, dv) = split_heads(qkv, 3, len(bias)), split_heads(dqkv, 3, len(bias))
        dout = split_heads(dout.contiguous(), 1, len(bias))[0]
        with no_autocast(qkv.device.type):
            for windows, heads in split_chunks(len(qkv), len(bias), context.chunks):
                chunk = windows, heads
                # Recompute q', k' and P as in the forward pass.
                scaled_q, scaled_k = (
                    scale(q[chunk], factor[heads], context.cosine),
                    scale(k[chunk], 1.0, context.cosine),
                )
                weights = masked_logits(scaled_q.x, scaled_k.x, bias[heads], mask, windows).softmax(dim=-1)
                # 1. dV = P^T dO, dP = dO V^T
                chunk_dout = dout[chunk].contiguous()
                dv[chunk] = weights.to(v.dtype).transpose(-2, -1) @ chunk_dout
                dweights = (chunk_dout @ v[chunk].transpose(-2, -1)).to(weights.dtype)
                # 2. dS = P (dP - rowsum(P dP))
                dlogits = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
                # 3. dB = sum over windows of dS
                dbias[heads] += dlogits.sum(dim=0) if len(dlogits) > 1 else dlogits[0]
                # 4. dq' = dS k', dk' = dS^T q'
                dscaled_q, dscaled_k = dlogits @ scaled_k.x, dlogits.transpose(-2, -1) @ scaled_q.x
                # 5. df = sum (q' . dq') / f
                q_dot_dq = (scaled_q.x * dscaled_q).sum(dim=-1, keepdim=True)
                dfactor[heads] += q_dot_dq.sum(dim=(0, 2))[:, None] / factor[heads]
                # 6. Subtract q' (q' . dq') / f^2 and k' (k' . dk'), then multiply by f / |q| and 1 / |k|.
                if context.cosine:
                    dscaled_q.addcmul_(scaled_q.x, q_dot_dq / factor[heads].square(), value=-1)
                    dscaled_k.addcmul_(scaled_k.x, (scaled_k.x * dscaled_k).sum(dim=-1, keepdim=True), value=-1)
                dq[chunk], dk[chunk] = dscaled_q.mul_(scaled_q.multiplier), dscaled_k.mul_(scaled_k.multiplier)
        return dqkv, dfactor, dbias, None, None, None
