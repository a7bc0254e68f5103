"""COCO annotations from JSON to arrays: what hundreds of thousands of objects leave in memory are numbers.

Bad annotations are left out and named, with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

NO_SHAPE, POLYGONS, RUNS = 0, 1, 2
Problem = tuple[str, str]
"""What it is about, and what is wrong with it."""


class Annotations(NamedTuple):
    """The objects of all images, one image after the other; images in the order of their ids."""

    files: pa.Array
    """Of every image, relative to the folder of images."""
    image_ids: np.ndarray
    """int64 ``(images,)``."""
    sizes: np.ndarray
    """int64 ``(images, 2)``: height and width, px."""
    first: np.ndarray
    """int64 ``(images + 1,)``: where the objects of each image begin."""
    boxes: np.ndarray
    """float32 ``(objects, 4)``: left, top, right, bottom, px."""
    labels: np.ndarray
    """int64 ``(objects,)``, from 1."""
    areas: np.ndarray
    """float64 ``(objects,)``, square px, as the file says."""
    crowds: np.ndarray
    """bool ``(objects,)``: a group that is neither to be found nor to be missed."""
    shape_kinds: np.ndarray
    """uint8 ``(objects,)``: none, polygons or run lengths."""
    shape_ends: np.ndarray
    """int64 ``(objects + 1,)``: where each object's part of ``shapes`` ends, after a zero."""
    shapes: np.ndarray
    """uint8: polygons as float64, the number of coordinates before each ring; run lengths as COCO packs them."""
    classes: list[str]
    category_ids: list[int]
    """Of the file, by class."""
    problems: list[Problem]

    def select(self, images: np.ndarray) -> Annotations:
        """Of some images only, bool ``(images,)``."""
        objects = np.repeat(images, np.diff(self.first))
        lengths = np.diff(self.shape_ends)
        return self._replace(
            files=self.files.filter(pa.array(images)),
            image_ids=self.image_ids[images],
            sizes=self.sizes[images],
            first=_starts(np.diff(self.first)[images]),
            boxes=self.boxes[objects],
            labels=self.labels[objects],
            areas=self.areas[objects],
            crowds=self.crowds[objects],
            shape_kinds=self.shape_kinds[objects],
            shape_ends=_starts(lengths[objects]),
            shapes=self.shapes[np.repeat(objects, lengths)],
        )


def read_annotations(
    file: Path, *, training: bool, masks: bool, categories: Sequence[str] | None = None
) -> Annotations:
    """All that is usable in a COCO file.

    Args:
        training: objects of less than a pixel, crowds, and with ``masks`` objects without a segmentation are left
            out. Elsewhere crowds stay, and an object without a segmentation is treated as one, with its box for a
            shape: nobody can be asked for the outline that the file does not know.
        masks: segmentations are read.
        categories: the names that other annotations have given numbers to, for a validation set.

    Raises:
        ValueError: not a COCO file, or one without categories.
        OSError: it cannot be read.
    """
    content = _load(file)
    problems: list[Problem] = []
    files, image_ids, sizes = _images(content["images"], problems)
    classes, category_ids, labels = _categories(file, content["categories"], categories, problems)
    reader = _Objects(image_ids, sizes, labels, problems, training=training, masks=masks)
    for number, annotation in enumerate(content["annotations"]):
        reader.read(number, annotation)
    del content
    return reader.arrays(files, classes, category_ids)


def rings_of(shape: np.ndarray) -> list[list[float]]:
    """The polygons that were packed as uint8: each is x and y of its corners, in turns."""
    numbers, rings, start = shape.view(np.float64), [], 0
    while start < len(numbers):
        end = start + 1 + int(numbers[start])
        rings.append(numbers[start + 1 : end].tolist())
        start = end
    return rings


def run_lengths(counts: bytes) -> list[int]:
    """Lengths of runs as COCO packs them: five bits per character, from the third on differences to the last but one.

    Raises:
        ValueError: characters that cannot be of it.
    """
    lengths: list[int] = []
    value, shift = 0, 0
    for character in counts:
        bits = character - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("run lengths that COCO does not know")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            lengths.append(value + lengths[-2] if len(lengths) > 2 else value)
            value, shift = 0, 0
    if shift:
        raise ValueError("run lengths that end in the middle")
    return lengths


