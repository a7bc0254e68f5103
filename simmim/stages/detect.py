"""Detection and instance segmentation, from a recipe to an exported detector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from simmim.config import DetectStage, Recipe
from simmim.data.box_transforms import EvaluationSize, LargeScaleJitter, ShortSideJitter
from simmim.evaluation.detection import average_precision
from simmim.export.heads import HEAD, save_head
from simmim.metrics.average_precision import AveragePrecision
from simmim.rng import derive_seed
from simmim.stages.datasets import make_sources
from simmim.stages.initialization import make_start, resume_fingerprint
from simmim.stages.runner import Job, Trained
from simmim.tasks.detection import Detection
from simmim.training.run_log import write_atomically
from swin import SwinEncoder
from swin.config import Pair

MEASURES = ("box_ap", "box_ap50", "mask_ap", "mask_ap50")


def make_job(recipe: Recipe, out: Path, name: str, precision: str) -> Job:
    """What the stage trains, on which images, and from where; weights and settings do not depend on the launch.

    Raises:
        ValueError: settings, data or a start that cannot work, or nothing installed that could judge.
    """
    stage = recipe.stages[name]
    assert isinstance(stage, DetectStage)
    AveragePrecision(masks=stage.masks)  # what it needs is missed now, not after days of training
    sources = make_sources(recipe, name)
    torch.manual_seed(derive_seed("step", recipe.seed, 0))
    start = make_start(recipe, name, out)
    task = make_task(recipe, stage, start.encoder, sources.classes)
    settings = resume_fingerprint(
        recipe, name, start, num_training_images=len(sources.training), classes=sources.classes, precision=precision
    )
    return Job(
        task=task,
        training=sources.training,
        validation=sources.validation,
        transform=make_jitter(stage, start.encoder.config.image_size),
        view=EvaluationSize(stage.test.short_px, stage.test.long_px, stage.jitter.interpolation),
        settings=settings,
        start=str(start.path or "scratch"),
        pictures="predictions",
        about={"detection": describe(stage, sources.classes)},
        save=lambda folder, weights: save_head(folder / HEAD, weights),
        layer_decay=stage.layer_decay,
        ema_decay=stage.ema_decay,
        problems=sources.problems,
    )


def make_jitter(stage: DetectStage, size: Pair) -> ShortSideJitter | LargeScaleJitter:
    """How training images change their size."""
    jitter = stage.jitter
    if jitter.kind == "large_scale":
        return LargeScaleJitter(size, jitter.scale, jitter.flip, jitter.interpolation)
    return ShortSideJitter(jitter.short_px, jitter.long_px, jitter.flip, jitter.interpolation)


def make_task(recipe: Recipe, stage: DetectStage, encoder: SwinEncoder, classes: list[str]) -> Detection:
    """The encoder with a fresh head."""
    looks = stage.test.model_dump(include={"soft_nms", "scales", "flip"})
    return Detection(encoder, classes, mean=recipe.data.mean, std=recipe.data.std, **head_of(stage), **looks)


def make_fake_task(recipe: Recipe, stage: DetectStage, encoder: SwinEncoder, classes: int) -> Detection:
    """For as many classes."""
    return make_task(recipe, stage, encoder, [""] * classes)


def head_of(stage: DetectStage) -> dict[str, Any]:
    """What the head is."""
    names = {"masks", "cascade", "width", "hidden", "anchor_px", "regions_per_image"}
    return stage.model_dump(mode="json", include=names)


def describe(stage: DetectStage, classes: list[str]) -> dict[str, Any]:
    """All that :func:`simmim.evaluation.detection.load_detector` needs beside the weights."""
    test = stage.test.model_dump(mode="json") | {"interpolation": stage.jitter.interpolation}
    return {"classes": classes, **head_of(stage), "test": test}


def evaluate_trained(trained: Trained, accelerator: Accelerator) -> None:
    """Average precision over all held-out images, on the screen and in ``summary.json``.

    Raises:
        ValueError: no held-out image could be read.
    """
    task, log, validation = trained.task, trained.log, trained.validation
    assert isinstance(task, Detection) and validation is not None
    measured = average_precision(task, trained.views, validation, accelerator, trained.preview)
    if not measured:
        raise ValueError(f"none of the held-out images could be read: checkpoints are in {log.folder}")
    shown = "  ".join(f"{name} {measured[name]:.3f}" for name in MEASURES if name in measured)
    log.info(f"held-out, {measured['images']} images: {shown or 'they show no object'}")
    if log.is_main:
        numbers = {f"validation_{name}": value for name, value in measured.items()}
        write_atomically(log.folder / "summary.json", json.dumps(numbers, indent=2) + "\n")
