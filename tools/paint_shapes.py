"""Paint images with known label maps: shapes of four textures on photographs, or on leaves.

``python tools/paint_shapes.py FOLDER [--photos FOLDER]`` writes ``images`` and ``annotations``, each with ``training``
and ``validation``, and ``classes.txt``, the layout that ``labels.path`` of a segmentation stage expects. No photograph
is used in both parts. The same arguments give the same images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from simmim.data import Decoder, RandomCrop, Shapes, open_images, split_validation
from simmim.data.decode import to_image
from simmim.data.shapes import TEXTURES
from simmim.data.sources import Source
from simmim.rng import derive_seed
from simmim.visualization.drawing import label_map_image

CLASSES = ("background", *TEXTURES)


def paint(out: Path, photos: str | None, counts: dict[str, int], size: int) -> None:
    """Write ``counts[part]`` images of ``size`` px for every part.

    Raises:
        ValueError: there are no photographs, or too few for a validation part.
    """
    backgrounds: dict[str, Source | None] = dict.fromkeys(counts)
    if photos is not None:
        images = open_images(photos, Decoder())
        backgrounds["training"], backgrounds["validation"] = split_validation(images, len(images) // 5)
        if backgrounds["validation"] is None:
            raise ValueError(f"{photos} holds {len(images)} images, too few for a validation part: give at least 10")
    for part, count in counts.items():
        shapes = Shapes(count, (size, size), validation=part == "validation")
        folders = {kind: out / kind / part for kind in ("images", "annotations")}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, inside = shapes.paint(index, crop_background(backgrounds[part], index, size))
            labels = inside * (1 + shapes.label(index))
            to_image(image).save(folders["images"] / f"{index:06d}.png")
            label_map_image(labels, len(CLASSES)).save(folders["annotations"] / f"{index:06d}.png")
    (out / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")


def crop_background(photos: Source | None, index: int, size: int) -> Tensor | None:
    """Return a crop of one of the photographs, float ``(3, size, size)``; None if there are no photographs."""
    if photos is None:
        return None
    crop = RandomCrop((size, size), scale=(0.1, 1.0))
    generator = torch.Generator().manual_seed(derive_seed("crop", 0, index))
    draws = torch.rand(crop.num_draws, generator=generator).tolist()
    return crop(photos.decode(photos.fetch(index % len(photos))), draws) / 255


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--photos", help="anything that data.path of a recipe accepts (default: painted leaves)")
    parser.add_argument("--training", type=int, default=4000, metavar="N", help="training images (default: 4000)")
    parser.add_argument("--validation", type=int, default=200, metavar="N", help="validation images (default: 200)")
    parser.add_argument("--size", type=int, default=64, metavar="PX", help="side of the images (default: 64)")
    given = parser.parse_args(argv)
    try:
        paint(given.out, given.photos, {"training": given.training, "validation": given.validation}, given.size)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
