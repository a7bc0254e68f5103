"""UPerNet (arXiv 1807.10221) and the auxiliary FCN head: from the feature maps of an encoder to class logits.

Norms are LayerNorm over channels at each position instead of BatchNorm. Splitting a batch then does not change the
gradient, a batch may have one image, and a map pooled to 1 x 1 needs no special case.

Maps are resized by a product with one matrix per side, whose gradient is deterministic on a GPU; the gradients of
``F.interpolate`` and of adaptive pooling are not.

Letters: b batch, h w token grid, c channels, k classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from swin.linear import Linear

POOLS = (1, 2, 3, 6)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``(b, c, h, w)``, separately at every position."""

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(super().forward(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")


class ConvBlock(nn.Sequential):
    """A 1 x 1 or 3 x 3 convolution without bias, a norm and ReLU."""

    def __init__(self, in_channels: int, channels: int, kernel: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False),
            ChannelNorm(channels),
            nn.ReLU(),
        )


class Classifier(nn.Module):
    """Channel dropout and a linear layer: ``(b, c, h, w)`` -> logits ``(b, k, h, w)``."""

    def __init__(self, channels: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.linear = Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.linear(rearrange(self.dropout(x), "b c h w -> b h w c")), "b h w k -> b k h w")


class UPerHead(nn.Module):
    """Pyramid pooling on the coarsest map, a top-down feature pyramid, and a convolution over all its levels.

    Args:
        widths: channels of the maps, finest first; each map has half the sides of the one before, rounded up.
        classes: number of classes.
        channels: width of all layers of the head.
        dropout: probability of dropping a channel before the last layer.
    """

    def __init__(self, widths: Sequence[int], classes: int, channels: int = 512, dropout: float = 0.1) -> None:
        super().__init__()
        *fine, coarsest = widths
        self.psp_modules = nn.ModuleList(ConvBlock(coarsest, channels, 1) for _ in POOLS)
        self.bottleneck = ConvBlock(coarsest + len(POOLS) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvBlock(width, channels, 1) for width in fine)
        self.fpn_convs = nn.ModuleList(ConvBlock(channels, channels, 3) for _ in fine)
        self.fpn_bottleneck = ConvBlock(len(widths) * channels, channels, 3)
        self.classifier = Classifier(channels, classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Compute logits ``(b, k, h, w)`` on the finest grid from maps ``(b, c, h, w)``, finest first."""
        *fine, coarsest = maps
        levels = [self.bottleneck(torch.cat([coarsest, *self.pyramid_pooling(coarsest)], dim=1))]
        for conv, finer in zip(reversed(self.lateral_convs), reversed(fine), strict=True):
            levels.append(conv(finer) + upsample(levels[-1], 2, finer.shape[-2:]))
        top, *others = levels
        smooth = [top] + [conv(level) for conv, level in zip(reversed(self.fpn_convs), others, strict=True)]
        size = maps[0].shape[-2:]
        upsampled = [upsample(level, 2**steps, size) for steps, level in enumerate(reversed(smooth))]
        return self.classifier(self.fpn_bottleneck(torch.cat(upsampled, dim=1)))

    def pyramid_pooling(self, x: Tensor) -> list[Tensor]:
        """Average over 1, 2, 3 and 6 bins per side and resize back to the map (PSPNet, arXiv 1612.01105)."""
        found = []
        for bins, conv in zip(POOLS, self.psp_modules, strict=True):
            small = conv(resample(x, *(pooling_matrix(side, bins, x) for side in x.shape[-2:])))
            found.append(resample(small, *(interpolation_matrix(bins, side, x) for side in x.shape[-2:])))
        return found


class FCNHead(nn.Module):
    """One convolution and a classifier (FCN, arXiv 1411.4038): ``(b, c, h, w)`` -> logits ``(b, k, h, w)``."""

    def __init__(self, width: int, classes: int, channels: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv = ConvBlock(width, channels, 3)
        self.classifier = Classifier(channels, classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.conv(x))


def upsample(x: Tensor, factor: int, size: Sequence[int]) -> Tensor:
    """Upsample bilinearly by ``factor`` and crop to ``size``.

    Cropping is needed because the maps of padded images extend beyond the image.
    """
    if factor == 1 and tuple(x.shape[-2:]) == tuple(size):
        return x
    rows, columns = (
        interpolation_matrix(side, factor * side, x)[:, :wanted]
        for side, wanted in zip(x.shape[-2:], size, strict=True)
    )
    return resample(x, rows, columns)


def resample(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Multiply maps ``(b, c, h, w)`` by ``rows (h, H)`` and ``columns (w, W)``; returns ``(b, c, H, W)``."""
    return rows.T @ (x @ columns)


def interpolation_matrix(side: int, size: int, like: Tensor) -> Tensor:
    """Return the matrix ``(side, size)`` of linear interpolation between pixel centers."""
    unit = torch.eye(side, device=like.device)[None]
    return F.interpolate(unit, size, mode="linear", align_corners=False)[0].to(like.dtype)


def pooling_matrix(side: int, bins: int, like: Tensor) -> Tensor:
    """Return the matrix ``(side, bins)`` of adaptive average pooling."""
    unit = torch.eye(side, device=like.device)[None]
    return F.adaptive_avg_pool1d(unit, bins)[0].to(like.dtype)
