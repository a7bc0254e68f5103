"""Running stages: from a recipe to a trained and exported model, the same way for every stage type."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from simmim.config import Recipe, video_of
from simmim.data import Source, evaluation_batches, training_batches
from simmim.data.loader import Batch, Batches
from simmim.data.transforms import Transform
from simmim.data.views import num_workers_of, summarize_problems
from simmim.rng import derive_seed
from simmim.signals import StopRequest
from simmim.stages.datasets import check_stages, make_datasets
from simmim.stages.initialization import (
    chunks_of,
    derive_accumulation,
    make_start,
    resume_fingerprint,
    schedule_of,
)
from simmim.stages.job import Job, TrainedStage
from simmim.stages.run_folder import Position, common_starting_point, is_done, open_folder, publish, write_export
from simmim.stages.stage_type import stage_type_of
from simmim.training.attention_backend import configure_speed
from simmim.training.checkpoint import Checkpoints, load_checkpoint
from simmim.training.distributed import default_precision, distribute, full_state_dict, make_accelerator
from simmim.training.engine import LoopSettings, fit
from simmim.training.footprint import footprint, free_bytes, gigabytes, sizes, states_bytes
from simmim.training.memory import device_bytes
from simmim.training.optim import make_optimizer
from simmim.training.run_log import RunLog, locked, write_atomically

PREVIEW_IMAGES = 8
logger = logging.getLogger(__name__)


def run(recipe: Recipe, out: Path, *, precision: str | None = None, allow_changes: bool = False) -> Path:
    """Run all stages of a recipe in order; finished stages are skipped, interrupted ones resumed.

    Returns:
        Export folder of the last stage.

    Raises:
        ValueError: as :func:`run_stage`. Inputs of all stages are checked before the first one is trained.
    """
    check_stages(recipe, (name for name in recipe.stages if not (out / recipe.name / name / "export").exists()))
    for name in recipe.stages:
        last = run_stage(recipe, name, out, precision=precision, allow_changes=allow_changes)
    return last


def run_stage(
    recipe: Recipe, name: str, out: Path, *, precision: str | None = None, allow_changes: bool = False
) -> Path:
    """Run or resume a stage through its export, holding the lock of its folder; a finished stage is skipped.

    Args:
        out: the stage writes into ``out / recipe.name / name``.
        precision: ``bf16``, ``fp32``, or None for the launcher's precision or the default of this machine.
        allow_changes: resume although settings differ from those of the checkpoint.

    Returns:
        Export folder.

    Raises:
        ValueError: no such stage; settings, data, initial weights or a launch that cannot work; a folder with other
            settings or in use by another run.
        Stopped, NonFiniteLoss, OSError: as :func:`simmim.training.engine.fit`.
    """
    if name not in recipe.stages:
        raise ValueError(f"{recipe.name} has no stage {name!r}: it has {', '.join(recipe.stages)}")
    folder = out / recipe.name / name
    trackers = recipe.stages[name].log.trackers
    accelerator = make_accelerator(precision or default_precision(folder), trackers, folder)
    job = make_job(recipe, name, out, accelerator.mixed_precision)
    with locked(folder, is_main=accelerator.is_main_process):
        if is_done(folder, job.fingerprint):
            if accelerator.is_main_process:
                logger.info(f"{recipe.name}/{name}: finished before, {folder / 'export'}")
            return folder / "export"
        try:
            trained = train(job, folder, accelerator, allow_changes)
            with accelerator.autocast():
                summary = job.stage_type.evaluate(trained, accelerator)
            if accelerator.is_main_process:
                if summary:
                    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
                publish(write_export(job, folder, trained.weights), folder / "export")
                previews = folder / job.stage_type.preview_folder
                trained.log.info(f"previews  {previews}\nexport    {folder / 'export'}  (swin.load_encoder)")
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()
        accelerator.wait_for_everyone()
    return folder / "export"


def make_job(recipe: Recipe, name: str, out: Path, precision: str) -> Job:
    """Build the task of a stage with its initial weights, and open its datasets.

    Weights and settings do not depend on the launch.

    Raises:
        ValueError: settings, data or initial weights that cannot work, or a missing library for the evaluation.
    """
    stage = recipe.stages[name]
    stage_type = stage_type_of(stage)
    stage_type.check_requirements(stage)
    torch.manual_seed(derive_seed("step", recipe.seed, 0))
    start = make_start(recipe, name, out)
    config = start.encoder.config
    datasets = make_datasets(recipe, name, config.image_size)
    classes = datasets.classes
    datasets = datasets._replace(tests=stage_type.open_tests(recipe, stage, config, classes))
    task = stage_type.make_task(recipe, stage, start.encoder, classes)
    stage_type.initialize_head(stage, task, start)
    fingerprint = resume_fingerprint(
        recipe,
        name,
        start,
        is_supervised=stage_type.is_supervised,
        num_training_images=len(datasets.training),
        classes=classes,
        precision=precision,
        **stage_type.fingerprint(stage, task),
    )
    transforms = stage_type.make_transforms(recipe, stage, config.image_size)
    init_from = str(start.export.path) if start.export else "scratch"
    return Job(recipe, name, stage_type, task, datasets, transforms, fingerprint, init_from)


def train(job: Job, folder: Path, accelerator: Accelerator, allow_changes: bool = False) -> TrainedStage:
    """Train a stage from its newest checkpoint or from the start.

    Raises:
        ValueError: a batch that cannot be divided, a folder with other settings, or damaged checkpoints only.
        Stopped, NonFiniteLoss, OSError: as :func:`simmim.training.engine.fit`.
    """
    recipe, stage, task = job.recipe, job.stage, job.task
    datasets, timeout_s = job.datasets, job.recipe.data.read_timeout_s

    # Decide where to start: at a checkpoint, or at step 0.
    accumulation = derive_accumulation(stage, accelerator.num_processes)
    position = common_starting_point(folder, job.fingerprint, accelerator, allow_changes)
    log = open_folder(folder, recipe, accelerator, job.stage_type.preview_folder, len(datasets.training))
    log.info(describe_run(job, accelerator, accumulation))
    log_position(job, position, log, accelerator)

    # Choose memory options and attention backend, then shard the model and load the checkpoint.
    warnings = [("excluded_data", text) for text in summarize_problems(datasets.problems)]
    warnings += [("memory", warning) for warning in apply_memory_options(job, accelerator)]
    warnings += [("speed", text) for text in configure_speed(task.encoder, stage, accelerator, folder)]
    for kind, warning in warnings:
        log.log_event(position.step, kind, warning)
        log.warning(warning)
    ema_decay = job.stage_type.ema_decay(stage)
    model, optimizer, ema = distribute(task, lambda: optimizer_of(job), ema_decay, accelerator)
    if position.checkpoint is not None:
        load_checkpoint(position.checkpoint, task, optimizer, ema and ema.module)

    # Train.
    num_workers = num_workers_of(recipe.data, accelerator)
    validation = fixed_batches(job, datasets.validation, job.transforms.evaluation, accelerator)
    preview = make_preview(job, job.transforms.evaluation, PREVIEW_IMAGES)
    if position.step < job.num_steps:
        with StopRequest() as stop:
            fit(
                accelerator,
                model,
                optimizer,
                training_batches(
                    datasets.training,
                    job.transforms.training,
                    labelled=job.stage_type.has_image_labels,
                    seed=recipe.seed,
                    num_workers=num_workers,
                    timeout_s=timeout_s,
                    pin_memory=accelerator.device.type == "cuda",
                    batch_size=stage.batch_size,
                    micro_batch_size=stage.micro_batch_size,
                    rank=accelerator.process_index,
                    world_size=accelerator.num_processes,
                    start_step=position.step,
                    end_step=job.num_steps,
                ),
                LoopSettings(
                    start_step=position.step,
                    total_steps=job.num_steps,
                    accumulation=accumulation,
                    images_per_epoch=len(datasets.training),
                    seed=recipe.seed,
                    clip_grad_norm=stage.optimizer.clip_grad_norm,
                    metrics_every_steps=stage.log.metrics_every_steps,
                    evaluate_every_steps=stage.log.evaluate_every_steps,
                    checkpoint_every_steps=stage.log.checkpoint_every_steps,
                ),
                lr_at=schedule_of(stage, len(datasets.training), job.num_steps),
                log=log,
                checkpoints=Checkpoints(
                    folder / "checkpoints",
                    job.fingerprint,
                    keep=stage.log.keep_checkpoints,
                    keep_every_steps=stage.log.keep_every_steps,
                    rank=accelerator.process_index,
                    world_size=accelerator.num_processes,
                    is_sharded=accelerator.is_fsdp2,
                ),
                stop=stop,
                validation=validation,
                preview=preview,
                ema=ema,
            )
    if isinstance(validation, Batches):
        log.log_corrupt_images(list(validation.corrupt.items()))
    return trained_stage(job, task if ema is None else ema.module, validation, preview, log, accelerator)


def trained_stage(
    job: Job, task: Any, validation: Batches | list, preview: Batch, log: RunLog, accelerator: Accelerator
) -> TrainedStage:
    """Gather the weights of a trained task, and make the batches for its evaluation.

    Args:
        task: the model to evaluate and export.
        validation, preview: batches of the evaluation during training; used again unless the final view is another.
    """
    view = job.transforms.evaluation
    if job.transforms.final is not None:
        view = job.transforms.final
        validation = fixed_batches(job, job.datasets.validation, view, accelerator)
        preview = make_preview(job, view, images=1)
    tests = {path: fixed_batches(job, source, view, accelerator) for path, source in job.datasets.tests.items()}
    weights = full_state_dict(task, accelerator)
    return TrainedStage(task.eval(), weights, job.datasets, validation, preview, tests, log)


def fixed_batches(job: Job, source: Source | None, view: Transform, accelerator: Accelerator) -> Batches | list:
    """Make batches with fixed views of a source, for evaluation by all processes; an empty list without a source."""
    if source is None:
        return []
    # Videos are decoded by worker processes; for images, starting the processes would take longer than decoding.
    is_video = video_of(job.stage) is not None
    return evaluation_batches(
        source,
        view,
        batch_size=job.stage.micro_batch_size,
        labelled=job.stage_type.has_image_labels,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=num_workers_of(job.recipe.data, accelerator) if is_video else 0,
        timeout_s=job.recipe.data.read_timeout_s,
    )


def make_preview(job: Job, view: Transform, images: int) -> Batch:
    """Make a batch of the first readable validation images; of training images if there are none.

    Raises:
        ValueError: no image can be read.
    """
    sources = [source for source in (job.datasets.validation, job.datasets.training) if source is not None]
    for source in sources:
        batches = evaluation_batches(source, view, batch_size=images, labelled=job.stage_type.has_image_labels)
        for batch in batches:
            return batch
    names = "; ".join(f"{name}: {reason}" for name, reason in list(batches.corrupt.items())[-3:])
    raise ValueError(f"none of {len(job.datasets.training)} images could be read, the last: {names}")


def describe_run(job: Job, accelerator: Accelerator, accumulation: int) -> str:
    """Describe model, data, steps and launch in one line."""
    recipe, stage, config, video = job.recipe, job.stage, job.task.encoder.config, video_of(job.stage)
    data = "images" if video is None else f"videos, clips of {video.frames} frames,"
    return (
        f"{recipe.name}/{job.name}: {recipe.encoder.name}, {sum(p.numel() for p in job.task.parameters()):,} "
        f"parameters; {len(job.datasets.training):,} {data} at {config.image_size[0]} x {config.image_size[1]} px; "
        f"{job.num_steps} steps of "
        f"{stage.batch_size} = {accelerator.num_processes} process(es) x {accumulation} x "
        f"{stage.micro_batch_size} on {accelerator.device.type} ({accelerator.distributed_type.value}) "
        f"in {accelerator.mixed_precision}; seed {recipe.seed}"
    )


def log_position(job: Job, position: Position, log: RunLog, accelerator: Accelerator) -> None:
    """Log where a stage starts or resumes, skipped checkpoints and changed settings."""
    for problem in position.skipped:
        log.log_event(position.step, "damaged_checkpoint", problem)
        log.warning(f"checkpoint skipped: {problem}")
    if position.checkpoint is None:
        log.info(f"starts from {job.init_from}")
    else:
        log.info(f"resumes at step {position.step} from {position.checkpoint}")
    if position.changed:
        log.log_event(position.step, "settings_changed", position.changed)
        log.warning(f"settings changed since then: {position.changed}")
    if position.checkpoint is not None:
        processes = f"{accelerator.num_processes} process(es)"
        log.log_event(position.step, "resumed", f"from {position.checkpoint.name} by {processes}")


def optimizer_of(job: Job) -> torch.optim.AdamW:
    """Make the optimizer of the parameters of the task."""
    layer_decay = job.stage_type.layer_decay(job.stage)
    return make_optimizer(
        job.task,
        job.task.no_decay_parameters(),
        layer_decay=layer_decay,
        depths=job.task.depth_of_parameters() if layer_decay < 1 else None,
        **job.stage.optimizer.model_dump(include={"weight_decay", "betas", "eps"}),
    )


def apply_memory_options(job: Job, accelerator: Accelerator) -> list[str]:
    """Apply the memory options of the recipe, and compare the memory that the stage needs with what is available.

    Returns:
        Warnings.

    Raises:
        ValueError: weights, gradients and optimizer state alone need more memory.
    """
    task, stage, device, ranks = job.task, job.stage, accelerator.device, accelerator.num_processes
    budget = device_bytes(device) // (1 if device.type == "cuda" else ranks)
    chunks = chunks_of(stage, task.encoder.config, budget)
    task.encoder.save_memory(checkpointing=stage.memory.checkpointing, attention_chunks=chunks)
    plugin = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    zero = "none" if plugin is None else "3" if plugin.reshard_after_forward else "2"
    states = states_bytes(sizes(task), zero, ranks, bool(job.stage_type.ema_decay(stage)))
    if states > budget:
        raise ValueError(
            f"weights, gradients and optimizer state take {gigabytes(states)} on each of {ranks} process(es), which "
            f"have {gigabytes(budget)}: use recipes/accelerate/zero3_8.yaml and more GPUs, or a smaller encoder"
        )
    if device.type != "cuda":
        return []
    needed = footprint(task, stage.memory.checkpointing, chunks, precision=accelerator.mixed_precision)
    free = free_bytes(budget, states)
    if needed.of(stage.micro_batch_size) <= free:
        return []
    return [
        f"{stage.micro_batch_size} images need {gigabytes(needed.of(stage.micro_batch_size))} beside "
        f"{gigabytes(states)} of weights, gradients and optimizer state; at most {needed.largest_batch(free)} would "
        "fit. `simmim plan` shows alternatives"
    ]


def stage_of_kind(recipe: Recipe, kinds: Sequence[str]) -> str:
    """Return the name of the first stage of one of these kinds.

    Raises:
        ValueError: there is none.
    """
    for name, stage in recipe.stages.items():
        if stage.kind in kinds:
            return name
    raise ValueError(f"{recipe.name} has no stage of kind {' or '.join(kinds)}: it has {', '.join(recipe.stages)}")
