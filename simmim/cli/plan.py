"""``simmim plan``: print the memory, FLOPs, time and disk space that a recipe needs."""

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

No image is read and nothing is trained. If a stage does not work on these GPUs, a change that works is suggested
and the exit code is 1.
"""
UNITS = {"K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
ZERO_NAMES = {"none": "DDP", "1": "ZeRO-1 *", "2": "ZeRO-2", "3": "ZeRO-3"}


def add_plan(commands: argparse._SubParsersAction) -> None:
    """Add ``simmim plan``."""
    plan = add_command(
        commands,
        "plan",
        examples=EXAMPLES,
        help="estimate parameters, FLOPs, memory and time of a recipe without running it",
    )
    add_recipe(plan)
    plan.add_argument("--stage", metavar="NAME", help="plan this stage only (default: all)")
    plan.add_argument("--gpus", type=int, metavar="N", help="number of GPUs (default: 1)")
    plan.add_argument("--memory", type=parse_bytes, metavar="80G", help="memory per GPU (default: of this machine)")
    plan.add_argument(
        "--zero", choices=tuple(ZERO_NAMES), help="ZeRO stage (default: 3 for several GPUs, none for one)"
    )
    plan.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on GPUs, fp32 on CPUs")
    plan.add_argument("--images", type=int, metavar="N", help="images per epoch (default: 1,000,000)")
    plan.add_argument(
        "--tflops", type=float, metavar="T", help="TFLOP/s per GPU in training (default: measured matrix products)"
    )
    plan.add_argument("--classes", type=int, default=1000, metavar="N", help="number of classes (default: 1000)")
    plan.set_defaults(run=_plan)


def parse_bytes(text: str) -> float:
    """Parse a size in bytes: ``80G`` -> 80e9.

    Raises:
        argparse.ArgumentTypeError: the text is not a number above 0 with a unit K, M, G or T.
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
        raise ValueError(f"--tflops must be between 0.001 and 1,000,000, got {arguments.tflops}")
    machine = _machine(arguments)
    zero = arguments.zero or ("3" if machine.ranks > 1 else "none")
    problems = []
    for name in names:
        plan = plan_stage(recipe, name, machine, zero, arguments.classes)
        print(describe(plan, recipe, machine, zero, arguments.images))
        problems += plan.problems
    for problem in problems:
        print(f"does not work: {problem}")
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
    """Format the plan of a stage as text."""
    from swin import VideoConfig

    stage, config = recipe.stages[plan.name], plan.config
    size = f"{config.image_size[0]} x {config.image_size[1]} px"
    input_size = f"clips of {config.frames} frames of {size}" if isinstance(config, VideoConfig) else size
    lines = [f"{recipe.name}/{plan.name}: {recipe.encoder.name}, {input_size}"]
    lines.append(f"  {'tokens':>11}{'window':>11}{'shift':>9}{'padding':>10}{'reference':>11}{'chunks':>8}")
    for grid, chunks in zip(plan.grids, plan.chunks, strict=True):
        columns = ["x".join(map(str, sizes)) for sizes in grid]
        widths = (11, 11, 9, 10, 11)
        line = "".join(f"{column:>{width}}" for column, width in zip(columns, widths, strict=True))
        lines.append(f"  {line}{chunks:>8}{'  global' if grid.is_global else ''}")
    lines += [f"  {title:<12}{text}" for title, text in plan.facts.items()]
    lines.append(f"  parameters  {plan.sizes.all:,}, encoder {plan.sizes.encoder:,}")
    forward, training = (readable(count / 1e9) for count in plan.flops)
    total = f"{forward} in all of the forward pass, {training} per training step"
    if plan.official_flops is None:
        lines.append(f"  FLOPs       per clip, in 10^9 multiply-adds: {total}")
    else:
        official = f"{readable(plan.official_flops / 1e9)} in the encoder by the official count,"
        lines += [f"  FLOPs       per image, in 10^9 multiply-adds: {official}", f"              {total}"]
    return "\n".join(
        [*lines, *_memory(plan, stage, machine, zero), *_time_and_disk(plan, stage, recipe, machine, images)]
    )


def _memory(plan: StagePlan, stage: Stage, machine: Machine, zero: str) -> list[str]:
    from simmim.training.footprint import free_bytes

    lines = [
        f"  memory      GB per device ({machine.ranks} with {machine.memory / 1e9:.0f} GB), {machine.precision}, "
        f"micro-batch of {stage.micro_batch_size}; in brackets the largest that fits",
        f"    {'':<10}{'states':>8}" + "".join(f"{f'checkpointing {kind}':>26}" for kind in plan.footprints),
    ]
    for kind, name in ZERO_NAMES.items():
        states = plan.states(kind, machine)
        free = free_bytes(machine.memory, states)
        columns = [
            f"{(states + own.of(stage.micro_batch_size)) / 1e9:.1f} ({own.largest_batch(free)})"
            for own in plan.footprints.values()
        ]
        mark = "  <- planned" if kind == zero else ""
        lines.append(f"    {name:<10}{states / 1e9:>8.1f}" + "".join(f"{column:>26}" for column in columns) + mark)
    lines.append("    * estimate only: ZeRO-2 sends as much and needs less memory")
    return lines


def _time_and_disk(plan: StagePlan, stage: Stage, recipe: Recipe, machine: Machine, images: int | None) -> list[str]:
    from simmim.training.footprint import gigabytes

    builtin = recipe.data.path == "builtin:shapes"
    count = images or (round(recipe.data.num_images * recipe.data.fraction) if builtin else 1_000_000)
    assumed = "" if images or builtin else " (assumed: set --images)"
    seconds = count * 2 * plan.flops.training / (machine.flops * machine.ranks)
    source = "measured matrix products; training is slower" if machine.measured else "given"
    checkpoint = (16 if plan.ema else 12) * plan.sizes.all
    written = checkpoint * (stage.log.keep_checkpoints + 1) + 4 * plan.sizes.all
    return [
        f"  time        {duration(seconds)} per epoch of {count:,} images{assumed}, "
        f"{duration(seconds * stage.schedule.epochs)} for {stage.schedule.epochs:g}, "
        f"at {readable(machine.flops / 1e12)} TFLOP/s per device ({source})",
        f"  disk        {gigabytes(written)}: {stage.log.keep_checkpoints} checkpoints, one being written, the export",
    ]


def readable(value: float) -> str:
    """Format a value with three significant digits and no exponent: 0.0175, 26.0, 4,640."""
    if value < 1000:
        return f"{value:#.3g}".rstrip(".")
    return f"{float(f'{value:.3g}'):,.0f}"


def duration(seconds: float) -> str:
    """Format a duration in days, hours, minutes or seconds."""
    for name, size, least in (("days", 86400, 2 * 86400), ("h", 3600, 3600), ("min", 60, 60)):
        if seconds >= least:
            return f"{readable(seconds / size)} {name}"
    return f"{readable(seconds)} s"
