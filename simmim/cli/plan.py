"""``simmim plan``: what a recipe will need, on the screen."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from simmim.cli.arguments import add_command, add_recipe

if TYPE_CHECKING:
    from simmim.config import Recipe, Stage
    from simmim.planning.plan import Machine, StagePlan

EXAMPLES = """examples:
  simmim plan recipes/simmim_swinv2_b.yaml
  simmim plan simmim_swinv2_h --gpus 8 --memory 80G --images 14000000 --tflops 300
  simmim plan simmim_swinv2_3b --gpus 64 --memory 80G --stage finetune_640 stages.finetune_640.memory.checkpointing=full

Nothing is trained and no image is read. Exit code 1 where a stage cannot work on these GPUs, with what would.
"""
UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
ZERO_NAMES = {"none": "DDP", "1": "ZeRO-1 *", "2": "ZeRO-2", "3": "ZeRO-3"}


def add_plan(commands: argparse._SubParsersAction) -> None:
    """``simmim plan``."""
    plan = add_command(
        commands, "plan", examples=EXAMPLES, help="parameters, FLOPs, memory and time of a recipe, before it is run"
    )
    add_recipe(plan)
    plan.add_argument("--stage", metavar="NAME", help="one stage alone")
    plan.add_argument("--gpus", type=int, metavar="N", help="default: one of this machine")
    plan.add_argument("--memory", type=parse_bytes, metavar="80G", help="of each (default: of this machine)")
    plan.add_argument("--zero", choices=tuple(ZERO_NAMES), help="default: 3 for several GPUs, none for one")
    plan.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 for GPUs, fp32 for processors")
    plan.add_argument("--images", type=int, metavar="N", help="of an epoch (default: a million)")
    plan.add_argument(
        "--tflops", type=float, metavar="T", help="what a GPU reaches in training (default: products measured here)"
    )
    plan.add_argument("--classes", type=int, default=1000, metavar="N", help="of the labels (default: 1000)")
    plan.set_defaults(run=_plan)


def parse_bytes(text: str) -> float:
    """``80G`` -> 80e9.

    Raises:
        argparse.ArgumentTypeError: not a number above 0 with K, M, G or T.
    """
    found = re.fullmatch(r"(\d+\.?\d*)([KMGT])B?", text.upper())
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"expected a size such as 80G, got {text!r}")
    return float(found[1]) * UNITS[found[2]]


def _plan(arguments: argparse.Namespace) -> int:
    from simmim.config.loading import load_recipe
    from simmim.planning.plan import plan_stage

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    names = list(recipe.stages) if arguments.stage is None else [arguments.stage]
    if arguments.stage is not None and arguments.stage not in recipe.stages:
        raise ValueError(f"{recipe.name} has no stage {arguments.stage!r}: it has {', '.join(recipe.stages)}")
    for name, value in (("gpus", arguments.gpus), ("images", arguments.images), ("classes", arguments.classes)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if arguments.tflops is not None and not 1e-3 <= arguments.tflops <= 1e6:
        raise ValueError(f"--tflops must lie between 0.001 and a million, got {arguments.tflops}")
    machine = _machine(arguments)
    zero = arguments.zero or ("3" if machine.ranks > 1 else "none")
    problems = []
    for name in names:
        plan = plan_stage(recipe, name, machine, zero, arguments.classes)
        print(describe(plan, recipe, machine, zero, arguments.images))
        problems += plan.problems
    for problem in problems:
        print(f"cannot work: {problem}")
    return 1 if problems else 0


def _machine(arguments: argparse.Namespace) -> Machine:
    import torch

    from simmim.planning.plan import Machine, product_rate
    from simmim.training.distributed import default_precision
    from simmim.training.memory import device_bytes

    is_gpu = torch.cuda.is_available() or arguments.memory is not None
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = arguments.precision or ("bf16" if is_gpu else default_precision() or "fp32")
    rate = arguments.tflops * 1e12 if arguments.tflops else product_rate(here, precision)
    memory = arguments.memory or device_bytes(here)
    return Machine(arguments.gpus or 1, memory, precision, "cuda" if is_gpu else "cpu", rate, not arguments.tflops)


def describe(plan: StagePlan, recipe: Recipe, machine: Machine, zero: str, images: int | None) -> str:
    """Everything of a stage, in lines."""
    from swin import VideoConfig

    stage, config = recipe.stages[plan.name], plan.config
    size = f"{config.image_size[0]} x {config.image_size[1]} px"
    what = f"clips of {config.frames} frames of {size}" if isinstance(config, VideoConfig) else size
    lines = [f"{recipe.name}/{plan.name}: {recipe.encoder.name}, {what}"]
    lines.append(f"  {'tokens':>11}{'window':>11}{'shift':>9}{'padding':>10}{'reference':>11}{'chunks':>8}")
    for grid, chunks in zip(plan.grids, plan.chunks, strict=True):
        cells = ["x".join(map(str, sizes)) for sizes in grid]
        widths = (11, 11, 9, 10, 11)
        line = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"  {line}{chunks:>8}{'  global' if grid.is_global else ''}")
    lines += [f"  {title:<12}{text}" for title, text in plan.facts.items()]
    lines.append(f"  parameters  {plan.sizes.all:,}, of which the encoder {plan.sizes.encoder:,}")
    forward, training = (readable(number / 1e9) for number in plan.flops)
    everything = f"{forward} with everything, {training} a training step"
    if plan.official_flops is None:
        lines.append(f"  FLOPs       of a clip, in 10^9 multiply-adds: {everything}")
    else:
        official = f"{readable(plan.official_flops / 1e9)} through the encoder as officially counted,"
        lines += [f"  FLOPs       of an image, in 10^9 multiply-adds: {official}", f"              {everything}"]
    return "\n".join(
        [*lines, *_memory(plan, stage, machine, zero), *_time_and_disk(plan, stage, recipe, machine, images)]
    )


def _memory(plan: StagePlan, stage: Stage, machine: Machine, zero: str) -> list[str]:
    from simmim.training.footprint import free_bytes

    lines = [
        f"  memory      GB of each of {machine.ranks} with {machine.memory / 1e9:.0f} GB, {machine.precision}, "
        f"{stage.micro_batch_size} images at a time; in brackets how many would fit",
        f"    {'':<10}{'states':>8}" + "".join(f"{f'checkpointing {kind}':>26}" for kind in plan.footprints),
    ]
    for kind, name in ZERO_NAMES.items():
        states = plan.states(kind, machine)
        free = free_bytes(machine.memory, states)
        cells = [
            f"{(states + own.of(stage.micro_batch_size)) / 1e9:.1f} ({own.largest_batch(free)})"
            for own in plan.footprints.values()
        ]
        mark = "  <- planned" if kind == zero else ""
        lines.append(f"    {name:<10}{states / 1e9:>8.1f}" + "".join(f"{cell:>26}" for cell in cells) + mark)
    lines.append("    * by arithmetic: ZeRO-2 sends as much and needs less")
    return lines


def _time_and_disk(plan: StagePlan, stage: Stage, recipe: Recipe, machine: Machine, images: int | None) -> list[str]:
    from simmim.training.footprint import gigabytes

    builtin = recipe.data.path == "builtin:shapes"
    number = images or (round(recipe.data.num_images * recipe.data.fraction) if builtin else 1_000_000)
    assumed = "" if images or builtin else " (--images says how many there are)"
    seconds = number * 2 * plan.flops.training / (machine.flops * machine.ranks)
    how = "measured products, which training does not reach" if machine.measured else "given"
    checkpoint = (16 if plan.ema else 12) * plan.sizes.all
    written = checkpoint * (stage.log.keep_checkpoints + 1) + 4 * plan.sizes.all
    return [
        f"  time        {duration(seconds)} an epoch of {number:,} images{assumed}, "
        f"{duration(seconds * stage.schedule.epochs)} for {stage.schedule.epochs:g}, "
        f"at {readable(machine.flops / 1e12)} TFLOP/s each ({how})",
        f"  disk        {gigabytes(written)}: {stage.log.keep_checkpoints} checkpoints, one being written, the export",
    ]


def readable(number: float) -> str:
    """Three digits, without exponents: 0.0175, 26.0, 4,640."""
    if number < 1000:
        return f"{number:#.3g}".rstrip(".")
    return f"{float(f'{number:.3g}'):,.0f}"


def duration(seconds: float) -> str:
    """In the unit that people would use."""
    for name, size, least in (("days", 86400, 2 * 86400), ("h", 3600, 3600), ("min", 60, 60)):
        if seconds >= least:
            return f"{readable(seconds / size)} {name}"
    return f"{readable(seconds)} s"
