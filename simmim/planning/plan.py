"""Estimates of parameters, FLOPs, memory and time of the stages of a recipe, before training."""

from __future__ import annotations

import time
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch

from simmim.config import Recipe, Stage, encoder_config
from simmim.export.export import open_export
from simmim.stages.initialization import check_start, chunks_of, derive_accumulation, micro_batch_sizes, moved_config
from simmim.stages.stage_type import stage_type_of
from simmim.tasks.task import Task
from simmim.training.footprint import (
    ZEROS,
    Flops,
    Footprint,
    Sizes,
    flops,
    footprint,
    free_bytes,
    gigabytes,
    sizes,
    states_bytes,
)
from swin import SwinConfig, VideoConfig
from swin.activation_checkpointing import CHECKPOINTINGS
from swin.video import build_encoder
from swin.windows import fit_windows


class Machine(NamedTuple):
    """Hardware and launch that a recipe is planned for."""

    ranks: int
    memory: float
    """Bytes per rank."""
    precision: str
    device: str
    """``cuda`` or ``cpu``, whose autocast differs."""
    flops: float
    """Multiply-adds per second and rank."""
    measured: bool
    """True if ``flops`` was measured on this machine."""


class Grid(NamedTuple):
    """Token grid and attention windows of one stage of the encoder."""

    grid: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]
    padding: tuple[int, ...]
    reference: tuple[int, ...]

    @property
    def is_global(self) -> bool:
        return self.window == self.grid


class StagePlan(NamedTuple):
    """Plan of one stage of a recipe."""

    name: str
    config: SwinConfig
    grids: list[Grid]
    facts: Mapping[str, str]
    """Further lines of the plan, by title."""
    sizes: Sizes
    flops: Flops
    official_flops: int | None
    """Multiply-adds by the count of the official code; None for clips, which it cannot count."""
    chunks: list[int]
    footprints: dict[str, Footprint]
    """Memory of activations, by checkpointing option."""
    ema: bool
    """True if an EMA of the weights is kept."""
    problems: list[str]
    """Reasons why the stage cannot run, each with what to do."""

    def states(self, zero: str, machine: Machine) -> float:
        """Return the bytes of weights, gradients and optimizer state per rank."""
        return states_bytes(self.sizes, zero, machine.ranks, self.ema)


def plan_stage(recipe: Recipe, name: str, machine: Machine, zero: str, classes: int) -> StagePlan:
    """Plan a stage: count parameters and FLOPs, estimate memory, and check that it fits.

    Args:
        zero: ZeRO stage: ``none``, ``1``, ``2`` or ``3``.
        classes: number of classes of stages with labels.

    Raises:
        ValueError: a stage that cannot be built.
    """
    stage, task = recipe.stages[name], make_fake_task(recipe, name, classes)
    stage_type = stage_type_of(stage)
    config = task.encoder.config
    chunks = chunks_of(stage, config, int(machine.memory))
    footprints: dict[str, Footprint] = {
        kind: footprint(task, kind, chunks, precision=machine.precision, device=machine.device)
        for kind in CHECKPOINTINGS
    }
    plan = StagePlan(
        name,
        config,
        grids_of(config),
        stage_type.plan(task),
        sizes(task),
        flops(task, stage.memory.checkpointing),
        None if isinstance(config, VideoConfig) else official_flops(config),
        chunks,
        footprints,
        stage_type.ema_decay(stage) is not None,
        [],
    )
    try:
        derive_accumulation(stage, machine.ranks)
    except ValueError as error:
        plan.problems.append(f"{name}: {error}")
    plan.problems.extend(memory_problems(plan, task, stage, machine, zero))
    return plan


def memory_problems(plan: StagePlan, task: Task, stage: Stage, machine: Machine, zero: str) -> list[str]:
    """Return a list with one error that names settings that would fit; empty if the stage fits into memory."""
    states = plan.states(zero, machine)
    free = free_bytes(machine.memory, states)
    own = plan.footprints[stage.memory.checkpointing]
    needed = own.of(stage.micro_batch_size)
    if needed <= free:
        return []
    fixes = []
    largest = fitting_batch(plan, task, stage, machine, free)
    if choices := [size for size in micro_batch_sizes(stage, machine.ranks) if size <= largest]:
        fixes.append(f"stages.{plan.name}.micro_batch_size={choices[-1]}")
    saving = [kind for kind, other in plan.footprints.items() if other.of(stage.micro_batch_size) <= free]
    if saving:
        fixes.append(f"stages.{plan.name}.memory.checkpointing={saving[0]}")
    sharing = [kind for kind in ZEROS[ZEROS.index(zero) + 1 :] if kind != "1"]  # no launch offers ZeRO-1
    if enough := [kind for kind in sharing if needed <= free_bytes(machine.memory, plan.states(kind, machine))]:
        fixes.append(f"ZeRO-{enough[0]}")
    if not fixes:
        fixes.append("more or larger GPUs, ZeRO-3 with full checkpointing, or a smaller encoder")
    return [
        f"{plan.name}: a rank needs {gigabytes(states)} for weights, gradients and optimizer state and "
        f"{gigabytes(needed)} for the activations of {stage.micro_batch_size} images, but has "
        f"{gigabytes(machine.memory)} less 5 %: use {', or '.join(fixes)}"
    ]


