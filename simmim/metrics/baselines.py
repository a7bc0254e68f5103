"""Reconstruction baselines without learning, to compare a masked loss with."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_of_visible(images: Tensor, pixel_mask: Tensor) -> Tensor:
    """Predict every pixel as the mean of the visible pixels of its image and channel.

    Args:
        images: ``(b, c, H, W)``
        pixel_mask: bool ``(b, 1, H, W)``, True = masked.
    """
    visible = (~pixel_mask).to(images.dtype)
    mean = (images * visible).sum((2, 3), keepdim=True) / visible.sum((2, 3), keepdim=True)
    return mean.expand_as(images)


def copy_nearest_visible(images: Tensor, pixel_mask: Tensor) -> Tensor:
    """Predict every pixel as a copy of the nearest visible pixel (Euclidean distance).

    Args:
        images: ``(b, c, H, W)``
        pixel_mask: bool ``(b, 1, H, W)``, True = masked.
    """
    copies = []
    for image, mask in zip(images, pixel_mask[:, 0], strict=True):
        rows, columns = nearest_visible(mask)
        copies.append(image[:, rows, columns])
    return torch.stack(copies)


def average_distance(mask: Tensor) -> float:
    """Compute AvgDist: the mean distance in px of masked pixels to the nearest visible one (SimMIM, section 4.1.2).

    Args:
        mask: bool ``(H, W)``, True = masked, at least one pixel visible.
    """
    rows, columns = nearest_visible(mask)
    height, width = mask.shape
    away = (rows - torch.arange(height, device=mask.device)[:, None]) ** 2
    across = (columns - torch.arange(width, device=mask.device)) ** 2
    return (away + across)[mask].double().sqrt().mean().item()


def nearest_visible(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return row and column, each ``(H, W)``, of the visible pixel nearest to every pixel of a mask ``(H, W)``.

    The result is exact and takes two passes: the nearest visible row in every column, then the best column per row.
    """
    height, width = mask.shape
    rows = torch.arange(height, device=mask.device)
    columns = torch.arange(width, device=mask.device)
    far = height + width
    distance = (rows[:, None] - rows[None, :]).abs()[:, :, None] + far * mask[None]  # (row, source row, column)
    row_distance, source_row = distance.min(dim=1)
    across = (columns[:, None] - columns[None, :]) ** 2  # (column, source column)
    source_column = (across[None] + row_distance[:, None, :] ** 2).argmin(dim=2)
    return source_row.gather(1, source_column), source_column


def masked_l1(prediction: Tensor, images: Tensor, pixel_mask: Tensor) -> Tensor:
    """Compute the mean absolute error over masked pixels and channels."""
    weight = pixel_mask.expand_as(images)
    return (prediction - images).abs()[weight].mean()
