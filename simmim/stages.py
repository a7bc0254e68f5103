"""The only place where a recipe becomes objects."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from simmim.checkpoint import different_settings, list_checkpoints, load_checkpoint, load_state
from simmim.counter_rng import derive_seed
from simmim.data import (
    CenterCrop,
    Folder,
    RandomCrop,
    Shapes,
    Source,
    evaluation_batches,
    split_holdout,
    training_batches,
)
from simmim.data.loader import Batches
from simmim.engine import evaluate, fit, to_device
from simmim.masking import MaskGenerator
from simmim.objectives.reconstruct import Reconstruct
from simmim.objectives.trivial import copy_nearest_visible, masked_l1, mean_of_visible
from simmim.optim import LearningRate, make_lr, make_optimizer
from simmim.recipe import Data, Pretrain, Recipe, dump_recipe, encoder_config
from simmim.runlog import RunLog, write_environment
from swin import SwinEncoder, save_encoder
from swin.config import Pair

PREVIEW_IMAGES = 8


def pretrain(recipe: Recipe, out: Path, *, precision: str | None = None) -> Path:
    """Run the pretraining stage of a recipe, from where it stands.

    Args:
        out: the stage writes into ``out / recipe.name / "pretrain"``.
        precision: ``bf16``, ``fp32``, or None for what the launcher says.

    Returns:
        The folder of the exported encoder.

    Raises:
        ValueError: settings, data or launch that cannot work, or a folder with other settings.
    """
    stage = recipe.stages.pretrain
    accelerator = make_accelerator(precision)
    size = stage.image_size
    training, holdout = make_sources(recipe.data, size, recipe.encoder.in_chans)
    accumulation = derive_accumulation(stage.batch_size, stage.micro_batch_size, accelerator.num_processes)
    total_steps = max(1, round(stage.schedule.epochs * len(training) / stage.batch_size))
    objective = make_objective(recipe, stage, size)
    optimizer = make_optimizer(
        objective,
        objective.no_decay_parameters(),
        **stage.optimizer.model_dump(include={"weight_decay", "betas", "eps"}),
    )

    folder = out / recipe.name / "pretrain"
    settings = decisive_settings(recipe, len(training), accelerator.mixed_precision)
    checkpoint, start_step = starting_point(folder, settings)
    log = open_folder(folder, recipe, accelerator)
    log.say(
        f"{recipe.name}/pretrain: {recipe.encoder.name}, {sum(p.numel() for p in objective.parameters()):,} "
        f"parameters; {len(training):,} images at {size[0]} x {size[1]} px; {total_steps} steps of "
        f"{stage.batch_size} = {accelerator.num_processes} process(es) x {accumulation} x "
        f"{stage.micro_batch_size} on {accelerator.device.type} in {accelerator.mixed_precision}; seed {recipe.seed}"
    )
    if checkpoint is not None:
        load_checkpoint(checkpoint, objective, optimizer)
    log.say(f"continues at step {start_step} from {checkpoint}" if checkpoint else "starts from scratch")

    views = make_views(holdout, size, stage.micro_batch_size)
    shown = training if holdout is None else holdout
    preview = next(iter(make_views(shown, size, min(PREVIEW_IMAGES, len(shown)))))
    log.broken(preview["broken"])
    model, optimizer = accelerator.prepare(objective, optimizer)
    if start_step < total_steps:
        fit(
            accelerator,
            model,
            optimizer,
            training_batches(
                training,
                RandomCrop(size, **stage.crop.model_dump()),
                seed=recipe.seed,
                num_workers=recipe.data.num_workers,
                pin_memory=accelerator.device.type == "cuda",
                batch_size=stage.batch_size,
                micro_batch_size=stage.micro_batch_size,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                start_step=start_step,
                end_step=total_steps,
            ),
            lr_at=schedule_of(stage, len(training), total_steps),
            start_step=start_step,
            total_steps=total_steps,
            accumulation=accumulation,
            clip_grad_norm=stage.optimizer.clip_grad_norm,
            images_per_epoch=len(training),
            seed=recipe.seed,
            log=log,
            checkpoints=folder / "checkpoints",
            settings=settings,
            holdout=views,
            preview=preview,
            **stage.log.model_dump(),
        )
    export = folder / "export"
    if accelerator.is_main_process:
        export_encoder(objective.encoder, export, recipe, total_steps)
        with accelerator.autocast():
            sum_up(objective.eval(), views, log, accelerator.device)
        log.say(f"pictures  {log.pictures}\nencoder   {export}  (swin.load_encoder)")
    accelerator.wait_for_everyone()
    return export


def make_accelerator(precision: str | None) -> Accelerator:
    """An Accelerator, after checking that the launch is what it seems.

    Raises:
        ValueError: several independent copies were started instead of one distributed run, or a
            kind of distribution or precision that is not supported.
    """
    accelerator = Accelerator(mixed_precision={"fp32": "no"}.get(precision or "", precision))
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but each of them believes to be alone: on a machine without "
            "GPUs start with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ..."
        )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ValueError(
            f"accelerate is configured for {accelerator.distributed_type.value}, which is not supported yet: "
            "start with --multi_gpu, or correct `accelerate config`"
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed precision {accelerator.mixed_precision!r} is not supported: use bf16, which needs no "
            "loss scaling, or no for fp32"
        )
    return accelerator


def make_sources(data: Data, size: Pair, channels: int) -> tuple[Source, Source | None]:
    """Training images and held-out images (None where too few are left to hold any out)."""
    if data.path == "builtin:shapes":
        held_out = Shapes(data.holdout_images, size, channels, held_out=True)
        return Shapes(data.num_images, size, channels), held_out if data.holdout_images else None
    if data.path.startswith("builtin:"):
        raise ValueError(f"data.path {data.path!r}: the only builtin data is builtin:shapes")
    if not data.path:
        raise ValueError("the recipe names no images: set data.path=FOLDER_OF_IMAGES (or builtin:shapes)")
    return split_holdout(Folder(data.path, channels), data.holdout_images)


def make_views(source: Source | None, size: Pair, batch_size: int) -> Batches | list:
    """Fixed central crops, the same in every epoch and run."""
    return evaluation_batches(source, CenterCrop(size), batch_size=batch_size) if source is not None else []


def derive_accumulation(batch_size: int, micro_batch_size: int, num_processes: int) -> int:
    """Micro-steps per optimizer step.

    Raises:
        ValueError: the batch cannot be divided; names the micro-batches that would.
    """
    if batch_size % (micro_batch_size * num_processes) == 0:
        return batch_size // (micro_batch_size * num_processes)
    if batch_size % num_processes:
        raise ValueError(f"batch_size {batch_size} does not divide among {num_processes} processes: change it")
    share = batch_size // num_processes
    choices = [size for size in range(1, share + 1) if share % size == 0]
    raise ValueError(
        f"batch_size {batch_size} is not a multiple of micro_batch_size {micro_batch_size} x {num_processes} "
        f"process(es): take a micro_batch_size of {', '.join(map(str, choices))}"
    )


def make_objective(recipe: Recipe, stage: Pretrain, size: Pair) -> Reconstruct:
    """Encoder, masks and head with fresh weights that depend on the seed only."""
    torch.manual_seed(derive_seed("step", recipe.seed, 0))
    return Reconstruct(
        SwinEncoder(encoder_config(recipe.encoder, stage)),
        MaskGenerator(size, stage.mask.patch_size, stage.mask.ratio, seed=recipe.seed),
        mean=recipe.data.mean,
        std=recipe.data.std,
        loss=stage.target.loss,
        norm_target_window=stage.target.norm_window,
    )


def schedule_of(stage: Pretrain, num_images: int, total_steps: int) -> LearningRate:
    """The learning rate of every step of a stage."""
    return make_lr(
        batch_size=stage.batch_size,
        steps_per_epoch=num_images / stage.batch_size,
        total_steps=total_steps,
        **stage.schedule.model_dump(exclude={"epochs"}),
    )


def decisive_settings(recipe: Recipe, num_images: int, precision: str) -> dict[str, Any]:
    """What must not change when a run continues: everything but names, places and bookkeeping."""
    settings = recipe.model_dump(
        mode="json",
        exclude={
            "name": True,
            "data": {"path", "num_workers"},
            "stages": {"pretrain": {"log": True, "micro_batch_size": True}},
        },
    )
    return {**settings, "num_training_images": num_images, "precision": precision}


def starting_point(folder: Path, settings: dict[str, Any]) -> tuple[Path | None, int]:
    """Own checkpoint or scratch: the newest checkpoint of the folder and its step, or None and 0.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    newest = list_checkpoints(folder / "checkpoints")[-1:]
    if not newest:
        return None, 0
    state = load_state(newest[0])
    changed = different_settings(state["settings"], settings)
    if changed:
        raise ValueError(
            f"{folder} holds a run with other settings ({'; '.join(changed)}): "
            "give another name=..., another --out, or remove the folder"
        )
    return newest[0], state["step"]


