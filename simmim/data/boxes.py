"""Images with annotated objects in COCO format: boxes, classes and masks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from simmim.data.coco import POLYGONS, RLE, Problem, read_annotations, unpack_polygons
from simmim.data.decode import Box, DecodedImage, Decoder
from simmim.data.sources import Subset, split_validation

_SPLIT_NAMES = (("instances_{}2017.json", "{}2017"), ("{}.json", "{}"))
"""Annotation file and image folder of a split: the names of COCO, and short ones."""


@dataclass(frozen=True)
class Scene:
    """An image and its annotated objects, without crowds."""

    image: DecodedImage
    image_id: int
    boxes: Tensor
    """float32 ``(n, 4)``: left, top, right, bottom, px."""
    labels: Tensor
    """int64 ``(n,)``, from 1."""
    masks: Tensor | None
    """uint8 ``(n, H, W)``, 0 or 1."""

    @property
    def size(self) -> tuple[int, int]:
        return self.image.size

    @property
    def kind(self) -> str:
        return self.image.kind

    def crop(self, box: Box, size: tuple[int, int], interpolation: str = "bilinear", *, flip: bool = False) -> Tensor:
        """Crop and resize the image alone, without its objects."""
        return self.image.crop(box, size, interpolation, flip=flip)


class CocoImages:
    """The images of a COCO file, a source of :class:`Scene`.

    ``problems`` lists what was left out or corrected, with the reason: missing files, annotations whose image or
    category is not listed, boxes without area or outside the image, unusable segmentations, duplicate ids.

    Args:
        annotations: the JSON file.
        folder: the folder that ``file_name`` is relative to.
        training: see :func:`simmim.data.coco.read_annotations`.
        masks: read segmentations too.
        keep_empty: keep images without objects; None: only in evaluation.
        categories: class names in the order of their labels, for a validation set.

    Raises:
        ValueError: not a COCO file, or no usable image in it.
        OSError: the file cannot be read.
    """

    blocks = None

    def __init__(
        self,
        annotations: str | Path,
        folder: str | Path,
        decoder: Decoder | None = None,
        *,
        training: bool = True,
        masks: bool = True,
        keep_empty: bool | None = None,
        categories: Sequence[str] | None = None,
    ) -> None:
        self.folder, self.decoder, self.masks = Path(folder), decoder or Decoder(), masks
        found = read_annotations(Path(annotations), training=training, masks=masks, categories=categories)
        self.problems: list[Problem] = found.problems
        exist = self._files_exist(found.files)
        self.problems += [(name, "is missing") for name in found.files.filter(pa.array(~exist)).to_pylist()]
        if not exist.any():
            raise ValueError(
                f"none of the {len(exist)} images of {annotations} is in {self.folder}"
                f"{f', for example {found.files[0]}' if len(exist) else ''}: file_name is relative to that folder"
            )
        allow_empty = keep_empty if keep_empty is not None else not training
        keep = exist if allow_empty else exist & (np.diff(found.object_offsets) > 0)
        if not keep.any():
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.problems[:3])
            raise ValueError(f"no image of {annotations} has a usable object. {reasons}")
        self.annotations = found if keep.all() else found.select(keep)
        self.classes, self.category_ids = found.classes, found.category_ids

    def __len__(self) -> int:
        return len(self.annotations.image_ids)

    def name(self, index: int) -> str:
        return str(self.folder / self.annotations.files[index].as_py())

    def fetch(self, index: int) -> tuple[int, bytes]:
        return index, Path(self.name(index)).read_bytes()

    def decode(self, content: tuple[int, bytes]) -> Scene:
        """Combine the image with its annotations.

        Raises:
            ValueError: the image has another size than its annotations state.
        """
        index, data = content
        image, size = self.decoder(data), tuple(self.annotations.sizes[index].tolist())
        if tuple(image.size) != size:
            raise ValueError(
                f"is {image.size[0]} x {image.size[1]} px, but its annotations state {size[0]} x {size[1]}"
            )
        objects = self._objects(index)
        objects = objects[~self.annotations.crowds[objects]]
        return Scene(
            image,
            int(self.annotations.image_ids[index]),
            torch.from_numpy(self.annotations.boxes[objects]),
            torch.from_numpy(self.annotations.labels[objects]),
            self._masks(objects, *size) if self.masks else None,
        )

    def truth(self, image_id: int) -> dict[str, Tensor]:
        """Return the ground truth of an image at its own size, including crowds.

        Returns:
            ``boxes`` float32 ``(n, 4)``, ``labels`` int64, ``iscrowd`` int64 and ``area`` float64 ``(n,)``, with
            masks also ``masks`` bool ``(n, H, W)``.
        """
        index = int(np.searchsorted(self.annotations.image_ids, image_id))
        objects = self._objects(index)
        truth = {
            "boxes": torch.from_numpy(self.annotations.boxes[objects]),
            "labels": torch.from_numpy(self.annotations.labels[objects]),
            "iscrowd": torch.from_numpy(self.annotations.crowds[objects].astype(np.int64)),
            "area": torch.from_numpy(self.annotations.areas[objects]),
        }
        if self.masks:
            truth["masks"] = self._masks(objects, *self.annotations.sizes[index].tolist()).bool()
        return truth

    def _objects(self, index: int) -> np.ndarray:
        """Return the indices of the objects of an image."""
        return np.arange(self.annotations.object_offsets[index], self.annotations.object_offsets[index + 1])

    def _masks(self, objects: np.ndarray, height: int, width: int) -> Tensor:
        """Return the masks of objects, uint8 ``(n, H, W)``; the box where there is no segmentation."""
        annotations = self.annotations
        masks = torch.zeros(len(objects), height, width, dtype=torch.uint8)
        for mask, index in zip(masks, objects.tolist(), strict=True):
            start, end = annotations.segmentation_offsets[index : index + 2].tolist()
            segmentation, kind = annotations.segmentations[start:end], annotations.segmentation_kinds[index]
            if kind in (POLYGONS, RLE):
                mask.copy_(torch.from_numpy(_decode_mask(kind, segmentation, height, width)))
            else:
                left, top, right, bottom = annotations.boxes[index].round().astype(int).tolist()
                mask[top:bottom, left:right] = 1
        return masks

    def _files_exist(self, files: pa.Array) -> np.ndarray:
        """Return which files exist, bool ``(n,)``; lists each folder only once."""
        names = files.to_pylist()
        listed = {
            parent: {entry.name for entry in os.scandir(self.folder / parent)}
            for parent in {os.path.dirname(name) for name in names}
            if (self.folder / parent).is_dir()
        }
        return np.array([os.path.basename(n) in listed.get(os.path.dirname(n), ()) for n in names], bool)


def open_coco(path: str | Path, split: str, decoder: Decoder | None = None, **settings: object) -> CocoImages:
    """Open a split of a folder in COCO layout.

    The layout is ``path/annotations/instances_train2017.json`` with images in ``path/train2017``, or
    ``path/annotations/train.json`` with images in ``path/train``; the same for ``val``.

    Args:
        settings: see :class:`CocoImages`.

    Raises:
        ValueError: the split is in neither layout; or as :class:`CocoImages`.
    """
    candidates = _split_paths(path, split)
    for file, folder in candidates:
        if file.is_file() and folder.is_dir():
            return CocoImages(file, folder, decoder, **settings)  # type: ignore[arg-type]
    tried = [f"{file} with {folder}" for file, folder in candidates]
    raise ValueError(f"{path} is not in COCO layout: expected {', or '.join(tried)}")


def has_split(path: str | Path, split: str) -> bool:
    """Return whether :func:`open_coco` would find this split."""
    return any(file.is_file() and folder.is_dir() for file, folder in _split_paths(path, split))


def coco_sources(
    path: str | Path, decoder: Decoder, validation_images: int, *, masks: bool
) -> tuple[CocoImages | Subset, CocoImages | Subset, list[Problem]]:
    """Open training images, validation images and the list of problems in their annotations.

    Validation uses ``val`` if it exists, else images of ``train`` chosen by :func:`simmim.data.split_validation`.
    Validation images without objects are kept.

    Raises:
        ValueError: as :func:`open_coco`; or too few images for a validation split.
    """
    training = open_coco(path, "train", decoder, masks=masks)
    split = "val" if has_split(path, "val") else "train"
    every = open_coco(path, split, decoder, training=False, masks=masks, categories=training.classes)
    problems = list(dict.fromkeys(training.problems + every.problems))
    if split == "val":
        return training, every, problems
    _, validation = split_validation(every, validation_images)
    if not isinstance(validation, Subset):
        raise ValueError(
            f"{path} has no val split and only {len(every)} images: a validation split of a tenth needs at least 10"
        )
    unseen = every.annotations.image_ids[validation.indices.numpy()]
    kept = np.flatnonzero(~np.isin(training.annotations.image_ids, unseen))
    if not len(kept):
        raise ValueError(
            f"{path} has no val split, and no image with an object besides the {len(validation)} validation images: "
            "add images"
        )
    return Subset(training, torch.from_numpy(kept)), validation, problems


def _split_paths(path: str | Path, split: str) -> list[tuple[Path, Path]]:
    """Return the possible annotation files and image folders of a split."""
    root = Path(path).expanduser()
    return [(root / "annotations" / file.format(split), root / folder.format(split)) for file, folder in _SPLIT_NAMES]


def _decode_mask(kind: int, segmentation: np.ndarray, height: int, width: int) -> np.ndarray:
    """Decode a segmentation with pycocotools into uint8 ``(H, W)``."""
    from pycocotools import mask as coco_mask

    if kind == RLE:
        return coco_mask.decode({"size": [height, width], "counts": segmentation.tobytes()})
    polygons = coco_mask.frPyObjects(unpack_polygons(segmentation), height, width)
    return coco_mask.decode(coco_mask.merge(polygons))
