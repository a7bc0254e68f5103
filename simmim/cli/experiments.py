"""``simmim experiment``: the command line of the laboratories."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from simmim.cli.arguments import add_command, add_recipe, add_run_options

LAB_EXAMPLES = """examples:
  simmim experiment label-efficiency recipes/demo.yaml
  simmim experiment label-efficiency recipes/cifar_swinv2_nano.yaml data.path=cifar10 --seeds 0 1 2 3 4
  simmim experiment loss-baselines simmim_swinv2_b data.path=photos --mask-patch-sizes 8 16 32 64 --ratios 0.4 0.6 0.8
  simmim experiment ablations recipes/demo.yaml
  simmim experiment ablations recipes/demo.yaml --variants loss=l2 pixels=all norm_window=7 --seeds 0 1 2 3 4
  simmim experiment data-scaling recipes/demo.yaml --shares 0.01 0.1 1 --sizes embed_dim=16 embed_dim=32
  simmim experiment mask-distance
  simmim experiment mask-distance --image-size 96 --mask-patch-sizes 4 8 16 32 --strategies random block
  simmim experiment activations --steps 100 --lrs 1e-3 1.6e-2
  simmim experiment window-transfer
  simmim experiment window-transfer --data flowers --image-size 96 --window-size 12 --seeds 5

