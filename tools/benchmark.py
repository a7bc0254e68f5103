"""Measure: `python tools/benchmark.py data FOLDER_OF_PHOTOS`."""

from __future__ import annotations

import argparse
from pathlib import Path

from simmim.lab.data_speed import data_speed

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What is measured on this machine, side by side in one run.")
    what = parser.add_subparsers(required=True, metavar="WHAT")
    data = what.add_parser("data", help="loaders: images per second and core, bytes, start-up")
    data.add_argument("path", type=Path, help="a folder of photographs")
    data.add_argument("--rounds", type=int, default=30, metavar="N", help="default: %(default)s")
    data.add_argument("--images", type=int, default=250, metavar="N", help="at most so many (default: %(default)s)")
    data.add_argument("--files", type=int, default=60_000, metavar="N", help="of the tree (default: %(default)s)")
    arguments = parser.parse_args()
    data_speed(arguments.path, rounds=arguments.rounds, images=arguments.images, files=arguments.files)
