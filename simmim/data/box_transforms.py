"""Scene of any size -> image with boxes and masks that have followed it. Pure functions of the drawn numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from simmim.data.boxes import Scene
from simmim.data.decode import Box

Size = tuple[int, int]


def fitted_size(size: Size, short_px: int, long_px: int) -> Size:
    """``(H, W)`` with the short side at ``short_px``, or less where the long one would pass ``long_px``."""
    zoom = min(short_px / min(size), long_px / max(size))
    return max(1, round(size[0] * zoom)), max(1, round(size[1] * zoom))


def view(scene: Scene, box: Box, size: Size, interpolation: str, *, flip: bool = False) -> dict[str, Tensor]:
    """A crop of a scene at another size. Objects of which less than a pixel or no mask is left are left out.

    Returns:
        ``image`` uint8 ``(3, H, W)``, ``boxes`` float32 ``(n, 4)``, ``box_labels`` int64 ``(n,)``, and where the
        scene has them ``masks`` uint8 ``(n, H, W)``.
    """
    top, left, height, width = box
    zoom = torch.tensor([size[1] / width, size[0] / height] * 2)
    limits = torch.tensor([size[1], size[0]] * 2, dtype=torch.float32)
    boxes = ((scene.boxes - torch.tensor([left, top] * 2)) * zoom).clamp(min=0).minimum(limits)
    if flip:
        boxes = torch.stack([size[1] - boxes[:, 2], boxes[:, 1], size[1] - boxes[:, 0], boxes[:, 3]], dim=1)
    kept = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(dim=1)
    example = {"image": scene.crop(box, size, interpolation, flip=flip)}
    if scene.masks is not None:
        masks = scene.masks[kept, top : top + height, left : left + width]
        masks = F.interpolate(masks[None], size, mode="nearest-exact")[0] if len(masks) else masks.new_zeros(0, *size)
        visible = masks.bool().flatten(1).any(dim=1)
        kept[kept.clone()] = visible
        example["masks"] = (masks.flip(-1) if flip else masks)[visible]
    return example | {"boxes": boxes[kept], "box_labels": scene.labels[kept]}


def collate_scenes(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Images of several sizes in one batch, each at the upper left of the largest height and width, zeros around.

    Returns:
        ``image`` uint8 ``(b, 3, H, W)``, ``image_size`` int64 ``(b, 2)``, and the objects of all images one after
        the other: ``boxes`` float32 ``(n, 4)``, ``box_labels`` int64 ``(n,)``, ``box_counts`` int64 ``(b,)``, and
        ``masks`` uint8 ``(n, H, W)`` where there are any.
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
    """The short side as wanted, the long side limited, the aspect ratio kept.

    Examples also say which image it is, and how large: ``image_id`` and ``original_size``.
    """

    num_draws = 0
    collate = staticmethod(collate_scenes)

    def __init__(self, short_px: int = 800, long_px: int = 1333, interpolation: str = "bilinear") -> None:
        self.short_px, self.long_px, self.interpolation = short_px, long_px, interpolation

    def __call__(self, scene: Scene, draws: Sequence[float]) -> dict[str, Tensor]:
        size = fitted_size(scene.size, self.short_px, self.long_px)
        example = view(scene, (0, 0, *scene.size), size, self.interpolation)
        return example | {"image_id": torch.tensor(scene.image_id), "original_size": torch.tensor(scene.size)}


class ShortSideJitter:
    """The short side is drawn from a list, the long side limited, flipped at random: the training of the Swin papers.

    Args:
        short_px: the list; 480 to 800 in steps of 32.
        long_px: the limit.
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
        return view(scene, (0, 0, *scene.size), size, self.interpolation, flip=draws[1] < self.flip)


class LargeScaleJitter:
    """The image fitted into ``size`` times a drawn scale; of what is larger than ``size`` a crop (arXiv 2012.07177).

    Args:
        size: ``(H, W)`` px; no example is larger.
        scale: the range that the scale is drawn from.
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
        zoom = drawn * min(self.size[0] / height, self.size[1] / width)
        h, w = min(height, max(1, round(self.size[0] / zoom))), min(width, max(1, round(self.size[1] / zoom)))
        box = (int(draws[1] * (height - h + 1)), int(draws[2] * (width - w + 1)), h, w)
        size = (min(self.size[0], max(1, round(h * zoom))), min(self.size[1], max(1, round(w * zoom))))
        return view(scene, box, size, self.interpolation, flip=draws[3] < self.flip)
