"""``simmim data``: check, pack and probe images before training."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from simmim.cli.arguments import add_command

EXAMPLES = """examples:
  simmim data check /data/photos                       # every image decoded once; broken ones named
  simmim data pack /data/photos packed                 # short side 256 px, JPEG 90: decodes several times faster
  simmim data pack /data/photos packed --short-side 0 --quality 0      # as they are, in a few large files
  simmim data pack hf:cifar10 packed
  simmim data probe packed                             # how many loader processes pay

PATH is whatever data.path of a recipe may be. An interrupted pack continues with the same command.
"""


def add_data(commands: Any) -> None:
    """Add the command and what it can do."""
    data = add_command(
        commands,
        "data",
        examples=EXAMPLES,
        help="check, pack and probe images",
    )
    actions = data.add_subparsers(required=True, metavar="ACTION")
    check = _add(actions, "check", _check, "decode every image once: what is broken, how large, mean and std")
    check.add_argument("--report", type=Path, default=Path("corrupt_images.csv"), help="default: %(default)s")
    pack = _add(actions, "pack", _pack, "write images into shards: smaller, faster to decode, few files")
    pack.add_argument("out", type=Path, help="a new folder; a recipe then takes data.path=OUT")
    pack.add_argument("--short-side", type=int, metavar="PX", help="reduce larger images to it (default: 256; 0: none)")
    pack.add_argument("--quality", type=int, metavar="Q", help="of JPEG (default: 90; 0: without loss)")
    pack.add_argument("--shard-images", type=int, metavar="N", help="images in each shard (default: 2048)")
    probe = _add(actions, "probe", _probe, "images per second for several numbers of loader processes")
    probe.add_argument("--image-size", type=int, default=192, metavar="PX", help="default: %(default)s")
    probe.add_argument("--batch-size", type=int, default=128, metavar="N", help="default: %(default)s")
    probe.add_argument("--seconds", type=float, default=5.0, metavar="S", help="for each number (default: %(default)s)")


def _add(actions: Any, name: str, run: Any, meaning: str) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=meaning, description=f"{meaning[0].upper()}{meaning[1:]}.")
    parser.add_argument("path", metavar="PATH", help="a folder, archive, list, table or name, as data.path of a recipe")
    parser.add_argument("--in-chans", type=int, default=3, metavar="N", help="channels (default: 3)")
    parser.add_argument(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="black and white in files of more than 8 bits",
    )
    if name != "probe":
        cores = os.cpu_count() or 1
        parser.add_argument("--num-workers", type=int, default=cores, metavar="N", help="default: all cores")
    parser.set_defaults(run=run, overrides=[])
    return parser


def _images(arguments: argparse.Namespace) -> Any:
    from simmim.data import Decoder, open_images

    return open_images(arguments.path, Decoder(arguments.in_chans, _range(arguments)))


def _range(arguments: argparse.Namespace) -> tuple[float, float] | None:
    return tuple(arguments.value_range) if arguments.value_range else None


def _check(arguments: argparse.Namespace) -> int:
    from simmim.data.survey import check, format_summary

    summary = check(_images(arguments), arguments.report, num_workers=arguments.num_workers)
    print(format_summary(summary))
    if summary.corrupt:
        print(f"named in {arguments.report}")
    return 1 if summary.corrupt else 0


def _pack(arguments: argparse.Namespace) -> int:
    from simmim.data.pack import Packing, pack

    given = {name: getattr(arguments, name) for name in ("short_side", "quality", "shard_images")}
    packing = Packing(
        channels=arguments.in_chans,
        value_range=_range(arguments),
        **{name: value for name, value in given.items() if value is not None},
    )
    result = pack(arguments.path, arguments.out, packing, num_workers=arguments.num_workers)
    before, after = (result[f"bytes_{when}"] / 1e6 for when in ("before", "after"))
    print(f"{result['images']:,} images, {before:,.1f} MB -> {after:,.1f} MB; {result['broken']} broken ones left out")
    if result["corrupt"]:
        print(f"named in {arguments.out / 'corrupt_images.csv'}")
    mean, std = (",".join(f"{value:g}" for value in result[name]) for name in ("mean", "std"))
    print(f"data.path={arguments.out}\nof these images: data.mean=[{mean}] data.std=[{std}]")
    return 0


def _probe(arguments: argparse.Namespace) -> int:
    from simmim.data import RandomCrop
    from simmim.data.worker_probe import format_probe, probe

    crop = RandomCrop((arguments.image_size, arguments.image_size))
    print(format_probe(probe(_images(arguments), crop, batch_size=arguments.batch_size, seconds=arguments.seconds)))
    return 0
