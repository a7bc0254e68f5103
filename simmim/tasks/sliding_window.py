"""Prediction for images of any size: sliding windows and test-time augmentation (scales, horizontal flip).

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
"""A function from images ``(b, c, H, W)`` of any size to logits ``(b, k, H, W)``."""


@torch.no_grad()
def sliding_window_logits(logits: Logits, images: Tensor, window: Pair, stride: Pair) -> Tensor:
    """Compute logits in overlapping windows and average them at every pixel.

    The last window of a row or column is aligned with the border of the image.

    Args:
        window: (height, width) in px, at most the size of the image is used.
        stride: (vertical, horizontal) in px, not longer than the window.
    """
    size = images.shape[-2:]
    height, width = (min(side, wanted) for side, wanted in zip(size, window, strict=True))
    tops, lefts = window_starts(size[0], height, stride[0]), window_starts(size[1], width, stride[1])
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


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """Return the first pixels of windows that together cover a side, all in px."""
    return [*range(0, side - window, stride), side - window]


@torch.no_grad()
def averaged_log_probabilities(
    logits: Logits, images: Tensor, scales: Sequence[float] = (1.0,), flip: bool = False
) -> Tensor:
    """Average class probabilities over rescaled and mirrored copies of images, and return their logarithm.

    Args:
        logits: computes logits of images.
        images: ``(b, c, H, W)``.
        scales: factors by which both sides are resized.
        flip: use a horizontally mirrored copy at every scale too.

    Returns:
        Log-probabilities ``(b, k, H, W)``.
    """
    size = images.shape[-2:]
    total: Tensor | None = None  # a running sum: all maps together may not fit in memory
    for scale in scales:
        scaled = [max(1, round(scale * side)) for side in size]
        resized = images if scaled == list(size) else F.interpolate(images, scaled, mode="bilinear", antialias=True)
        views = [resize_maps(logits(resized), size)] + (
            [resize_maps(logits(resized.flip(-1)), size).flip(-1)] if flip else []
        )
        for view in views:
            found = view.log_softmax(dim=1)
            total = found if total is None else torch.logaddexp(total, found)
    assert total is not None
    return total - math.log(len(scales) * (1 + flip))


def resize_maps(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps ``(b, c, h, w)`` bilinearly to ``size``, if they differ from it."""
    return maps if tuple(maps.shape[-2:]) == tuple(size) else F.interpolate(maps, list(size), mode="bilinear")
