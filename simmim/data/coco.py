"""COCO annotations, read from JSON into flat arrays that stay small for hundreds of thousands of objects.

Unusable annotations are left out and listed with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

NO_SEGMENTATION, POLYGONS, RLE = 0, 1, 2
Problem = tuple[str, str]
"""The file, image or annotation concerned, and what is wrong with it."""


class Annotations(NamedTuple):
    """The objects of all images, grouped by image; images are sorted by id."""

    files: pa.Array
    """File name of every image, relative to the image folder."""
    image_ids: np.ndarray
    """int64 ``(images,)``."""
    sizes: np.ndarray
    """int64 ``(images, 2)``: height and width, px."""
    object_offsets: np.ndarray
    """int64 ``(images + 1,)``: image ``i`` has the objects ``object_offsets[i]`` to ``object_offsets[i + 1]``."""
    boxes: np.ndarray
    """float32 ``(objects, 4)``: left, top, right, bottom, px."""
    labels: np.ndarray
    """int64 ``(objects,)``, from 1."""
    areas: np.ndarray
    """float64 ``(objects,)``, square px, as given in the file."""
    crowds: np.ndarray
    """bool ``(objects,)``: a group of objects (``iscrowd``), which counts neither as found nor as missed."""
    segmentation_kinds: np.ndarray
    """uint8 ``(objects,)``: ``NO_SEGMENTATION``, ``POLYGONS`` or ``RLE``."""
    segmentation_offsets: np.ndarray
    """int64 ``(objects + 1,)``: object ``i`` has the bytes ``[offsets[i], offsets[i + 1])`` of ``segmentations``."""
    segmentations: np.ndarray
    """uint8: polygons as float64, each preceded by its number of coordinates; or compressed RLE counts."""
    classes: list[str]
    category_ids: list[int]
    """Category id in the file, for each class."""
    problems: list[Problem]

    def select(self, images: np.ndarray) -> Annotations:
        """Return the annotations of some images only, chosen by bool ``(images,)``."""
        objects = np.repeat(images, np.diff(self.object_offsets))
        lengths = np.diff(self.segmentation_offsets)
        return self._replace(
            files=self.files.filter(pa.array(images)),
            image_ids=self.image_ids[images],
            sizes=self.sizes[images],
            object_offsets=_offsets(np.diff(self.object_offsets)[images]),
            boxes=self.boxes[objects],
            labels=self.labels[objects],
            areas=self.areas[objects],
            crowds=self.crowds[objects],
            segmentation_kinds=self.segmentation_kinds[objects],
            segmentation_offsets=_offsets(lengths[objects]),
            segmentations=self.segmentations[np.repeat(objects, lengths)],
        )


def read_annotations(
    file: Path, *, training: bool, masks: bool, categories: Sequence[str] | None = None
) -> Annotations:
    """Read all usable annotations of a COCO file.

    Args:
        training: leave out objects smaller than a pixel, crowds, and with ``masks`` objects without a usable
            segmentation. In evaluation crowds are kept, and an object without a usable segmentation is treated as a
            crowd with its box as the mask, because no prediction can be compared with an unknown outline.
        masks: read segmentations too.
        categories: class names in the order of their labels, so that a validation set uses the labels of training.

    Raises:
        ValueError: not a COCO file, or one without categories.
        OSError: the file cannot be read.
    """
    content = _load(file)
    problems: list[Problem] = []
    files, image_ids, sizes = _images(content["images"], problems)
    classes, category_ids, labels = _categories(file, content["categories"], categories, problems)
    reader = _ObjectReader(image_ids, sizes, labels, problems, training=training, masks=masks)
    for index, annotation in enumerate(content["annotations"]):
        reader.read(index, annotation)
    del content
    return reader.arrays(files, classes, category_ids)


def unpack_polygons(segmentation: np.ndarray) -> list[list[float]]:
    """Unpack polygons from uint8; each becomes a list ``x0, y0, x1, y1, ...``."""
    values, polygons, start = segmentation.view(np.float64), [], 0
    while start < len(values):
        end = start + 1 + int(values[start])
        polygons.append(values[start + 1 : end].tolist())
        start = end
    return polygons


def decode_rle_counts(counts: bytes) -> list[int]:
    """Decode compressed RLE counts into run lengths.

    Each character holds five bits. From the fourth count on, the difference to the count two before it is stored.

    Raises:
        ValueError: characters that are not valid in RLE counts.
    """
    lengths: list[int] = []
    value, shift = 0, 0
    for character in counts:
        bits = character - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("invalid RLE run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
            value, shift = 0, 0
    if shift:
        raise ValueError("truncated RLE run lengths")
    return lengths


def _load(file: Path) -> dict[str, list[dict]]:
    try:
        content = json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): expected annotations in COCO format") from None
    expected = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in expected):
        kind = ", ".join(list(content)[:5]) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(
            f"{file} is not in COCO format: expected the lists {', '.join(expected)}, found {kind or 'nothing'}"
        )
    return content


def _images(entries: list[Any], problems: list[Problem]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return file names, ids and sizes of the images, sorted by id."""
    found: dict[int, tuple[str, int, int]] = {}
    for index, entry in enumerate(entries):
        try:
            image_id, file = entry["id"], entry["file_name"]
            height, width = int(entry["height"]), int(entry["width"])
        except (KeyError, TypeError, ValueError, OverflowError):
            problems.append((f"image {index} of the list", "has no id, file_name, height or width"))
            continue
        if type(image_id) is not int or not isinstance(file, str) or height < 1 or width < 1:
            problems.append((str(file), f"id {image_id!r}, {height} x {width} px: expected an integer and sides > 0"))
        elif not -(2**63) <= image_id < 2**63:
            problems.append((file, f"has the id {image_id}: expected a 64-bit integer"))
        elif image_id in found:
            problems.append((file, f"has the same id {image_id} as {found[image_id][0]}"))
        else:
            found[image_id] = (file, height, width)
    ids = sorted(found)
    sizes = np.array([found[image_id][1:] for image_id in ids], np.int64).reshape(-1, 2)
    return [found[image_id][0] for image_id in ids], np.array(ids, np.int64), sizes


