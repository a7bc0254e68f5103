"""Scaled cosine attention inside windows (Swin V2, section 3.2, equation 2).

Letters: b batch, n windows, t tokens per window, c channels, m heads, d head width.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from swin.config import Pair
from swin.position_bias import LogCPB

MAX_LOGIT_SCALE = math.log(100)  # tau never below 0.01


class CosineAttention(nn.Module):
    """``softmax(cos(q, k) / tau + B) v`` with one learnable tau per head and a continuous position bias.

    The key has no bias of its own (official code). Normalisation, logits and softmax are computed in
    at least fp32, whatever autocast says: in half precision the normalisation underflows and logits
    of up to 100 lose their differences.
    """

    def __init__(self, dim: int, num_heads: int, reference_window: Pair) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10)))
        self.cpb_mlp = LogCPB(num_heads, reference_window)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, window: Pair, mask: Tensor | None) -> Tensor:
        """Attend inside windows.

        Args:
            x: ``(b n, t, c)``, the tokens of each window.
            window: its height and width; their product is t.
            mask: bool ``(n, t, t)``, True where attention is allowed; None allows everything.

        Returns:
            ``(b n, t, c)``
        """
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = rearrange(qkv, "bn t (three m d) -> three bn m t d", three=3, m=self.num_heads)
        with _no_autocast(x.device.type):
            weights = self._attention(_at_least_fp32(q), _at_least_fp32(k), window, mask)
        x = rearrange(weights.to(v.dtype) @ v, "bn m t d -> bn t (m d)")
        return self.proj(x)

    def _attention(self, q: Tensor, k: Tensor, window: Pair, mask: Tensor | None) -> Tensor:
        """Attention weights ``(bn, m, t, t)`` that sum to one over the last axis."""
        inverse_tau = self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
        # Scaling q touches t x d numbers, scaling the logits would touch t x t.
        logits = (F.normalize(q, dim=-1) * inverse_tau) @ F.normalize(k, dim=-1).transpose(-2, -1)
        bias = self.cpb_mlp(window)
        if mask is None:
            return (logits + bias).softmax(dim=-1)
        n = mask.shape[0]
        bias = bias.masked_fill(~mask[:, None], -math.inf)  # (n, m, t, t), shared by the batch
        logits = rearrange(logits, "(b n) m t s -> b n m t s", n=n) + bias
        return rearrange(logits.softmax(dim=-1), "b n m t s -> (b n) m t s")


def _no_autocast(device_type: str) -> AbstractContextManager:
    """The meta device, where shapes are planned, has no autocast to switch off."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