def fitting_batch(plan: StagePlan, task: Task, stage: Stage, machine: Machine, free: float) -> int:
    """Return the largest micro-batch that fits.

    With fewer images, attention may be computed in fewer chunks, which needs more memory per image.
    """
    kind = stage.memory.checkpointing
    largest, chunks = plan.footprints[kind].largest_batch(free), plan.chunks
    while largest:
        smaller = stage.model_copy(update={"micro_batch_size": largest})
        if (fewer := chunks_of(smaller, plan.config, int(machine.memory))) == chunks:
            break
        chunks = fewer
        needed = footprint(task, kind, chunks, precision=machine.precision, device=machine.device)
        largest = min(largest, needed.largest_batch(free))
    return largest


def grids_of(config: SwinConfig) -> list[Grid]:
    """Return token grid, window, shift and padding of every stage of the encoder."""
    found = []
    for grid, reference in zip(config.grids(), config.reference_windows or (), strict=True):
        windows = fit_windows(grid, config.window, shifted=True)
        found.append(Grid(grid, windows.window, windows.shift, windows.padding, reference))
    return found


def official_flops(config: SwinConfig) -> int:
    """Count the multiply-adds of one image as ``flops()`` of the official code does.

    The official code leaves out position biases; the classifier is not counted.
    """
    dim, scales = config.embed_dim, len(config.depths)
    (height, width), total = config.grids()[0], 0
    total += height * width * dim * (config.in_chans * config.patch_size**2 + 1)
    for index, (grid, depth) in enumerate(zip(grids_of(config), config.depths, strict=True)):
        tokens, dim = grid.grid[0] * grid.grid[1], config.embed_dim * 2**index
        padded = (grid.grid[0] + grid.padding[0]) * (grid.grid[1] + grid.padding[1])
        window = grid.window[0] * grid.window[1]
        attention = padded * dim * (4 * dim + 2 * window)
        total += depth * int(attention + 2 * tokens * dim * dim * config.mlp_ratio + 2 * tokens * dim)
        if index < scales - 1:
            merged = ceil(grid.grid[0] / 2) * ceil(grid.grid[1] / 2)
            norm = merged * 2 * dim if config.norm == "res-post" else tokens * dim
            total += merged * 8 * dim * dim + norm
    return total + config.num_features * height * width // 2**scales


def config_of(recipe: Recipe, name: str) -> SwinConfig:
    """Return the encoder configuration of a stage, after all transfers before it.

    Raises:
        ValueError: sizes that do not fit each other, or initial weights of unknown size.
    """
    stage, start = recipe.stages[name], recipe.start_of(name)
    if start == "scratch":
        return encoder_config(recipe.encoder, stage)
    path = Path(start).expanduser()
    if start in recipe.stages:
        old = config_of(recipe, start)
    elif not path.exists():
        raise ValueError(f"{name} starts from {start}, which does not exist: correct stages.{name}.init_from")
    elif (export := open_export(path)).is_native:
        old = export.config
        check_start(recipe, name, path, old)
    elif stage.image_size is not None and stage.window_size is not None:
        return encoder_config(recipe.encoder, stage)
    else:
        raise ValueError(
            f"{name} starts from {start}, which is no export and does not record its sizes: "
            f"set image_size and window_size of stages.{name}"
        )
    return moved_config(stage, old)


def make_fake_task(recipe: Recipe, name: str, classes: int) -> Task:
    """Build the task of a stage on the meta device, where tensors have shapes but no values."""
    stage, config = recipe.stages[name], config_of(recipe, name)
    with torch.device("meta"):
        return stage_type_of(stage).make_fake_task(recipe, stage, build_encoder(config), classes)


def product_rate(device: torch.device, precision: str) -> float:
    """Measure the multiply-adds per second of large matrix products."""
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    side = 8192 if device.type != "cpu" else 1024
    left = torch.randn(side, side, device=device, dtype=kind)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        float((left @ left)[0, 0])  # synchronizes with the device
        times.append(time.perf_counter() - begin)
    return 2 * side**3 / min(times)
