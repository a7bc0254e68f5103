"""From the parts of a stage to a trained model: the same way for every kind of stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from simmim.config import Optimizer, Recipe, Stage, video_of
from simmim.data import Source, training_batches
from simmim.data.loader import Batch, Batches
from simmim.data.transforms import Transform
from simmim.data.views import make_views, num_workers_of, told
from simmim.signals import StopRequest
from simmim.stages.initialization import chunks_of, derive_accumulation, schedule_of
from simmim.stages.run_folder import common_starting_point, export, is_done, open_folder, publish
from simmim.tasks.task import Task
from simmim.training.attention_backend import configure_speed
from simmim.training.checkpoint import Checkpoints, load_checkpoint
from simmim.training.distributed import default_precision, distribute, full_state_dict, make_accelerator
from simmim.training.engine import LoopSettings, fit
from simmim.training.footprint import footprint, free_bytes, gigabytes, sizes, states_bytes
from simmim.training.memory import device_bytes
from simmim.training.optim import make_optimizer
from simmim.training.run_log import RunLog, locked

PREVIEW_IMAGES = 8


class Job(NamedTuple):
    """What a stage brings: the objective, the images that it is trained on and judged by, and what is exported."""

    task: Task
    training: Source
    validation: Source | None
    transform: Transform
    """Of training images."""
    view: Transform
    """Of held-out images, the same in every epoch."""
    settings: dict[str, Any]
    """What must not change when the stage continues."""
    start: str
    pictures: str
    about: dict[str, Any]
    """What ``encoder.json`` says beside the encoder."""
    save: Callable[[Path, dict[str, Tensor]], None]
    """Write, of the whole weights, what an export has beside the encoder."""
    labelled: bool = False
    """Whether batches have labels, one of each image."""
    problems: Sequence[tuple[str, str]] = ()
    """What is left out of the data from the beginning, with the reason."""
    layer_decay: float = 1.0
    ema_decay: float | None = None
    final_view: Transform | None = None
    """Of held-out images once the stage is trained, where that is another."""
    tests: Mapping[str, Source] = {}
    """More images to judge it by then."""


class Trained(NamedTuple):
    """What is left of it: the objective to judge, its whole weights to export, and the held-out images.

    ``views``, ``preview`` and ``tests`` are by the last view of the job.
    """

    task: Task
    weights: dict[str, Tensor]
    validation: Source | None
    views: Batches | list
    preview: Batch
    tests: dict[str, Batches | list]
    log: RunLog


def num_steps(recipe: Recipe, name: str, num_images: int) -> int:
    """Optimizer steps of a stage."""
    stage = recipe.stages[name]
    return max(1, round(stage.schedule.epochs * num_images / stage.batch_size))


MakeJob = Callable[[Recipe, Path, str, str], Job]
Evaluate = Callable[[Trained, Accelerator], None]


def carry_out(
    recipe: Recipe,
    out: Path,
    name: str,
    make_job: MakeJob,
    evaluate: Evaluate,
    *,
    precision: str | None = None,
    allow_changes: bool = False,
) -> Path:
    """A stage from where it stands to its export, alone in its folder.

    Args:
        out: the stage writes into ``out / recipe.name / name``.
        judge: what is said of the trained objective, on the screen and in ``summary.json``.
        precision: ``bf16``, ``fp32``, or None for what the launcher says, or is usual on this machine.
        allow_changes: continue although settings are not those of the checkpoint.

    Returns:
        The folder of the export.

    Raises:
        ValueError: settings, data, start or launch that cannot work, a folder with other settings or
            in use by another run.
        Stopped, NonFiniteLoss, OSError: as of :func:`simmim.training.engine.fit`.
    """
    stage, folder = recipe.stages[name], out / recipe.name / name
    accelerator = make_accelerator(precision or default_precision(folder), stage.log.trackers, folder)
    job = make_job(recipe, out, name, accelerator.mixed_precision)
    with locked(folder, is_main=accelerator.is_main_process):
        if is_done(folder, job.settings):
            accelerator.print(f"{recipe.name}/{name}: done before, {folder / 'export'}")
            return folder / "export"
        try:
            trained = train(job, recipe, name, folder, accelerator, allow_changes)
            with accelerator.autocast():
                evaluate(trained, accelerator)
            if accelerator.is_main_process:
                publish(write_export(job, recipe, name, folder, trained.weights), folder / "export")
                trained.log.info(
                    f"pictures  {trained.log.image_folder}\nexport    {folder / 'export'}  (swin.load_encoder)"
                )
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()
        accelerator.wait_for_everyone()
    return folder / "export"


def write_export(job: Job, recipe: Recipe, name: str, folder: Path, weights: dict[str, Tensor]) -> Path:
    """The encoder, and what is around it, with how they were trained; not yet under its name."""
    steps = num_steps(recipe, name, len(job.training))
    trained = {"recipe": recipe.name, "stage": name, "steps": steps, "seed": recipe.seed, "settings": job.settings}
    unfinished = export(job.task.encoder, weights, folder / "export", recipe, trained, **job.about)
    job.save(unfinished, weights)
    return unfinished


def train(
    job: Job, recipe: Recipe, name: str, folder: Path, accelerator: Accelerator, allow_changes: bool = False
) -> Trained:
    """Train a stage from where it stands.

    Raises:
        ValueError: a batch that cannot be divided, a folder with other settings or with damaged
            checkpoints only.
        Stopped, NonFiniteLoss, OSError: as of :func:`simmim.training.engine.fit`.
    """
    stage = recipe.stages[name]
    task = job.task
    config, video = task.encoder.config, video_of(stage)
    what = "images" if video is None else f"videos, clips of {video.frames} frames,"
    accumulation = derive_accumulation(stage, accelerator.num_processes)
    total_steps = num_steps(recipe, name, len(job.training))
    checkpoint, start_step, passed_over, changed = common_starting_point(
        folder, job.settings, accelerator, allow_changes
    )
    log = open_folder(folder, recipe, accelerator, job.pictures, len(job.training))
    log.info(
        f"{recipe.name}/{name}: {recipe.encoder.name}, {sum(p.numel() for p in task.parameters()):,} "
        f"parameters; {len(job.training):,} {what} at {config.image_size[0]} x {config.image_size[1]} px; "
        f"{total_steps} steps of "
        f"{stage.batch_size} = {accelerator.num_processes} process(es) x {accumulation} x "
        f"{stage.micro_batch_size} on {accelerator.device.type} ({accelerator.distributed_type.value}) "
        f"in {accelerator.mixed_precision}; seed {recipe.seed}"
    )
    for problem in passed_over:
        log.log_event(start_step, "damaged_checkpoint", problem)
        log.warning(f"{problem}: skipped")
    log.info(f"continues at step {start_step} from {checkpoint}" if checkpoint else f"starts from {job.start}")
    if changed:
        log.log_event(start_step, "settings_changed", changed)
        log.warning(f"settings changed since then: {changed}")
    if checkpoint:
        log.log_event(start_step, "resumed", f"from {checkpoint.name} by {accelerator.num_processes} process(es)")
    warnings = [("excluded_data", text) for text in told(job.problems)]
    warnings += [("memory", warning) for warning in save_memory(job, stage, accelerator)]
    warnings += [("speed", text) for text in configure_speed(task.encoder, stage, accelerator, folder)]
    for kind, warning in warnings:
        log.log_event(start_step, kind, warning)
        log.warning(warning)
    model, optimizer, ema = distribute(task, lambda: optimizer_of(job, stage.optimizer), job.ema_decay, accelerator)
    if checkpoint is not None:
        load_checkpoint(checkpoint, task, optimizer, ema and ema.module)

    shares = (accelerator.process_index, accelerator.num_processes)
    timeout_s = recipe.data.read_timeout_s
    # A picture is decoded before a worker has started; a video is not.
    workers = 0 if video is None else num_workers_of(recipe.data, accelerator)
    looking = (stage.micro_batch_size, job.labelled, shares, workers, timeout_s)
    views, preview = make_views(job.validation, job.view, *looking), make_preview(job)
    checkpoints = Checkpoints(
        folder / "checkpoints",
        job.settings,
        keep=stage.log.keep_checkpoints,
        keep_every_steps=stage.log.keep_every_steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        is_sharded=accelerator.is_fsdp2,
    )
    if start_step < total_steps:
        with StopRequest() as stop:
            fit(
                accelerator,
                model,
                optimizer,
                training_batches(
                    job.training,
                    job.transform,
                    labelled=job.labelled,
                    seed=recipe.seed,
                    num_workers=num_workers_of(recipe.data, accelerator),
                    timeout_s=timeout_s,
                    pin_memory=accelerator.device.type == "cuda",
                    batch_size=stage.batch_size,
                    micro_batch_size=stage.micro_batch_size,
                    rank=accelerator.process_index,
                    world_size=accelerator.num_processes,
                    start_step=start_step,
                    end_step=total_steps,
                ),
                LoopSettings(
                    start_step=start_step,
                    total_steps=total_steps,
                    accumulation=accumulation,
                    images_per_epoch=len(job.training),
                    seed=recipe.seed,
                    clip_grad_norm=stage.optimizer.clip_grad_norm,
                    metrics_every_steps=stage.log.metrics_every_steps,
                    evaluate_every_steps=stage.log.evaluate_every_steps,
                    checkpoint_every_steps=stage.log.checkpoint_every_steps,
                ),
                lr_at=schedule_of(stage, len(job.training), total_steps),
                log=log,
                checkpoints=checkpoints,
                stop=stop,
                validation=views,
                preview=preview,
                ema=ema,
            )
    if isinstance(views, Batches):
        log.log_corrupt_images(list(views.corrupt.items()))
    if job.final_view is not None:
        views, preview = make_views(job.validation, job.final_view, *looking), make_preview(job, final=True)
    judged = task if ema is None else ema.module
    tests = {place: make_views(its, job.final_view or job.view, *looking) for place, its in job.tests.items()}
    return Trained(judged.eval(), full_state_dict(judged, accelerator), job.validation, views, preview, tests, log)


def optimizer_of(job: Job, settings: Optimizer) -> torch.optim.AdamW:
    """Of the parameters of the objective as they are now."""
    return make_optimizer(
        job.task,
        job.task.no_decay_parameters(),
        layer_decay=job.layer_decay,
        depths=job.task.depth_of_parameters() if job.layer_decay < 1 else None,
        **settings.model_dump(include={"weight_decay", "betas", "eps"}),
    )


def save_memory(job: Job, stage: Stage, accelerator: Accelerator) -> list[str]:
    """Do what the recipe says of memory, and compare what the stage needs with what there is.

    Returns:
        Warnings.

    Raises:
        ValueError: weights, gradients and moments alone are more than that.
    """
    task, device, ranks = job.task, accelerator.device, accelerator.num_processes
    budget = device_bytes(device) // (1 if device.type == "cuda" else ranks)
    chunks = chunks_of(stage, task.encoder.config, budget)
    task.encoder.save_memory(checkpointing=stage.memory.checkpointing, attention_chunks=chunks)
    plugin = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    zero = "none" if plugin is None else "3" if plugin.reshard_after_forward else "2"
    states = states_bytes(sizes(task), zero, ranks, bool(job.ema_decay))
    if states > budget:
        raise ValueError(
            f"weights, gradients and moments take {gigabytes(states)} on each of {ranks} process(es), which have "
            f"{gigabytes(budget)}: use recipes/accelerate/zero3_8.yaml and more GPUs, or a smaller encoder"
        )
    if device.type != "cuda":
        return []
    needed = footprint(task, stage.memory.checkpointing, chunks, precision=accelerator.mixed_precision)
    free = free_bytes(budget, states)
    if needed.of(stage.micro_batch_size) <= free:
        return []
    return [
        f"{stage.micro_batch_size} images need {gigabytes(needed.of(stage.micro_batch_size))} beside "
        f"{gigabytes(states)} of weights, gradients and moments; {needed.largest_batch(free)} at most would fit. "
        "`simmim plan` shows what else would"
    ]


def make_preview(job: Job, *, final: bool = False) -> Batch:
    """The first images that can be read, one alone by the final view: held out, or of training where there are none.

    Raises:
        ValueError: none can be read.
    """
    for source in (job.validation, job.training):
        view, images = (job.final_view, 1) if final and job.final_view else (job.view, PREVIEW_IMAGES)
        views = make_views(source, view, images, job.labelled)
        for batch in views:
            return batch
    assert isinstance(views, Batches)
    names = "; ".join(f"{name}: {reason}" for name, reason in list(views.corrupt.items())[-3:])
    raise ValueError(f"none of {len(job.training)} images could be read, the last: {names}")
