"""Attention chunk by chunk: the same numbers as at once, with the logits of one chunk in memory at a time.

An image of 1536 px has 2.4 billion logits in every block of the first stage of 3b with windows of 32 tokens, so Swin V2
computes its attention sequentially there (arXiv 2111.09883, section 3.5). Nothing but what goes in is kept for the
gradient: the weights of a chunk are computed again from its queries and keys.

Letters: b batch, n windows, t tokens per window, m heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Chunk = tuple[slice, slice]
"""Windows and heads."""
Scale = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Queries, keys and a factor of each head -> queries and keys whose products are the logits."""


def attend_in_chunks(
    scale: Scale, q: Tensor, k: Tensor, v: Tensor, factor: Tensor, bias: Tensor, mask: Tensor | None, chunks: int
) -> Tensor:
    """``softmax(q k^T + bias) v`` with q and k scaled, without ever holding all logits.

    Args:
        q, k, v: ``(b n, m, t, d)``
        factor: ``(m, 1, 1)``
        bias: ``(m, t, t)``
        mask: bool ``(n, t, t)``, True where attention is allowed; None allows everything.
        chunks: of the windows; of the heads too where there are fewer windows than chunks.

    Returns:
        ``(b n, m, t, d)``
    """
    attended: Tensor = _Sequential.apply(scale, q, k, v, factor, bias, mask, chunks)
    return attended


def cut(windows: int, heads: int, chunks: int) -> Iterator[Chunk]:
    """At least ``chunks`` chunks, if there are so many windows and heads together."""
    of_windows = min(chunks, windows)
    of_heads = min(-(-chunks // of_windows), heads)
    for i in range(of_windows):
        some_windows = slice(i * windows // of_windows, (i + 1) * windows // of_windows)
        for j in range(of_heads):
            yield some_windows, slice(j * heads // of_heads, (j + 1) * heads // of_heads)


def no_autocast(device_type: str) -> AbstractContextManager:
    """The meta device, where shapes are planned, has no autocast to switch off."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precision loses the differences of large logits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _Sequential(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        scale: Scale,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        factor: Tensor,
        bias: Tensor,
        mask: Tensor | None,
        chunks: int,
    ) -> Tensor:
        context.save_for_backward(q, k, v, factor, bias, mask)
        context.scale, context.chunks = scale, chunks
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        for chunk in cut(q.shape[0], q.shape[1], chunks):
            heads = chunk[1]
            scaled = scale(at_least_fp32(q[chunk]), at_least_fp32(k[chunk]), factor[heads])
            out[chunk] = _weights(*scaled, bias[heads], mask, chunk[0]).to(v.dtype) @ v[chunk]
        return out

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, factor, bias, mask = context.saved_tensors
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        dfactor, dbias = torch.zeros_like(factor), torch.zeros_like(bias)
        with no_autocast(q.device.type):
            for chunk in cut(q.shape[0], q.shape[1], context.chunks):
                windows, heads = chunk
                inputs = [at_least_fp32(q[chunk]), at_least_fp32(k[chunk]), factor[heads]]
                inputs = [x.detach().requires_grad_() for x in inputs]
                with torch.enable_grad():
                    scaled = context.scale(*inputs)
                left, right = (x.detach() for x in scaled)
                weights = _weights(left, right, bias[heads], mask, windows)
                dv[chunk] = weights.to(v.dtype).transpose(-2, -1) @ gradient[chunk]
                # Of the softmax: weights * (incoming - its mean by the weights of the row), in place.
                dlogits = (gradient[chunk] @ v[chunk].transpose(-2, -1)).to(weights.dtype).mul_(weights)
                dlogits.addcmul_(weights, dlogits.sum(dim=-1, keepdim=True), value=-1)
                del weights
                dbias[heads] += dlogits.sum(dim=0)
                outer = [dlogits @ right, dlogits.transpose(-2, -1) @ left]
                del dlogits
                of_q, of_k, of_factor = torch.autograd.grad(scaled, inputs, outer, allow_unused=True)
                dq[chunk], dk[chunk] = of_q, of_k
                dfactor[heads] += of_factor
        return None, dq, dk, dv, dfactor, dbias, None, None


def masked_logits(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None, windows: slice) -> Tensor:
    """Of some windows; q and k are scaled; -inf where attention is not allowed."""
    logits = q @ k.transpose(-2, -1) + bias  # the product itself may be kept by checkpointing, and must stay as it is
    if mask is not None:
        of_windows = torch.arange(windows.start, windows.stop, device=mask.device) % len(mask)
        logits.masked_fill_(~mask[of_windows][:, None], float("-inf"))
    return logits


def _weights(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None, windows: slice) -> Tensor:
    return masked_logits(q, k, bias, mask, windows).softmax(dim=-1)
