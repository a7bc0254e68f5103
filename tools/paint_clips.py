"""Paint videos of shapes that sink or rise: ``python tools/paint_clips.py painted --photos PHOTOS``

The shapes are those of builtin:shapes: discs, squares, triangles and crosses in four textures, on a still photograph
(``--photos FOLDER``) or on smooth noise. ``OUT/train`` and ``OUT/val`` hold one folder per class. A class is a texture
and a direction of motion, which a single frame does not show. The same arguments give the same videos. Needs PyAV.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # this file is run by its path, so the root is not on sys.path

from simmim.data import MovingShapes
from simmim.data.decode import to_image
from tools.paint_objects import add_output_options, background, photographs


def main(argv: Sequence[str] | None = None) -> None:
    """Write ``OUT/train`` and ``OUT/val``."""
    parser = argparse.ArgumentParser(description="Paint videos of shapes that sink or rise; --size must be even.")
    add_output_options(parser, size_px=24)
    parser.add_argument("--videos", type=int, default=8000, help="training videos (default: 8000)")
    parser.add_argument("--val-videos", type=int, default=400, help="validation videos (default: 400)")
    arguments = parser.parse_args(argv)
    size, seed = arguments.size, arguments.seed
    photos = photographs(arguments.photos)
    for part, (split, count) in enumerate((("train", arguments.videos), ("val", arguments.val_videos))):
        rng = np.random.default_rng([seed, part])
        shapes = MovingShapes((seed + 1) * count, (size, size), validation=split == "val")
        for index in range(seed * count, (seed + 1) * count):
            folder = arguments.out / split / shapes.classes[shapes.label(index)].replace(", ", "_")
            folder.mkdir(parents=True, exist_ok=True)
            scene = pil_to_tensor(background(size, photos[part::2], rng)) / 255
            video, _ = shapes.paint(index, scene)
            write(folder / f"{index:06d}.avi", [to_image(frame) for frame in video.unbind(1)])


def write(path: Path, frames: list[Image.Image]) -> None:
    """Write a video as motion JPEG, of which every frame can be decoded on its own."""
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
