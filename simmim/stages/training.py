"""From the parts of a stage to a trained model: the same way for every kind of stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from timm.utils import ModelEmaV3

from simmim.checkpoint import load_checkpoint
from simmim.data import CenterCrop, RandomCrop, Source, training_batches
from simmim.data.loader import Batch, Batches
from simmim.engine import fit
from simmim.objectives.classify import Classify
from simmim.objectives.reconstruct import Reconstruct
from simmim.optim import make_optimizer
from simmim.runlog import RunLog
from simmim.schema import Recipe
from simmim.stages.assembly import (
    derive_accumulation,
    make_views,
    num_workers_of,
    open_folder,
    schedule_of,
    starting_point,
)

PREVIEW_IMAGES = 8


class Job(NamedTuple):
    """What a stage brings: the objective, and the images that it is trained on and judged by."""

    objective: Reconstruct | Classify
    training: Source
    holdout: Source | None
    transform: RandomCrop
    start: str
    pictures: str
    layer_decay: float = 1.0
    ema_decay: float | None = None

    @property
    def labelled(self) -> bool:
        return isinstance(self.objective, Classify)


class Trained(NamedTuple):
    """What is left of it: the objective to judge and export, and the held-out images."""

    objective: Reconstruct | Classify
    views: Batches | list
    log: RunLog
    total_steps: int


def num_steps(recipe: Recipe, name: str, num_images: int) -> int:
    """Optimizer steps of a stage."""
    stage = recipe.stages[name]
    return max(1, round(stage.schedule.epochs * num_images / stage.batch_size))


def train(
    job: Job, recipe: Recipe, name: str, folder: Path, settings: dict[str, Any], accelerator: Accelerator
) -> Trained:
    """Train a stage from where it stands.

    Raises:
        ValueError: a batch that cannot be divided, or a folder with other settings.
    """
    stage = recipe.stages[name]
    objective, size = job.objective, job.transform.size
    accumulation = derive_accumulation(stage.batch_size, stage.micro_batch_size, accelerator.num_processes)
    total_steps = num_steps(recipe, name, len(job.training))
    optimizer = make_optimizer(
        objective,
        objective.no_decay_parameters(),
        layer_decay=job.layer_decay,
        depths=objective.depth_of_parameters() if isinstance(objective, Classify) else None,
        **stage.optimizer.model_dump(include={"weight_decay", "betas", "eps"}),
    )
    checkpoint, start_step = starting_point(folder, settings)
    log = open_folder(folder, recipe, accelerator, job.pictures, len(job.training))
    log.say(
        f"{recipe.name}/{name}: {recipe.encoder.name}, {sum(p.numel() for p in objective.parameters()):,} "
        f"parameters; {len(job.training):,} images at {size[0]} x {size[1]} px; {total_steps} steps of "
        f"{stage.batch_size} = {accelerator.num_processes} process(es) x {accumulation} x "
        f"{stage.micro_batch_size} on {accelerator.device.type} in {accelerator.mixed_precision}; seed {recipe.seed}"
    )
    log.say(f"continues at step {start_step} from {checkpoint}" if checkpoint else f"starts from {job.start}")
    objective.to(accelerator.device)
    average = ModelEmaV3(objective, decay=job.ema_decay) if job.ema_decay else None
    if checkpoint is not None:
        load_checkpoint(checkpoint, objective, optimizer, average)

    view = CenterCrop(size, job.transform.interpolation)
    shares = (accelerator.process_index, accelerator.num_processes)
    timeout_s = recipe.data.read_timeout_s
    views = make_views(job.holdout, view, stage.micro_batch_size, job.labelled, shares, timeout_s=timeout_s)
    preview = make_preview(job, view)
    model, optimizer = accelerator.prepare(objective, optimizer)
    if start_step < total_steps:
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
                timeout_s=recipe.data.read_timeout_s,
                pin_memory=accelerator.device.type == "cuda",
                batch_size=stage.batch_size,
                micro_batch_size=stage.micro_batch_size,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                start_step=start_step,
                end_step=total_steps,
            ),
            lr_at=schedule_of(stage, len(job.training), total_steps),
            start_step=start_step,
            total_steps=total_steps,
            accumulation=accumulation,
            clip_grad_norm=stage.optimizer.clip_grad_norm,
            images_per_epoch=len(job.training),
            seed=recipe.seed,
            log=log,
            checkpoints=folder / "checkpoints",
            settings=settings,
            holdout=views,
            preview=preview,
            average=average,
            **stage.log.model_dump(),
        )
    if isinstance(views, Batches):
        log.broken(list(views.broken.items()))
    judged = objective if average is None else average.module
    return Trained(judged.eval(), views, log, total_steps)


def make_preview(job: Job, view: CenterCrop) -> Batch:
    """The first images that can be read: held-out ones, or of training where there are none.

    Raises:
        ValueError: none can be read.
    """
    for source in (job.holdout, job.training):
        views = make_views(source, view, PREVIEW_IMAGES, job.labelled)
        for batch in views:
            return batch
    assert isinstance(views, Batches)
    names = "; ".join(f"{name}: {reason}" for name, reason in list(views.broken.items())[-3:])
    raise ValueError(f"none of {len(job.training)} images could be read, the last: {names}")
