"""Writes pictures of painted shapes in the layout of COCO: ``python tools/paint_objects.py shapes --images 400``

Each has one to three discs, squares, triangles and crosses of random colour, size and rotation, whose outlines are
known exactly, on photographs (``--photos FOLDER``) or on soft noise. The same arguments give the same pictures.
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
    parser = argparse.ArgumentParser(description="Pictures of painted shapes in the layout of COCO.")
    add_place(parser, size_px=64)
    parser.add_argument("--images", type=int, default=400, help="to train on (default: 400)")
    parser.add_argument("--val-images", type=int, default=100, help="default: 100")
    arguments = parser.parse_args()
    photos = photographs(arguments.photos)
    for number, (split, count) in enumerate((("train", arguments.images), ("val", arguments.val_images))):
        rng = np.random.default_rng([arguments.seed, number])
        write_split(arguments.out, split, count, arguments.size, photos[number::2], rng)


def add_place(parser: argparse.ArgumentParser, size_px: int) -> None:
    """Where pictures are written to, how large, and in front of what."""
    parser.add_argument("out", type=Path, help="a folder, new or empty")
    parser.add_argument("--size", type=int, default=size_px, metavar="PX", help="side (default: %(default)s)")
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="backgrounds: every other photograph for val")
    parser.add_argument("--seed", type=int, default=0)


def photographs(folder: Path | None) -> list[Path]:
    """All files of a folder by name; none without one."""
    return sorted(file for file in folder.iterdir() if file.is_file()) if folder else []


def write_split(out: Path, split: str, count: int, size: int, photos: list[Path], rng: np.random.Generator) -> None:
    """So many pictures, and ``annotations/{split}.json``."""
    (out / "annotations").mkdir(parents=True, exist_ok=True)
    (out / split).mkdir(exist_ok=True)
    images, annotations = [], []
    for number in range(count):
        picture, objects = paint(background(size, photos, rng), rng)
        name = f"{number:06d}.png"
        picture.save(out / split / name)
        images.append({"id": number, "file_name": name, "height": size, "width": size})
        annotations += [
            {"id": len(annotations) + place, "image_id": number, **own} for place, own in enumerate(objects)
        ]
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (out / "annotations" / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")


def background(size: int, photos: list[Path], rng: np.random.Generator) -> Image.Image:
    """A random square of a photograph, or noise of two scales."""
    if photos:
        with Image.open(photos[rng.integers(len(photos))]) as photo:
            side = int(min(photo.size) * rng.uniform(0.4, 1))
            left, top = (int(rng.integers(length - side + 1)) for length in photo.size)
            return photo.convert("RGB").resize((size, size), box=(left, top, left + side, top + side))
    coarse = Image.fromarray(rng.integers(40, 216, (4, 4, 3), dtype=np.uint8)).resize((size, size))
    grain = rng.normal(0, 12, (size, size, 1))
    return Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))


def paint(picture: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, list[dict]]:
    """Shapes that do not touch each other, and what COCO says of them."""
    size, draw, objects = picture.width, ImageDraw.Draw(picture), []
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
    return picture, objects


def outline(kind: int, radius: float, angle: float) -> np.ndarray:
    """Corners ``(n, 2)`` around the origin, none farther away than ``radius``."""
    if CLASSES[kind] == "cross":
        variant = 1 / 3
        corners = [(variant, 1), (variant, variant), (1, variant), (1, -variant), (variant, -variant), (variant, -1)]
        shape = np.array([*corners, *((-x, -y) for x, y in corners)]) / math.hypot(1, variant)
    else:
        count = {"disc": 24, "square": 4, "triangle": 3}[CLASSES[kind]]
        turns = 2 * math.pi * np.arange(count) / count
        shape = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return radius * shape @ turn.T


if __name__ == "__main__":
    main()
