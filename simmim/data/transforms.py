"""Crops that turn an image of any size into a uint8 image of a fixed size, as pure functions of random draws."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torch.utils.data import default_collate

from simmim.data.decode import Box, DecodedImage, from_image, to_image

_ATTEMPTS = 10

Example = Tensor | dict[str, Tensor]
"""An image, uint8 ``(c, H, W)``; or a dictionary of ``image`` and its targets."""


class Transform(Protocol):
    """Turns decoded images into examples, and examples into batches."""

    num_draws: int

    def __call__(self, image: Any, draws: Sequence[float], /) -> Example:
        """Make an example; a pure function of the image and of ``num_draws`` draws in [0, 1)."""

    def collate(self, examples: list[Any]) -> dict[str, Tensor]:
        """Collate examples into a batch whose ``image`` has one entry per example."""


def stack(images: list[Tensor]) -> dict[str, Tensor]:
    """Stack images of one size into ``image`` uint8 ``(n, c, H, W)``.

    In a worker this copies each image directly into memory shared with the main process.
    """
    return {"image": default_collate(images)}


class RandomCrop:
    """A crop of random area and aspect ratio, resized with antialiasing and randomly flipped.

    The same distribution as torchvision's ``RandomResizedCrop``: up to ten draws of a fraction of the area
    and a log-uniform aspect ratio, then the largest central crop within the ratio limits.

    Args:
        size: ``(H, W)`` of the result in pixels.
        scale: range of the crop's fraction of the image area.
        ratio: range of width over height.
        flip: probability of a horizontal flip.
        interpolation: ``bilinear`` or ``bicubic``.
    """

    num_draws = 4 * _ATTEMPTS + 1
    collate = staticmethod(stack)

    def __init__(
        self,
        size: tuple[int, int],
        scale: tuple[float, float] = (0.67, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        interpolation: str = "bilinear",
    ) -> None:
        self.size, self.scale, self.ratio, self.flip = size, scale, ratio, flip
        self.interpolation = interpolation

    def __call__(self, image: DecodedImage, draws: Sequence[float]) -> Tensor:
        """Crop an image with ``num_draws`` draws in [0, 1): uint8 ``(c, H, W)``."""
        box = self.box(*image.size, draws[1:])
        return image.crop(box, self.size, self.interpolation, flip=draws[0] < self.flip)

    def box(self, height: int, width: int, draws: Sequence[float]) -> Box:
        """Choose the crop box for an image of this size in px."""
        low, high = (math.log(r) for r in self.ratio)
        for attempt in range(_ATTEMPTS):
            u_area, u_ratio, u_top, u_left = draws[4 * attempt : 4 * attempt + 4]
            area = height * width * (self.scale[0] + u_area * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + u_ratio * (high - low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w
        return central_box(height, width, min(max(width / height, self.ratio[0]), self.ratio[1]))


class CenterCrop:
    """The largest central crop of the target aspect ratio, resized; used for evaluation."""

    num_draws = 0
    collate = staticmethod(stack)

    def __init__(self, size: tuple[int, int], interpolation: str = "bilinear") -> None:
        self.size, self.interpolation = size, interpolation

    def __call__(self, image: DecodedImage, draws: Sequence[float]) -> Tensor:
        box = central_box(*image.size, self.size[1] / self.size[0])
        return image.crop(box, self.size, self.interpolation)


class RandAugmentedCrop(RandomCrop):
    """:class:`RandomCrop` followed by timm's RandAugment (arXiv 1909.13719), for three channels.

    Args:
        rand_augment: policy in timm's notation, for example ``rand-m9-mstd0.5-inc1``.
        mean: pixel mean in [0, 1] per channel; fills the corners of rotated images.
    """

    num_draws = RandomCrop.num_draws + 1

    def __init__(self, size: tuple[int, int], *, rand_augment: str, mean: Sequence[float], **crop: Any) -> None:
        super().__init__(size, **crop)
        settings = {
            "translate_const": int(min(size) * 0.45),
            "img_mean": tuple(min(255, round(255 * value)) for value in mean),
            "interpolation": Image.Resampling[self.interpolation.upper()],
        }
        self.rand_augment = rand_augment_transform(rand_augment, settings)
        keep_one_posterize_bit(self.rand_augment)

    def __call__(self, image: DecodedImage, draws: Sequence[float]) -> Tensor:
        """Crop and augment; seeds the global generators, which timm draws from: see :func:`preserve_global_rng`."""
        crop = to_image(super().__call__(image, draws[:-1]))
        seed = int(draws[-1] * 2**32)
        random.seed(seed)
        np.random.seed(seed)
        return from_image(self.rand_augment(crop))


def keep_one_posterize_bit(rand_augment: Any) -> None:
    """Keep at least one bit in posterize: at high levels timm asks for 0 bits, which Pillow refuses."""
    for op in rand_augment.ops:
        if op.name.startswith("Posterize"):
            op.level_fn = partial(_at_least_one_bit, op.level_fn)


def _at_least_one_bit(level_fn: Callable, level: float, settings: dict) -> tuple[int]:
    return (max(1, level_fn(level, settings)[0]),)


@contextmanager
def preserve_global_rng() -> Iterator[None]:
    """Restore the state of the global generators of Python and NumPy afterwards."""
    before = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def central_box(height: int, width: int, ratio: float) -> Box:
    """Return the largest central box with this aspect ratio (width over height) in an image of this size."""
    h, w = min(height, max(1, round(width / ratio))), min(width, max(1, round(height * ratio)))
    return (height - h) // 2, (width - w) // 2, h, w
