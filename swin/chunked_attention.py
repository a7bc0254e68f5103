"""Attention chunk by chunk: the same numbers as at once, with the logits of one chunk in memory at a time.

An image of 1536 px has 2.4 billion logits in every block of the first stage of 3b with windows of 32 tokens, so Swin V2
computes its attention sequentially there (arXiv 2111.09883, section 3.5). On a processor chunks that stay in its cache
are the quickest too. Nothing but what goes in is kept for the gradient: the weights of a chunk are computed again from
its queries and keys.

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
"""Windows and heads."""
CACHE = 2**20
"""Bytes of logits, which are gone through several times."""
SMALLEST_NORM = 1e-12  # of torch.nn.functional.normalize


def attend(qkv: Tensor, factor: Tensor, bias: Tensor, mask: Tensor | None, *, cosine: bool, chunks: int = 1) -> Tensor:
    """``softmax(factor similarity(q, k) + bias) v``; logits and softmax in at least fp32.

    Args:
        qkv: queries, keys and values side by side, ``(b n, t, 3 c)``.
        factor: what each head multiplies its similarities by, ``(m, 1, 1)``.
        bias: ``(m, t, t)``
        mask: bool ``(n, t, t)``, True where attention is allowed; None allows everything.
        cosine: similarity is the cosine (Swin V2), not the product (V1).
        chunks: at least so many; of the windows, and of the heads where there are fewer windows than chunks.

    Returns:
        ``(b n, t, c)``, heads side by side.
    """
    with no_autocast(qkv.device.type):
        factor, bias = at_least_fp32(factor), at_least_fp32(bias)  # of a model that is in half precision as a whole
        attended: Tensor = _Sequential.apply(qkv, factor, bias, mask, cosine, chunks)
    return attended


def cut(windows: int, heads: int, chunks: int) -> Iterator[Chunk]:
    """At least ``chunks`` chunks, if there are so many windows and heads together."""
    of_windows = min(chunks, windows)
    of_heads = min(-(-chunks // of_windows), heads)
    for i in range(of_windows):
        some_windows = slice(i * windows // of_windows, (i + 1) * windows // of_windows)
        for j in range(of_heads):
            yield some_windows, slice(j * heads // of_heads, (j + 1) * heads // of_heads)


def chunks_in_cache(windows: int, bias: Tensor) -> int:
    """So many that a processor's cache holds the logits of one of them, where windows and heads are enough."""
    return -(-windows * bias.numel() * max(bias.element_size(), 4) // CACHE)


def no_autocast(device_type: str) -> AbstractContextManager:
    """The meta device, where shapes are planned, has no autocast to switch off."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precision loses the differences of large logits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def split_heads(x: Tensor, parts: int, heads: int) -> Tensor:
    """``(b n, t, parts m d)`` -> ``(parts, b n, m, t, d)``, a view; three parts are queries, keys and values."""
    windows, tokens, width = x.shape
    return x.view(windows, tokens, parts, heads, width // parts // heads).permute(2, 0, 3, 1, 4)


class Scaled(NamedTuple):
    """Queries or keys ``(g, m, t, d)``, contiguous, whose products are the logits."""

    x: Tensor
    by: Tensor
    """What they were multiplied by, ``(g, m, t, 1)`` or ``(m, 1, 1)``."""


def scale(x: Tensor, factor: Tensor | float, cosine: bool) -> Scaled:
    """Scaling them touches t x d numbers; scaling the logits would touch t x t."""
    x = at_least_fp32(x).contiguous()
    by = x.norm(dim=-1, keepdim=True).clamp(min=SMALLEST_NORM).reciprocal() if cosine else x.new_ones(())
    by = by * factor
    return Scaled(x * by, by)


def masked_logits(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None, windows: slice) -> Tensor:
    """``(g, m, t, t)`` of some windows; q and k are scaled; -inf where attention is not allowed."""
    bias = at_least_fp32(bias)
    logits = bias.new_empty(len(q), *bias.shape)
    if mask is None:
        logits.copy_(bias)
    else:
        of_windows = torch.arange(windows.start, windows.stop, device=mask.device) % len(mask)
        # 1 - 1/1 or 1 - 1/0: the same as filling with -inf, in a fifth of the time on a processor.
        torch.add(bias, (1 - mask[of_windows].to(bias.dtype).reciprocal())[:, None], out=logits)
    flat = logits.flatten(0, 1)
    torch.baddbmm(flat, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), out=flat)
    return logits


class _Sequential(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, qkv: Tensor, factor: Tensor, bias: Tensor, mask: Tensor | None, cosine: bool, chunks: int
    ) -> Tensor:
        q, k, v = split_heads(qkv, 3, len(bias))
        out = qkv.new_empty(len(qkv), qkv.shape[1], qkv.shape[2] // 3)
        by_head = split_heads(out, 1, len(bias))[0]
        for windows, heads in cut(len(qkv), len(bias), chunks):
            chunk = windows, heads
            left, right = scale(q[chunk], factor[heads], cosine).x, scale(k[chunk], 1.0, cosine).x
            weights = masked_logits(left, right, bias[heads], mask, windows).softmax(dim=-1)
            by_head[chunk] = weights.to(v.dtype) @ v[chunk]
        context.save_for_backward(qkv, factor, bias, mask)
        context.cosine, context.chunks = cosine, chunks
        return out

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        qkv, factor, bias, mask = context.saved_tensors
        dqkv, dfactor, dbias = torch.empty_like(qkv), torch.zeros_like(factor), torch.zeros_like(bias)
        (q, k, v), (dq, dk, dv) = split_heads(qkv, 3, len(bias)), split_heads(dqkv, 3, len(bias))
        gradient = split_heads(gradient.contiguous(), 1, len(bias))[0]
        with no_autocast(qkv.device.type):
            for windows, heads in cut(len(qkv), len(bias), context.chunks):
                chunk = windows, heads
                left, right = scale(q[chunk], factor[heads], context.cosine), scale(k[chunk], 1.0, context.cosine)
                incoming = gradient[chunk].contiguous()
                weights = masked_logits(left.x, right.x, bias[heads], mask, windows).softmax(dim=-1)
                dv[chunk] = weights.to(v.dtype).transpose(-2, -1) @ incoming
                dweights = (incoming @ v[chunk].transpose(-2, -1)).to(weights.dtype)
                dlogits = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
                dbias[heads] += dlogits.sum(dim=0) if len(dlogits) > 1 else dlogits[0]
                dleft, dright = dlogits @ right.x, dlogits.transpose(-2, -1) @ left.x
                along = (left.x * dleft).sum(dim=-1, keepdim=True)
                dfactor[heads] += along.sum(dim=(0, 2))[:, None] / factor[heads]
                if context.cosine:  # lengths do not count
                    dleft.addcmul_(left.x, along / factor[heads].square(), value=-1)
                    dright.addcmul_(right.x, (right.x * dright).sum(dim=-1, keepdim=True), value=-1)
                dq[chunk], dk[chunk] = dleft.mul_(left.by), dright.mul_(right.by)
        return dqkv, dfactor, dbias, None, None, None
