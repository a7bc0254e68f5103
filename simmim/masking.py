"""Random masking with large patches (SimMIM, arXiv 2111.09886, section 3.2). True = masked.

``cell_mask`` (b, hm, wm) is over mask patches; it grows to ``token_mask`` (b, h, w) and
``pixel_mask`` (b, 1, H, W) by repetition only.
"""

from __future__ import annotations

import math

import torch
from einops import repeat
from torch import Tensor

from simmim.counter_rng import random_bits


class MaskGenerator:
    """Masks exactly ``ceil(mask_ratio x cells)`` cells of every image, drawn from (seed, epoch, index).

    Args:
        image_size: ``(H, W)`` in pixels.
        mask_patch_size: side of a cell in pixels; must divide both sides of the image.

    Raises:
        ValueError: cells that do not divide the image, or a ratio that leaves nothing to see or to predict.
    """

    def __init__(
        self, image_size: tuple[int, int], mask_patch_size: int = 32, mask_ratio: float = 0.6, *, seed: int = 0
    ) -> None:
        if mask_patch_size < 1 or image_size[0] % mask_patch_size or image_size[1] % mask_patch_size:
            raise ValueError(
                f"mask_patch_size {mask_patch_size} does not divide the image size "
                f"{image_size[0]} x {image_size[1]}: {_dividing_sizes(image_size)}"
            )
        self.grid = (image_size[0] // mask_patch_size, image_size[1] // mask_patch_size)
        self.num_cells = self.grid[0] * self.grid[1]
        # Rounded first: 0.6 x 5 is 3, not a little more.
        self.num_masked = math.ceil(round(mask_ratio * self.num_cells, 9))
        if not 0 < self.num_masked < self.num_cells:
            raise ValueError(
                f"mask_ratio {mask_ratio} masks {self.num_masked} of {self.num_cells} cells of "
                f"{mask_patch_size} px: at least one cell must be masked and one visible; "
                "change mask_ratio or take smaller cells"
            )
        self.mask_patch_size = mask_patch_size
        self.seed = seed

    def __call__(self, epoch: Tensor, index: Tensor) -> Tensor:
        """bool ``(b, hm, wm)`` for samples given by int64 ``(b,)`` epoch and index, on their device."""
        scores = random_bits("mask", self.seed, epoch, index, self.num_cells)
        chosen = scores.argsort(dim=1)[:, : self.num_masked]
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
        return mask.view(-1, *self.grid)


def expand_mask(mask: Tensor, factor: int) -> Tensor:
    """Repeat every cell ``factor`` times on both axes: ``(b, h, w)`` -> ``(b, h factor, w factor)``."""
    return repeat(mask, "b h w -> b (h p) (w q)", p=factor, q=factor)


def _dividing_sizes(image_size: tuple[int, int]) -> str:
    common = math.gcd(*image_size)
    sizes = [size for size in range(4, common + 1) if common % size == 0]
    if not sizes:
        return "no cell of at least 4 px divides both sides; change image_size"
    return f"take one of {', '.join(map(str, sizes))}"
