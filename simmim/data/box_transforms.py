"""Transforms that resize, crop and flip images together with their boxes and masks.

They are pure functions of the draws. The image is cropped while it is decoded; boxes and masks go through
:mod:`torchvision.transforms.v2`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms
from torchvision.tv_tensors import BoundingBoxes

from simmim.data.boxes import Scene
from simmim.data.decode import Box

Size = tuple[int, int]


def fitted_size(size: Size, short_px: int, long_px: int) -> Size:
    """Return ``(H, W)`` with the short side at ``short_px``, or less so that the long side is at most ``long_px``."""
    scale = min(short_px / min(size), long_px / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def crop_scene(scene: Scene, box: Box, size: Size, interpolation: str, *, flip: bool = False) -> dict[str, Tensor]:
    """Crop a scene and resize the crop, leaving out objects smaller than a pixel or with an empty mask.

    Returns:
        ``image`` uint8 ``(3, H, W)``, ``boxes`` float32 ``(n, 4)``, ``box_labels`` int64 ``(n,)``, and if the scene
        has masks ``masks`` uint8 ``(n, H, W)``.
    """
    # Clamp only after the resize: a border scaled in float32 can differ from the image size by a rounding error.
    boxes = BoundingBoxes(scene.boxes, format="XYXY", canvas_size=scene.size, clamping_mode=None)
    boxes = transforms.clamp_bounding_boxes(transforms.resized_crop(boxes, *box, list(size)), clamping_mode="hard")
    boxes = transforms.horizontal_flip(boxes) if flip else boxes
    boxes, kept = transforms.sanitize_bounding_boxes(boxes, min_size=1)
    objects = {"boxes": boxes.as_subclass(Tensor), "box_labels": scene.labels[kept]}
    if scene.masks is not None:
        masks = transforms.resized_crop(scene.masks[kept], *box, list(size), InterpolationMode.NEAREST_EXACT)
        visible = masks.bool().flatten(1).any(dim=1)
        objects["masks"] = transforms.horizontal_flip(masks) if flip else masks
        objects = {key: value[visible] for key, value in objects.items()}
    return {"image": scene.crop(box, size, interpolation, flip=flip)} | objects


def collate_scenes(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Batch images of several sizes, each at the upper left of the largest height and width, padded with zeros.

    Returns:
        ``image`` uint8 ``(b, 3, H, W)``, ``image_size`` int64 ``(b, 2)``, and the concatenated objects of all images:
        ``boxes`` float32 ``(n, 4)``, ``box_labels`` int64 ``(n,)``, ``box_counts`` int64 ``(b,)``, and ``masks`` uint8
        ``(n, H, W)`` if the examples have them.
    """
    sizes = torch.tensor([example["image"].shape[-2:] for example in examples])
    height, width = sizes.amax(dim=0).tolist()

    def padded(pixels: Tensor) -> Tensor:
        return F.pad(pixels, (0, width - pixels.shape[-1], 0, height - pixels.shape[-2]))

    batch = {
        "image": torch.stack([padded(example["image"]) for example in examples]),
        "image_size": sizes,
        "boxes": torch.cat([example["boxes"] for example in examples]),
        "box_labels": torch.cat([example["box_labels"] for example in examples]),
        "box_counts": torch.tensor([len(example["boxes"]) for example in examples]),
    }
    if "masks" in examples[0]:
        batch["masks"] = torch.cat([padded(example["masks"]) for example in examples])
    for key in ("image_id", "original_size"):
        if key in examples[0]:
            batch[key] = torch.stack([example[key] for example in examples])
    return batch


class EvaluationSize:
    """Resizes to a short side with a limited long side, keeping the aspect ratio.

    Examples also hold ``image_id`` and ``original_size`` ``(H, W)``.
    """

    num_draws = 0
    collate = staticmethod(collate_scenes)

    def __init__(self, short_px: int = 800, long_px: int = 1333, interpolation: str = "bilinear") -> None:
        self.short_px, self.long_px, self.interpolation = short_px, long_px, interpolation

    def __call__(self, scene: Scene, draws: Sequence[float]) -> dict[str, Tensor]:
        size = fitted_size(scene.size, self.short_px, self.long_px)
        example = crop_scene(scene, (0, 0, *scene.size), size, self.interpolation)
        return example | {"image_id": torch.tensor(scene.image_id), "original_size": torch.tensor(scene.size)}


class ShortSideJitter:
    """Resizes to a random short side with a limited long side, and flips at random, as in the Swin papers.

    Args:
        short_px: short sides to choose from; by default 480 to 800 in steps of 32.
        long_px: limit of the long side.
        flip: probability of a horizontal flip.
    """

    num_draws = 2
    collate = staticmethod(collate_scenes)

    def __init__(
        self,
        short_px: Sequence[int] = tuple(range(480, 801, 32)),
        long_px: int = 1333,
        flip: float = 0.5,
        interpolation: str = "bilinear",
    ) -> None:
        self.short_px, self.long_px, self.flip, self.interpolation = tuple(short_px), long_px, flip, interpolation

    def __call__(self, scene: Scene, draws: Sequence[float]) -> dict[str, Tensor]:
        short_px = self.short_px[int(draws[0] * len(self.short_px))]
        size = fitted_size(scene.size, short_px, self.long_px)
        return crop_scene(scene, (0, 0, *scene.size), size, self.interpolation, flip=draws[1] < self.flip)


class LargeScaleJitter:
    """Resizes by a random scale, crops at random what exceeds ``size``, and flips at random (arXiv 2012.07177).

    At scale 1 the image just fits into ``size``.

    Args:
        size: ``(H, W)`` px; the upper limit of every example.
        scale: range of the random scale.
        flip: probability of a horizontal flip.
    """

    num_draws = 4
    collate = staticmethod(collate_scenes)

    def __init__(
        self,
        size: Size = (1024, 1024),
        scale: tuple[float, float] = (0.1, 2.0),
        flip: float = 0.5,
        interpolation: str = "bilinear",
    ) -> None:
        self.size, self.scale, self.flip, self.interpolation = size, scale, flip, interpolation

    def __call__(self, scene: Scene, draws: Sequence[float]) -> dict[str, Tensor]:
        height, width = scene.size
        drawn = self.scale[0] + draws[0] * (self.scale[1] - self.scale[0])
        scale = drawn * min(self.size[0] / height, self.size[1] / width)
        h, w = min(height, max(1, round(self.size[0] / scale))), min(width, max(1, round(self.size[1] / scale)))
        box = (int(draws[1] * (height - h + 1)), int(draws[2] * (width - w + 1)), h, w)
        size = (min(self.size[0], max(1, round(h * scale))), min(self.size[1], max(1, round(w * scale))))
        return crop_scene(scene, box, size, self.interpolation, flip=draws[3] < self.flip)
