"""Images with objects: boxes, classes and masks, as COCO describes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from simmim.data.coco import POLYGONS, RUNS, Problem, read_annotations, rings_of
from simmim.data.decode import Box, DecodedImage, Decoder
from simmim.data.sources import Subset, split_validation

_NAMES = (("instances_{}2017.json", "{}2017"), ("{}.json", "{}"))
"""Of annotations and folder of a split: as COCO has them, and short."""


@dataclass(frozen=True)
class Scene:
    """A picture, and the objects on it that are to be found: crowds are not among them."""

    picture: DecodedImage
    image_id: int
    boxes: Tensor
    """float32 ``(n, 4)``: left, top, right, bottom, px."""
    labels: Tensor
    """int64 ``(n,)``, from 1."""
    masks: Tensor | None
    """uint8 ``(n, H, W)``, 0 or 1."""

    @property
    def size(self) -> tuple[int, int]:
        return self.picture.size

    @property
    def kind(self) -> str:
        return self.picture.kind

    def crop(self, box: Box, size: tuple[int, int], interpolation: str = "bilinear", *, flip: bool = False) -> Tensor:
        """Of the picture alone."""
        return self.picture.crop(box, size, interpolation, flip=flip)


class CocoImages:
    """The images of a COCO file, a source of :class:`Scene`.

    ``problems`` names what was left out or mended, with the reason: files that are missing, annotations of images or
    categories that are not listed, boxes without area or outside the image, segmentations that cannot be used,
    numbers that are used twice.

    Args:
        annotations: the JSON.
        folder: that ``file_name`` is relative to.
        training: see :func:`simmim.data.coco.read_annotations`.
        masks: read segmentations too.
        keep_empty: images without an object; None: not in training.
        categories: names in the order of their numbers, for a validation set.

    Raises:
        ValueError: not a COCO file, or nothing left of it.
        OSError: it cannot be read.
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
        there = self._files_there(found.files)
        self.problems += [(name, "is missing") for name in found.files.filter(pa.array(~there)).to_pylist()]
        if not there.any():
            raise ValueError(
                f"none of the {len(there)} images of {annotations} is in {self.folder}"
                f"{f', {found.files[0]} for one' if len(there) else ''}: file_name is relative to that folder"
            )
        keep = there if keep_empty or (keep_empty is None and not training) else there & (np.diff(found.first) > 0)
        if not keep.any():
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.problems[:3])
            raise ValueError(f"no image of {annotations} has an object that can be used. {reasons}")
        self.annotations = found if keep.all() else found.select(keep)
        self.classes, self.category_ids = found.classes, found.category_ids

    def __len__(self) -> int:
        return len(self.annotations.image_ids)

    def name(self, index: int) -> str:
        return str(self.folder / self.annotations.files[index].as_py())

    def fetch(self, index: int) -> tuple[int, bytes]:
        return index, Path(self.name(index)).read_bytes()

    def decode(self, content: tuple[int, bytes]) -> Scene:
        """Raises ValueError for a picture that is not of the size that the annotations speak of."""
        number, data = content
        picture, size = self.decoder(data), tuple(self.annotations.sizes[number].tolist())
        if tuple(picture.size) != size:
            raise ValueError(
                f"is {picture.size[0]} x {picture.size[1]} px, but its annotations are of {size[0]} x {size[1]}"
            )
        objects = self._objects(number)
        objects = objects[~self.annotations.crowds[objects]]
        return Scene(
            picture,
            int(self.annotations.image_ids[number]),
            torch.from_numpy(self.annotations.boxes[objects]),
            torch.from_numpy(self.annotations.labels[objects]),
            self._masks(objects, *size) if self.masks else None,
        )

    def truth(self, image_id: int) -> dict[str, Tensor]:
        """All that is known of an image, crowds too, at its own size: what predictions are measured by.

        Returns:
            ``boxes`` float32 ``(n, 4)``, ``labels`` int64, ``iscrowd`` int64 and ``area`` float64 ``(n,)``, with
            masks also ``masks`` bool ``(n, H, W)``.
        """
        number = int(np.searchsorted(self.annotations.image_ids, image_id))
        objects = self._objects(number)
        truth = {
            "boxes": torch.from_numpy(self.annotations.boxes[objects]),
            "labels": torch.from_numpy(self.annotations.labels[objects]),
            "iscrowd": torch.from_numpy(self.annotations.crowds[objects].astype(np.int64)),
            "area": torch.from_numpy(self.annotations.areas[objects]),
        }
        if self.masks:
            truth["masks"] = self._masks(objects, *self.annotations.sizes[number].tolist()).bool()
        return truth

    def _objects(self, number: int) -> np.ndarray:
        """The numbers of the objects of an image."""
        return np.arange(self.annotations.first[number], self.annotations.first[number + 1])

    def _masks(self, objects: np.ndarray, height: int, width: int) -> Tensor:
        """uint8 ``(n, H, W)``."""
        masks = torch.zeros(len(objects), height, width, dtype=torch.uint8)
        for mask, number in zip(masks, objects.tolist(), strict=True):
            start, end = self.annotations.shape_ends[number : number + 2].tolist()
            shape, kind = self.annotations.shapes[start:end], self.annotations.shape_kinds[number]
            if kind in (POLYGONS, RUNS):
                mask.copy_(torch.from_numpy(_draw(kind, shape, height, width)))
            else:
                left, top, right, bottom = self.annotations.boxes[number].round().astype(int).tolist()
                mask[top:bottom, left:right] = 1
        return masks

    def _files_there(self, files: pa.Array) -> np.ndarray:
        """Which of them exist, bool ``(n,)``: every folder is listed once."""
        names = files.to_pylist()
        listed = {
            parent: {entry.name for entry in os.scandir(self.folder / parent)}
            for parent in {os.path.dirname(name) for name in names}
            if (self.folder / parent).is_dir()
        }
        return np.array([os.path.basename(n) in listed.get(os.path.dirname(n), ()) for n in names], bool)


