"""Writes videos of shapes that sink or rise: ``python tools/paint_clips.py painted --photos PHOTOS``

They are those of builtin:shapes, discs, squares, triangles and crosses of four textures, in front of a still photograph
(``--photos FOLDER``) or of soft noise. ``OUT/train`` and ``OUT/val`` hold a folder per class, which is the texture and
how it moves: of the latter no frame alone tells anything. The same arguments give the same videos. Needs PyAV.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # this file is run by its path

from simmim.data import MovingShapes
from simmim.data.decode import to_image
from tools.paint_objects import add_place, background, photographs


def main(argv: Sequence[str] | None = None) -> None:
    """Write ``OUT/train`` and ``OUT/val``."""
    parser = argparse.ArgumentParser(
        description="Videos of painted shapes that sink or rise; --size is an even number."
    )
    add_place(parser, size_px=24)
    parser.add_argument("--videos", type=int, default=8000, help="to train on (default: 8000)")
    parser.add_argument("--val-videos", type=int, default=400, help="default: 400")
    arguments = parser.parse_args(argv)
    size, seed = arguments.size, arguments.seed
    photos = photographs(arguments.photos)
    for place, (split, count) in enumerate((("train", arguments.videos), ("val", arguments.val_videos))):
        rng = np.random.default_rng([seed, place])
        shapes = MovingShapes((seed + 1) * count, (size, size), validation=split == "val")
        for number in range(seed * count, (seed + 1) * count):
            folder = arguments.out / split / shapes.classes[shapes.label(number)].replace(", ", "_")
            folder.mkdir(parents=True, exist_ok=True)
            scene = pil_to_tensor(background(size, photos[place::2], rng)) / 255
            video, _ = shapes.paint(number, scene)
            write(folder / f"{number:06d}.avi", [to_image(frame) for frame in video.unbind(1)])


def write(path: Path, frames: list[Image.Image]) -> None:
    """As JPEG, frame by frame: any of them is decoded without the others."""
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream("mjpeg", rate=25, options={"qmin": "1", "qmax": "2"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuvj444p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_image(frame)))
        file.mux(stream.encode())


if __name__ == "__main__":
    main()