DATA is builtin:shapes or a folder with one subfolder per class. The same command continues what was interrupted.
"""


def add_experiments(commands: argparse._SubParsersAction) -> None:
    """``simmim experiment``."""
    lab = commands.add_parser("experiment", help="small experiments that answer one question of the papers each")
    experiments = lab.add_subparsers(required=True, metavar="EXPERIMENT")
    efficiency = add_command(
        experiments,
        "label-efficiency",
        examples=LAB_EXAMPLES,
        help="does pretraining help where labels are few? The stages of a recipe against scratch, over seeds",
    )
    add_recipe(efficiency)
    add_run_options(efficiency)
    efficiency.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    efficiency.set_defaults(run=_label_efficiency)
    anchors = add_command(
        experiments,
        "loss-baselines",
        examples=LAB_EXAMPLES,
        help="how low is a masked loss that needs no learning? Trivial predictors on the images of a recipe",
    )
    add_recipe(anchors)
    anchors.add_argument("--mask-patch-sizes", type=int, nargs="+", metavar="PX", help="default: that of the recipe")
    anchors.add_argument("--ratios", type=float, nargs="+", metavar="R", help="default: that of the recipe")
    anchors.add_argument("--images", type=int, default=120, metavar="N", help="at most so many (default: 120)")
    anchors.add_argument("--out", type=Path, default=Path("runs"), help="where the table is written (default: runs)")
    anchors.set_defaults(run=_loss_baselines)
    _add_ablations(experiments)
    _add_data_scaling(experiments)
    transfer = add_command(
        experiments,
        "window-transfer",
        examples=LAB_EXAMPLES,
        help="which position bias survives a larger window? Table 1 of Swin V2 in small",
    )
    transfer.add_argument("--data", help="default: builtin:shapes")
    transfer.add_argument(
        "--out", type=Path, default=Path("runs/experiments/window-transfer"), help="default: %(default)s"
    )
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
    _add_masking(experiments)
    _add_activations(experiments)


def _add_ablations(experiments: argparse._SubParsersAction) -> None:
    command = add_command(
        experiments,
        "ablations",
        examples=LAB_EXAMPLES,
        help="which parts of SimMIM matter? Losses, pixels, heads, target resolutions: pretrained and fine-tuned",
    )
    add_recipe(command)
    add_run_options(command)
    command.add_argument(
        "--variants",
        nargs="+",
        metavar="KEY=VALUE",
        help="values of target to try (default: those that the paper tries)",
    )
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    command.set_defaults(run=_ablations)


def _add_data_scaling(experiments: argparse._SubParsersAction) -> None:
    command = add_command(
        experiments,
        "data-scaling",
        examples=LAB_EXAMPLES,
        help="does pretraining need many images? Share of the images x size x length, loss against accuracy",
    )
    add_recipe(command)
    add_run_options(command)
    command.add_argument("--shares", type=float, nargs="+", metavar="S", help="of the images (default: 0.02 0.1 1)")
    command.add_argument(
        "--sizes", nargs="+", metavar="KEY=VALUE", help="of encoder (default: embed_dim=16 embed_dim=32)"
    )
    command.add_argument(
        "--lengths", type=float, nargs="+", metavar="L", help="steps over those of the recipe (default: 0.25 0.5 1)"
    )
    command.add_argument("--seeds", type=int, nargs="+", metavar="N", help="default: 0")
    command.set_defaults(run=_data_scaling)


def _add_masking(experiments: argparse._SubParsersAction) -> None:
    masking = add_command(
        experiments,
        "mask-distance",
        examples=LAB_EXAMPLES,
        help="how far must a hidden pixel look? AvgDist by strategy, cell and ratio",
    )
    masking.add_argument("--image-size", type=int, nargs="+", default=[192], metavar="PX", help="default: 192")
    masking.add_argument("--mask-patch-sizes", type=int, nargs="+", metavar="PX", help="default: 4 8 16 32 64")
    masking.add_argument("--ratios", type=float, nargs="+", metavar="R", help="default: 0.1 to 0.9")
    masking.add_argument("--strategies", nargs="+", choices=("random", "square", "block"), help="default: random")
    masking.add_argument("--masks", type=int, metavar="N", help="of each kind (default: 100)")
    masking.add_argument(
        "--out", type=Path, default=Path("runs/experiments/mask-distance"), help="default: %(default)s"
    )
    masking.set_defaults(run=_masking, overrides=[])


def _add_activations(experiments: argparse._SubParsersAction) -> None:
    activations = add_command(
        experiments,
        "activations",
        examples=LAB_EXAMPLES,
        help="why the norm moved: amplitude of every block before and after training, by norm. Figure 2 in small",
    )
    activations.add_argument("--depths", type=int, nargs="+", metavar="N", help="default: 2 2 18 2")
    activations.add_argument("--lrs", type=float, nargs="+", metavar="RATE", help="default: 0.001 0.004 0.016")
    for name, meaning in (
        ("embed-dim", "channels of the first stage (default: 32)"),
        ("image-size", "px (default: 64)"),
        ("window-size", "tokens of 2 px (default: 8)"),
        ("batch-size", "images per step (default: 8)"),
        ("steps", "of training at each rate (default: 100)"),
        ("seeds", "repetitions (default: 2)"),
    ):
        activations.add_argument(f"--{name}", type=int, metavar="N", help=meaning)
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
    from simmim.experiments.ablations import tasks

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    tasks(recipe, arguments.out, arguments.variants, arguments.seeds, precision=arguments.precision)
    return 0


def _data_scaling(arguments: argparse.Namespace) -> int:
    from simmim.config.loading import load_recipe
    from simmim.experiments.data_scaling import data_scaling

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    given = _given(arguments, ("shares", "sizes", "lengths", "seeds"))
    data_scaling(recipe, arguments.out, **given, precision=arguments.precision)
    return 0


def _loss_baselines(arguments: argparse.Namespace) -> int:
    from simmim.config.loading import load_recipe
    from simmim.experiments.loss_baselines import loss_baselines

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    sizes, ratios = arguments.mask_patch_sizes, arguments.ratios
    loss_baselines(recipe, arguments.out, sizes, ratios, images=arguments.images)
    return 0


def _masking(arguments: argparse.Namespace) -> int:
    from simmim.experiments.mask_distance import masking

    if len(arguments.image_size) > 2:
        raise ValueError(f"--image-size is one number or height and width, got {arguments.image_size}")
    height, width = (arguments.image_size * 2)[:2]
    given = _given(arguments, ("cells", "ratios", "strategies", "masks"))
    masking(arguments.out, image_size=(height, width), **given)
    return 0


def _activations(arguments: argparse.Namespace) -> int:
    from simmim.experiments.activations import Plan, activations

    plan = _given(arguments, [field.name for field in fields(Plan)])
    plan |= {name: tuple(plan[name]) for name in ("depths", "lrs") if name in plan}
    activations(Plan(**plan), arguments.out)
    return 0


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those of the options that were given; the others keep the defaults of what they are for."""
    values = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}
