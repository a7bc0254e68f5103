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
    masked_logits,
    no_autocast,
    scale,
    split_chunks,
    split_heads,
)
from swin.linear import Linear
from swin.position_bias import BiasTable, ContinuousBias, PositionBias
from swin.triton_attention import attend_windows
from swin.windows import WindowLayout, attention_mask, window_partition, window_reverse

MAX_LOGIT_SCALE = math.log(100)  # keeps tau at 0.01 or above (Swin V2, section 3.2)


class WindowAttention(nn.Module):
    """Base class: ``softmax(similarity(q, k) + B) v`` within windows. Subclasses define q, k, v and the similarity.

    Logits and softmax are computed in at least fp32, also under autocast.
    """

    fused = False
    """True if the kernel of :mod:`swin.triton_attention` is used."""
    chunks = 1
    """Minimum number of chunks in which attention is computed, see :mod:`swin.chunked_attention`."""
    in_cache = True
    """True if, on a CPU, chunks are small enough to fit into its cache, which is fastest."""
    cosine = False
    """True if the similarity is the cosine instead of the dot product."""

    def __init__(self, dim: int, num_heads: int, position_bias: PositionBias, *, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        # One of the two is None. Their names are keys in saved weights, see swin.weights.state_dict_names.
        self.cpb_mlp = position_bias if isinstance(position_bias, ContinuousBias) else None
        self.relative_position_bias = position_bias if isinstance(position_bias, BiasTable) else None
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    @property
    def position_bias(self) -> PositionBias:
        """The relative position bias, continuous or a table."""
        bias = self.cpb_mlp if self.cpb_mlp is not None else self.relative_position_bias
        assert bias is not None
        return bias

    def forward(self, x: Tensor, windows: WindowLayout) -> Tensor:
        """Let every token attend to the tokens of its window: ``(b, h, w, c)`` -> ``(b, h, w, c)``."""
        with no_autocast(x.device.type):
            bias, factor = self.position_bias(windows.window), self.factor()
        is_compiling = torch.compiler.is_compiling()
        if self.fused and not is_compiling:
            return self.proj(attend_windows(self.project(x), factor, bias, windows, cosine=self.cosine))
        tokens, mask = _partition_with_mask(x, windows)
        if is_compiling:  # Compilers and exporters can process plain operations, but not our autograd functions.
            attended = self.reference_attention(tokens, factor, bias, mask)
        else:
            qkv, chunks = self.project(tokens), self._chunks(len(tokens), bias)
            attended = attend(qkv, factor, bias, mask, cosine=self.cosine, chunks=chunks)
        return window_reverse(self.proj(attended), windows, tuple(x.shape[1:-1]))

    def _chunks(self, windows: int, bias: Tensor) -> int:
        """Return the number of chunks for this many windows."""
        if self.in_cache and bias.device.type == "cpu":
            return max(self.chunks, chunks_in_cache(windows, bias))
        return self.chunks

    def reference_attention(self, x: Tensor, factor: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        """Compute attention with plain operations, the reference for :func:`swin.chunked_attention.attend`.

        Args:
            x: tokens ``(b n, t, c)``.
            factor: see :meth:`factor`.
            bias: position bias, ``(m, t, t)``.
            mask: see :func:`swin.windows.attention_mask`.
        """
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
        """Compute the logits of :meth:`forward`, ``(b n, m, t, t)``; -inf where attention is not allowed."""
        tokens, mask = _partition_with_mask(x, windows)
        q, k, _ = self.split(tokens)
        with no_autocast(x.device.type):
            q, k = self.scale(q, k, self.factor())
            return masked_logits(q, k, self.position_bias(windows.window), mask, slice(0, len(tokens)))

    def largest_logit(self, x: Tensor, windows: WindowLayout) -> Tensor:
        """Compute the maximum of :meth:`logits` chunk by chunk."""
        tokens, mask = _partition_with_mask(x, windows)
        q, k, _ = self.split(tokens)
        largest = []
        with no_autocast(x.device.type):
            bias, factor = self.position_bias(windows.window), self.factor()
            for chunk in split_chunks(len(q), self.num_heads, self._chunks(len(q), bias)):
                chunk_windows, heads = chunk
                scaled_q, scaled_k = self.scale(q[chunk], k[chunk], factor[heads])
                largest.append(masked_logits(scaled_q, scaled_k, bias[heads], mask, chunk_windows).max())
        return torch.stack(largest).max()

    def attention(self, x: Tensor, windows: WindowLayout) -> Tensor:
        """Compute the attention weights, for inspection: ``(b n, m, t, t)``, rows that sum to 1."""
        return self.logits(x, windows).softmax(dim=-1)

    def heads_at_clamp(self) -> int:
        """Count the heads whose temperature is at its lower limit, where its gradient is 0."""
        return 0

    def project(self, x: Tensor) -> Tensor:
        """Project tokens ``(..., c)`` to queries, keys and values, concatenated: ``(..., 3 c)``."""
        return self.qkv(x)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project tokens ``(b n, t, c)`` to queries, keys and values per head, ``(b n, m, t, d)`` each."""
        q, k, v = split_heads(self.project(x), 3, self.num_heads)
        return q, k, v

    def factor(self) -> Tensor:
        """Return the scale of the similarities per head, ``(m, 1, 1)``: 1 / tau, or 1 / sqrt(d)."""
        raise NotImplementedError

    def scale(self, q: Tensor, k: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Scale queries and keys ``(b n, m, t, d)`` so that their products are the logits without the bias."""
        return scale(q, factor, self.cosine).x, scale(k, 1.0, self.cosine).x

    def no_decay_parameters(self) -> set[nn.Parameter]:
        """Return the parameters with more than one axis that must not decay: they are not weights of a linear layer."""
        return set(self.position_bias.parameters())


class DotAttention(WindowAttention):
    """Scaled dot product ``q k / sqrt(d)`` with biases for q, k and v (Swin V1, equation 4)."""

    def __init__(self, dim: int, num_heads: int, position_bias: PositionBias) -> None:
        super().__init__(dim, num_heads, position_bias, qkv_bias=True)

    def factor(self) -> Tensor:
        width = self.proj.in_features // self.num_heads
        return self.proj.weight.new_full((self.num_heads, 1, 1), width**-0.5)


class CosineAttention(WindowAttention):
    """Scaled cosine ``cos(q, k) / tau`` with one learnable tau per head (Swin V2, equation 2).

    ``logit_scale`` is the logarithm of 1 / tau. Keys have no bias (official code). In half precision the normalization
    would underflow, and small differences between logits of up to 100 would be lost.
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


def _partition_with_mask(x: Tensor, windows: WindowLayout) -> tuple[Tensor, Tensor | None]:
    """Partition ``(b, h, w, c)`` into the tokens of each window ``(b n, t, c)`` and build the attention mask."""
    return window_partition(x, windows), attention_mask(tuple(x.shape[1:-1]), windows, x.device)


@contextmanager
def watch_attention(model: nn.Module) -> Iterator[dict[str, float]]:
    """Collect ``max_attention_logit`` and ``heads_at_clamp`` over all attention layers during one forward pass.

    Computes all logits a second time. The yielded dictionary is filled when the context exits.
    """
    statistics: dict[str, float] = {}
    largest: list[Tensor] = []
    heads: list[int] = []

    @torch.no_grad()
    def record(attention: nn.Module, arguments: tuple) -> None:
        assert isinstance(attention, WindowAttention)
        largest.append(attention.largest_logit(*arguments))
        heads.append(attention.heads_at_clamp())

    hooks = [
        module.register_forward_pre_hook(record) for module in model.modules() if isinstance(module, WindowAttention)
    ]
    try:
        yield statistics
    finally:
        for hook in hooks:
            hook.remove()
    if largest:
        statistics |= {"max_attention_logit": float(torch.stack(largest).max()), "heads_at_clamp": float(sum(heads))}
