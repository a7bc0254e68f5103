"""Evaluation and inference of segmenters on whole images."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from simmim.config import SegmenterOptions
from simmim.config.loading import read_options
from simmim.data import Source, TensorImage, evaluation_batches
from simmim.data.segment_transforms import ShortSideResize
from simmim.data.segments import class_names_in, validation_segments
from simmim.data.views import report_corrupt, summarize_problems
from simmim.export.export import SIZES, Export, open_export
from simmim.metrics.mean_iou import MeanIoU
from simmim.tasks.segmentation import Segmentation
from simmim.tasks.sliding_window import resize_maps
from simmim.training.distributed import make_accelerator
from simmim.training.engine import to_device
from simmim.visualization import drawing

logger = logging.getLogger(__name__)


class SegmentationResult(NamedTuple):
    """Metrics over whole images."""

    numbers: dict[str, float]
    """``images``, ``mean_iou``, ``mean_accuracy``, ``pixel_accuracy``."""
    iou_of_classes: dict[str, float | None]
    """Intersection over union by class; None for classes that are neither in the labels nor predicted."""
    corrupt: dict[str, str]
    """Images of this process that could not be read, with the reason."""


class SegmentedImage(NamedTuple):
    """The segmentation of one image."""

    overlay: Image.Image
    facts: dict[str, Any]
    """Size of the image, and the fraction of its pixels of each class that was found; plain JSON."""
    label_map: Image.Image
    """Class labels as a palette image, numbered as in the training label maps."""


def load_segmenter(source: Export | Path | str, **options: Any) -> Segmentation:
    """Load the segmenter of an export, on the CPU and in evaluation mode.

    Args:
        options: ``image_size`` and ``window_size`` of the encoder, which the size of whole images and windows follows;
            and inference options: ``short_px``, ``window`` (px; None: the whole image at once), ``stride``, ``scales``,
            ``flip``, see :class:`simmim.tasks.segmentation.Segmentation`.

    Raises:
        ValueError: the export has no segmenter, or options do not fit.
    """
    export = open_export(source)
    settings = export.head_settings("segmenter")
    sizes = {name: options.pop(name) for name in SIZES if name in options}
    encoder = export.encoder(**sizes)
    trained_size, size = export.config.image_size, encoder.config.image_size
    if size != trained_size:
        short_px = round(settings["short_px"] * min(size) / min(trained_size))
        settings |= {"short_px": short_px, "window": settings["window"] and size, "stride": None}
    if "window" in options:  # the stride belongs to the old window
        settings["stride"] = None
    try:
        inference = {name: settings[name] for name in SegmenterOptions.model_fields}
        settings |= read_options(SegmenterOptions, inference | options)
        task = Segmentation(encoder, **settings, mean=export.mean, std=export.std)
    except (KeyError, TypeError) as error:
        raise ValueError(f"encoder.json of {export.path} does not describe a segmenter ({error!r})") from None
    export.load_head(task)
    return task.eval()


def evaluate_segmenter(
    source: Export | Path | str,
    data: str,
    *,
    annotations: str | None = None,
    num_workers: int = 2,
    precision: str | None = None,
    **options: Any,
) -> dict[str, float]:
    """Compute the mean intersection over union of a segmenter; each image counts once, over any number of processes.

    Args:
        source: the export of a segmentation stage.
        data: a folder with ``images`` and ``annotations``, of which the validation part is used if there is one;
            or images, with ``annotations``.
        options: of :func:`load_segmenter`.

    Raises:
        ValueError: no segmenter, images without label maps, or other classes.
    """
    export = open_export(source)
    accelerator = make_accelerator(precision)
    task = load_segmenter(export, **options).to(accelerator.device)
    names = class_names_in(data)
    if names is not None and names != task.classes:
        raise ValueError(
            f"{data} names {len(names)} classes ({names[0]}, ...), which are not the {len(task.classes)} of the "
            f"segmenter ({task.classes[0]}, ...): evaluate on data with the classes of the segmenter"
        )
    images = validation_segments(
        data,
        export.make_decoder(task.encoder.config),
        annotations=annotations,
        classes=task.classes,
        ignore_zero=bool(task.first_label),
    )
    with accelerator.autocast():
        result = evaluate_whole_images(task, images, accelerator, num_workers=num_workers)
    if accelerator.is_main_process:
        for problem in summarize_problems(images.problems):
            logger.warning(problem)
    report_corrupt(result.corrupt)
    return result.numbers


@torch.no_grad()
def evaluate_whole_images(
    task: Segmentation, source: Source, accelerator: Accelerator, *, num_workers: int = 0, is_sharded: bool = False
) -> SegmentationResult:
    """Evaluate whole images one by one, with the inference options of the task.

    Args:
        is_sharded: parameters are sharded over the processes. Then every process evaluates all images, because each
            forward pass needs all processes and the number of windows depends on the image.

    Raises:
        ValueError: no image could be read, or none of their pixels has a label.
    """
    rank, world_size = (0, 1) if is_sharded else (accelerator.process_index, accelerator.num_processes)
    batches = evaluation_batches(
        source,
        ShortSideResize(task.short_px),
        batch_size=1,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
    )
    scores, images = MeanIoU(len(task.classes)), 0
    for batch in tqdm(batches, unit="image", disable=None if accelerator.is_main_process else True):
        inputs = to_device(batch, accelerator.device)
        scores.add(task.scores(inputs).argmax(dim=1), inputs["segments"])
        images += 1
    if not is_sharded:
        scores.gather(gather_object)
        images = sum(gather_object([images]))
    if not images:
        report_corrupt(batches.corrupt)
        raise ValueError(
            f"none of {len(source)} images could be read with its label map, for instance {source.name(0)}"
        )
    numbers = scores.compute()
    if math.isnan(numbers["mean_iou"]):
        raise ValueError(f"no pixel of {images} images has a label: evaluate on images with labels")
    iou_of_classes = dict(zip(task.classes, scores.iou_per_class(), strict=True))
    return SegmentationResult({"images": float(images), **numbers}, iou_of_classes, batches.corrupt)


@torch.no_grad()
def segment_image(task: Segmentation, image: Tensor) -> SegmentedImage:
    """Segment an image of any size.

    Args:
        image: uint8 ``(c, H, W)``.
    """
    resized_image = ShortSideResize(task.short_px).resize(TensorImage(image))
    scores = task.predict(resized_image[None].to(task.mean.device))
    found = resize_maps(scores, image.shape[-2:]).argmax(dim=1).cpu()
    counts = torch.bincount(found.flatten(), minlength=len(task.classes)).tolist()
    fractions = {task.classes[label]: count / found.numel() for label, count in enumerate(counts) if count}
    return SegmentedImage(
        drawing.draw_segmentation(drawing.to_rgb(image[None] / 255), None, found, task.classes),
        {"size": list(image.shape[-2:]), "classes": fractions},
        drawing.label_map_image(found[0], len(task.classes), first=task.first_label),
    )
