"""Classification stages: supervised training, fine-tuning and transfer to another size."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from torch import Tensor

from simmim.config import FinetuneStage, Recipe
from simmim.data import (
    CenterCrop,
    LabelledSource,
    RandAugmentedCrop,
    RandomCrop,
    Source,
    Views,
    labelled_sources,
    limit_labels,
)
from simmim.data.loader import Batches
from simmim.data.sources import imagenet_v2_parts
from simmim.data.views import describe_video, transforms_of
from simmim.evaluation.classification import labelled_images
from simmim.export.classifier import load_classifier_head, map_classifier_head, save_classifier
from simmim.stages.datasets import BUILTIN, builtin_datasets, decoder_of
from simmim.stages.initialization import Start, weights_fingerprint
from simmim.stages.job import Datasets, TrainedStage, Transforms
from simmim.stages.run_folder import part_of
from simmim.stages.stage_type import SupervisedType, register
from simmim.tasks.classification import Classification
from simmim.training.engine import evaluate
from swin import SwinConfig, SwinEncoder
from swin.config import Pair


class FinetuneType(SupervisedType[FinetuneStage]):
    """Classification of images or clips."""

    settings = FinetuneStage
    data_description = "labelled images"
    data_keys = "data.path or the labels.path of the stage"
    has_builtin_data = True
    has_image_labels = True

    def open_datasets(self, recipe: Recipe, stage: FinetuneStage, path: str, size: Pair | None) -> Datasets:
        labels = stage.labels
        if path == BUILTIN:
            return builtin_datasets(recipe, stage, size, labels.val_images)
        decoder = decoder_of(recipe.data, recipe.encoder.in_chans, stage.video)
        training, validation = labelled_sources(path, decoder, labels.val_images, labels.val_path or None)
        return Datasets(training, validation, list(training.classes))

    def open_tests(
        self, recipe: Recipe, stage: FinetuneStage, config: SwinConfig, classes: list[str]
    ) -> dict[str, Source]:
        decoder = decoder_of(recipe.data, config.in_chans, stage.video)
        return {path: labelled_images(path, config, decoder, classes, len(classes)) for path in self.test_paths(stage)}

    def test_paths(self, stage: FinetuneStage) -> list[str]:
        return [path for test in stage.labels.tests for path in imagenet_v2_parts(test)]

    def select_training(self, source: Source, recipe: Recipe, stage: FinetuneStage) -> Source:
        if stage.labels.labels_per_class is None:
            return source
        return limit_labels(cast(LabelledSource, source), stage.labels.labels_per_class, recipe.seed)

    def make_transforms(self, recipe: Recipe, stage: FinetuneStage, size: Pair) -> Transforms:
        """Make the transforms of single images or clips; mixup, CutMix and erasing belong to the task."""
        video, interpolation, crop = stage.video, stage.crop.interpolation, stage.crop.model_dump()
        random_crop = RandomCrop(size, **crop)
        if stage.augment.rand_augment is not None:
            augment = stage.augment.rand_augment
            random_crop = RandAugmentedCrop(size, rand_augment=augment, mean=recipe.data.mean, **crop)
        training, evaluation = transforms_of(random_crop, CenterCrop(size, interpolation), video)
        if video is None:
            return Transforms(training, evaluation)
        views = Views(
            size,
            video.frames,
            video.stride,
            temporal=video.views,
            spatial=video.crops,
            interpolation=interpolation,
        )
        return Transforms(training, evaluation, views)

    def make_task(
        self, recipe: Recipe, stage: FinetuneStage, encoder: SwinEncoder, classes: list[str]
    ) -> Classification:
        return Classification(
            encoder,
            classes,
            mean=recipe.data.mean,
            std=recipe.data.std,
            label_smoothing=stage.label_smoothing,
            **stage.augment.model_dump(exclude={"rand_augment"}),
        )

    def initialize_head(self, stage: FinetuneStage, task: Classification, start: Start) -> None:
        head = head_of(stage)
        if head == "fresh":
            return
        if start.export is None:
            raise ValueError(f"head {head!r}: a stage that starts from scratch has no classifier to start from")
        old = start.export.classifier_head()
        if head == "keep":
            load_classifier_head(task.head, old, task.classes, str(start.export.path))
        else:
            map_classifier_head(task.head, old, Path(head))

    def fingerprint(self, stage: FinetuneStage, task: Classification) -> dict[str, Any]:
        return {"head": "fresh" if head_of(stage) == "fresh" else weights_fingerprint(task.head)}

    def evaluate(self, trained: TrainedStage, accelerator: Accelerator) -> dict[str, Any]:
        """Evaluate the accuracy on validation images and on further test data."""
        task, log, filler = trained.task, trained.log, trained.preview
        measured = evaluate(task, trained.validation, accelerator, filler)
        _log_corrupt(trained, trained.validation)
        if not measured:
            raise ValueError(f"none of the validation images could be read: checkpoints are in {log.folder}")
        image = filler["image"]
        views = f" by {image.shape[1]} views each" if image.ndim == 6 else ""
        log.info(f"validation top-1 {measured['top1']:.2%}, top-5 {measured['top5']:.2%}{views}")
        summary: dict[str, Any] = {f"validation_{key}": value for key, value in measured.items()}
        for path, batches in trained.tests.items():
            found = evaluate(task, batches, accelerator, filler)
            _log_corrupt(trained, batches)
            if found:
                log.info(f"top-1 {found['top1']:.2%}, top-5 {found['top5']:.2%}{views} on {path}")
            else:
                log.warning(f"none of the images of {path} could be read")
            for key, value in found.items():
                summary.setdefault(f"test_{key}", {})[path] = value
        return summary

    def describe(self, stage: FinetuneStage, task: Classification) -> dict[str, Any]:
        return {"classes": task.classes, **describe_video(stage.video)}

    def save_head(self, folder: Path, weights: dict[str, Tensor]) -> None:
        save_classifier(folder, part_of(weights, "head"))


FINETUNE = register(FinetuneType())


def head_of(stage: FinetuneStage) -> str:
    """Return how the head is initialized: ``fresh``, ``keep``, or the path of a file that maps classes."""
    return stage.head or ("keep" if stage.kind == "transfer" else "fresh")


def _log_corrupt(trained: TrainedStage, batches: Batches | list) -> None:
    if isinstance(batches, Batches):
        trained.log.log_corrupt_images(list(batches.corrupt.items()))
