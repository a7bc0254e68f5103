"""Classification: the supervised stage, fine-tuning and transfer, from a recipe to an exported classifier."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator

from simmim.config import FinetuneStage, Recipe, Video
from simmim.data import CenterCrop, Labelled, RandAugmentedCrop, RandomCrop, Views
from simmim.data.loader import Batches
from simmim.data.views import about_video, transforms_of
from simmim.evaluation.classification import labelled_images
from simmim.export.classifier import load_classifier, load_classifier_head, map_classifier_head, save_classifier
from simmim.rng import derive_seed
from simmim.stages.datasets import make_sources, tests_of
from simmim.stages.initialization import Start, fingerprint, make_start, resume_fingerprint
from simmim.stages.run_folder import part_of
from simmim.stages.runner import Job, Trained
from simmim.tasks.classification import Classification
from simmim.training.engine import evaluate
from simmim.training.run_log import write_atomically
from swin import SwinEncoder
from swin.config import Pair


def evaluate_trained(trained: Trained, accelerator: Accelerator) -> None:
    """Held-out accuracy, on the screen and in ``summary.json``.

    Raises:
        ValueError: no held-out image could be read.
    """
    log = trained.log
    measured = evaluate(trained.task, trained.views, accelerator, trained.preview)
    if isinstance(trained.views, Batches):
        log.log_corrupt_images(list(trained.views.corrupt.items()))
    numbers = {f"validation_{key}": value for key, value in measured.items()}
    if not numbers:
        raise ValueError(f"none of the held-out images could be read: checkpoints are in {log.folder}")
    image = trained.preview["image"]
    how = f" by {image.shape[1]} views each" if image.ndim == 6 else ""
    log.info(f"held-out top-1 {numbers['validation_top1']:.2%}, top-5 {numbers['validation_top5']:.2%}{how}")
    tests: dict[str, dict[str, float]] = {}
    for place, views in trained.tests.items():
        found = evaluate(trained.task, views, accelerator, trained.preview)
        if isinstance(views, Batches):
            log.log_corrupt_images(list(views.corrupt.items()))
        if found:
            log.info(f"top-1 {found['top1']:.2%}, top-5 {found['top5']:.2%}{how} of {place}")
        else:
            log.warning(f"none of the images of {place} could be read")
        for key, value in found.items():
            tests.setdefault(f"test_{key}", {})[place] = value
    if log.is_main:
        write_atomically(log.folder / "summary.json", json.dumps(numbers | tests, indent=2) + "\n")


def make_job(recipe: Recipe, out: Path, name: str, precision: str) -> Job:
    """What the stage trains, on which images, and from where; weights and settings do not depend on the launch.

    Raises:
        ValueError: settings, data or a start that cannot work.
    """
    stage = recipe.stages[name]
    assert isinstance(stage, FinetuneStage)
    torch.manual_seed(derive_seed("step", recipe.seed, 0))
    start = make_start(recipe, name, out)
    size = start.encoder.config.image_size
    sources = make_sources(recipe, name, size)
    task = make_task(recipe, stage, start, sources.classes)
    view = CenterCrop(size, stage.crop.interpolation)
    transform, view_in_training = transforms_of(make_transform(recipe, stage, size), view, stage.video)
    settings = resume_fingerprint(
        recipe,
        name,
        start,
        head="fresh" if wanted_head(stage) == "fresh" else fingerprint(task.head),
        num_training_images=len(sources.training),
        classes=sources.classes,
        precision=precision,
    )
    return Job(
        task=task,
        training=sources.training,
        validation=sources.validation,
        transform=transform,
        view=view_in_training,
        settings=settings,
        start=str(start.path or "scratch"),
        pictures="predictions",
        about={"classes": task.classes, **about_video(stage.video)},
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


def make_tests(recipe: Recipe, stage: FinetuneStage, encoder: SwinEncoder, classes: list[str]) -> dict[str, Labelled]:
    """More images to judge the classifier by, by their places.

    Raises:
        ValueError: classes that it does not know.
    """
    pixels = {"value_range": recipe.data.value_range}
    return {place: labelled_images(place, encoder, pixels, classes, len(classes)) for place in tests_of(stage)}


def make_transform(recipe: Recipe, stage: FinetuneStage, size: Pair) -> RandomCrop:
    """The augmentation of single images; mixup, CutMix and erasing belong to the objective."""
    crop = stage.crop.model_dump()
    if stage.augment.rand_augment is None:
        return RandomCrop(size, **crop)
    return RandAugmentedCrop(size, rand_augment=stage.augment.rand_augment, mean=recipe.data.mean, **crop)


def make_fake_task(recipe: Recipe, stage: FinetuneStage, encoder: SwinEncoder, classes: int) -> Classification:
    """For as many classes."""
    return Classification(encoder, [""] * classes, mean=recipe.data.mean, std=recipe.data.std)


def make_task(recipe: Recipe, stage: FinetuneStage, start: Start, classes: list[str]) -> Classification:
    """The classifier, its head fresh or taken over."""
    task = Classification(
        start.encoder,
        classes,
        mean=recipe.data.mean,
        std=recipe.data.std,
        label_smoothing=stage.label_smoothing,
        **stage.augment.model_dump(exclude={"rand_augment"}),
    )
    head = wanted_head(stage)
    if head == "fresh":
        return task
    if start.path is None:
        raise ValueError(f"head {head!r}: a stage that starts from scratch has no classifier to take over")
    old = load_classifier(start.path)
    if head == "keep":
        load_classifier_head(task.head, old, classes, str(start.path))
    else:
        map_classifier_head(task.head, old, Path(head))
    return task


def wanted_head(stage: FinetuneStage) -> str:
    """fresh, keep, or a file that maps classes."""
    return stage.head or ("keep" if stage.kind == "transfer" else "fresh")
