"""UPerNet: from the maps of an encoder to a class for every place (arXiv 1807.10221), and the auxiliary FCN head.

The normalisation is LayerNorm over channels, place by place, instead of BatchNorm: a batch in one piece and in
several gives the same gradient, one image is enough, and a map that is pooled to 1 x 1 is no special case.

What resizes maps is a product with a matrix for either side, as its gradient is the same every time on a GPU too;
those of ``F.interpolate`` and of adaptive pooling are not.

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
    """LayerNorm over the channels of ``(b, c, h, w)``, by itself at every place."""

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(super().forward(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")


class ConvBlock(nn.Sequential):
    """Convolution of 1 or 3 x 3 pixels without bias, norm, ReLU."""

    def __init__(self, in_channels: int, channels: int, kernel: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False),
            ChannelNorm(channels),
            nn.ReLU(),
        )


class Classifier(nn.Module):
    """Dropout of whole channels and a linear layer: ``(b, c, h, w)`` -> logits ``(b, k, h, w)``."""

    def __init__(self, channels: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.linear = Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.linear(rearrange(self.dropout(x), "b c h w -> b h w c")), "b h w k -> b k h w")


class UPerHead(nn.Module):
    """Pyramid pooling on the coarsest map, a feature pyramid down to the finest, and all levels together.

    Args:
        widths: channels of the maps, finest first; each map has half the sides of the one before, rounded up.
        classes: how many.
        channels: of everything inside.
        dropout: of channels before the last layer.
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
        """Maps ``(b, c, h, w)``, finest first -> logits ``(b, k, h, w)`` on the grid of the finest."""
        *fine, coarsest = maps
        levels = [self.bottleneck(torch.cat([coarsest, *self.pooled(coarsest)], dim=1))]
        for conv, finer in zip(reversed(self.lateral_convs), reversed(fine), strict=True):
            levels.append(conv(finer) + enlarge(levels[-1], 2, finer.shape[-2:]))
        top, *others = levels
        smooth = [top] + [conv(level) for conv, level in zip(reversed(self.fpn_convs), others, strict=True)]
        size = maps[0].shape[-2:]
        whole = [enlarge(level, 2**steps, size) for steps, level in enumerate(reversed(smooth))]
        return self.classifier(self.fpn_bottleneck(torch.cat(whole, dim=1)))

    def pooled(self, x: Tensor) -> list[Tensor]:
        """Means over 1, 2, 3 and 6 parts of either side, at the size of the map (PSPNet, arXiv 1612.01105)."""
        found = []
        for bins, conv in zip(POOLS, self.psp_modules, strict=True):
            small = conv(resample(x, *(pooling(side, bins, x) for side in x.shape[-2:])))
            found.append(resample(small, *(interpolation(bins, side, x) for side in x.shape[-2:])))
        return found


class FCNHead(nn.Module):
    """One convolution and a classifier (arXiv 1411.4038): ``(b, c, h, w)`` -> logits ``(b, k, h, w)``."""

    def __init__(self, width: int, classes: int, channels: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.conv = ConvBlock(width, channels, 3)
        self.classifier = Classifier(channels, classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.conv(x))


def enlarge(x: Tensor, factor: int, size: Sequence[int]) -> Tensor:
    """Bilinear, ``factor`` times larger, then cut to ``size``: maps of padded images cover more than the image."""
    if factor == 1 and tuple(x.shape[-2:]) == tuple(size):
        return x
    rows, columns = (
        interpolation(side, factor * side, x)[:, :wanted] for side, wanted in zip(x.shape[-2:], size, strict=True)
    )
    return resample(x, rows, columns)


def resample(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``(b, c, h, w)`` times ``(h, H)`` and ``(w, W)`` -> ``(b, c, H, W)``."""
    return rows.T @ (x @ columns)


def interpolation(side: int, size: int, like: Tensor) -> Tensor:
    """The matrix ``(side, size)`` of linear interpolation between pixel centres."""
    unit = torch.eye(side, device=like.device)[None]
    return F.interpolate(unit, size, mode="linear", align_corners=False)[0].to(like.dtype)


def pooling(side: int, bins: int, like: Tensor) -> Tensor:
    """The matrix ``(side, bins)`` of adaptive mean pooling."""
    unit = torch.eye(side, device=like.device)[None]
    return F.adaptive_avg_pool1d(unit, bins)[0].to(like.dtype)
