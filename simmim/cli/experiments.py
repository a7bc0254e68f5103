"""``simmim experiment``: small experiments on the questions of the SimMIM and Swin V2 papers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from simmim.cli.arguments import add_command, add_recipe, add_run_options, add_seeds

EXAMPLES = """examples:
  simmim experiment label-efficiency recipes/demo.yaml
  simmim experiment label-efficiency recipes/cifar_swinv2_nano.yaml data.path=cifar10 --seeds 0 1 2 3 4
  simmim experiment loss-baselines simmim_swinv2_b data.path=photos --mask-patch-sizes 8 16 32 64 --ratios 0.4 0.6 0.8
  simmim experiment ablations recipes/demo.yaml
  simmim experiment ablations recipes/demo.yaml --variants loss=l2 pixels=all norm_window=7 --seeds 0 1 2 3 4
  simmim experiment data-scaling recipes/demo.yaml --fractions 0.01 0.1 1 --sizes embed_dim=16 embed_dim=32
  simmim experiment mask-distance
  simmim experiment mask-distance --image-size 96 --mask-patch-sizes 4 8 16 32 --strategies random block
  simmim experiment activations --steps 100 --lrs 1e-3 1.6e-2
  simmim experiment window-transfer
  simmim experiment window-transfer --data flowers --image-size 96 --window-size 12 --seeds 5

