"""Semantic segmentation, from a recipe to an exported segmenter."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator

from simmim import schema
from simmim.around import save_around
from simmim.counter_rng import derive_seed
from simmim.data.segment_transforms import CenterSegmentCrop, RandomSegmentCrop
from simmim.objectives.mean_iou import MeanIoU
from simmim.objectives.segment import Segment
from simmim.runlog import write_whole
from simmim.schema import Recipe
from simmim.stages.assembly import decisive_settings, make_start
from simmim.stages.evaluate_segments import HEAD, judge_whole
from simmim.stages.sources import make_sources
from simmim.stages.training import Job, Trained
from swin import SwinEncoder


def judge(trained: Trained, accelerator: Accelerator) -> None:
    """Mean intersection over union on whole held-out images, on the screen and in ``summary.json``.

    Raises:
        ValueError: no held-out image could be read, or none of their pixels has a label.
    """
    objective, log, holdout = trained.objective, trained.log, trained.holdout
    assert isinstance(objective, Segment) and holdout is not None
    found = judge_whole(objective, holdout, accelerator, is_sharded=accelerator.is_fsdp2)
    log.broken(list(found.broken.items()))
    numbers = found.numbers
    log.say(
        f"held-out mean IoU {numbers['mean_iou']:.2%}, mean accuracy {numbers['mean_accuracy']:.2%}, pixels "
        f"{numbers['pixel_accuracy']:.2%}, of {numbers['images']:,.0f} whole images"
    )
    if log.is_main:
        summary = {f"holdout_{key}": value for key, value in numbers.items()}
        content = {**summary, "holdout_iou": found.of_classes}
        write_whole(log.folder / "summary.json", json.dumps(content, indent=2) + "\n")


def make_job(recipe: Recipe, out: Path, name: str, precision: str) -> Job:
    """What the stage trains, on which images, and from where; weights and settings do not depend on the launch.

    Raises:
        ValueError: settings, data or a start that cannot work.
    """
    stage = recipe.stages[name]
    assert isinstance(stage, schema.Segment)
    torch.manual_seed(derive_seed("step", recipe.seed, 0))
    start = make_start(recipe, name, out)
    sources = make_sources(recipe, name)
    MeanIoU(len(sources.classes))  # which says now, and not after the training, what is not installed
    objective = make_objective(recipe, stage, start.encoder, sources.classes)
    settings = decisive_settings(
        recipe,
        name,
        start,
        num_training_images=len(sources.training),
        classes=sources.classes,
        precision=precision,
    )
    return Job(
        objective=objective,
        training=sources.training,
        holdout=sources.holdout,
        transform=RandomSegmentCrop(stage.image_size, mean=recipe.data.mean, **stage.augment.model_dump()),
        view=CenterSegmentCrop(stage.image_size),
        settings=settings,
        start=str(start.path or "scratch"),
        pictures="predictions",
        about={"segmentation": objective.description()},
        save=lambda folder, weights: save_around(folder / HEAD, weights),
        problems=sources.problems,
        layer_decay=stage.layer_decay,
        ema_decay=stage.ema_decay,
    )


def make_objective(recipe: Recipe, stage: schema.Segment, encoder: SwinEncoder, classes: list[str]) -> Segment:
    """Heads with fresh weights around the encoder."""
    test = stage.test
    return Segment(
        encoder,
        classes,
        mean=recipe.data.mean,
        std=recipe.data.std,
        **stage.head.model_dump(),
        window=stage.image_size if test.window else None,
        **test.model_dump(exclude={"window"}),
        first_label=int(stage.labels.ignore_zero),
    )


def plan_objective(recipe: Recipe, stage: schema.Segment, encoder: SwinEncoder, classes: int) -> Segment:
    """For as many classes."""
    return make_objective(recipe, stage, encoder, [""] * classes)
