"""Predictions for images of any size: in windows, at several scales, mirrored.

Letters: b batch, c channels, k classes, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from swin.config import Pair

Logits = Callable[[Tensor], Tensor]
"""Images ``(b, c, H, W)`` -> logits ``(b, k, H, W)``, at any size."""


@torch.no_grad()
def sliding_logits(logits: Logits, images: Tensor, window: Pair, stride: Pair) -> Tensor:
    """Means of the logits of all windows that cover a pixel; the last ones of a row or column lie at the border.

    Args:
        window: px; an image that is smaller is seen whole.
        stride: px, not longer than the window.
    """
    size = images.shape[-2:]
    height, width = (min(side, wanted) for side, wanted in zip(size, window, strict=True))
    tops, lefts = starts(size[0], height, stride[0]), starts(size[1], width, stride[1])
    if len(tops) == len(lefts) == 1:
        return logits(images)
    total: Tensor | None = None
    count = images.new_zeros(size)
    for top in tops:
        for left in lefts:
            inside = (..., slice(top, top + height), slice(left, left + width))
            found = logits(images[inside])
            if total is None:
                total = found.new_zeros(*found.shape[:2], *size)
            total[inside] += found
            count[inside] += 1
    assert total is not None
    return total / count


def starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin so that they cover a side."""
    return [*range(0, side - window, stride), side - window]


@torch.no_grad()
def averaged_log_probabilities(
    logits: Logits, images: Tensor, scales: Sequence[float] = (1.0,), flip: bool = False
) -> Tensor:
    """Logarithms of the probabilities, averaged over the image at several scales, on request also mirrored.

    Args:
        images: ``(b, c, H, W)``.
        scales: of both sides.

    Returns:
        ``(b, k, H, W)``
    """
    size = images.shape[-2:]
    total: Tensor | None = None  # one sum, as the maps of many scales and classes would fill the memory
    for scale in scales:
        scaled = [max(1, round(scale * side)) for side in size]
        seen = images if scaled == list(size) else F.interpolate(images, scaled, mode="bilinear", antialias=True)
        views = [resized(logits(seen), size)] + ([resized(logits(seen.flip(-1)), size).flip(-1)] if flip else [])
        for view in views:
            found = view.log_softmax(dim=1)
            total = found if total is None else torch.logaddexp(total, found)
    assert total is not None
    return total - math.log(len(scales) * (1 + flip))


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear, where the size differs."""
    return maps if tuple(maps.shape[-2:]) == tuple(size) else F.interpolate(maps, list(size), mode="bilinear")