DATA is builtin:shapes or a folder with one subfolder per class. Run the same command again to resume.
"""


def add_experiments(commands: argparse._SubParsersAction) -> None:
    """Add ``simmim experiment`` with all experiments."""
    parser = commands.add_parser("experiment", help="run a small experiment on a question of the papers")
    experiments = parser.add_subparsers(required=True, metavar="EXPERIMENT")
    _add_label_efficiency(experiments)
    _add_loss_baselines(experiments)
    _add_ablations(experiments)
    _add_data_scaling(experiments)
    _add_window_transfer(experiments)
    _add_mask_distance(experiments)
    _add_activations(experiments)


def _add_label_efficiency(experiments: argparse._SubParsersAction) -> None:
    efficiency = add_command(
        experiments,
        "label-efficiency",
        examples=EXAMPLES,
        help="compare pretraining with training from scratch on few labels, over several seeds",
    )
    add_recipe(efficiency)
    add_run_options(efficiency)
    add_seeds(efficiency, [0, 1, 2])
    efficiency.set_defaults(run=_label_efficiency)


def _add_loss_baselines(experiments: argparse._SubParsersAction) -> None:
    baselines = add_command(
        experiments,
        "loss-baselines",
        examples=EXAMPLES,
        help="compute the masked loss of predictors that learn nothing, on the images of a recipe",
    )
    add_recipe(baselines)
    baselines.add_argument("--mask-patch-sizes", type=int, nargs="+", metavar="PX", help="default: as in the recipe")
    baselines.add_argument("--ratios", type=float, nargs="+", metavar="R", help="default: as in the recipe")
    baselines.add_argument(
        "--images", type=int, default=120, metavar="N", help="maximum number of images (default: 120)"
    )
    baselines.add_argument("--out", type=Path, default=Path("runs"), help="parent of the output folder (default: runs)")
    baselines.set_defaults(run=_loss_baselines)


def _add_window_transfer(experiments: argparse._SubParsersAction) -> None:
    transfer = add_command(
        experiments,
        "window-transfer",
        examples=EXAMPLES,
        help="compare position biases when windows become larger (Swin V2, table 1)",
    )
    transfer.add_argument("--data", help="default: builtin:shapes")
    transfer.add_argument(
        "--out", type=Path, default=Path("runs/experiments/window-transfer"), help="default: %(default)s"
    )
    for name, text in (
        ("seeds", "number of repetitions (default: 3)"),
        ("image-size", "image size of training, px (default: 48)"),
        ("window-size", "window size of training, tokens of 4 px (default: 6)"),
        ("steps", "training steps (default: 1000)"),
        ("finetune-steps", "fine-tuning steps at each larger window (default: 40)"),
        ("batch-size", "images per step (default: 32)"),
        ("embed-dim", "width of the encoder (default: 32)"),
    ):
        transfer.add_argument(f"--{name}", type=int, metavar="N", help=text)
    for name, text in (
        ("lr", "learning rate of training (default: 0.006)"),
        ("finetune-lr", "learning rate of fine-tuning (default: 0.001)"),
    ):
        transfer.add_argument(f"--{name}", type=float, metavar="LR", help=text)
    transfer.set_defaults(run=_window_transfer, overrides=[])


def _add_ablations(experiments: argparse._SubParsersAction) -> None:
    command = add_command(
        experiments,
        "ablations",
        examples=EXAMPLES,
        help="compare losses, predicted pixels, heads and target resolutions after fine-tuning",
    )
    add_recipe(command)
    add_run_options(command)
    command.add_argument(
        "--variants",
        nargs="+",
        metavar="KEY=VALUE",
        help="settings of target to compare (default: those of the paper)",
    )
    add_seeds(command, [0, 1, 2])
    command.set_defaults(run=_ablations)


def _add_data_scaling(experiments: argparse._SubParsersAction) -> None:
    command = add_command(
        experiments,
        "data-scaling",
        examples=EXAMPLES,
        help="vary the number of images, the encoder size and the training length; relate loss to accuracy",
    )
    add_recipe(command)
    add_run_options(command)
    command.add_argument(
        "--fractions", type=float, nargs="+", metavar="F", help="fractions of the images (default: 0.02 0.1 1)"
    )
    command.add_argument(
        "--sizes", nargs="+", metavar="KEY=VALUE", help="settings of encoder (default: embed_dim=16 embed_dim=32)"
    )
    command.add_argument(
        "--lengths", type=float, nargs="+", metavar="L", help="steps relative to the recipe (default: 0.25 0.5 1)"
    )
    add_seeds(command, [0])
    command.set_defaults(run=_data_scaling)


def _add_mask_distance(experiments: argparse._SubParsersAction) -> None:
    masking = add_command(
        experiments,
        "mask-distance",
        examples=EXAMPLES,
        help="measure the distance from masked to visible pixels (AvgDist) by strategy, patch size and ratio",
    )
    masking.add_argument("--image-size", type=int, nargs="+", default=[192], metavar="PX", help="default: 192")
    masking.add_argument("--mask-patch-sizes", type=int, nargs="+", metavar="PX", help="default: 4 8 16 32 64")
    masking.add_argument("--ratios", type=float, nargs="+", metavar="R", help="default: 0.1 to 0.9")
    masking.add_argument("--strategies", nargs="+", choices=("random", "square", "block"), help="default: random")
    masking.add_argument("--masks", type=int, metavar="N", help="masks per setting (default: 100)")
    masking.add_argument(
        "--out", type=Path, default=Path("runs/experiments/mask-distance"), help="default: %(default)s"
    )
    masking.set_defaults(run=_mask_distance, overrides=[])


def _add_activations(experiments: argparse._SubParsersAction) -> None:
    activations = add_command(
        experiments,
        "activations",
        examples=EXAMPLES,
        help="measure the activation RMS per block before and after training, by norm placement (Swin V2, figure 2)",
    )
    activations.add_argument("--depths", type=int, nargs="+", metavar="N", help="blocks per stage (default: 2 2 18 2)")
    activations.add_argument(
        "--lrs", type=float, nargs="+", metavar="LR", help="learning rates (default: 0.001 0.004 0.016)"
    )
    for name, text in (
        ("embed-dim", "channels of the first stage (default: 32)"),
        ("image-size", "image size, px (default: 64)"),
        ("window-size", "window size, tokens of 2 px (default: 8)"),
        ("batch-size", "images per step (default: 8)"),
        ("steps", "training steps per learning rate (default: 100)"),
        ("seeds", "number of repetitions (default: 2)"),
    ):
        activations.add_argument(f"--{name}", type=int, metavar="N", help=text)
    activations.add_argument(
        "--out", type=Path, default=Path("runs/experiments/activations"), help="default: %(default)s"
    )
    activations.set_defaults(run=_activations, overrides=[])


def _window_transfer(arguments: argparse.Namespace) -> int:
    from simmim.experiments.window_transfer import Plan, window_transfer

    window_transfer(Plan(**_given(arguments, [field.name for field in fields(Plan)])), arguments.out)
    return 0


def _label_efficiency(arguments: argparse.Namespace) -> int:
    from simmim.config.loading import load_recipe
    from simmim.experiments.label_efficiency import label_efficiency

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    label_efficiency(recipe, arguments.out, arguments.seeds, precision=arguments.precision)
    return 0


def _ablations(arguments: argparse.Namespace) -> int:
    from simmim.config.loading import load_recipe
    from simmim.experiments.ablations import ablations

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    ablations(recipe, arguments.out, arguments.variants, arguments.seeds, precision=arguments.precision)
    return 0


def _data_scaling(arguments: argparse.Namespace) -> int:
    from simmim.config.loading import load_recipe
    from simmim.experiments.data_scaling import data_scaling

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    given = _given(arguments, ("fractions", "sizes", "lengths", "seeds"))
    data_scaling(recipe, arguments.out, **given, precision=arguments.precision)
    return 0


def _loss_baselines(arguments: argparse.Namespace) -> int:
    from simmim.config.loading import load_recipe
    from simmim.experiments.loss_baselines import loss_baselines

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    sizes, ratios = arguments.mask_patch_sizes, arguments.ratios
    loss_baselines(recipe, arguments.out, sizes, ratios, images=arguments.images)
    return 0


def _mask_distance(arguments: argparse.Namespace) -> int:
    from simmim.experiments.mask_distance import mask_distance

    if len(arguments.image_size) > 2:
        raise ValueError(f"--image-size takes one side, or height and width; got {arguments.image_size}")
    height, width = (arguments.image_size * 2)[:2]
    given = _given(arguments, ("mask_patch_sizes", "ratios", "strategies", "masks"))
    mask_distance(arguments.out, image_size=(height, width), **given)
    return 0


def _activations(arguments: argparse.Namespace) -> int:
    from simmim.experiments.activations import Plan, activations

    plan = _given(arguments, [field.name for field in fields(Plan)])
    plan |= {name: tuple(plan[name]) for name in ("depths", "lrs") if name in plan}
    activations(Plan(**plan), arguments.out)
    return 0


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Return the options that were given; the experiments define the defaults of the others."""
    values = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}
