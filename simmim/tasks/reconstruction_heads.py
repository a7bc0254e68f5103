"""Reconstruction heads: the linear layer of SimMIM, and the heavier heads of its ablation (section 4.2.3).

Letters: b batch, h w token grid, c channels, p q pixels inside a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import cast

from einops import rearrange
from torch import Tensor, nn

from swin.blocks import SwinBlock
from swin.config import SwinConfig
from swin.encoder import make_blocks
from swin.linear import Linear

BLOCKS = 2  # per scale of an inverse Swin: one with regular and one with shifted windows


def make_head(kind: str, config: SwinConfig) -> nn.Module:
    """Build a module from features ``(b, h, w, num_features)`` to pixels ``(b, h, w, in_chans stride stride)``.

    Args:
        kind: ``linear``; ``mlp`` with two layers; ``inverse_swin``, the stages of the encoder in reverse order with
            two blocks each (SimMIM, arXiv 2111.09886, section 4.2.3: heavier heads cost more and transfer no better).
    """
    pixels = config.stride**2 * config.in_chans
    if kind == "linear":
        return Linear(config.num_features, pixels)
    if kind == "mlp":
        hidden = Linear(config.num_features, config.num_features)
        return nn.Sequential(hidden, nn.GELU(), Linear(config.num_features, pixels))
    return InverseSwin(config)


class InverseSwin(nn.Module):
    """Swin blocks at every scale of the encoder, from the coarsest to the finest.

    The blocks of a scale are followed by a linear layer that splits each token into four, or into pixels at the
    finest scale.
    """

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        scales = len(config.depths)
        config = replace(config, depths=(BLOCKS,) * scales, drop_path=0.0, extra_norm_interval=0)
        self.token = config.patch_size
        self.scales = nn.ModuleList()
        for index in reversed(range(scales)):
            dim = config.embed_dim * 2**index
            split = Linear(dim, config.patch_size**2 * config.in_chans if index == 0 else 2 * dim)
            self.scales.append(nn.ModuleList([*make_blocks(config, index, [0.0] * BLOCKS), split]))

    def forward(self, features: Tensor) -> Tensor:
        """Predict the pixels ``(b, h, w, c p q)`` of features ``(b, h, w, num_features)``."""
        height, width = features.shape[1:3]
        x = features
        for index, scale in enumerate(self.scales):
            *blocks, split = cast(Iterable[SwinBlock | Linear], scale)
            for block in blocks:
                x = block(x)
            x = split(x)
            side = self.token if index == len(self.scales) - 1 else 2
            x = rearrange(x, "b h w (c p q) -> b (h p) (w q) c", p=side, q=side)
        return rearrange(x, "b (h p) (w q) c -> b h w (c p q)", h=height, w=width)
