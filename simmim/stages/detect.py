"""Detection and instance segmentation stages."""

from __future__ import annotations

from typing import Any, cast

from accelerate import Accelerator

from simmim.config import DetectStage, Recipe
from simmim.data import LabelledSource, Source
from simmim.data.box_transforms import EvaluationSize, LargeScaleJitter, ShortSideJitter
from simmim.data.boxes import coco_sources, has_split, open_coco
from simmim.evaluation.detection import average_precision
from simmim.metrics.average_precision import AveragePrecision
from simmim.stages.datasets import decoder_of
from simmim.stages.job import Datasets, TrainedStage, Transforms
from simmim.stages.stage_type import SupervisedType, register
from simmim.tasks.detection import Detection
from swin import SwinEncoder
from swin.config import Pair

LOGGED_METRICS = ("box_ap", "box_ap50", "mask_ap", "mask_ap50")


class DetectType(SupervisedType[DetectStage]):
    """Detection and instance segmentation with Mask R-CNN or Cascade Mask R-CNN."""

    settings = DetectStage
    data_description = "images with objects"
    data_keys = "data.path or the labels.path of the stage"

    def check_requirements(self, stage: DetectStage) -> None:
        AveragePrecision(masks=stage.masks)

    def open_datasets(self, recipe: Recipe, stage: DetectStage, path: str, size: Pair | None) -> Datasets:
        decoder = decoder_of(recipe.data, recipe.encoder.in_chans, None)
        training, validation, problems = coco_sources(path, decoder, stage.labels.val_images, masks=stage.masks)
        return Datasets(training, validation, list(cast(LabelledSource, training).classes), problems)

    def open_validation(self, recipe: Recipe, stage: DetectStage, path: str) -> Source | None:
        if has_split(path, "val"):  # do not read the training annotations, which are large
            return open_coco(path, "val", training=False, masks=False)
        return super().open_validation(recipe, stage, path)

    def make_transforms(self, recipe: Recipe, stage: DetectStage, size: Pair) -> Transforms:
        jitter = stage.jitter
        view = EvaluationSize(stage.test.short_px, stage.test.long_px, jitter.interpolation)
        if jitter.kind == "large_scale":
            return Transforms(LargeScaleJitter(size, jitter.scale, jitter.flip, jitter.interpolation), view)
        return Transforms(ShortSideJitter(jitter.short_px, jitter.long_px, jitter.flip, jitter.interpolation), view)

    def make_task(self, recipe: Recipe, stage: DetectStage, encoder: SwinEncoder, classes: list[str]) -> Detection:
        inference = stage.test.model_dump(include={"soft_nms", "scales", "flip"})
        return Detection(encoder, classes, mean=recipe.data.mean, std=recipe.data.std, **head_of(stage), **inference)

    def evaluate(self, trained: TrainedStage, accelerator: Accelerator) -> dict[str, Any]:
        """Evaluate the average precision on all validation images."""
        task, log, validation = trained.task, trained.log, trained.datasets.validation
        assert isinstance(task, Detection) and validation is not None
        numbers = average_precision(task, trained.validation, validation, accelerator, trained.preview)
        if not numbers:
            raise ValueError(f"none of the validation images could be read: checkpoints are in {log.folder}")
        text = "  ".join(f"{name} {numbers[name]:.3f}" for name in LOGGED_METRICS if name in numbers)
        log.info(f"validation, {numbers['images']} images: {text or 'they show no object'}")
        return {f"validation_{name}": value for name, value in numbers.items()}

    def describe(self, stage: DetectStage, task: Detection) -> dict[str, Any]:
        return {"detection": describe(stage, task.classes)}


DETECT = register(DetectType())


def head_of(stage: DetectStage) -> dict[str, Any]:
    """Return the settings of the head."""
    names = {"masks", "cascade", "width", "hidden", "anchor_px", "regions_per_image"}
    return stage.model_dump(mode="json", include=names)


def describe(stage: DetectStage, classes: list[str]) -> dict[str, Any]:
    """Return all that :func:`simmim.evaluation.detection.load_detector` needs besides weights."""
    test = stage.test.model_dump(mode="json") | {"interpolation": stage.jitter.interpolation}
    return {"classes": classes, **head_of(stage), "test": test}
