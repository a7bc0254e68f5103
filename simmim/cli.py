"""The command line. Exit codes: 0 done, 2 a mistake in what was given, 1 anything else, 130 Ctrl-C."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from simmim import __version__

PRETRAIN_EXAMPLES = """examples:
  simmim pretrain recipes/demo.yaml
  simmim pretrain recipes/simmim_swinv2_b.yaml data.path=/data/photos stages.pretrain.micro_batch_size=32
  accelerate launch tools/pretrain.py recipes/simmim_swinv2_h.yaml data.path=/data/photos

The same command again continues an interrupted run. `simmim show RECIPE` prints every key.
"""


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
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last checkpoint", file=sys.stderr)
        return 130


def _pretrain(arguments: argparse.Namespace) -> int:
    from simmim.engine import NonFiniteLoss
    from simmim.recipe import load_recipe
    from simmim.stages import pretrain

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    try:
        pretrain(recipe, arguments.out, precision=arguments.precision)
    except NonFiniteLoss as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from simmim.recipe import dump_recipe, load_recipe, shipped_recipes

    if arguments.recipe is None:
        print("\n".join(recipe.stem for recipe in shipped_recipes()))
    else:
        print(dump_recipe(load_recipe(arguments.recipe, arguments.overrides)), end="")
    return 0


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
    pretrain.add_argument("overrides", nargs="*", metavar="key.path=value", help="replace values of the recipe")
    pretrain.add_argument("--out", type=Path, default=Path("runs"), help="where run folders are made (default: runs)")
    pretrain.add_argument(
        "--precision", choices=("fp32", "bf16"), help="default: what accelerate is configured for, else fp32"
    )
    pretrain.set_defaults(run=_pretrain)

    show = commands.add_parser("show", help="print a recipe with every value; without one, list the shipped recipes")
    show.add_argument("recipe", nargs="?")
    show.add_argument("overrides", nargs="*", metavar="key.path=value")
    show.set_defaults(run=_show)
    return parser


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
