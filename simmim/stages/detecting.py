"""Detection and instance segmentation, from a recipe to an exported detector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from simmim import schema
from simmim.around import HEAD, save_around
from simmim.counter_rng import derive_seed
from simmim.data.box_transforms import EvaluationSize, LargeScaleJitter, ShortSideJitter
from simmim.objectives.average_precision import AveragePrecision
from simmim.objectives.detect import Detect
from simmim.runlog import write_whole
from simmim.stages.assembly import decisive_settings, make_start
from simmim.stages.evaluate_objects import average_precision
from simmim.stages.sources import make_sources
from simmim.stages.training import Job, Trained
from swin import SwinEncoder
from swin.config import Pair

MEASURES = ("box_ap", "box_ap50", "mask_ap", "mask_ap50")


def make_job(recipe: schema.Recipe, out: Path, name: str, precision: str) -> Job:
    """What the stage trains, on which images, and from where; weights and settings do not depend on the launch.

    Raises:
        ValueError: settings, data or a start that cannot work, or nothing installed that could judge.
    """
    stage = recipe.stages[name]
    assert isinstance(stage, schema.Detect)
    AveragePrecision(masks=stage.masks)  # what it needs is missed now, not after days of training
    sources = make_sources(recipe, name)
    torch.manual_seed(derive_seed("step", recipe.seed, 0))
    start = make_start(recipe, name, out)
    objective = make_objective(recipe, stage, start.encoder, sources.classes)
    settings = decisive_settings(
        recipe, name, start, num_training_images=len(sources.training), classes=sources.classes, precision=precision
    )
    return Job(
        objective=objective,
        training=sources.training,
        holdout=sources.holdout,
        transform=make_jitter(stage, start.encoder.config.image_size),
        view=EvaluationSize(stage.test.short_px, stage.test.long_px, stage.jitter.interpolation),
        settings=settings,
        start=str(start.path or "scratch"),
        pictures="predictions",
        about={"detection": describe(stage, sources.classes)},
        save=lambda folder, weights: save_around(folder / HEAD, weights),
        layer_decay=stage.layer_decay,
        ema_decay=stage.ema_decay,
        problems=sources.problems,
    )


def make_jitter(stage: schema.Detect, size: Pair) -> ShortSideJitter | LargeScaleJitter:
    """How training images change their size."""
    jitter = stage.jitter
    if jitter.kind == "large_scale":
        return LargeScaleJitter(size, jitter.scale, jitter.flip, jitter.interpolation)
    return ShortSideJitter(jitter.short_px, jitter.long_px, jitter.flip, jitter.interpolation)


def make_objective(recipe: schema.Recipe, stage: schema.Detect, encoder: SwinEncoder, classes: list[str]) -> Detect:
    """The encoder with a fresh head."""
    looks = stage.test.model_dump(include={"soft_nms", "zooms", "flips"})
    return Detect(encoder, classes, mean=recipe.data.mean, std=recipe.data.std, **head_of(stage), **looks)


def plan_objective(recipe: schema.Recipe, stage: schema.Detect, encoder: SwinEncoder, classes: int) -> Detect:
    """For as many classes."""
    return make_objective(recipe, stage, encoder, [""] * classes)


def head_of(stage: schema.Detect) -> dict[str, Any]:
    """What the head is."""
    names = {"masks", "cascade", "width", "hidden", "anchor_px", "regions_per_image"}
    return stage.model_dump(mode="json", include=names)


def describe(stage: schema.Detect, classes: list[str]) -> dict[str, Any]:
    """All that :func:`simmim.stages.evaluate_objects.load_detector` needs beside the weights."""
    test = stage.test.model_dump(mode="json") | {"interpolation": stage.jitter.interpolation}
    return {"classes": classes, **head_of(stage), "test": test}


def judge(trained: Trained, accelerator: Accelerator) -> None:
    """Average precision over all held-out images, on the screen and in ``summary.json``.

    Raises:
        ValueError: no held-out image could be read.
    """
    objective, log, holdout = trained.objective, trained.log, trained.holdout
    assert isinstance(objective, Detect) and holdout is not None
    measured = average_precision(objective, trained.views, holdout, accelerator, trained.preview)
    if not measured:
        raise ValueError(f"none of the held-out images could be read: checkpoints are in {log.folder}")
    shown = "  ".join(f"{name} {measured[name]:.3f}" for name in MEASURES if name in measured)
    log.say(f"held-out, {measured['images']} images: {shown or 'they show no object'}")
    if log.is_main:
        numbers = {f"holdout_{name}": value for name, value in measured.items()}
        write_whole(log.folder / "summary.json", json.dumps(numbers, indent=2) + "\n")
