"""``simmim reconstruct`` and ``simmim report``: the command line of looking."""

from __future__ import annotations

import argparse
from pathlib import Path

from simmim.cli.arguments import add_command

EXAMPLES = """examples:
  simmim reconstruct runs/demo/pretrain/export builtin:shapes
  simmim reconstruct runs/b/pretrain/export photos --images 8 --mask-ratio 0.75 --out masked.png
  simmim reconstruct runs/b/pretrain/export photos --mask-patch-sizes 16 32 64 --ratios 0.2 0.4 0.6 0.8
  simmim reconstruct runs/sentinel/pretrain/export tiles --bands 3 2 1        (or: --bands pca)

IMAGES is anything that data.path of a recipe takes.
"""


def add_look(commands: argparse._SubParsersAction) -> None:
    """Both commands."""
    shown = add_command(
        commands,
        "reconstruct",
        examples=EXAMPLES,
        help="what a pretrained encoder draws under a mask: any images, cells and ratios",
    )
    shown.add_argument("export", type=Path, help="of a pretraining stage")
    shown.add_argument("images_path", metavar="IMAGES", help="a folder, archive, table, or builtin:shapes")
    shown.add_argument("--images", type=int, default=4, metavar="N", help="how many (default: 4)")
    shown.add_argument("--mask-patch-size", type=int, metavar="PX", help="default: as trained")
    shown.add_argument("--mask-ratio", type=float, metavar="R", help="default: as trained")
    shown.add_argument(
        "--mask-patch-sizes", type=int, nargs="+", metavar="PX", help="with --ratios: a gallery of the first image"
    )
    shown.add_argument("--ratios", type=float, nargs="+", metavar="R", help="with --mask-patch-sizes")
    shown.add_argument("--bands", nargs="+", metavar="N", help="three channels to show as colours, or pca")
    shown.add_argument("--seed", type=int, default=0, metavar="N", help="of the masks (default: 0)")
    shown.add_argument("--out", type=Path, default=Path("reconstruction.png"), help="default: %(default)s")
    shown.set_defaults(run=_reconstruct, overrides=[])
    page = commands.add_parser("report", help="one page with the curves, pictures and settings of runs")
    page.add_argument("folders", type=Path, nargs="+", help="runs, or single stages, to be compared")
    page.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first folder")
    page.set_defaults(run=_report, overrides=[])


def _reconstruct(arguments: argparse.Namespace) -> int:
    from simmim.export.export import open_export
    from simmim.visualization.reconstructions import gallery, load_simmim, read_images, reconstruct

    if (arguments.cells is None) != (arguments.ratios is None):
        raise ValueError("a gallery needs both --mask-patch-sizes and --ratios")
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
    images = read_images(arguments.images_path, task, 1 if arguments.cells else arguments.images)
    if arguments.cells:
        picture = gallery(export, images[0], arguments.cells, arguments.ratios, bands, arguments.seed)
    else:
        picture = reconstruct(task, images, bands)
    picture.save(arguments.out)
    print(f"picture  {arguments.out}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from simmim.visualization.report import write_report

    print(f"page  {write_report(arguments.folders, arguments.out)}")
    return 0
