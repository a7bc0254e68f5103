"""``simmim evaluate``, ``simmim probe`` and ``simmim predict``."""

from __future__ import annotations

import argparse
import os
from glob import glob
from pathlib import Path
from typing import Any

from simmim.cli.arguments import add_command, as_count, as_fraction, as_size, split_options

EVALUATE_EXAMPLES = """examples:
  simmim evaluate runs/b/finetune/export /data/imagenet
  simmim evaluate runs/b/finetune/export /data/imagenetv2          (one row per variant)
  simmim evaluate runs/k400/finetune/export /data/k400 views=4 crops=3
  simmim evaluate runs/ade/segment/export /data/ADEChallengeData2016 window='[512, 512]' scales='[0.75, 1, 1.25]' flip=true
  simmim evaluate runs/coco/detect/export /data/coco short_px=1000 long_px=1600 soft_nms=linear
"""  # noqa: E501
PREDICT_EXAMPLES = """examples:
  simmim predict runs/b/finetune/export photos
  simmim predict runs/coco/detect/export photos --least-score 0.7 --out found
  simmim predict runs/ade/segment/export photos flip=true --images 20
"""


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    """Add all three commands."""
    evaluate = add_command(
        commands,
        "evaluate",
        examples=EVALUATE_EXAMPLES,
        help="measure the accuracy of a classifier, mean IoU of a segmenter or average precision of a detector",
    )
    evaluate.add_argument("encoder", type=Path, help="an export, or a classifier checkpoint of another project")
    evaluate.add_argument("data", nargs="+", help="one or more labelled data sets, and inference options as key=value")
    evaluate.add_argument(
        "--batch-size", type=as_count, metavar="N", help="default: 64 for classifiers, 1 for detectors"
    )
    evaluate.set_defaults(run=_evaluate, overrides=[])
    probe = commands.add_parser(
        "probe",
        help="measure k-NN, few-shot and linear accuracy and effective rank of the frozen features of every stage",
    )
    probe.add_argument("encoder", type=Path, help="an export, or a checkpoint of another project")
    probe.add_argument("data", help="a folder with one subfolder per class, hf:NAME, or builtin:shapes")
    probe.add_argument("--batch-size", type=as_count, default=64, metavar="N", help="default: 64")
    probe.set_defaults(run=_probe, overrides=[])
    for parser in (evaluate, probe):
        parser.add_argument("--num-workers", type=int, default=2, metavar="N", help="default: 2")
        parser.add_argument("--json", type=Path, metavar="FILE", help="also write the metrics to this file")
    shown = add_command(
        commands,
        "predict",
        examples=PREDICT_EXAMPLES,
        help="draw the predicted classes, label map or objects of every image, and write them as JSON",
    )
    shown.add_argument("encoder", type=Path, help="the export of a classifier, a segmenter or a detector")
    shown.add_argument(
        "data", nargs="+", metavar="IMAGES", help="anything that data.path accepts, and inference options as key=value"
    )
    shown.add_argument("--images", type=as_count, metavar="N", help="process only the first N images (default: all)")
    shown.add_argument(
        "--least-score",
        type=as_fraction,
        default=0.5,
        metavar="S",
        help="lowest score of a drawn object (default: 0.5)",
    )
    shown.add_argument("--out", type=Path, default=Path("predictions"), help="output folder (default: %(default)s)")
    shown.set_defaults(run=_predict, overrides=[])
    for parser in (evaluate, probe, shown):
        parser.add_argument("--image-size", type=as_size, metavar="PX", help="default: as the encoder was trained")
        parser.add_argument("--window-size", type=as_size, metavar="TOKENS", help="default: as the encoder was trained")
        parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: fp32")


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = {name: getattr(arguments, name) for name in ("image_size", "window_size")}
    return {"precision": arguments.precision, **{name: size for name, size in sizes.items() if size is not None}}


def _evaluate(arguments: argparse.Namespace) -> int:
    from simmim.data.sources import imagenet_v2_parts, is_data_set_name
    from simmim.evaluation.dispatch import evaluate_export

    given, options = split_options([*arguments.data, *arguments.overrides])
    rows = {}
    settings = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers, **_given(arguments)}
    paths = [path for each in given for path in imagenet_v2_parts(each)]
    for path in paths:  # check all before evaluating the first, which may take hours
        if not is_data_set_name(path) and not glob(str(Path(path).expanduser())):
            raise ValueError(f"there is no {path!r}: expected labelled images, or options as key=value")
    for path in paths:
        rows[path] = evaluate_export(arguments.encoder, path, options, **settings)
    lines = ["  ".join(f"{name} {value:.4g}" for name, value in metrics.items()) for metrics in rows.values()]
    if len(paths) > 1:
        names = [Path(path).name for path in rows]
        names = names if len(set(names)) == len(names) else list(rows)
        lines = [f"{name}: {line}" for name, line in zip(names, lines, strict=True)]
    return _print_results("\n".join(lines), rows if len(paths) > 1 else rows[paths[0]], arguments.json)


def _probe(arguments: argparse.Namespace) -> int:
    from simmim.evaluation.probe import format_probe, probe

    if arguments.overrides:
        raise ValueError(
            f"simmim probe takes no key=value options, got {arguments.overrides[0]!r}: see simmim probe --help"
        )
    settings = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers, **_given(arguments)}
    rows = probe(arguments.encoder, arguments.data, **settings)
    return _print_results(format_probe(rows), rows, arguments.json)


def _print_results(text: str, results: Any, file: Path | None) -> int:
    if os.environ.get("RANK", "0") == "0":
        from simmim.evaluation.dispatch import write_results

        print(text)
        if file:
            write_results(file, results)
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from simmim.evaluation.predict import LINES, predict

    paths, options = split_options([*arguments.data, *arguments.overrides])
    if len(paths) != 1:
        raise ValueError(f"expected one path with images, got {len(paths)}: {', '.join(paths)}")
    count = predict(
        arguments.encoder,
        paths[0],
        arguments.out,
        options,
        images=arguments.images,
        least_score=arguments.least_score,
        **_given(arguments),
    )
    print(f"{count} image(s) and {LINES} in {arguments.out}")
    return 0
