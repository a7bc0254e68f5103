"""``simmim reconstruct`` and ``simmim report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from simmim.cli.arguments import add_command

EXAMPLES = """examples:
  simmim reconstruct runs/demo/pretrain/export builtin:shapes
  simmim reconstruct runs/b/pretrain/export photos --images 8 --mask-ratio 0.75 --out masked.png
  simmim reconstruct runs/b/pretrain/export photos --mask-patch-sizes 16 32 64 --ratios 0.2 0.4 0.6 0.8
  simmim reconstruct runs/sentinel/pretrain/export tiles --bands 3 2 1        (or: --bands pca)

IMAGES is anything that data.path of a recipe accepts.
"""


def add_visualize(commands: argparse._SubParsersAction) -> None:
    """Add both commands."""
    reconstruct = add_command(
        commands,
        "reconstruct",
        examples=EXAMPLES,
        help="draw the masked images and the reconstructions of a pretrained model",
    )
    reconstruct.add_argument("export", type=Path, help="export of a pretraining stage")
    reconstruct.add_argument("images_path", metavar="IMAGES", help="a folder, archive, table, or builtin:shapes")
    reconstruct.add_argument("--images", type=int, default=4, metavar="N", help="number of images (default: 4)")
    reconstruct.add_argument("--mask-patch-size", type=int, metavar="PX", help="default: as in pretraining")
    reconstruct.add_argument("--mask-ratio", type=float, metavar="R", help="default: as in pretraining")
    reconstruct.add_argument(
        "--mask-patch-sizes",
        type=int,
        nargs="+",
        metavar="PX",
        help="with --ratios: draw the first image under every combination",
    )
    reconstruct.add_argument("--ratios", type=float, nargs="+", metavar="R", help="with --mask-patch-sizes")
    reconstruct.add_argument(
        "--bands", nargs="+", metavar="N", help="three channels to show as red, green and blue, or pca"
    )
    reconstruct.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the masks (default: 0)")
    reconstruct.add_argument("--out", type=Path, default=Path("reconstruction.png"), help="default: %(default)s")
    reconstruct.set_defaults(run=_reconstruct, overrides=[])
    report = commands.add_parser("report", help="write an HTML page with the curves, images and settings of runs")
    report.add_argument("folders", type=Path, nargs="+", help="run folders or stage folders to compare")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first folder")
    report.set_defaults(run=_report, overrides=[])


def _reconstruct(arguments: argparse.Namespace) -> int:
    from simmim.export.export import open_export
    from simmim.visualization.reconstructions import gallery, load_simmim, read_images, reconstruct

    if (arguments.mask_patch_sizes is None) != (arguments.ratios is None):
        raise ValueError("got only one of --mask-patch-sizes and --ratios: give both to draw every combination")
    if arguments.images < 1:
        raise ValueError(f"--images must be at least 1, got {arguments.images}")
    bands = "pca" if arguments.bands == ["pca"] else arguments.bands and [int(band) for band in arguments.bands]
    export = open_export(arguments.export)
    task = load_simmim(
        export,
        mask_patch_size=arguments.mask_patch_size,
        mask_ratio=arguments.mask_ratio,
        seed=arguments.seed,
    )
    sizes = arguments.mask_patch_sizes
    images = read_images(arguments.images_path, task, 1 if sizes else arguments.images)
    if sizes:
        figure = gallery(export, images[0], sizes, arguments.ratios, bands, arguments.seed)
    else:
        figure = reconstruct(task, images, bands)
    figure.save(arguments.out)
    print(f"image  {arguments.out}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from simmim.visualization.report import write_report

    print(f"report  {write_report(arguments.folders, arguments.out)}")
    return 0
