"""Random masking with large patches (SimMIM, arXiv 2111.09886, section 3.2). True = masked.

``patch_mask`` (b, hm, wm) has one value per mask patch; repetition expands it to ``token_mask`` (b, h, w)
and ``pixel_mask`` (b, 1, H, W).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from einops import repeat
from torch import Tensor

from simmim.rng import random_bits, uniform

Strategy = Literal["random", "square", "block"]
BLOCKS, SMALLEST_BLOCK, BLOCK_ASPECT = 40, 16 / 14**2, 1 / 0.3


class MaskGenerator:
    """Masks exactly ``ceil(mask_ratio x mask patches)`` mask patches of every image, drawn from (seed, epoch, index).

    Args:
        image_size: ``(H, W)`` in pixels.
        mask_patch_size: side of a mask patch in pixels; must divide both sides of the image.
        mask_ratio: fraction of mask patches to mask.
        strategy: ``random`` mask patches; one ``square`` at a random position (context encoders), with the
            integer side that is closest to the ratio; or ``block``: overlapping rectangles (BEiT, arXiv
            2106.08254, algorithm 1), filled up with single mask patches to the exact count.

    Raises:
        ValueError: mask patches do not divide the image, or the ratio masks none or all of them.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        mask_patch_size: int = 32,
        mask_ratio: float = 0.6,
        *,
        seed: int = 0,
        strategy: Strategy = "random",
    ) -> None:
        if mask_patch_size < 1 or image_size[0] % mask_patch_size or image_size[1] % mask_patch_size:
            raise ValueError(
                f"mask_patch_size {mask_patch_size} does not divide the image size "
                f"{image_size[0]} x {image_size[1]}: {_dividing_sizes(image_size)}"
            )
        self.grid = (image_size[0] // mask_patch_size, image_size[1] // mask_patch_size)
        self.num_mask_patches = self.grid[0] * self.grid[1]
        # Round first, because 0.6 x 5 may be slightly more than 3 in floating point.
        self.num_masked = math.ceil(round(mask_ratio * self.num_mask_patches, 9))
        if strategy == "square":
            self.side = min(max(1, round(math.sqrt(mask_ratio * self.num_mask_patches))), *self.grid)
            self.num_masked = self.side**2
        if not 0 < self.num_masked < self.num_mask_patches:
            raise ValueError(
                f"mask_ratio {mask_ratio} masks {self.num_masked} of {self.num_mask_patches} mask patches of "
                f"{mask_patch_size} px: at least one mask patch must be masked and one visible; "
                "change mask_ratio or choose a smaller mask_patch_size"
            )
        self.mask_patch_size, self.mask_ratio = mask_patch_size, mask_ratio
        self.seed, self.strategy = seed, strategy

    def __call__(self, epoch: Tensor, index: Tensor) -> Tensor:
        """Draw masks, bool ``(b, hm, wm)``, for samples given by epoch and index, int64 ``(b,)``, on their device."""
        if self.strategy == "square":
            return self._squares(epoch, index)
        if self.strategy == "block":
            return self._blocks(epoch, index)
        scores = random_bits("mask", self.seed, epoch, index, self.num_mask_patches)
        chosen = scores.argsort(dim=1)[:, : self.num_masked]
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
        return mask.view(-1, *self.grid)

    def _squares(self, epoch: Tensor, index: Tensor) -> Tensor:
        draws = uniform("mask", self.seed, epoch, index, 2)
        rows, columns = (
            torch.arange(length, device=index.device) - (draw * (length - self.side + 1)).long()[:, None]
            for length, draw in zip(self.grid, draws.unbind(dim=1), strict=True)
        )
        inside = [(line >= 0) & (line < self.side) for line in (rows, columns)]
        return inside[0][:, :, None] & inside[1][:, None, :]

    def _blocks(self, epoch: Tensor, index: Tensor) -> Tensor:
        draws = uniform("mask", self.seed, epoch, index, 4 * BLOCKS).view(-1, BLOCKS, 4).tolist()
        spare = random_bits("mask", self.seed, epoch, index, self.num_mask_patches).argsort(dim=1).tolist()
        masks = [self._block_mask(blocks, order) for blocks, order in zip(draws, spare, strict=True)]
        return torch.stack(masks).to(index.device)

    def _block_mask(self, blocks: list[list[float]], order: list[int]) -> Tensor:
        height, width = self.grid
        mask = torch.zeros(height, width, dtype=torch.bool)
        missing = self.num_masked
        for area_draw, shape_draw, top_draw, left_draw in blocks:
            smallest = min(SMALLEST_BLOCK * self.num_mask_patches, missing)
            area = smallest + area_draw * (missing - smallest)
            aspect = BLOCK_ASPECT ** (2 * shape_draw - 1)
            h, w = (
                min(side, max(1, round(math.sqrt(area * a)))) for side, a in ((height, aspect), (width, 1 / aspect))
            )
            top, left = int(top_draw * (height - h + 1)), int(left_draw * (width - w + 1))
            block = mask[top : top + h, left : left + w]
            fresh = h * w - int(block.sum())
            if fresh <= missing:
                block.fill_(True)
                missing -= fresh
            if not missing:
                return mask
        # Mask single patches until the count is exact.
        flat = mask.view(-1)
        for patch in order:
            if missing and not flat[patch]:
                flat[patch] = True
                missing -= 1
        return mask


def expand_mask(mask: Tensor, factor: int) -> Tensor:
    """Repeat every mask value ``factor`` times on both axes: ``(b, h, w)`` -> ``(b, h factor, w factor)``."""
    return repeat(mask, "b h w -> b (h p) (w q)", p=factor, q=factor)


def _dividing_sizes(image_size: tuple[int, int]) -> str:
    """Suggest mask patch sizes that divide the image."""
    common = math.gcd(*image_size)
    sizes = [size for size in range(4, common + 1) if common % size == 0]
    if not sizes:
        return "no mask patch of at least 4 px divides both sides; change image_size"
    return f"choose one of {', '.join(map(str, sizes))}"