def open_coco(path: str | Path, split: str, decoder: Decoder | None = None, **settings: object) -> CocoImages:
    """A split of a folder in the layout of COCO.

    ``path/annotations/instances_train2017.json`` of images in ``path/train2017``, or ``path/annotations/train.json``
    of images in ``path/train``; and so for ``val``.

    Args:
        settings: of :class:`CocoImages`.

    Raises:
        ValueError: neither is there; or as :class:`CocoImages`.
    """
    places = _places(path, split)
    for file, folder in places:
        if file.is_file() and folder.is_dir():
            return CocoImages(file, folder, decoder, **settings)  # type: ignore[arg-type]
    tried = [f"{file} with {folder}" for file, folder in places]
    raise ValueError(f"{path} is not in the layout of COCO: expected {', or '.join(tried)}")


def has_split(path: str | Path, split: str) -> bool:
    """Whether :func:`open_coco` would find it."""
    return any(file.is_file() and folder.is_dir() for file, folder in _places(path, split))


def coco_sources(
    path: str | Path, decoder: Decoder, validation_images: int, *, masks: bool
) -> tuple[CocoImages | Subset, CocoImages | Subset, list[Problem]]:
    """Images to train on, held-out ones, and what is wrong with their annotations.

    ``val`` is held out where it is there, else images of ``train`` as :func:`simmim.data.split_validation` draws them.
    Held-out images without objects stay.

    Raises:
        ValueError: as :func:`open_coco`; too few images to hold any out.
    """
    training = open_coco(path, "train", decoder, masks=masks)
    split = "val" if has_split(path, "val") else "train"
    every = open_coco(path, split, decoder, training=False, masks=masks, categories=training.classes)
    problems = list(dict.fromkeys(training.problems + every.problems))
    if split == "val":
        return training, every, problems
    _, validation = split_validation(every, validation_images)
    if not isinstance(validation, Subset):
        raise ValueError(f"{path} has no val and {len(every)} images: too few to hold a tenth out, 10 are the least")
    unseen = every.annotations.image_ids[validation.indices.numpy()]
    kept = np.flatnonzero(~np.isin(training.annotations.image_ids, unseen))
    if not len(kept):
        raise ValueError(
            f"{path} has no val, and no image with an object beside the {len(validation)} held out: add some"
        )
    return Subset(training, torch.from_numpy(kept)), validation, problems


def _places(path: str | Path, split: str) -> list[tuple[Path, Path]]:
    """Where annotations and images of a split may be."""
    root = Path(path).expanduser()
    return [(root / "annotations" / file.format(split), root / folder.format(split)) for file, folder in _NAMES]


def _draw(kind: int, shape: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 ``(H, W)``, as pycocotools draws it."""
    from pycocotools import mask as coco_mask

    if kind == RUNS:
        return coco_mask.decode({"size": [height, width], "counts": shape.tobytes()})
    rings = coco_mask.frPyObjects(rings_of(shape), height, width)
    return coco_mask.decode(coco_mask.merge(rings))
