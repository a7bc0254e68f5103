"""Paint images of shapes in the COCO layout: ``python tools/paint_objects.py shapes --images 400``

Each image has one to three discs, squares, triangles or crosses of random color, size and rotation with exactly known
outlines, on photographs (``--photos FOLDER``) or on smooth noise. The same arguments give the same images.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("disc", "square", "triangle", "cross")
ATTEMPTS, GAP_PX = 20, 2


def main() -> None:
    """Write ``OUT/train`` and ``OUT/val`` with their annotations."""
    parser = argparse.ArgumentParser(description="Paint images of shapes in the COCO layout.")
    add_output_options(parser, size_px=64)
    parser.add_argument("--images", type=int, default=400, help="training images (default: 400)")
    parser.add_argument("--val-images", type=int, default=100, help="validation images (default: 100)")
    arguments = parser.parse_args()
    photos = photographs(arguments.photos)
    for part, (split, count) in enumerate((("train", arguments.images), ("val", arguments.val_images))):
        rng = np.random.default_rng([arguments.seed, part])
        write_split(arguments.out, split, count, arguments.size, photos[part::2], rng)


def add_output_options(parser: argparse.ArgumentParser, size_px: int) -> None:
    """Add the output folder, the image size, the backgrounds and the seed."""
    parser.add_argument("out", type=Path, help="output folder, new or empty")
    parser.add_argument(
        "--size", type=int, default=size_px, metavar="PX", help="side of the images (default: %(default)s)"
    )
    parser.add_argument(
        "--photos", type=Path, metavar="FOLDER", help="backgrounds; every second photograph is used for val"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")


def photographs(folder: Path | None) -> list[Path]:
    """Return all files of a folder sorted by name; none if ``folder`` is None."""
    return sorted(file for file in folder.iterdir() if file.is_file()) if folder else []


def write_split(out: Path, split: str, count: int, size: int, photos: list[Path], rng: np.random.Generator) -> None:
    """Write ``count`` images and ``annotations/{split}.json``."""
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    (out / split).mkdir(exist_ok=True)
    images, annotations = [], []
    for index in range(count):
        image, objects = paint(background(size, photos, rng), rng)
        name = f"{index:06d}.png"
        image.save(out / split / name)
        images.append({"id": index, "file_name": name, "height": size, "width": size})
        annotations += [{"id": id_, "image_id": index, **each} for id_, each in enumerate(objects, len(annotations))]
    categories = [{"id": id_, "name": name} for id_, name in enumerate(CLASSES, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (out / "annotations" / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")


def background(size: int, photos: list[Path], rng: np.random.Generator) -> Image.Image:
    """Crop a random square of a photograph, or make noise of two scales."""
    if photos:
        with Image.open(photos[rng.integers(len(photos))]) as photo:
            side = int(min(photo.size) * rng.uniform(0.4, 1))
            left, top = (int(rng.integers(length - side + 1)) for length in photo.size)
            return photo.convert("RGB").resize((size, size), box=(left, top, left + side, top + side))
    coarse = Image.fromarray(rng.integers(40, 216, (4, 4, 3), dtype=np.uint8)).resize((size, size))
    grain = rng.normal(0, 12, (size, size, 1))
    return Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))


def paint(image: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, list[dict]]:
    """Paint shapes that do not touch each other, and return the image and their COCO annotations."""
    size, draw, objects = image.width, ImageDraw.Draw(image), []
    boxes: list[np.ndarray] = []
    for _ in range(rng.integers(1, 4)):
        for _ in range(ATTEMPTS):
            kind, radius = int(rng.integers(len(CLASSES))), size * rng.uniform(0.1, 0.22)
            corners = outline(kind, radius, rng.uniform(0, 2 * math.pi)) + rng.uniform(radius, size - radius, 2)
            box = np.concatenate([corners.min(axis=0), corners.max(axis=0)])
            if all((box[:2] > other[2:] + GAP_PX).any() or (box[2:] < other[:2] - GAP_PX).any() for other in boxes):
                break
        else:
            continue
        boxes.append(box)
        draw.polygon([tuple(corner) for corner in corners], fill=tuple(rng.integers(0, 256, 3).tolist()))
        left, top, right, bottom = box.tolist()
        x, y = corners.T
        area = abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2
        objects.append(
            {
                "category_id": kind + 1,
                "bbox": [left, top, right - left, bottom - top],
                "area": area,
                "iscrowd": 0,
                "segmentation": [corners.flatten().tolist()],
            }
        )
    return image, objects


def outline(kind: int, radius: float, angle: float) -> np.ndarray:
    """Return the corners ``(n, 2)`` of a shape around the origin, at a distance of at most ``radius``."""
    if CLASSES[kind] == "cross":
        width = 1 / 3
        corners = [(width, 1), (width, width), (1, width), (1, -width), (width, -width), (width, -1)]
        shape = np.array([*corners, *((-x, -y) for x, y in corners)]) / math.hypot(1, width)
    else:
        count = {"disc": 24, "square": 4, "triangle": 3}[CLASSES[kind]]
        angles = 2 * math.pi * np.arange(count) / count
        shape = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return radius * shape @ rotation.T


if __name__ == "__main__":
    main()
