"""Classification: the supervised stage, fine-tuning and transfer, from a recipe to an exported classifier."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator

from simmim.classifier import load_classifier, save_classifier, take_over, take_over_rows
from simmim.counter_rng import derive_seed
from simmim.data import CenterCrop, Labelled, RandAugmentedCrop, RandomCrop, Views
from simmim.data.loader import Batches
from simmim.engine import evaluate
from simmim.objectives.classify import Classify
from simmim.runlog import write_whole
from simmim.schema import Finetune, Recipe, Video
from simmim.stages.assembly import Start, decisive_settings, fingerprint, make_start
from simmim.stages.evaluate import labelled_images
from simmim.stages.folder import part_of
from simmim.stages.images import about_video, transforms_of
from simmim.stages.sources import make_sources, tests_of
from simmim.stages.training import Job, Trained, carry_out
from swin import SwinEncoder
from swin.config import Pair


def finetune(
    recipe: Recipe, out: Path, *, name: str, precision: str | None = None, allow_changes: bool = False
) -> Path:
    """Run a stage with labels, from where it stands; see :func:`simmim.stages.training.carry_out`."""
    return carry_out(recipe, out, name, make_job, judge, precision=precision, allow_changes=allow_changes)


def judge(trained: Trained, accelerator: Accelerator) -> None:
    """Held-out accuracy, on the screen and in ``summary.json``.

    Raises:
        ValueError: no held-out image could be read.
    """
    log = trained.log
    measured = evaluate(trained.objective, trained.views, accelerator, trained.preview)
    if isinstance(trained.views, Batches):
        log.broken(list(trained.views.broken.items()))
    numbers = {f"holdout_{key}": value for key, value in measured.items()}
    if not numbers:
        raise ValueError(f"none of the held-out images could be read: checkpoints are in {log.folder}")
    image = trained.preview["image"]
    how = f" by {image.shape[1]} views each" if image.ndim == 6 else ""
    log.say(f"held-out top-1 {numbers['holdout_top1']:.2%}, top-5 {numbers['holdout_top5']:.2%}{how}")
    tests: dict[str, dict[str, float]] = {}
    for place, views in trained.tests.items():
        found = evaluate(trained.objective, views, accelerator, trained.preview)
        if isinstance(views, Batches):
            log.broken(list(views.broken.items()))
        if found:
            log.say(f"top-1 {found['top1']:.2%}, top-5 {found['top5']:.2%}{how} of {place}")
        else:
            log.say(f"warning: none of the images of {place} could be read")
        for key, value in found.items():
            tests.setdefault(f"test_{key}", {})[place] = value
    if log.is_main:
        write_whole(log.folder / "summary.json", json.dumps(numbers | tests, indent=2) + "\n")


def make_job(recipe: Recipe, out: Path, name: str, precision: str) -> Job:
    """What the stage trains, on which images, and from where; weights and settings do not depend on the launch.

    Raises:
        ValueError: settings, data or a start that cannot work.
    """
    stage = recipe.stages[name]
    assert isinstance(stage, Finetune)
    torch.manual_seed(derive_seed("step", recipe.seed, 0))
    start = make_start(recipe, name, out)
    size = start.encoder.config.image_size
    sources = make_sources(recipe, name, size)
    objective = make_objective(recipe, stage, start, sources.classes)
    view = CenterCrop(size, stage.crop.interpolation)
    transform, view_in_training = transforms_of(make_transform(recipe, stage, size), view, stage.video)
    settings = decisive_settings(
        recipe,
        name,
        start,
        head="fresh" if wanted_head(stage) == "fresh" else fingerprint(objective.head),
        num_training_images=len(sources.training),
        classes=sources.classes,
        precision=precision,
    )
    return Job(
        objective=objective,
        training=sources.training,
        holdout=sources.holdout,
        transform=transform,
        view=view_in_training,
        settings=settings,
        start=str(start.path or "scratch"),
        pictures="predictions",
        about={"classes": objective.classes, **about_video(stage.video)},
        save=lambda folder, weights: save_classifier(folder, part_of(weights, "head")),
        labelled=True,
        problems=sources.problems,
        layer_decay=stage.layer_decay,
        ema_decay=stage.ema_decay,
        final_view=None if stage.video is None else views_of(stage.video, view),
        tests=make_tests(recipe, stage, start.encoder, sources.classes),
    )


def views_of(video: Video, crop: CenterCrop) -> Views:
    """What a trained classifier of clips is judged by."""
    return Views(
        crop.size,
        video.frames,
        video.stride,
        temporal=video.views,
        spatial=video.crops,
        interpolation=crop.interpolation,
    )


def make_tests(recipe: Recipe, stage: Finetune, encoder: SwinEncoder, classes: list[str]) -> dict[str, Labelled]:
    """More images to judge the classifier by, by their places.

    Raises:
        ValueError: classes that it does not know.
    """
    pixels = {"value_range": recipe.data.value_range}
    return {place: labelled_images(place, encoder, pixels, classes, len(classes)) for place in tests_of(stage)}


def make_transform(recipe: Recipe, stage: Finetune, size: Pair) -> RandomCrop:
    """The augmentation of single images; mixup, CutMix and erasing belong to the objective."""
    crop = stage.crop.model_dump()
    if stage.augment.rand_augment is None:
        return RandomCrop(size, **crop)
    return RandAugmentedCrop(size, rand_augment=stage.augment.rand_augment, mean=recipe.data.mean, **crop)


def plan_objective(recipe: Recipe, stage: Finetune, encoder: SwinEncoder, classes: int) -> Classify:
    """For as many classes."""
    return Classify(encoder, [""] * classes, mean=recipe.data.mean, std=recipe.data.std)


def make_objective(recipe: Recipe, stage: Finetune, start: Start, classes: list[str]) -> Classify:
    """The classifier, its head fresh or taken over."""
    objective = Classify(
        start.encoder,
        classes,
        mean=recipe.data.mean,
        std=recipe.data.std,
        label_smoothing=stage.label_smoothing,
        **stage.augment.model_dump(exclude={"rand_augment"}),
    )
    head = wanted_head(stage)
    if head == "fresh":
        return objective
    if start.path is None:
        raise ValueError(f"head {head!r}: a stage that starts from scratch has no classifier to take over")
    old = load_classifier(start.path)
    if head == "keep":
        take_over(objective.head, old, classes, str(start.path))
    else:
        take_over_rows(objective.head, old, Path(head))
    return objective


def wanted_head(stage: Finetune) -> str:
    """fresh, keep, or a file that maps classes."""
    return stage.head or ("keep" if stage.kind == "transfer" else "fresh")
