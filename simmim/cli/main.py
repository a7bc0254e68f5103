"""The ``simmim`` command line.

Exit codes: 0 success; 2 invalid arguments, invalid data or a full disk; 75 stopped by a signal after saving, run the
same command to resume; 130 interrupted by Ctrl-C without saving; 1 any other failure.
"""

from __future__ import annotations

import argparse
import errno
import multiprocessing
import os
import sys
from pathlib import Path

from simmim import __version__
from simmim.cli.arguments import add_command, add_recipe, add_run_options, as_size
from simmim.cli.data import add_data
from simmim.cli.evaluate import add_evaluate
from simmim.cli.experiments import add_experiments
from simmim.cli.plan import add_plan
from simmim.cli.visualize import add_visualize
from simmim.signals import Stopped, raise_on_signals
from simmim.training.console import configure_logging

PRETRAIN_EXAMPLES = """examples:
  simmim pretrain recipes/demo.yaml
  simmim pretrain recipes/simmim_swinv2_b.yaml data.path=/data/photos stages.pretrain.micro_batch_size=32
  accelerate launch -m simmim pretrain recipes/simmim_swinv2_h.yaml data.path=/data/photos

Run the same command again to resume an interrupted run. `simmim show RECIPE` prints every key.
"""

FINETUNE_EXAMPLES = """examples:
  simmim finetune --encoder runs/demo/pretrain/export --data flowers --image-size 224
  simmim finetune --encoder runs/demo/pretrain/export --data flowers stages.finetune.schedule.epochs=30
  accelerate launch -m simmim finetune recipes/simmim_swinv2_b.yaml --stage finetune_224 data.path=/data/imagenet

DATA holds one subfolder per class, or train and val with one subfolder per class each. Without RECIPE, a recipe is
written next to the results.
"""

CONVERT_EXAMPLES = """examples:
  simmim convert swinv2_base_22k_500k.pth encoders/base
  simmim convert runs/demo/pretrain/export demo_timm --to timm
  simmim convert encoders/base base_384 --image-size 384 --window-size 24
  simmim convert encoders/base base_sentinel --in-chans 13 --inflate mean
  simmim convert encoders/base base.onnx --to onnx

Every written file is loaded again with its target library and compared; it is deleted if the outputs differ.
"""
EXIT_STOPPED = os.EX_TEMPFAIL  # 75: try again later
LAYOUTS = ("native", "timm", "transformers", "official", "onnx", "torch-export")


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    configure_logging()
    parser = _parser()
    # argparse accepts positional arguments in one block only, but overrides may also follow options.
    arguments, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown:
        command = arguments.command
        command.error(f"unrecognized arguments: {' '.join(unknown)} (see {command.prog} --help)")
    arguments.overrides += rest
    try:
        with raise_on_signals():
            code = arguments.run(arguments)
            _close_process_group()
            return code
    except (ValueError, OSError) as error:
        if os.environ.get("SIMMIM_DEBUG"):
            raise
        return _print_error(_one_line(error), 2)
    except Stopped as stopped:
        print(f"simmim: {stopped}", file=sys.stderr)
        return EXIT_STOPPED
    except RuntimeError as error:
        from simmim.training.engine import NonFiniteLoss

        if isinstance(error, NonFiniteLoss):
            return _print_error(str(error), 1)
        if not _is_lost_connection(error) or os.environ.get("SIMMIM_DEBUG"):
            raise
        return _print_error("another process has failed: see its error output", 1)
    except KeyboardInterrupt:
        print("interrupted: run the same command to resume from the last checkpoint", file=sys.stderr)
        return 130
    finally:
        # Data-loader workers ignore signals, so kill them explicitly.
        for child in multiprocessing.active_children():
            child.kill()


