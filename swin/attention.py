"""Attention inside windows: scaled cosine (Swin V2, section 3.2, equation 2) and scaled dot product (V1).

Letters: b batch, h w token grid, n windows, t tokens per window, c channels, m heads, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from swin.chunked_attention import (
    at_least_fp32,
    attend,
    chunks_in_cache,
    cut,
    masked_logits,
    no_autocast,
    scale,
    split_heads,
)
from swin.linear import Linear
from swin.position_bias import ContinuousBias, PositionBias
from swin.triton_attention import attend_windows
from swin.windows import WindowLayout, attention_mask, window_partition, window_reverse

MAX_LOGIT_SCALE = math.log(100)  # tau never below 0.01


class WindowAttention(nn.Module):
    """``softmax(similarity(q, k) + B) v``; the two kinds below say how tokens become q, k, v and logits.

    Logits and softmax are computed in at least fp32, whatever autocast says. With ``chunks`` above 1 they are computed
    one after the other, see :mod:`swin.chunked_attention`; with ``fused`` by the kernel of :mod:`swin.triton_attention`.
    """

    fused = False
    chunks = 1
    in_cache = True
    """On a processor, chunks that its cache can hold, which are the quickest."""
    cosine = False

    def __init__(self, dim: int, num_heads: int, position_bias: PositionBias, *, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        # Official weights call the network of a continuous bias `cpb_mlp`.
        self._bias_name = "cpb_mlp" if isinstance(position_bias, ContinuousBias) else "relative_position_bias"
        self.add_module(self._bias_name, position_bias)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    @property
    def position_bias(self) -> PositionBias:
        return getattr(self, self._bias_name)

    def forward(self, x: Tensor, windows: WindowLayout) -> Tensor:
        """Every token mixed with those of its window: ``(b, h, w, c)`` -> ``(b, h, w, c)``."""
        with no_autocast(x.device.type):
            bias, factor = self.position_bias(windows.window), self.factor()
        is_compiling = torch.compiler.is_compiling()
        if self.fused and not is_compiling:
            return self.proj(attend_windows(self.project(x), factor, bias, windows, cosine=self.cosine))
        tokens, mask = _cut_out(x, windows)
        if is_compiling:  # what is traced is handed on, or compilers cut it as they like
            attended = self.reference_attention(tokens, factor, bias, mask)
        else:
            qkv, chunks = self.project(tokens), self._chunks(len(tokens), bias)
            attended = attend(qkv, factor, bias, mask, cosine=self.cosine, chunks=chunks)
        return window_reverse(self.proj(attended), windows, tuple(x.shape[1:-1]))

    def _chunks(self, windows: int, bias: Tensor) -> int:
        if self.in_cache and bias.device.type == "cpu":
            return max(self.chunks, chunks_in_cache(windows, bias))
        return self.chunks

    def reference_attention(self, x: Tensor, factor: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        """The same by plain operations: what :func:`swin.chunked_attention.attend` is held against."""
        q, k, v = self.split(x)
        with no_autocast(x.device.type):
            if mask is not None:
                bias = bias.masked_fill(~mask[:, None], -math.inf)  # (n, m, t, t), shared by the batch
            q, k = at_least_fp32(q), at_least_fp32(k)
            if self.cosine:
                q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            logits = (q * factor) @ k.transpose(-2, -1)
            logits = logits.unflatten(0, (-1, len(bias) if mask is not None else 1)) + bias
            weights = logits.softmax(dim=-1).flatten(0, 1)
            return rearrange(weights.to(v.dtype) @ v, "bn m t d -> bn t (m d)")

    def logits(self, x: Tensor, windows: WindowLayout) -> Tensor:
        """What :meth:`forward` takes the softmax of, ``(b n, m, t, t)``; -inf where attention is not allowed."""
        tokens, mask = _cut_out(x, windows)
        q, k, _ = self.split(tokens)
        with no_autocast(x.device.type):
            q, k = self.scale(q, k, self.factor())
            return masked_logits(q, k, self.position_bias(windows.window), mask, slice(0, len(tokens)))

    def largest_logit(self, x: Tensor, windows: WindowLayout) -> Tensor:
        """The maximum of :meth:`logits`, of as many at once as chunks hold."""
        tokens, mask = _cut_out(x, windows)
        q, k, _ = self.split(tokens)
        largest = []
        with no_autocast(x.device.type):
            bias, factor = self.position_bias(windows.window), self.factor()
            for some, heads in cut(len(q), self.num_heads, self._chunks(len(q), bias)):
                left, right = self.scale(q[some, heads], k[some, heads], factor[heads])
                largest.append(masked_logits(left, right, bias[heads], mask, some).max())
        return torch.stack(largest).max()

    def attention(self, x: Tensor, windows: WindowLayout) -> Tensor:
        """What every token of a window attends to: ``(b n, m, t, t)``, rows that sum to one; to be looked at."""
        return self.logits(x, windows).softmax(dim=-1)

    def heads_at_clamp(self) -> int:
        """Heads whose temperature has reached its lowest value, where it learns no more."""
        return 0

    def project(self, x: Tensor) -> Tensor:
        """Tokens ``(b n, t, c)`` -> queries, keys and values side by side ``(b n, t, 3 c)``."""
        return self.qkv(x)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``(b n, t, c)`` -> queries, keys and values of every head, ``(b n, m, t, d)`` each."""
        q, k, v = split_heads(self.project(x), 3, self.num_heads)
        return q, k, v

    def factor(self) -> Tensor:
        """What each head multiplies its similarities by: ``(m, 1, 1)``."""
        raise NotImplementedError

    def scale(self, q: Tensor, k: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys ``(b n, m, t, d)`` such that their products are the logits."""
        return scale(q, factor, self.cosine).x, scale(k, 1.0, self.cosine).x

    def no_decay_parameters(self) -> set[nn.Parameter]:
        """Parameters with more than one axis that are no weights of a linear map over channels."""
        return set(self.position_bias.parameters())


class DotAttention(WindowAttention):
    """``q k / sqrt(d)`` with full biases (Swin V1, equation 4)."""

    def __init__(self, dim: int, num_heads: int, position_bias: PositionBias) -> None:
        super().__init__(dim, num_heads, position_bias, qkv_bias=True)

    def factor(self) -> Tensor:
        width = self.proj.in_features // self.num_heads
        return self.proj.weight.new_full((self.num_heads, 1, 1), width**-0.5)


class CosineAttention(WindowAttention):
    """``cos(q, k) / tau`` with one learnable tau per head (Swin V2, equation 2).

    The key has no bias of its own (official code). In half precision the normalisation would
    underflow and logits of up to 100 lose their differences.
    """

    cosine = True

    def __init__(self, dim: int, num_heads: int, position_bias: PositionBias) -> None:
        super().__init__(dim, num_heads, position_bias, qkv_bias=False)
        self.logit_scale = nn.Parameter(torch.empty(num_heads, 1, 1))
        self.q_bias = nn.Parameter(torch.empty(dim))
        self.v_bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.logit_scale, math.log(10))
        nn.init.zeros_(self.q_bias)
        nn.init.zeros_(self.v_bias)

    def project(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))

    def factor(self) -> Tensor:
        return self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()

    def heads_at_clamp(self) -> int:
        return int((self.logit_scale >= MAX_LOGIT_SCALE).sum())

    def no_decay_parameters(self) -> set[nn.Parameter]:
        return super().no_decay_parameters() | {self.logit_scale}


ATTENTIONS: dict[str, type[DotAttention] | type[CosineAttention]] = {"cosine": CosineAttention, "dot": DotAttention}


def _cut_out(x: Tensor, windows: WindowLayout) -> tuple[Tensor, Tensor | None]:
    """``(b, h, w, c)`` -> the tokens of each window ``(b n, t, c)``, and which of them may attend to which."""
    return window_partition(x, windows), attention_mask(tuple(x.shape[1:-1]), windows, x.device)


@contextmanager
def watch_attention(model: nn.Module) -> Iterator[dict[str, float]]:
    """Collect ``max_attention_logit`` and ``heads_at_clamp`` over all attention of one forward pass.

    The logits are computed once more for it. What is collected is there when the context ends.
    """
    numbers: dict[str, float] = {}
    largest: list[Tensor] = []
    heads: list[int] = []

    @torch.no_grad()
    def look(attention: nn.Module, arguments: tuple) -> None:
        assert isinstance(attention, WindowAttention)
        largest.append(attention.largest_logit(*arguments))
        heads.append(attention.heads_at_clamp())

    hooks = [
        module.register_forward_pre_hook(look) for module in model.modules() if isinstance(module, WindowAttention)
    ]
    try:
        yield numbers
    finally:
        for hook in hooks:
            hook.remove()
    if largest:
        numbers |= {"max_attention_logit": float(torch.stack(largest).max()), "heads_at_clamp": float(sum(heads))}
