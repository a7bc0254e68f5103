"""Window attention as a fused kernel, equivalent to :func:`swin.chunked_attention.attend` without storing any logits.

The grid is not padded, rolled or partitioned: the kernels compute the position of every token on the grid. They are
defined in :mod:`swin.triton_kernels`, which is imported only when they run, because it needs Triton.

Letters: b batch, h w token grid, n windows, t tokens per window, c channels, m heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swin.config import Pair
from swin.windows import WindowLayout

BIAS_PROGRAMS = 2048
"""Number of programs that compute the gradient of the bias, each over a part of the windows, if there are enough
windows. It gives every multiprocessor of a large GPU several programs."""


def available(device: torch.device) -> bool:
    """Return whether Triton is installed and runs on the device: a GPU, or the CPU with ``TRITON_INTERPRET=1``."""
    try:
        import triton
    except ImportError:
        return False
    return device.type == "cuda" or (device.type == "cpu" and bool(triton.knobs.runtime.interpret))


def attend_windows(qkv: Tensor, factor: Tensor, bias: Tensor, windows: WindowLayout, *, cosine: bool) -> Tensor:
    """Compute ``softmax(factor * similarity(q, k) + bias) v`` within windows, logits and softmax in at least fp32.

    Args:
        qkv: queries, keys and values, concatenated, on the grid: ``(b, h, w, 3 c)``, neither padded nor rolled.
        factor: scale of the similarities per head, ``(m, 1, 1)``.
        bias: position bias, ``(m, t, t)``.
        windows: window size, shift and padding.
        cosine: similarity is the cosine (Swin V2) instead of the dot product (V1).

    Returns:
        ``(b, h, w, c)``, the heads concatenated.
    """
    attended: Tensor = FusedAttention.apply(qkv, factor, bias, windows, cosine)
    return attended


def block_sizes(tokens: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Choose the numbers of queries, keys and warps per program so that sm_90 spills few registers.

    The choice depends on sizes only. Autotuning by time could choose differently when a run is resumed, which would
    change the rounding.
    """
    half = dtype.itemsize == 2
    side = min(64 if half else 32 if width <= 32 else 16, max(16, 1 << (tokens - 1).bit_length()))
    return {"BLOCK_Q": side, "BLOCK_K": side, "num_warps": 4 if half and tokens <= 64 and width <= 32 else 8}


def _constants(windows: WindowLayout, width: int, dtype: torch.dtype, cosine: bool) -> dict[str, Any]:
    """Return the compile-time arguments of the kernels."""
    (th, tw), block_d = windows.window, max(16, 1 << (width - 1).bit_length())
    sizes = {"TH": th, "TW": tw, "D": width, "BLOCK_D": block_d, "COSINE": cosine}
    return {**sizes, **block_sizes(th * tw, width, dtype), "enable_fp_fusion": True}


def _geometry(batch: int, grid: Pair, windows: WindowLayout) -> tuple[int, ...]:
    """Return the argument ``geometry`` of the kernels, see :mod:`swin.triton_kernels`."""
    (h, w), (th, tw), (bottom, right) = grid, windows.window, windows.padding
    return batch * h * w, h, w, (h + bottom) // th, (w + right) // tw, *windows.shift


class FusedAttention(torch.autograd.Function):
    """Autograd function that launches the kernels; saves qkv and the log-sum-exp of every row of logits."""

    @staticmethod
    def forward(context: Any, qkv: Tensor, factor: Tensor, bias: Tensor, windows: WindowLayout, cosine: bool) -> Tensor:
        from swin.triton_kernels import attention_kernel

        qkv, factor, bias = qkv.contiguous(), factor.contiguous(), bias.contiguous()
        (b, h, w, width), m = qkv.shape, len(bias)
        geometry, constants = _geometry(b, (h, w), windows), _constants(windows, width // 3 // m, qkv.dtype, cosine)
        out = qkv.new_empty(b, h, w, width // 3)
        lse = torch.empty(m, b, h, w, dtype=torch.promote_types(qkv.dtype, torch.float32), device=qkv.device)
        programs = b * geometry[3] * geometry[4] * -(-bias.shape[1] // constants["BLOCK_Q"])
        with torch.cuda.device_of(qkv):
            attention_kernel[programs, m](qkv, factor, bias, out, lse, geometry, **constants)
        context.save_for_backward(qkv, factor, bias, lse)
        context.geometry, context.constants = geometry, constants
        return out

    @staticmethod
    @once_differentiable
    def backward(context: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        from swin.triton_kernels import bias_gradient_kernel, key_gradient_kernel, query_gradient_kernel

        qkv, factor, bias, lse = context.saved_tensors
        dout, geometry, constants = dout.contiguous(), context.geometry, context.constants
        num_windows, (m, t, _) = len(qkv) * geometry[3] * geometry[4], bias.shape
        query_blocks, key_blocks = -(-t // constants["BLOCK_Q"]), -(-t // constants["BLOCK_K"])
        dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
        dfactor, dbias = lse.new_empty(m, num_windows * query_blocks), None
        with torch.cuda.device_of(qkv):
            inputs = qkv, factor, bias, lse, dout, delta
            # The first kernel also writes delta, which the other two read.
            query_gradient_kernel[num_windows * query_blocks, m](*inputs, dqkv, dfactor, geometry, **constants)
            key_gradient_kernel[num_windows * key_blocks, m](*inputs, dqkv, geometry, **constants)
            if context.needs_input_grad[2]:
                tiles = query_blocks * key_blocks
                parts = min(num_windows, -(-BIAS_PROGRAMS // (m * tiles)))
                partial_dbias = lse.new_empty(parts, m, t, t)
                bias_gradient_kernel[tiles, m, parts](*inputs, partial_dbias, num_windows, geometry, **constants)
                dbias = partial_dbias.sum(dim=0).to(bias.dtype)
        return dqkv, dfactor.sum(dim=1).to(factor.dtype).view_as(factor), dbias, None, None
