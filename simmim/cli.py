"""The command line. Exit codes: 0 done, 2 a mistake in what was given, 1 anything else, 130 Ctrl-C."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from simmim import __version__
from simmim.data_commands import add_data

PRETRAIN_EXAMPLES = """examples:
  simmim pretrain recipes/demo.yaml
  simmim pretrain recipes/simmim_swinv2_b.yaml data.path=/data/photos stages.pretrain.micro_batch_size=32
  accelerate launch tools/pretrain.py recipes/simmim_swinv2_h.yaml data.path=/data/photos

The same command again continues an interrupted run. `simmim show RECIPE` prints every key.
"""

FINETUNE_EXAMPLES = """examples:
  simmim finetune --encoder runs/demo/pretrain/export --data flowers --image-size 224
  simmim finetune --encoder runs/demo/pretrain/export --data flowers stages.finetune.schedule.epochs=30
  accelerate launch tools/finetune.py recipes/simmim_swinv2_b.yaml --stage finetune_224 data.path=/data/imagenet

DATA holds one subfolder per class, or train and val with one subfolder per class each. Without a recipe one is
written beside the results.
"""

CONVERT_EXAMPLES = """examples:
  simmim convert swinv2_base_22k_500k.pth encoders/base
  simmim convert runs/demo/pretrain/export demo_timm --to timm
  simmim convert encoders/base base_384 --image-size 384 --window-size 24
  simmim convert encoders/base base_sentinel --in-chans 13 --inflate mean
  simmim convert encoders/base base.onnx --to onnx

Every file is read back with the library it is for and compared; nothing is left when that fails.
"""
LAB_EXAMPLES = """examples:
  simmim lab label-efficiency recipes/demo.yaml
  simmim lab label-efficiency recipes/cifar_swinv2_nano.yaml data.path=cifar10 --seeds 0 1 2 3 4
  simmim lab loss-anchors simmim_swinv2_b data.path=photos --mask-patch-sizes 8 16 32 64 --ratios 0.4 0.6 0.8
  simmim lab window-transfer
  simmim lab window-transfer --data flowers --image-size 96 --window-size 12 --seeds 5

