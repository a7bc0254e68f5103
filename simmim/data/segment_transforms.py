"""Image with a label map -> both at the wanted size, pixel by pixel. Pure functions of the drawn numbers.

Examples hold ``image`` uint8 ``(c, H, W)`` and ``segments`` uint8 ``(H, W)``, batches have a ``b`` before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate
from torchvision.transforms.v2 import functional as adjust

from simmim.data.decode import Box, DecodedImage
from simmim.data.segments import IGNORED, SegmentedImage
from simmim.data.transforms import central_box

_ATTEMPTS = 10
_DISTORTION_DRAWS = 9
Size = tuple[int, int]


def view(
    picture: SegmentedImage, box: Box, size: Size, interpolation: str = "bilinear", *, flip: bool = False
) -> dict[str, Tensor]:
    """A crop of both at another size; of the labels the nearest."""
    top, left, height, width = box
    segments = picture.segments[None, None, top : top + height, left : left + width]
    segments = F.interpolate(segments, size, mode="nearest-exact")[0, 0]
    return {
        "image": picture.crop(box, size, interpolation, flip=flip),
        "segments": segments.flip(-1) if flip else segments,
    }


def collate_segments(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Examples of one size as a batch.

    Raises:
        ValueError: sizes that differ.
    """
    shapes = {tuple(tensor.shape) for example in examples for tensor in example.values()}
    if len(shapes) > len(examples[0]):
        raise ValueError("whole images of several sizes make no batch: evaluate them one by one, batch_size 1")
    return default_collate(examples)


class RandomSegmentCrop:
    """The training of the Swin papers on ADE20K (Swin V2, arXiv 2111.09883, appendix A1.2), as others do it too:
    scaled at random, cropped, flipped, colours distorted, filled up to the wanted size.

    Up to ten crops are drawn until no class has more than ``max_fraction`` of the pixels that have a label. What is
    smaller than ``size`` is filled up on the right and at the bottom with the mean colour and ``IGNORED``.

    Args:
        size: ``(H, W)`` of the result, px.
        mean: of the pixels in [0, 1], per channel.
        short_px: the short side of the image at scale 1; None: that of ``size``.
        scale: range that the scale is drawn from.
        flip: probability of a horizontal flip.
        distort: change brightness, contrast, saturation and hue, for three channels.
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
            raise ValueError(f"colours of {len(mean)} channels cannot be distorted: set distort to false")
        self.size, self.short_px, self.scale, self.max_fraction = size, short_px or min(size), scale, max_fraction
        self.flip, self.distort, self.interpolation = flip, distort, interpolation
        self.fill = torch.tensor([round(255 * value) for value in mean], dtype=torch.uint8).clamp(0, 255)

    def __call__(self, picture: SegmentedImage, draws: Sequence[float]) -> dict[str, Tensor]:
        u_scale, u_flip, *rest = draws
        low, high = self.scale
        zoom = self.short_px * (low + u_scale * (high - low)) / min(picture.size)
        (h, wanted_h), (w, wanted_w) = (
            _extent(side, wanted, zoom) for side, wanted in zip(picture.size, self.size, strict=True)
        )
        box = self.box(picture.segments, h, w, rest[: 2 * _ATTEMPTS])
        example = view(picture, box, (wanted_h, wanted_w), self.interpolation, flip=u_flip < self.flip)
        if self.distort:
            example["image"] = distorted(example["image"], rest[2 * _ATTEMPTS :])
        return self._filled_up(**example)

    def box(self, segments: Tensor, height: int, width: int, draws: Sequence[float]) -> Box:
        """The first crop that no class fills, or the last one that was drawn."""
        for attempt in range(_ATTEMPTS):
            u_top, u_left = draws[2 * attempt : 2 * attempt + 2]
            top = int(u_top * (segments.shape[0] - height + 1))
            left = int(u_left * (segments.shape[1] - width + 1))
            labels = segments[top : top + height, left : left + width].numpy()
            counts = np.bincount(labels.ravel(), minlength=IGNORED + 1)[:IGNORED]
            if 0 < counts.max() <= self.max_fraction * counts.sum():
                break
        return top, left, height, width

    def _filled_up(self, image: Tensor, segments: Tensor) -> dict[str, Tensor]:
        height, width = segments.shape
        if (height, width) != tuple(self.size):
            canvas = self.fill[:, None, None].repeat(1, *self.size)
            canvas[:, :height, :width] = image
            image = canvas
            segments = F.pad(segments, (0, self.size[1] - width, 0, self.size[0] - height), value=IGNORED)
        return {"image": image, "segments": segments}


class CenterSegmentCrop:
    """The largest central crop of the wanted aspect ratio: the fixed view while a model is being trained."""

    num_draws = 0
    collate = staticmethod(collate_segments)

    def __init__(self, size: Size, interpolation: str = "bilinear") -> None:
        self.size, self.interpolation = size, interpolation

    def __call__(self, picture: SegmentedImage, draws: Sequence[float]) -> dict[str, Tensor]:
        return view(picture, central_box(*picture.size, self.size[1] / self.size[0]), self.size, self.interpolation)


class WholeSegments:
    """The whole image with its short side at ``short_px``, for batches of one.

    The map keeps the size that it has in the file, as predictions are judged there.
    """

    num_draws = 0
    collate = staticmethod(collate_segments)

    def __init__(self, short_px: int, interpolation: str = "bilinear") -> None:
        self.short_px, self.interpolation = short_px, interpolation

    def __call__(self, picture: SegmentedImage, draws: Sequence[float]) -> dict[str, Tensor]:
        return {"image": self.image(picture), "segments": picture.segments}

    def image(self, picture: DecodedImage) -> Tensor:
        """uint8 ``(c, h, w)``, for pictures without a map, too."""
        zoom = self.short_px / min(picture.size)
        size = (round(picture.size[0] * zoom), round(picture.size[1] * zoom))
        return picture.crop((0, 0, *picture.size), size, self.interpolation)


def distorted(image: Tensor, draws: Sequence[float]) -> Tensor:
    """Other colours: brightness, contrast (first or last), saturation and hue, each with probability 1/2.

    The ranges are those of SSD (arXiv 1512.02325): brightness by an eighth, contrast and saturation by a half;
    hue by a tenth of the circle.

    Args:
        image: uint8 ``(3, H, W)``.
        draws: nine.
    """
    contrast_last, *pairs = draws
    steps = [
        (adjust.adjust_brightness, 1.0, 0.125),
        (adjust.adjust_contrast, 1.0, 0.5),
        (adjust.adjust_saturation, 1.0, 0.5),
        (adjust.adjust_hue, 0.0, 0.1),
    ]
    drawn = [(step, pairs[2 * number : 2 * number + 2]) for number, step in enumerate(steps)]
    if contrast_last < 0.5:
        drawn.append(drawn.pop(1))
    for (change, middle, reach), (u_whether, u_value) in drawn:
        if u_whether < 0.5:
            image = change(image, middle + reach * (2 * u_value - 1))
    return image


def _extent(side: int, wanted: int, zoom: float) -> tuple[int, int]:
    """Of one side of an image at a scale: how many pixels are taken, and how many they become, at most ``wanted``."""
    if side * zoom <= wanted:
        return side, max(1, round(side * zoom))
    return min(side, max(1, round(wanted / zoom))), wanted
