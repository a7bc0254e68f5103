"""Evaluation and inference of detectors."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from simmim.config import DetectTest
from simmim.config.loading import read_options
from simmim.data import Source, Subset, TensorImage, evaluation_batches
from simmim.data.box_transforms import EvaluationSize, collate_scenes
from simmim.data.boxes import CocoImages, Scene, has_split, open_coco
from simmim.data.views import report_corrupt, summarize_problems
from simmim.export.export import SIZES, Export, open_export
from simmim.metrics.average_precision import AveragePrecision, coco_results
from simmim.tasks.detection import Detection
from simmim.training.distributed import make_accelerator
from simmim.training.engine import Batch, synchronized_batches, to_device
from simmim.visualization import drawing

SMALLEST_SIDE_PX = 256
"""Smaller images are enlarged before class names are drawn on them."""
logger = logging.getLogger(__name__)


def evaluate_detector(
    source: Export | Path | str,
    data: str,
    *,
    batch_size: int = 1,
    num_workers: int = 2,
    precision: str | None = None,
    **options: Any,
) -> dict[str, float]:
    """Compute the average precision of boxes and masks; each image counts once, over any number of processes.

    Args:
        source: the export of a detection stage.
        data: a folder in COCO layout; its ``val`` split, or without one all of ``train``.
        options: of :func:`load_detector`.

    Returns:
        ``images``, and the metrics of :meth:`AveragePrecision.compute`.

    Raises:
        ValueError: no detector, data with other classes, or no readable image.
    """
    export = open_export(source)
    accelerator = make_accelerator(precision)
    task, view = load_detector(export, **options)
    split = "val" if has_split(data, "val") else "train"
    images = open_coco(
        data,
        split,
        export.make_decoder(task.encoder.config),
        training=False,
        keep_empty=True,
        masks=task.masks,
        categories=task.classes,
    )
    if accelerator.is_main_process:
        for problem in summarize_problems(images.problems):
            logger.warning(problem)
    if not len(images.annotations.boxes):
        raise ValueError(
            f"{data} has no object of the {len(task.classes)} classes of the detector "
            f"({', '.join(task.classes[:3])}{', ...' if len(task.classes) > 3 else ''}): "
            "evaluate on data with these classes"
        )
    batches = evaluation_batches(
        images,
        view,
        batch_size=batch_size,
        num_workers=num_workers,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    task.to(accelerator.device)
    progress = tqdm(batches, unit="batch", disable=None if accelerator.is_main_process else True)
    with accelerator.autocast():
        numbers = average_precision(task, progress, images, accelerator)
    report_corrupt(batches.corrupt)
    if not numbers:
        raise ValueError(f"none of {len(images)} images could be read, for instance {images.name(0)}")
    return numbers


@torch.no_grad()
def average_precision(
    task: Detection, batches: Iterable[Batch], source: Source, accelerator: Accelerator, filler: Batch | None = None
) -> dict[str, float]:
    """Compute the average precision over the batches of all processes.

    Args:
        batches: this process's part of ``source``, no image twice.
        source: the ground truth: :class:`CocoImages`, or a subset of it.
        filler: of :func:`simmim.training.engine.synchronized_batches`.

    Returns:
        ``images``, and the metrics of :meth:`AveragePrecision.compute`; empty without images.
    """
    scenes = source.source if isinstance(source, Subset) else source
    assert isinstance(scenes, CocoImages)
    metric, images = AveragePrecision(masks=task.masks), 0
    for batch, count in synchronized_batches(batches, accelerator, filler):
        found = task.predict(to_device(batch, accelerator.device))
        if count:
            metric.add(found, [scenes.truth(image_id) for image_id in batch["image_id"].tolist()])
            images += count
    metric.gather(gather_object)
    images = sum(gather_object([images]))
    return {"images": images, **metric.compute()} if images else {}


def load_detector(source: Export | Path | str, **options: Any) -> tuple[Detection, EvaluationSize]:
    """Load the detector of an export, on the CPU and in evaluation mode, and the transform of its images.

    Args:
        options: ``image_size`` and ``window_size``, as for :func:`swin.load_encoder`; and inference options in place of
            those of the stage: ``short_px``, ``long_px``, ``scales``, ``flip``, ``soft_nms``.

    Raises:
        ValueError: the export has no detector, files are missing or damaged, or options do not fit.
    """
    export = open_export(source)
    settings = export.head_settings("detector")
    sizes = {name: options.pop(name) for name in SIZES if name in options}
    try:
        classes, test = settings.pop("classes"), dict(settings.pop("test"))
        interpolation = test.pop("interpolation")
        test |= read_options(DetectTest, test | options)
        view = EvaluationSize(test["short_px"], test["long_px"], interpolation)
        task = Detection(
            export.encoder(**sizes),
            classes,
            mean=export.mean,
            std=export.std,
            **settings,
            **{key: test[key] for key in ("soft_nms", "scales", "flip")},
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"encoder.json of {export.path} does not describe a detector ({error!r})") from None
    export.load_head(task)
    return task.eval(), view


@torch.no_grad()
def detect_objects(
    task: Detection, image: Tensor, *, view: EvaluationSize, least_score: float = 0.5
) -> tuple[Image.Image, list[dict[str, Any]]]:
    """Detect the objects of an image.

    Args:
        image: uint8 ``(c, H, W)``.
        view: transform of the image, see :func:`load_detector`.
        least_score: objects with a lower score are left out.

    Returns:
        The image with the objects drawn on it, and the objects as plain JSON, best first: ``class``, ``score``,
        ``bbox`` (left, top, width, height, px) and, if the detector predicts masks, ``segmentation`` (run lengths of
        COCO).
    """
    scene = Scene(TensorImage(image), 0, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), None)
    batch = to_device(collate_scenes([view(scene, [])]), task.mean.device)
    (found,) = task.predict(batch)
    found = {key: value[found["scores"] >= least_score].cpu() for key, value in found.items()}
    facts = [
        {"class": task.classes[result["category_id"]], **_without_ids(result)}
        for result in coco_results([found], [0], range(len(task.classes)))
    ]
    names = [f"{fact['class']} {fact['score']:.2f}" for fact in facts]
    scale = max(1, -(-SMALLEST_SIDE_PX // min(image.shape[-2:])))
    enlarged = F.interpolate(drawing.to_rgb(image[None] / 255), scale_factor=scale)[0]
    overlay = drawing.draw_objects(enlarged, scale * found["boxes"], found["labels"], names, found.get("masks"))
    return to_pil_image(overlay), facts


def _without_ids(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if not key.endswith("_id")}
