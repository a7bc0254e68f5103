"""Window attention as one kernel: the numbers of :func:`swin.chunked_attention.attend`, with no logits in memory at all.

Nothing is padded, rolled or cut into windows either: the kernel looks its tokens up where they lie on the grid. The
programs themselves are in :mod:`swin.triton_kernels`, which is only imported where Triton is there to run them.

Letters: b batch, h w token grid, n windows, t tokens per window, c channels, m heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swin.config import Pair
from swin.windows import WindowLayout

PROGRAMS = 2048
"""So many add up the gradient of a bias, each over its share of the windows, where there are windows enough: some for
every multiprocessor of a large GPU."""


def available(device: torch.device) -> bool:
    """Whether Triton is installed and runs there: on a GPU, or on the processor with ``TRITON_INTERPRET=1``."""
    try:
        import triton
    except ImportError:
        return False
    return device.type == "cuda" or (device.type == "cpu" and bool(triton.knobs.runtime.interpret))


def attend_windows(qkv: Tensor, factor: Tensor, bias: Tensor, windows: WindowLayout, *, cosine: bool) -> Tensor:
    """``softmax(factor similarity(q, k) + bias) v`` inside windows; logits and softmax in at least fp32.

    Args:
        qkv: queries, keys and values side by side on the grid, ``(b, h, w, 3 c)``, neither padded nor rolled.
        factor: what each head multiplies its similarities by, ``(m, 1, 1)``.
        bias: ``(m, t, t)``
        windows: how the grid is cut.
        cosine: similarity is the cosine (Swin V2), not the product (V1).

    Returns:
        ``(b, h, w, c)``, heads side by side.
    """
    attended: Tensor = _Attend.apply(qkv, factor, bias, windows, cosine)
    return attended


def blocks(tokens: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Queries and keys of a program, and its warps: what compiles for sm_90 and hardly leaves the registers.

    A function of sizes alone: what is chosen by the clock would round differently when a run is continued.
    """
    half = dtype.itemsize == 2
    side = min(64 if half else 32 if width <= 32 else 16, max(16, 1 << (tokens - 1).bit_length()))
    return {"BLOCK_Q": side, "BLOCK_K": side, "num_warps": 4 if half and tokens <= 64 and width <= 32 else 8}


def _constants(windows: WindowLayout, width: int, dtype: torch.dtype, cosine: bool) -> dict[str, Any]:
    (th, tw), block_d = windows.window, max(16, 1 << (width - 1).bit_length())
    sizes = {"TH": th, "TW": tw, "D": width, "BLOCK_D": block_d, "COSINE": cosine}
    return {**sizes, **blocks(th * tw, width, dtype), "enable_fp_fusion": True}


def _geometry(batch: int, grid: Pair, windows: WindowLayout) -> tuple[int, ...]:
    """Tokens of all grids, the grid, windows along its axes, the shift."""
    (h, w), (th, tw), (bottom, right) = grid, windows.window, windows.padding
    return batch * h * w, h, w, (h + bottom) // th, (w + right) // tw, *windows.shift


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, qkv: Tensor, factor: Tensor, bias: Tensor, windows: WindowLayout, cosine: bool) -> Tensor:
        from swin.triton_kernels import attend_program

        qkv, factor, bias = qkv.contiguous(), factor.contiguous(), bias.contiguous()
        (b, h, w, width), m = qkv.shape, len(bias)
        geometry, constants = _geometry(b, (h, w), windows), _constants(windows, width // 3 // m, qkv.dtype, cosine)
        out = qkv.new_empty(b, h, w, width // 3)
        lse = torch.empty(m, b, h, w, dtype=torch.promote_types(qkv.dtype, torch.float32), device=qkv.device)
        programs = b * geometry[3] * geometry[4] * -(-bias.shape[1] // constants["BLOCK_Q"])
        with torch.cuda.device_of(qkv):
            attend_program[programs, m](qkv, factor, bias, out, lse, geometry, **constants)
        context.save_for_backward(qkv, factor, bias, lse)
        context.geometry, context.constants = geometry, constants
        return out

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from swin.triton_kernels import bias_program, keys_program, queries_program

        qkv, factor, bias, lse = context.saved_tensors
        gradient, geometry, constants = gradient.contiguous(), context.geometry, context.constants
        num_windows, (m, t, _) = len(qkv) * geometry[3] * geometry[4], bias.shape
        of_queries, of_keys = -(-t // constants["BLOCK_Q"]), -(-t // constants["BLOCK_K"])
        dqkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
        dfactor, dbias = lse.new_empty(m, num_windows * of_queries), None
        with torch.cuda.device_of(qkv):
            given = qkv, factor, bias, lse, gradient, delta
            queries_program[num_windows * of_queries, m](*given, dqkv, dfactor, geometry, **constants)
            keys_program[num_windows * of_keys, m](*given, dqkv, geometry, **constants)
            if context.needs_input_grad[2]:
                shares = min(num_windows, -(-PROGRAMS // (m * of_queries * of_keys)))
                of_shares = lse.new_empty(shares, m, t, t)
                bias_program[of_queries * of_keys, m, shares](*given, of_shares, num_windows, geometry, **constants)
                dbias = of_shares.sum(dim=0).to(bias.dtype)
        return dqkv, dfactor.sum(dim=1).to(factor.dtype).view_as(factor), dbias, None, None
