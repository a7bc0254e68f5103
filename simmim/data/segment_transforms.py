"""Transforms that resize, crop and flip images together with their label maps.

They are pure functions of the draws. The image is cropped while it is decoded; label maps go through
:mod:`torchvision.transforms.v2`. Examples hold ``image`` uint8 ``(c, H, W)`` and ``segments`` uint8 ``(H, W)``, batches
have a leading ``b``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from simmim.data.decode import Box, DecodedImage
from simmim.data.segments import IGNORED, SegmentedImage
from simmim.data.transforms import central_box

_ATTEMPTS = 10
_DISTORTION_DRAWS = 9
Size = tuple[int, int]


def crop_with_labels(
    image: SegmentedImage, box: Box, size: Size, interpolation: str = "bilinear", *, flip: bool = False
) -> dict[str, Tensor]:
    """Crop an image and its label map and resize both; the map with nearest-neighbor interpolation."""
    segments = transforms.resized_crop(image.segments[None], *box, list(size), InterpolationMode.NEAREST_EXACT)[0]
    return {
        "image": image.crop(box, size, interpolation, flip=flip),
        "segments": transforms.horizontal_flip(segments) if flip else segments,
    }


def collate_segments(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batch examples of one size.

    Raises:
        ValueError: the sizes differ.
    """
    shapes = {tuple(tensor.shape) for example in examples for tensor in example.values()}
    if len(shapes) > len(examples[0]):
        raise ValueError("images of different sizes cannot be batched: evaluate them one by one with batch_size 1")
    return default_collate(examples)


class RandomSegmentCrop:
    """Scales, crops, flips, distorts colors and pads at random, as the Swin papers train on ADE20K.

    The recipe is that of Swin V2 (arXiv 2111.09883, appendix A1.2). Up to ten crops are drawn until no class covers
    more than ``max_fraction`` of the labeled pixels. An example smaller than ``size`` is padded on the right and at the
    bottom with the mean color and ``IGNORED``.

    Args:
        size: ``(H, W)`` of the result, px.
        mean: mean of the pixels in [0, 1], per channel.
        short_px: short side of the image at scale 1; None: the short side of ``size``.
        scale: range of the random scale.
        max_fraction: largest fraction of one class.
        flip: probability of a horizontal flip.
        distort: change brightness, contrast, saturation and hue; needs three channels.

    Raises:
        ValueError: color distortion for images without three channels.
    """

    num_draws = 2 + 2 * _ATTEMPTS + _DISTORTION_DRAWS
    collate = staticmethod(collate_segments)

    def __init__(
        self,
        size: Size,
        *,
        mean: Sequence[float],
        short_px: int | None = None,
        scale: tuple[float, float] = (0.5, 2.0),
        max_fraction: float = 0.75,
        flip: float = 0.5,
        distort: bool = True,
        interpolation: str = "bilinear",
    ) -> None:
        if distort and len(mean) != 3:
            raise ValueError(f"color distortion needs 3 channels, got {len(mean)}: set distort to false")
        self.size, self.short_px, self.scale, self.max_fraction = size, short_px or min(size), scale, max_fraction
        self.flip, self.distort, self.interpolation = flip, distort, interpolation
        self.fill = [min(255, max(0, round(255 * value))) for value in mean]

    def __call__(self, image: SegmentedImage, draws: Sequence[float]) -> dict[str, Tensor]:
        u_scale, u_flip, *rest = draws
        low, high = self.scale
        scale = self.short_px * (low + u_scale * (high - low)) / min(image.size)
        (h, target_h), (w, target_w) = (
            _crop_extent(side, target, scale) for side, target in zip(image.size, self.size, strict=True)
        )
        box = self.box(image.segments, h, w, rest[: 2 * _ATTEMPTS])
        example = crop_with_labels(image, box, (target_h, target_w), self.interpolation, flip=u_flip < self.flip)
        if self.distort:
            example["image"] = distort_colors(example["image"], rest[2 * _ATTEMPTS :])
        return self._pad(**example)

    def box(self, segments: Tensor, height: int, width: int, draws: Sequence[float]) -> Box:
        """Return the first crop in which no class exceeds ``max_fraction``, or the last crop drawn."""
        for attempt in range(_ATTEMPTS):
            u_top, u_left = draws[2 * attempt : 2 * attempt + 2]
            top = int(u_top * (segments.shape[0] - height + 1))
            left = int(u_left * (segments.shape[1] - width + 1))
            labels = segments[top : top + height, left : left + width].numpy()
            counts = np.bincount(labels.ravel(), minlength=IGNORED + 1)[:IGNORED]
            if 0 < counts.max() <= self.max_fraction * counts.sum():
                break
        return top, left, height, width

    def _pad(self, image: Tensor, segments: Tensor) -> dict[str, Tensor]:
        height, width = segments.shape
        padding = [0, 0, self.size[1] - width, self.size[0] - height]
        if any(padding):
            image = transforms.pad(image, padding, fill=self.fill)
            segments = transforms.pad(segments[None], padding, fill=IGNORED)[0]
        return {"image": image, "segments": segments}