def _close_process_group() -> None:
    """Leave the process group of a distributed run, so that the other processes end without errors."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _print_error(text: str, code: int) -> int:
    rank = f" (process {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(f"error{rank}: {text}", file=sys.stderr)
    return code


def _is_lost_connection(error: RuntimeError) -> bool:
    """Return whether a distributed run failed because another of its processes has ended."""
    from torch.distributed import DistError

    return os.environ.get("WORLD_SIZE", "1") != "1" and (isinstance(error, DistError) or "gloo" in str(error))


def _run(arguments: argparse.Namespace) -> int:
    from simmim.config.loading import load_recipe
    from simmim.stages import run, run_stage, stage_of_kind

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    options = {"precision": arguments.precision, "allow_changes": arguments.allow_changes}
    stage = arguments.stage or (arguments.kinds and stage_of_kind(recipe, arguments.kinds))
    if stage:
        run_stage(recipe, stage, arguments.out, **options)
    else:
        run(recipe, arguments.out, **options)
        if os.environ.get("RANK", "0") == "0":
            from simmim.visualization.report import write_report

            print(f"report  {write_report([arguments.out / recipe.name])}")
    return 0


def _finetune(arguments: argparse.Namespace) -> int:
    from simmim.stages.finetune_recipe import make_recipe

    if arguments.encoder is not None and arguments.recipe is not None and "=" in arguments.recipe:
        arguments.overrides.insert(0, arguments.recipe)  # argparse took the first override for the recipe
        arguments.recipe = None
    if (arguments.recipe is None) == (arguments.encoder is None):
        raise ValueError("expected either a recipe, or --encoder EXPORT and --data FOLDER")
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


def _replay(arguments: argparse.Namespace) -> int:
    from simmim.stages.replay import replay

    result = replay(arguments.report)
    print(result.text)
    return 0 if result.is_reproduced else 1


def _show(arguments: argparse.Namespace) -> int:
    from simmim.config.loading import dump_recipe, load_recipe, shipped_recipes

    if arguments.recipe is None:
        print("\n".join(recipe.stem for recipe in shipped_recipes()))
    else:
        print(dump_recipe(load_recipe(arguments.recipe, arguments.overrides)), end="")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from simmim.export.convert import convert

    given = {name: getattr(arguments, name) for name in ("image_size", "window_size", "in_chans")}
    convert(
        arguments.source,
        arguments.out,
        arguments.to,
        inflate=arguments.inflate,
        table_resampling=arguments.table_resampling,
        report=print,
        **{name: value for name, value in given.items() if value is not None},
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="simmim", description="SimMIM pretraining of Swin Transformer V2.")
    parser.add_argument("--version", action="version", version=f"simmim {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    pretrain = add_command(
        commands,
        "pretrain",
        examples=PRETRAIN_EXAMPLES,
        help="pretrain an encoder on images without labels",
    )
    add_recipe(pretrain)
    add_run_options(pretrain)
    _add_stage(pretrain)
    pretrain.set_defaults(run=_run, kinds=("pretrain",))

    run = commands.add_parser("run", help="run all stages of a recipe; skip finished ones")
    add_recipe(run)
    add_run_options(run)
    _add_stage(run)
    run.set_defaults(run=_run, kinds=None)

    finetune = add_command(
        commands,
        "finetune",
        examples=FINETUNE_EXAMPLES,
        help="train a classifier: a stage of a recipe, or any encoder on a labelled folder",
    )
    add_recipe(finetune, optional=True)
    add_run_options(finetune)
    _add_stage(finetune)
    finetune.add_argument(
        "--encoder", type=Path, help="instead of a recipe: an export, or a checkpoint of another project"
    )
    finetune.add_argument("--data", help="instead of a recipe: a folder with one subfolder per class")
    finetune.add_argument("--image-size", type=as_size, metavar="PX", help="default: as the encoder was trained")
    finetune.add_argument("--window-size", type=as_size, metavar="TOKENS", help="default: in proportion to the image")
    finetune.add_argument("--name", help="name of the run folder (default: finetune_ and the name of the data)")
    finetune.set_defaults(run=_finetune, kinds=("finetune", "supervised", "transfer"))

    replay = commands.add_parser("replay", help="repeat a step with a non-finite loss or gradient and find its cause")
    replay.add_argument("report", type=Path, help="a stage folder, or a .json file in its nonfinite folder")
    replay.set_defaults(run=_replay, overrides=[])

    show = commands.add_parser("show", help="print a recipe with all values; without a recipe, list the shipped ones")
    add_recipe(show, optional=True)
    show.set_defaults(run=_show)
    add_evaluate(commands)
    _add_convert(commands)
    add_data(commands)
    add_experiments(commands)
    add_visualize(commands)
    add_plan(commands)
    _remember_parsers(parser)
    return parser


def _remember_parsers(parser: argparse.ArgumentParser) -> None:
    """Store every command's own parser as ``arguments.command``, so that errors name that command's help."""
    parser.set_defaults(command=parser)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _remember_parsers(command)


def _add_stage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stage", help="name of the stage (default: the first that the command can run; simmim run: all)"
    )
    parser.add_argument("--allow-changes", action="store_true", help="resume a run although its settings have changed")


def _add_convert(commands: argparse._SubParsersAction) -> None:
    convert = add_command(
        commands,
        "convert",
        examples=CONVERT_EXAMPLES,
        help="import weights of other projects, or export weights for other libraries",
    )
    convert.add_argument(
        "source", type=Path, help="an export folder, a .pth or .safetensors file, a timm or Hugging Face folder"
    )
    convert.add_argument("out", type=Path, help="output path; must not exist")
    convert.add_argument("--to", choices=LAYOUTS, default="native", help="output format (default: native)")
    convert.add_argument(
        "--image-size", type=as_size, metavar="PX", help="new image size: 384 or 256x320 (height first)"
    )
    convert.add_argument("--window-size", type=as_size, metavar="TOKENS", help="new window size: 24 or 8x10")
    convert.add_argument("--in-chans", type=int, metavar="N", help="new number of input channels; needs --inflate")
    convert.add_argument(
        "--inflate", choices=("mean", "repeat"), help="how the patch embedding is adapted to --in-chans"
    )
    convert.add_argument(
        "--table-resampling",
        choices=("bicubic", "geometric"),
        default="bicubic",
        help="how bias tables of Swin V1 are resampled to a new window (default: bicubic)",
    )
    convert.set_defaults(run=_convert, overrides=[])


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" for {error.filename}" if error.filename else ""
        return f"the disk is full{where} ({error.strerror}): free some space and run the same command to resume"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
