"""Image of any size -> uint8 image of the wanted size. Pure functions of the drawn numbers."""

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
"""An image, uint8 ``(c, H, W)``; or ``image`` beside what belongs to it."""


class Transform(Protocol):
    """From what a source decodes to what a batch is made of."""

    num_draws: int

    def __call__(self, picture: Any, draws: Sequence[float], /) -> Example:
        """A pure function of ``num_draws`` draws in [0, 1)."""

    def collate(self, examples: list[Any]) -> dict[str, Tensor]:
        """Several of them as one batch, in which ``image`` has an entry for each."""


def stack(images: list[Tensor]) -> dict[str, Tensor]:
    """Images of one size as ``image`` uint8 ``(n, c, H, W)``.

    In a worker this writes each of them straight into memory that the main process sees.
    """
    return {"image": default_collate(images)}


class RandomCrop:
    """A crop of random area and aspect ratio, resized with antialiasing, flipped at random.

    The same distribution as torchvision's ``RandomResizedCrop``: up to ten draws of an area share
    and a log-uniform aspect ratio, then the largest central crop inside the ratio limits.

    Args:
        size: ``(H, W)`` of the result in pixels.
        scale: range of the share of the image's area.
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

    def __call__(self, picture: DecodedImage, draws: Sequence[float]) -> Tensor:
        """uint8 ``(c, H, W)``; ``num_draws`` draws in [0, 1)."""
        box = self.box(*picture.size, draws[1:])
        return picture.crop(box, self.size, self.interpolation, flip=draws[0] < self.flip)

    def box(self, height: int, width: int, draws: Sequence[float]) -> Box:
        """The crop of an image of this size."""
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
    """The largest central crop of the wanted aspect ratio, resized: the fixed view for evaluation."""

    num_draws = 0
    collate = staticmethod(stack)

    def __init__(self, size: tuple[int, int], interpolation: str = "bilinear") -> None:
        self.size, self.interpolation = size, interpolation

    def __call__(self, picture: DecodedImage, draws: Sequence[float]) -> Tensor:
        box = central_box(*picture.size, self.size[1] / self.size[0])
        return picture.crop(box, self.size, self.interpolation)


class RandAugmentedCrop(RandomCrop):
    """:class:`RandomCrop`, then RandAugment by timm (arXiv 1909.13719), for three channels.

    Args:
        rand_augment: timm's notation, for instance ``rand-m9-mstd0.5-inc1``.
        mean: of the pixels in [0, 1]; what fills the corners of a rotated image.
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
        keep_a_bit(self.rand_augment)

    def __call__(self, picture: DecodedImage, draws: Sequence[float]) -> Tensor:
        """Seeds the global generators, which timm draws from: see :func:`untouched_generators`."""
        image = to_image(super().__call__(picture, draws[:-1]))
        seed = int(draws[-1] * 2**32)
        random.seed(seed)
        np.random.seed(seed)
        return from_image(self.rand_augment(image))


def keep_a_bit(rand_augment: Any) -> None:
    """At a high level timm's posterize asks for 0 bits, which Pillow refuses: here it keeps one."""
    for op in rand_augment.ops:
        if op.name.startswith("Posterize"):
            op.level_fn = partial(_at_least_a_bit, op.level_fn)


def _at_least_a_bit(level_fn: Callable, level: float, settings: dict) -> tuple[int]:
    return (max(1, level_fn(level, settings)[0]),)


@contextmanager
def untouched_generators() -> Iterator[None]:
    """What is drawn inside leaves no trace in the global generators of Python and NumPy."""
    before = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def central_box(height: int, width: int, ratio: float) -> Box:
    """The largest box of an aspect ratio, width over height, in the middle of an image of this size."""
    h, w = min(height, max(1, round(width / ratio))), min(width, max(1, round(height * ratio)))
    return (height - h) // 2, (width - w) // 2, h, w