def _categories(
    file: Path, entries: list[Any], names: Sequence[str] | None, problems: list[Problem]
) -> tuple[list[str], list[int], dict[int, int]]:
    """Return class names, their category ids, and the label of every id, in the order of ``names`` or of the ids."""
    found: dict[int, str] = {}
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or not entry.get("name"):
            problems.append((f"category {index} of the list", "has no integer id, or no name"))
        elif entry["id"] in found:
            problems.append((f"category {entry['name']}", f"has the same id {entry['id']} as {found[entry['id']]}"))
        else:
            found[entry["id"]] = str(entry["name"])
    if not found:
        raise ValueError(f"{file} has no categories: expected a list of {{'id': 1, 'name': 'cat'}}")
    if names is None:
        ids = sorted(found)
        return [found[i] for i in ids], ids, {category_id: label for label, category_id in enumerate(ids, start=1)}
    by_name = {name: category_id for category_id, name in reversed(found.items())}
    labels = {by_name[name]: label for label, name in enumerate(names, start=1) if name in by_name}
    return list(names), [by_name.get(name, -1) for name in names], labels


class _ObjectReader:
    """Collects annotations one by one as rows of numbers."""

    def __init__(
        self,
        image_ids: np.ndarray,
        sizes: np.ndarray,
        labels: dict[int, int],
        problems: list[Problem],
        *,
        training: bool,
        masks: bool,
    ) -> None:
        self.image_ids, self.sizes, self.labels, self.problems = image_ids, sizes, labels, problems
        self.training, self.masks = training, masks
        self.index_of_id = {image_id: index for index, image_id in enumerate(image_ids.tolist())}
        self.seen: set[int] = set()
        self.rows: list[tuple[float, ...]] = []
        self.segmentations: list[bytes] = []

    def read(self, index: int, annotation: Any) -> None:
        """Add an annotation, or list it as a problem with the reason."""
        name = f"annotation {annotation.get('id', index) if isinstance(annotation, dict) else index}"
        try:
            self._read(name, annotation)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            missing = f"has no {error.args[0]}" if isinstance(error, KeyError) else str(error)
            self.problems.append((name, missing))

    def _read(self, name: str, annotation: Any) -> None:
        image = self.index_of_id.get(annotation["image_id"])
        if image is None:
            raise ValueError(f"image_id {annotation['image_id']} is not listed in images")
        label = self.labels.get(annotation["category_id"])
        if label is None:
            raise ValueError(f"category_id {annotation['category_id']} is not a known category")
        if (own_id := annotation.get("id")) is not None:
            if own_id in self.seen:
                raise ValueError("has the same id as an earlier annotation")
            self.seen.add(own_id)
        crowd = bool(annotation.get("iscrowd", 0))
        if crowd and self.training:
            return
        height, width = self.sizes[image].tolist()
        box, area = self._box(name, annotation["bbox"], height, width)
        kind, segmentation = NO_SEGMENTATION, b""
        if self.masks:
            try:
                kind, segmentation = _pack_segmentation(annotation.get("segmentation"), height, width)
            except (KeyError, TypeError, ValueError) as error:
                consequence = "left out" if self.training else "ignored in evaluation"
                self.problems.append((name, f"has no usable segmentation ({error}): {consequence}"))
                if self.training:
                    return
                crowd = True
        stated = annotation.get("area")
        if isinstance(stated, int | float) and math.isfinite(stated) and stated > 0:
            area = stated
        self.rows.append((image, label, *box, area, crowd, kind))
        self.segmentations.append(segmentation)

    def _box(self, name: str, box: Any, height: int, width: int) -> tuple[tuple[float, ...], float]:
        """Return left, top, right, bottom clipped to the image, and the area before clipping."""
        if not isinstance(box, list) or len(box) != 4 or not all(math.isfinite(float(value)) for value in box):
            raise ValueError(f"bbox {box}: expected left, top, width and height")
        x, y, w, h = (float(value) for value in box)
        if w <= 0 or h <= 0:
            raise ValueError(f"bbox {box} has no area")
        left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
        least = 1.0 if self.training else 1e-6
        if right - left < least or bottom - top < least:
            raise ValueError(f"bbox {box} covers less than a pixel of the image of {height} x {width} px")
        if max(left - x, top - y, x + w - right, y + h - bottom) > 1:
            self.problems.append((name, f"bbox {box} extends beyond the image of {height} x {width} px: clipped"))
        return (left, top, right, bottom), w * h

    def arrays(self, files: list[str], classes: list[str], category_ids: list[int]) -> Annotations:
        """Return all rows as arrays, sorted by image."""
        table = np.array(self.rows, np.float64).reshape(-1, 9)
        order = table[:, 0].argsort(kind="stable")
        table = table[order]
        segmentations = [self.segmentations[index] for index in order.tolist()]
        return Annotations(
            files=pa.array(files, pa.string()),
            image_ids=self.image_ids,
            sizes=self.sizes,
            object_offsets=_offsets(np.bincount(table[:, 0].astype(np.int64), minlength=len(files))),
            boxes=table[:, 2:6].astype(np.float32),
            labels=table[:, 1].astype(np.int64),
            areas=table[:, 6].copy(),
            crowds=table[:, 7] > 0,
            segmentation_kinds=table[:, 8].astype(np.uint8),
            segmentation_offsets=_offsets(np.array([len(segmentation) for segmentation in segmentations], np.int64)),
            segmentations=np.frombuffer(b"".join(segmentations), np.uint8),
            classes=classes,
            category_ids=category_ids,
            problems=self.problems,
        )