def _load(file: Path) -> dict[str, list[dict]]:
    try:
        content = json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}): expected annotations in the format of COCO") from None
    wanted = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in wanted):
        kind = ", ".join(list(content)[:5]) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise ValueError(
            f"{file} is not in the format of COCO: expected the lists {', '.join(wanted)}, found {kind or 'nothing'}"
        )
    return content


def _images(entries: list[Any], problems: list[Problem]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Files, ids and sizes of the images, sorted by id."""
    found: dict[int, tuple[str, int, int]] = {}
    for number, entry in enumerate(entries):
        try:
            image_id, file = entry["id"], entry["file_name"]
            height, width = int(entry["height"]), int(entry["width"])
        except (KeyError, TypeError, ValueError, OverflowError):
            problems.append((f"image {number} of the list", "has no id, file_name, height or width"))
            continue
        if type(image_id) is not int or not isinstance(file, str) or height < 1 or width < 1:
            problems.append((str(file), f"id {image_id!r} and {height} x {width} px: expected whole numbers above 0"))
        elif not -(2**63) <= image_id < 2**63:
            problems.append((file, f"has the id {image_id}: expected one of 64 bits"))
        elif image_id in found:
            problems.append((file, f"has the id {image_id} of {found[image_id][0]}"))
        else:
            found[image_id] = (file, height, width)
    ids = sorted(found)
    sizes = np.array([found[image_id][1:] for image_id in ids], np.int64).reshape(-1, 2)
    return [found[image_id][0] for image_id in ids], np.array(ids, np.int64), sizes


def _categories(
    file: Path, entries: list[Any], names: Sequence[str] | None, problems: list[Problem]
) -> tuple[list[str], list[int], dict[int, int]]:
    """Names and ids by class, and the label of every id; in the order of ids, or of ``names``."""
    found: dict[int, str] = {}
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or not entry.get("name"):
            problems.append((f"category {number} of the list", "has no whole number as id, or no name"))
        elif entry["id"] in found:
            problems.append((f"category {entry['name']}", f"has the id {entry['id']} of {found[entry['id']]}"))
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


class _Objects:
    """Annotations one by one, as rows of numbers."""

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
        self.number_of = {image_id: number for number, image_id in enumerate(image_ids.tolist())}
        self.seen: set[int] = set()
        self.rows: list[tuple[float, ...]] = []
        self.shapes: list[bytes] = []

    def read(self, number: int, annotation: Any) -> None:
        """Keep it, or name it with the reason."""
        name = f"annotation {annotation.get('id', number) if isinstance(annotation, dict) else number}"
        try:
            self._read(name, annotation)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            missing = f"has no {error.args[0]}" if isinstance(error, KeyError) else str(error)
            self.problems.append((name, missing))

    def _read(self, name: str, annotation: Any) -> None:
        image = self.number_of.get(annotation["image_id"])
        if image is None:
            raise ValueError(f"of image {annotation['image_id']}, which is not listed")
        label = self.labels.get(annotation["category_id"])
        if label is None:
            raise ValueError(f"of category {annotation['category_id']}, which is not known")
        if (own := annotation.get("id")) is not None:
            if own in self.seen:
                raise ValueError("has the id of one before")
            self.seen.add(own)
        crowd = bool(annotation.get("iscrowd", 0))
        if crowd and self.training:
            return
        height, width = self.sizes[image].tolist()
        box, area = self._box(name, annotation["bbox"], height, width)
        kind, shape = NO_SHAPE, b""
        if self.masks:
            try:
                kind, shape = _shape(annotation.get("segmentation"), height, width)
            except (KeyError, TypeError, ValueError) as error:
                left = "left out" if self.training else "ignored in evaluation"
                self.problems.append((name, f"has no usable segmentation ({error}): {left}"))
                if self.training:
                    return
                crowd = True
        stated = annotation.get("area")
        if isinstance(stated, int | float) and math.isfinite(stated) and stated > 0:
            area = stated
        self.rows.append((image, label, *box, area, crowd, kind))
        self.shapes.append(shape)

    def _box(self, name: str, box: Any, height: int, width: int) -> tuple[tuple[float, ...], float]:
        """Left, top, right, bottom inside the image, and the area before it was clipped."""
        if not isinstance(box, list) or len(box) != 4 or not all(math.isfinite(float(number)) for number in box):
            raise ValueError(f"bbox {box}: expected left, top, width and height")
        x, y, w, h = (float(number) for number in box)
        if w <= 0 or h <= 0:
            raise ValueError(f"bbox {box} has no area")
        left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
        least = 1.0 if self.training else 1e-6
        if right - left < least or bottom - top < least:
            raise ValueError(f"bbox {box}: less than a pixel in the image of {height} x {width} px")
        if max(left - x, top - y, x + w - right, y + h - bottom) > 1:
            self.problems.append((name, f"bbox {box} reaches out of the image of {height} x {width} px: clipped"))
        return (left, top, right, bottom), w * h

    def arrays(self, files: list[str], classes: list[str], category_ids: list[int]) -> Annotations:
        """All rows, sorted by image."""
        table = np.array(self.rows, np.float64).reshape(-1, 9)
        order = table[:, 0].argsort(kind="stable")
        table = table[order]
        shapes = [self.shapes[number] for number in order.tolist()]
        return Annotations(
            files=pa.array(files, pa.string()),
            image_ids=self.image_ids,
            sizes=self.sizes,
            first=_starts(np.bincount(table[:, 0].astype(np.int64), minlength=len(files))),
            boxes=table[:, 2:6].astype(np.float32),
            labels=table[:, 1].astype(np.int64),
            areas=table[:, 6].copy(),
            crowds=table[:, 7] > 0,
            shape_kinds=table[:, 8].astype(np.uint8),
            shape_ends=_starts(np.array([len(shape) for shape in shapes], np.int64)),
            shapes=np.frombuffer(b"".join(shapes), np.uint8),
            classes=classes,
            category_ids=category_ids,
            problems=self.problems,
        )


def _shape(segmentation: Any, height: int, width: int) -> tuple[int, bytes]:
    """The kind of a segmentation, and its bytes."""
    if isinstance(segmentation, dict):
        return RUNS, _runs(segmentation, height, width)
    if not isinstance(segmentation, list):
        raise ValueError("there is none" if segmentation is None else f"it is a {type(segmentation).__name__}")
    parts = []
    for ring in segmentation:
        if len(ring) < 6 or len(ring) % 2:
            continue  # COCO itself has some of two corners beside whole ones
        corners = np.array(ring, np.float64)
        if not np.isfinite(corners).all():
            raise ValueError("corners that are no numbers")
        # Far outside they would cost memory by their distance when they are drawn.
        corners[0::2] = corners[0::2].clip(-width, 2 * width)
        corners[1::2] = corners[1::2].clip(-height, 2 * height)
        parts += [np.float64(len(ring)).tobytes(), corners.tobytes()]
    if not parts:
        raise ValueError("no polygon of three corners")
    return POLYGONS, b"".join(parts)


def _runs(segmentation: dict, height: int, width: int) -> bytes:
    """Run lengths that fill the image exactly: pycocotools would show memory where they do not."""
    from pycocotools import mask as coco_mask

    counts, size = segmentation["counts"], list(segmentation["size"])
    if size != [height, width]:
        raise ValueError(f"of {size} px for an image of {height} x {width}")
    packed = counts.encode() if isinstance(counts, str) else None
    lengths = counts if packed is None else run_lengths(packed)
    if not all(type(length) is int and length >= 0 for length in lengths) or sum(lengths) != height * width:
        raise ValueError("run lengths do not add up to the image")
    if packed is None:
        packed = coco_mask.frPyObjects({"size": size, "counts": lengths}, height, width)["counts"]
    return packed


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Where parts of such lengths begin, and the last ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
