"""Semantic segmentation, from a recipe to an exported segmenter."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator

from simmim.config import Recipe, SegmentStage
from simmim.data.segment_transforms import CenterSegmentCrop, RandomSegmentCrop
from simmim.evaluation.segmentation import HEAD, evaluate_whole_images
from simmim.export.heads import save_head
from simmim.metrics.mean_iou import MeanIoU
from simmim.rng import derive_seed
from simmim.stages.datasets import make_sources
from simmim.stages.initialization import make_start, resume_fingerprint
from simmim.stages.runner import Job, Trained
from simmim.tasks.segmentation import Segmentation
from simmim.training.run_log import write_atomically
from swin import SwinEncoder


def evaluate_trained(trained: Trained, accelerator: Accelerator) -> None:
    """Mean intersection over union on whole held-out images, on the screen and in ``summary.json``.

    Raises:
        ValueError: no held-out image could be read, or none of their pixels has a label.
    """
    task, log, validation = trained.task, trained.log, trained.validation
    assert isinstance(task, Segmentation) and validation is not None
    found = evaluate_whole_images(task, validation, accelerator, is_sharded=accelerator.is_fsdp2)
    log.log_corrupt_images(list(found.corrupt.items()))
    numbers = found.numbers
    log.info(
        f"held-out mean IoU {numbers['mean_iou']:.2%}, mean accuracy {numbers['mean_accuracy']:.2%}, pixels "
        f"{numbers['pixel_accuracy']:.2%}, of {numbers['images']:,.0f} whole images"
    )
    if log.is_main:
        summary = {f"validation_{key}": value for key, value in numbers.items()}
        content = {**summary, "validation_iou": found.of_classes}
        write_atomically(log.folder / "summary.json", json.dumps(content, indent=2) + "\n")


def make_job(recipe: Recipe, out: Path, name: str, precision: str) -> Job:
    """What the stage trains, on which images, and from where; weights and settings do not depend on the launch.

    Raises:
        ValueError: settings, data or a start that cannot work.
    """
    stage = recipe.stages[name]
    assert isinstance(stage, SegmentStage)
    torch.manual_seed(derive_seed("step", recipe.seed, 0))
    start = make_start(recipe, name, out)
    sources = make_sources(recipe, name)
    MeanIoU(len(sources.classes))  # which says now, and not after the training, what is not installed
    task = make_task(recipe, stage, start.encoder, sources.classes)
    settings = resume_fingerprint(
        recipe,
        name,
        start,
        num_training_images=len(sources.training),
        classes=sources.classes,
        precision=precision,
    )
    return Job(
        task=task,
        training=sources.training,
        validation=sources.validation,
        transform=RandomSegmentCrop(stage.image_size, mean=recipe.data.mean, **stage.augment.model_dump()),
        view=CenterSegmentCrop(stage.image_size),
        settings=settings,
        start=str(start.path or "scratch"),
        pictures="predictions",
        about={"segmentation": task.description()},
        save=lambda folder, weights: save_head(folder / HEAD, weights),
        problems=sources.problems,
        layer_decay=stage.layer_decay,
        ema_decay=stage.ema_decay,
    )


def make_task(recipe: Recipe, stage: SegmentStage, encoder: SwinEncoder, classes: list[str]) -> Segmentation:
    """Heads with fresh weights around the encoder."""
    test = stage.test
    return Segmentation(
        encoder,
        classes,
        mean=recipe.data.mean,
        std=recipe.data.std,
        **stage.head.model_dump(),
        window=stage.image_size if test.window else None,
        **test.model_dump(exclude={"window"}),
        first_label=int(stage.labels.ignore_zero),
    )


def make_fake_task(recipe: Recipe, stage: SegmentStage, encoder: SwinEncoder, classes: int) -> Segmentation:
    """For as many classes."""
    return make_task(recipe, stage, encoder, [""] * classes)
