"""The command line.

Exit codes: 0 done; 2 a mistake in what was given, or a full disk; 75 asked to stop, all is saved and the
same command continues; 1 anything else; 130 Ctrl-C where there was nothing to save, or twice.
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
from simmim.cli.evaluate import add_judge
from simmim.cli.experiments import add_experiments
from simmim.cli.plan import add_plan
from simmim.cli.visualize import add_look
from simmim.signals import Stopped, obey_signals
from simmim.training.console import configure_logging

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
EXIT_STOPPED = os.EX_TEMPFAIL  # 75: try again later
LAYOUTS = ("native", "timm", "transformers", "official", "onnx", "torch-export")


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    configure_logging()
    parser = _parser()
    # argparse takes positional arguments in one run only; overrides may also follow options.
    arguments, further = parser.parse_known_args(argv)
    unknown = [word for word in further if word.startswith("-") or "=" not in word]
    if unknown:
        parser.error(f"unknown argument(s): {' '.join(unknown)}")
    arguments.overrides += further
    try:
        with obey_signals():
            code = arguments.run(arguments)
            _part()
            return code
    except (ValueError, OSError) as error:
        if os.environ.get("SIMMIM_DEBUG"):
            raise
        return _fail(_one_line(error), 2)
    except Stopped as stopped:
        print(f"simmim: {stopped}", file=sys.stderr)
        return EXIT_STOPPED
    except RuntimeError as error:
        from simmim.training.engine import NonFiniteLoss

        if isinstance(error, NonFiniteLoss):
            return _fail(str(error), 1)
        if not _is_lost_connection(error) or os.environ.get("SIMMIM_DEBUG"):
            raise
        return _fail("another process has ended, and this one with it: its own error says why", 1)
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    finally:
        # Loader processes pass over signals, also those that would end them.
        for child in multiprocessing.active_children():
            child.kill()


def _part() -> None:
    """Leave the other processes of a distributed run in good order."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _fail(text: str, code: int) -> int:
    rank = f" (process {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(f"error{rank}: {text}", file=sys.stderr)
    return code


def _is_lost_connection(error: RuntimeError) -> bool:
    """What the others see when a process of a distributed run ends."""
    from torch.distributed import DistError

    return os.environ.get("WORLD_SIZE", "1") != "1" and (isinstance(error, DistError) or "gloo" in str(error))


def _run(arguments: argparse.Namespace) -> int:
    from simmim.config.loading import load_recipe
    from simmim.stages import run, run_stage, stage_of_kind

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    how = {"precision": arguments.precision, "allow_changes": arguments.allow_changes}
    stage = arguments.stage or (arguments.kinds and stage_of_kind(recipe, arguments.kinds))
    if stage:
        run_stage(recipe, stage, arguments.out, **how)
    else:
        run(recipe, arguments.out, **how)
        if os.environ.get("RANK", "0") == "0":
            from simmim.visualization.report import write_report

            print(f"page  {write_report([arguments.out / recipe.name])}")
    return 0


def _finetune(arguments: argparse.Namespace) -> int:
    from simmim.stages.finetune_recipe import make_recipe

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


def _replay(arguments: argparse.Namespace) -> int:
    from simmim.stages.replay import replay

    found = replay(arguments.report)
    print(found.text)
    return 0 if found.is_reproduced else 1


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

    every = commands.add_parser("run", help="walk all stages of a recipe; what is done is not done again")
    add_recipe(every)
    add_run_options(every)
    _add_stage(every)
    every.set_defaults(run=_run, kinds=None)

    finetune = add_command(
        commands,
        "finetune",
        examples=FINETUNE_EXAMPLES,
        help="train a classifier: a stage of a recipe, or any encoder on any labelled folder",
    )
    add_recipe(finetune, optional=True)
    add_run_options(finetune)
    _add_stage(finetune)
    finetune.add_argument("--encoder", type=Path, help="instead of a recipe: an export, or the file of another project")
    finetune.add_argument("--data", help="instead of a recipe: a folder with one subfolder per class")
    finetune.add_argument("--image-size", type=as_size, metavar="PX", help="default: as the encoder was trained")
    finetune.add_argument("--window-size", type=as_size, metavar="TOKENS", help="default: in proportion to the image")
    finetune.add_argument("--name", help="folder of the run (default: finetune_ and the name of the data)")
    finetune.set_defaults(run=_finetune, kinds=("finetune", "supervised", "transfer"))

    again = commands.add_parser("replay", help="do again a step whose loss or gradient was not finite; name its cause")
    again.add_argument("report", type=Path, help="the folder of a stage, or a .json in its nonfinite folder")
    again.set_defaults(run=_replay, overrides=[])

    show = commands.add_parser("show", help="print a recipe with every value; without one, list the shipped recipes")
    show.add_argument("recipe", nargs="?")
    show.add_argument("overrides", nargs="*", metavar="key.path=value")
    show.set_defaults(run=_show)
    add_judge(commands)
    _add_convert(commands)
    add_data(commands)
    add_experiments(commands)
    add_look(commands)
    add_plan(commands)
    return parser


def _add_stage(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", help="which stage (default: the first of its kind; run: all of them)")
    parser.add_argument(
        "--allow-changes", action="store_true", help="continue a run although its settings have changed since"
    )


def _add_convert(commands: argparse._SubParsersAction) -> None:
    convert = add_command(
        commands,
        "convert",
        examples=CONVERT_EXAMPLES,
        help="weights of another project in, weights for another library out",
    )
    convert.add_argument("source", type=Path, help="an export folder, a .pth or .safetensors file, a timm or HF folder")
    convert.add_argument("out", type=Path, help="what to write; must not exist")
    convert.add_argument("--to", choices=LAYOUTS, default="native", help="default: native")
    convert.add_argument("--image-size", type=as_size, metavar="PX", help="384 or 256x320 (height first)")
    convert.add_argument("--window-size", type=as_size, metavar="TOKENS", help="24 or 8x10")
    convert.add_argument("--in-chans", type=int, metavar="N", help="another number of channels, with --inflate")
    convert.add_argument("--inflate", choices=("mean", "repeat"), help="how channels are spread")
    convert.add_argument(
        "--table-resampling",
        choices=("bicubic", "geometric"),
        default="bicubic",
        help="how the bias tables of V1 change their window (default: bicubic)",
    )
    convert.set_defaults(run=_convert, overrides=[])


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" for {error.filename}" if error.filename else ""
        return f"the disk is full{where} ({error.strerror}): make room, and the same command continues"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