def open_folder(folder: Path, recipe: Recipe, accelerator: Accelerator) -> RunLog:
    """Create the run folder with its resolved recipe and environment."""
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        write_environment(folder, processes=accelerator.num_processes, precision=accelerator.mixed_precision)
    accelerator.wait_for_everyone()
    return RunLog(folder, is_main=accelerator.is_main_process)


def export_encoder(encoder: SwinEncoder, folder: Path, recipe: Recipe, step: int) -> None:
    """Write the encoder with what a later user must know about its pixels and its training."""
    trained = {"recipe": recipe.name, "stage": "pretrain", "steps": step, "seed": recipe.seed}
    pixels = {"mean": recipe.data.mean, "std": recipe.data.std}
    save_encoder(encoder, folder, about={"pixels": pixels, "trained": trained})


@torch.no_grad()
def sum_up(objective: Reconstruct, views: Batches | list, log: RunLog, device: torch.device) -> None:
    """Held-out loss beside predictors without learning, on the screen and in ``summary.json``.

    Trivial predictors know nothing of a normalised target but its mean, which is zero.
    """
    numbers = {f"holdout_{key}": value for key, value in evaluate(objective, views, device).items()}
    if not numbers:
        return
    sums = {"predict zero": 0.0, "mean of the visible pixels": 0.0, "copy the nearest visible pixel": 0.0}
    count = 0
    for batch in views:
        log.broken(batch["broken"])
        shown = objective.reconstruct(*objective.inputs(to_device(batch, device)))
        predictions = {"predict zero": torch.zeros_like(shown.target)}
        if objective.norm_target_window is None:
            predictions["mean of the visible pixels"] = mean_of_visible(shown.images, shown.pixel_mask)
            predictions["copy the nearest visible pixel"] = copy_nearest_visible(shown.images, shown.pixel_mask)
        predictions["model"] = shown.prediction.to(shown.target.dtype)
        for name, prediction in predictions.items():
            l1 = masked_l1(prediction, shown.target, shown.pixel_mask).item()
            sums[name] = sums.get(name, 0.0) + l1 * len(shown.target)
        count += len(shown.target)
    table = {name: total / count for name, total in sums.items() if total}
    log.say(f"held-out masked L1, {count} images (lower is better):")
    for name, value in table.items():
        log.say(f"  {value:.4f}  {name}")
    (log.folder / "summary.json").write_text(
        json.dumps({**numbers, "holdout_masked_l1": table}, indent=2) + "\n", encoding="utf-8"
    )