def _pack_segmentation(segmentation: Any, height: int, width: int) -> tuple[int, bytes]:
    """Return the kind of a segmentation, and its bytes."""
    if isinstance(segmentation, dict):
        return RLE, _pack_rle(segmentation, height, width)
    if not isinstance(segmentation, list):
        raise ValueError("missing" if segmentation is None else f"it is a {type(segmentation).__name__}")
    parts = []
    for polygon in segmentation:
        if len(polygon) < 6 or len(polygon) % 2:
            continue  # COCO itself has polygons of two points beside valid ones
        points = np.array(polygon, np.float64)
        if not np.isfinite(points).all():
            raise ValueError("polygon coordinates are not finite")
        # Drawing a polygon takes memory in proportion to its extent, so limit it.
        points[0::2] = points[0::2].clip(-width, 2 * width)
        points[1::2] = points[1::2].clip(-height, 2 * height)
        parts += [np.float64(len(polygon)).tobytes(), points.tobytes()]
    if not parts:
        raise ValueError("polygon has fewer than 3 points")
    return POLYGONS, b"".join(parts)


def _pack_rle(segmentation: dict, height: int, width: int) -> bytes:
    """Return compressed RLE counts after checking that they cover the image exactly.

    Otherwise pycocotools would return uninitialized memory.
    """
    from pycocotools import mask as coco_mask

    counts, size = segmentation["counts"], list(segmentation["size"])
    if size != [height, width]:
        raise ValueError(f"has {size} px, but the image has {height} x {width}")
    packed = counts.encode() if isinstance(counts, str) else None
    lengths = counts if packed is None else decode_rle_counts(packed)
    if not all(type(length) is int and length >= 0 for length in lengths) or sum(lengths) != height * width:
        raise ValueError("RLE run lengths do not add up to the image size")
    if packed is None:
        packed = coco_mask.frPyObjects({"size": size, "counts": lengths}, height, width)["counts"]
    return packed


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """Return where each of several consecutive parts begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
