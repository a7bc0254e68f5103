"""Pictures with known label maps: shapes of four textures in front of photographs, or of leaves.

``python tools/paint_shapes.py FOLDER [--photos FOLDER]`` writes ``images`` and ``annotations``, each with ``training``
and ``validation``, and ``classes.txt``: what ``labels.path`` of a stage of segmentation takes. No photograph is in both
parts. The same arguments give the same pictures.
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
    """Write ``counts`` pictures of ``size`` px by part.

    Raises:
        ValueError: no photographs, or too few to keep some for validation.
    """
    backgrounds: dict[str, Source | None] = dict.fromkeys(counts)
    if photos is not None:
        images = open_images(photos, Decoder())
        backgrounds["training"], backgrounds["validation"] = split_validation(images, len(images) // 5)
        if backgrounds["validation"] is None:
            raise ValueError(f"{photos} holds {len(images)} images: too few to keep some for validation")
    for part, count in counts.items():
        shapes = Shapes(count, (size, size), validation=part == "validation")
        folders = {kind: out / kind / part for kind in ("images", "annotations")}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image, inside = shapes.paint(number, view(backgrounds[part], number, size))
            labels = inside * (1 + shapes.label(number))
            to_image(image).save(folders["images"] / f"{number:06d}.png")
            label_map_image(labels, len(CLASSES)).save(folders["annotations"] / f"{number:06d}.png")
    (out / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")


def view(photos: Source | None, number: int, size: int) -> Tensor | None:
    """A crop of one of the photographs, float ``(3, size, size)``; None where there are none."""
    if photos is None:
        return None
    crop = RandomCrop((size, size), scale=(0.1, 1.0))
    generator = torch.Generator().manual_seed(derive_seed("crop", 0, number))
    draws = torch.rand(crop.num_draws, generator=generator).tolist()
    return crop(photos.decode(photos.fetch(number % len(photos))), draws) / 255


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; gives its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--photos", help="anything that data.path of a recipe takes (default: leaves)")
    parser.add_argument("--training", type=int, default=4000, metavar="N", help="default: 4000")
    parser.add_argument("--validation", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument("--size", type=int, default=64, metavar="PX", help="default: 64")
    given = parser.parse_args(argv)
    try:
        paint(given.out, given.photos, {"training": given.training, "validation": given.validation}, given.size)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
