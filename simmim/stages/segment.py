"""Semantic segmentation stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from simmim.config import Recipe, SegmentStage
from simmim.data import Source
from simmim.data.segment_transforms import CenterSegmentCrop, RandomSegmentCrop
from simmim.data.segments import read_class_names, segmented_sources
from simmim.data.sources import Subset
from simmim.evaluation.segmentation import evaluate_whole_images
from simmim.metrics.mean_iou import MeanIoU
from simmim.rng import permutation
from simmim.stages.datasets import data_path, decoder_of
from simmim.stages.job import Datasets, TrainedStage, Transforms
from simmim.stages.stage_type import SupervisedType, register
from simmim.tasks.segmentation import Segmentation
from swin import SwinEncoder
from swin.config import Pair


class SegmentType(SupervisedType[SegmentStage]):
    """Semantic segmentation with UPerNet."""

    settings = SegmentStage
    data_description = "images with label maps"
    data_keys = "the labels.path of the stage, or data.path"

    def check_requirements(self, stage: SegmentStage) -> None:
        MeanIoU(2)

    def open_datasets(self, recipe: Recipe, stage: SegmentStage, path: str, size: Pair | None) -> Datasets:
        labels = stage.labels
        classes = read_class_names(Path(labels.classes)) if isinstance(labels.classes, str) else labels.classes
        return self._open(recipe, stage, path, classes)

    def open_validation(self, recipe: Recipe, stage: SegmentStage, path: str) -> Source | None:
        # Any number of classes will do, and saves counting them, which may read all label maps.
        return self._open(recipe, stage, path, 2).validation

    def _open(self, recipe: Recipe, stage: SegmentStage, path: str, classes: list[str] | int | None) -> Datasets:
        labels = stage.labels
        sources = segmented_sources(
            path,
            decoder_of(recipe.data, recipe.encoder.in_chans, None),
            labels.val_images,
            annotations=labels.annotations or None,
            val_path=labels.val_path or None,
            val_annotations=labels.val_annotations or None,
            classes=classes,
            ignore_zero=labels.ignore_zero,
        )
        return Datasets(*sources)

    def label_map_folders(self, stage: SegmentStage, path: str) -> list[str]:
        folders = (stage.labels.annotations or f"{path}/annotations", stage.labels.val_annotations)
        return [folder for folder in folders if folder]

    def select_training(self, source: Source, recipe: Recipe, stage: SegmentStage) -> Source:
        wanted, count = stage.labels.images, len(source)
        if wanted is None:
            return source
        if wanted > count:
            raise ValueError(
                f"{data_path(recipe, stage)} has {count} training images, but labels.images is {wanted}: lower it"
            )
        return Subset(source, permutation(recipe.seed, 0, count)[:wanted])

    def make_transforms(self, recipe: Recipe, stage: SegmentStage, size: Pair) -> Transforms:
        crop = RandomSegmentCrop(stage.image_size, mean=recipe.data.mean, **stage.augment.model_dump())
        return Transforms(crop, CenterSegmentCrop(stage.image_size))

    def make_task(self, recipe: Recipe, stage: SegmentStage, encoder: SwinEncoder, classes: list[str]) -> Segmentation:
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

    def evaluate(self, trained: TrainedStage, accelerator: Accelerator) -> dict[str, Any]:
        """Evaluate the mean intersection over union on whole validation images."""
        task, log, validation = trained.task, trained.log, trained.datasets.validation
        assert isinstance(task, Segmentation) and validation is not None
        result = evaluate_whole_images(task, validation, accelerator, is_sharded=accelerator.is_fsdp2)
        log.log_corrupt_images(list(result.corrupt.items()))
        numbers = result.numbers
        log.info(
            f"validation mean IoU {numbers['mean_iou']:.2%}, mean accuracy {numbers['mean_accuracy']:.2%}, pixel "
            f"accuracy {numbers['pixel_accuracy']:.2%}, on {numbers['images']:,.0f} whole images"
        )
        return {
            **{f"validation_{key}": value for key, value in numbers.items()},
            "validation_iou": result.iou_of_classes,
        }

    def describe(self, stage: SegmentStage, task: Segmentation) -> dict[str, Any]:
        return {"segmentation": task.description()}


SEGMENT = register(SegmentType())