DATA is builtin:shapes or a folder with one subfolder per class. The same command continues what was interrupted.
"""
LAYOUTS = ("native", "timm", "transformers", "official", "onnx", "torch-export")


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    parser = _parser()
    # argparse takes positional arguments in one run only; overrides may also follow options.
    arguments, further = parser.parse_known_args(argv)
    unknown = [word for word in further if word.startswith("-") or "=" not in word]
    if unknown:
        parser.error(f"unknown argument(s): {' '.join(unknown)}")
    arguments.overrides += further
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        if os.environ.get("SIMMIM_DEBUG"):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from simmim.engine import NonFiniteLoss

        if not isinstance(error, NonFiniteLoss):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last checkpoint", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    from simmim.recipe import load_recipe
    from simmim.stages import run, run_stage, stage_of_kind

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    stage = arguments.stage or (arguments.kinds and stage_of_kind(recipe, arguments.kinds))
    if stage:
        run_stage(recipe, stage, arguments.out, precision=arguments.precision)
    else:
        run(recipe, arguments.out, precision=arguments.precision)
    return 0


def _finetune(arguments: argparse.Namespace) -> int:
    from simmim.stages.alone import make_recipe

    if arguments.encoder is not None and arguments.recipe is not None and "=" in arguments.recipe:
        arguments.overrides.insert(0, arguments.recipe)  # without a recipe, the first override stands in its place
        arguments.recipe = None
    if (arguments.recipe is None) == (arguments.encoder is None):
        raise ValueError("give a recipe, or --encoder EXPORT and --data FOLDER")
    if arguments.encoder is not None:
        arguments.recipe = str(
            make_recipe(
                arguments.encoder,
                arguments.data,
                arguments.out,
                image_size=arguments.image_size,
                window_size=arguments.window_size,
                name=arguments.name,
            )
        )
    return _run(arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    from simmim.stages import evaluate

    sizes = {name: getattr(arguments, name) for name in ("image_size", "window_size")}
    task = {
        "batch_size": arguments.batch_size,
        "num_workers": arguments.num_workers,
        "precision": arguments.precision,
        **{name: size for name, size in sizes.items() if size is not None},
    }
    results: Any
    if arguments.probe:
        results = evaluate.probe(arguments.encoder, arguments.data, **task)
        text = evaluate.format_probe(results)
    else:
        results = evaluate.evaluate_classifier(arguments.encoder, arguments.data, **task)
        text = "  ".join(f"{name} {value:.4g}" for name, value in results.items())
    if os.environ.get("RANK", "0") == "0":
        print(text)
        if arguments.json:
            evaluate.write_results(arguments.json, results)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from simmim.recipe import dump_recipe, load_recipe, shipped_recipes

    if arguments.recipe is None:
        print("\n".join(recipe.stem for recipe in shipped_recipes()))
    else:
        print(dump_recipe(load_recipe(arguments.recipe, arguments.overrides)), end="")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from simmim.convert import convert

    given = {name: getattr(arguments, name) for name in ("image_size", "window_size", "in_chans")}
    convert(
        arguments.source,
        arguments.out,
        arguments.to,
        inflate=arguments.inflate,
        table_resampling=arguments.table_resampling,
        **{name: value for name, value in given.items() if value is not None},
    )
    return 0


def _window_transfer(arguments: argparse.Namespace) -> int:
    from simmim.lab.window_transfer import Plan, window_transfer

    given = {field.name: getattr(arguments, field.name) for field in fields(Plan)}
    window_transfer(Plan(**{name: value for name, value in given.items() if value is not None}), arguments.out)
    return 0


def _label_efficiency(arguments: argparse.Namespace) -> int:
    from simmim.lab.label_efficiency import label_efficiency
    from simmim.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    label_efficiency(recipe, arguments.out, arguments.seeds, precision=arguments.precision)
    return 0


def _loss_anchors(arguments: argparse.Namespace) -> int:
    from simmim.lab.loss_anchors import loss_anchors
    from simmim.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    sizes, ratios = arguments.mask_patch_sizes, arguments.ratios
    loss_anchors(recipe, arguments.out, sizes, ratios, images=arguments.images)
    return 0


def _size(text: str) -> int | tuple[int, ...]:
    """``192`` or ``192x256``, height first."""
    sides = tuple(int(side) for side in text.split("x"))
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} has {len(sides)} sides: expected one number or HEIGHTxWIDTH")
    return sides[0] if len(sides) == 1 else sides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="simmim", description="SimMIM pretraining of Swin Transformer V2.")
    parser.add_argument("--version", action="version", version=f"simmim {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    pretrain = commands.add_parser(
        "pretrain",
        help="pretrain an encoder on images without labels",
        epilog=PRETRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pretrain.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    _add_run_options(pretrain)
    _add_stage(pretrain)
    pretrain.set_defaults(run=_run, kinds=("pretrain",))

    every = commands.add_parser("run", help="walk all stages of a recipe; what is done is not done again")
    every.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    _add_run_options(every)
    _add_stage(every)
    every.set_defaults(run=_run, kinds=None)

    finetune = commands.add_parser(
        "finetune",
        help="train a classifier: a stage of a recipe, or any encoder on any labelled folder",
        epilog=FINETUNE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    finetune.add_argument("recipe", nargs="?", help="a YAML file, or the name of a shipped recipe")
    _add_run_options(finetune)
    _add_stage(finetune)
    finetune.add_argument("--encoder", type=Path, help="instead of a recipe: an export, or the file of another project")
    finetune.add_argument("--data", help="instead of a recipe: a folder with one subfolder per class")
    finetune.add_argument("--image-size", type=_size, metavar="PX", help="default: as the encoder was trained")
    finetune.add_argument("--window-size", type=_size, metavar="TOKENS", help="default: in proportion to the image")
    finetune.add_argument("--name", help="folder of the run (default: finetune_ and the name of the data)")
    finetune.set_defaults(run=_finetune, kinds=("finetune", "supervised", "transfer"))

    show = commands.add_parser("show", help="print a recipe with every value; without one, list the shipped recipes")
    show.add_argument("recipe", nargs="?")
    show.add_argument("overrides", nargs="*", metavar="key.path=value")
    show.set_defaults(run=_show)
    _add_evaluate(commands)
    _add_convert(commands)
    add_data(commands)
    _add_lab(commands)
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replace values of the recipe")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where run folders are made (default: runs)")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="default: what accelerate is configured for, else fp32"
    )


def _add_stage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", help="which stage (default: the first of its kind; run: all of them)")


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    for name, is_probe, meaning in (
        ("evaluate", False, "top-1 and top-5 of a classifier, every image once over all processes"),
        ("probe", True, "k-NN, few-shot, linear probe and effective rank of frozen features, stage by stage"),
    ):
        judge = commands.add_parser(name, help=meaning)
        judge.add_argument("encoder", type=Path, help="an export, or the file of another project")
        judge.add_argument("data", help="a folder with one subfolder per class, hf:NAME, or builtin:shapes")
        judge.add_argument("--image-size", type=_size, metavar="PX", help="default: as the encoder was trained")
        judge.add_argument("--window-size", type=_size, metavar="TOKENS", help="default: as the encoder was trained")
        judge.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
        judge.add_argument("--num-workers", type=int, default=2, metavar="N", help="default: 2")
        judge.add_argument("--precision", choices=("fp32", "bf16"), help="default: fp32")
        judge.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
        judge.set_defaults(run=_evaluate, probe=is_probe, overrides=[])


def _add_convert(commands: argparse._SubParsersAction) -> None:
    convert = commands.add_parser(
        "convert",
        help="weights of another project in, weights for another library out",
        epilog=CONVERT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument("source", type=Path, help="an export folder, a .pth or .safetensors file, a timm or HF folder")
    convert.add_argument("out", type=Path, help="what to write; must not exist")
    convert.add_argument("--to", choices=LAYOUTS, default="native", help="default: native")
    convert.add_argument("--image-size", type=_size, metavar="PX", help="384 or 256x320 (height first)")
    convert.add_argument("--window-size", type=_size, metavar="TOKENS", help="24 or 8x10")
    convert.add_argument("--in-chans", type=int, metavar="N", help="another number of channels, with --inflate")
    convert.add_argument("--inflate", choices=("mean", "repeat"), help="how channels are spread")
    convert.add_argument(
        "--table-resampling",
        choices=("bicubic", "geometric"),
        default="bicubic",
        help="how the bias tables of V1 change their window (default: bicubic)",
    )
    convert.set_defaults(run=_convert, overrides=[])


def _add_lab(commands: argparse._SubParsersAction) -> None:
    lab = commands.add_parser("lab", help="small experiments that answer one question of the papers each")
    experiments = lab.add_subparsers(required=True, metavar="EXPERIMENT")
    efficiency = experiments.add_parser(
        "label-efficiency",
        help="does pretraining help where labels are few? The stages of a recipe against scratch, over seeds",
        epilog=LAB_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    efficiency.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    _add_run_options(efficiency)
    efficiency.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    efficiency.set_defaults(run=_label_efficiency)
    anchors = experiments.add_parser(
        "loss-anchors",
        help="how low is a masked loss that needs no learning? Trivial predictors on the images of a recipe",
        epilog=LAB_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    anchors.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    anchors.add_argument("overrides", nargs="*", metavar="key.path=value", help="replace values of the recipe")
    anchors.add_argument("--mask-patch-sizes", type=int, nargs="+", metavar="PX", help="default: that of the recipe")
    anchors.add_argument("--ratios", type=float, nargs="+", metavar="R", help="default: that of the recipe")
    anchors.add_argument("--images", type=int, default=120, metavar="N", help="at most so many (default: 120)")
    anchors.add_argument("--out", type=Path, default=Path("runs"), help="where the table is written (default: runs)")
    anchors.set_defaults(run=_loss_anchors)
    transfer = experiments.add_parser(
        "window-transfer",
        help="which position bias survives a larger window? Table 1 of Swin V2 in small",
        epilog=LAB_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    transfer.add_argument("--data", help="default: builtin:shapes")
    transfer.add_argument("--out", type=Path, default=Path("runs/lab/window-transfer"), help="default: %(default)s")
    for name, meaning in (
        ("seeds", "repetitions (default: 3)"),
        ("image-size", "of training, px (default: 48)"),
        ("window-size", "of training, tokens of 4 px (default: 6)"),
        ("steps", "of training (default: 1000)"),
        ("finetune-steps", "at each larger window (default: 40)"),
        ("batch-size", "images per step (default: 32)"),
        ("embed-dim", "width of the encoder (default: 32)"),
    ):
        transfer.add_argument(f"--{name}", type=int, metavar="N", help=meaning)
    for name, meaning in (("lr", "of training (default: 0.006)"), ("finetune-lr", "default: 0.001")):
        transfer.add_argument(f"--{name}", type=float, metavar="RATE", help=meaning)
    transfer.set_defaults(run=_window_transfer, overrides=[])


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