class CenterSegmentCrop:
    """The largest central crop of the target aspect ratio: the fixed view for evaluation during training."""

    num_draws = 0
    collate = staticmethod(collate_segments)

    def __init__(self, size: Size, interpolation: str = "bilinear") -> None:
        self.size, self.interpolation = size, interpolation

    def __call__(self, image: SegmentedImage, draws: Sequence[float]) -> dict[str, Tensor]:
        box = central_box(*image.size, self.size[1] / self.size[0])
        return crop_with_labels(image, box, self.size, self.interpolation)


class ShortSideResize:
    """Resizes the whole image to a short side of ``short_px``, for evaluation in batches of one.

    The label map keeps its original size, because predictions are evaluated at that size.
    """

    num_draws = 0
    collate = staticmethod(collate_segments)

    def __init__(self, short_px: int, interpolation: str = "bilinear") -> None:
        self.short_px, self.interpolation = short_px, interpolation

    def __call__(self, image: SegmentedImage, draws: Sequence[float]) -> dict[str, Tensor]:
        return {"image": self.resize(image), "segments": image.segments}

    def resize(self, image: DecodedImage) -> Tensor:
        """Resize an image, with or without a label map, to uint8 ``(c, h, w)``."""
        scale = self.short_px / min(image.size)
        size = (round(image.size[0] * scale), round(image.size[1] * scale))
        return image.crop((0, 0, *image.size), size, self.interpolation)


def distort_colors(image: Tensor, draws: Sequence[float]) -> Tensor:
    """Change brightness, contrast (after brightness or at the end), saturation and hue, each with probability 1/2.

    The ranges are those of SSD (arXiv 1512.02325): brightness by an eighth, contrast and saturation by a half,
    hue by a tenth of the circle.

    Args:
        image: uint8 ``(3, H, W)``.
        draws: nine draws in [0, 1).
    """
    contrast_last, *pairs = draws
    steps = [
        (transforms.adjust_brightness, 1.0, 0.125),
        (transforms.adjust_contrast, 1.0, 0.5),
        (transforms.adjust_saturation, 1.0, 0.5),
        (transforms.adjust_hue, 0.0, 0.1),
    ]
    drawn = [(step, pairs[2 * index : 2 * index + 2]) for index, step in enumerate(steps)]
    if contrast_last < 0.5:
        drawn.append(drawn.pop(1))
    for (adjust, center, max_change), (u_apply, u_value) in drawn:
        if u_apply < 0.5:
            image = adjust(image, center + max_change * (2 * u_value - 1))
    return image


def _crop_extent(side: int, target: int, scale: float) -> tuple[int, int]:
    """Return how many pixels of an image side are cropped, and how many they become, at most ``target``."""
    if side * scale <= target:
        return side, max(1, round(side * scale))
    return min(side, max(1, round(target / scale))), target
