"""Judging and showing segmenters: whole images, each once."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
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
from simmim.data import Source, TensorImage
from simmim.data.loader import Batches
from simmim.data.segment_transforms import ShortSideResize
from simmim.data.segments import class_names_in, validation_segments
from simmim.data.views import make_views, report_corrupt, told
from simmim.evaluation.classification import SIZES, decoder_of, pixels_of
from simmim.export.heads import load_head
from simmim.metrics.mean_iou import MeanIoU
from simmim.tasks.segmentation import Segmentation
from simmim.tasks.sliding_window import resize_maps
from simmim.training.distributed import make_accelerator
from simmim.training.engine import to_device
from simmim.visualization import drawing
from swin import load_description, load_encoder
from swin.weights.serialization import load_config

HEAD = "head.safetensors"


class Judged(NamedTuple):
    """Of whole images."""

    numbers: dict[str, float]
    """``images``, ``mean_iou``, ``mean_accuracy``, ``pixel_accuracy``."""
    of_classes: dict[str, float | None]
    """Intersection over union; None of classes that are neither in the labels nor in any prediction."""
    corrupt: dict[str, str]
    """Images of this process that could not be read, with the reason."""


class Shown(NamedTuple):
    """One image, segmented."""

    name: str
    overlay: Image.Image
    facts: dict[str, Any]
    """Its size, and the share of every class that was found; plain JSON."""
    label_map: Image.Image
    """Numbers of classes in a palette, counted as in the label maps of the training."""


def load_segmenter(export: Path | str, **options: Any) -> Segmentation:
    """The segmenter of an export, on the CPU, ready to predict.

    Args:
        options: other ``image_size`` and ``window_size`` of the encoder, which whole images and windows follow; and for
            predictions, other ``short_px``, ``window`` (px, or None for the whole image at once), ``stride``,
            ``scales``, ``flip``, as of :class:`simmim.tasks.segmentation.Segment`.

    Raises:
        ValueError: an export that is not of segmentation, or options that do not fit.
    """
    export = Path(export)
    about = load_description(export)
    described = about.get("segmentation")
    if described is None or not (export / HEAD).exists():
        raise ValueError(f"{export} holds no segmenter: give the export of a stage of segmentation")
    sizes = {name: options.pop(name) for name in SIZES if name in options}
    encoder, trained_size = load_encoder(export, **sizes), load_config(export).image_size
    size = encoder.config.image_size
    if size != trained_size:
        short_px = round(described["short_px"] * min(size) / min(trained_size))
        described = {**described, "short_px": short_px, "window": described["window"] and size, "stride": None}
    if "window" in options:  # the stride belongs to it
        described = {**described, "stride": None}
    try:
        looks = {name: described[name] for name in SegmenterOptions.model_fields}
        settings, pixels = {**described, **read_options(SegmenterOptions, looks | options)}, about["pixels"]
        task = Segmentation(encoder, **settings, mean=pixels["mean"], std=pixels["std"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"encoder.json of {export} does not describe a segmenter ({error!r})") from None
    load_head(export / HEAD, task)
    return task.eval()


def evaluate_segmenter(
    path: Path,
    data: str,
    *,
    annotations: str | None = None,
    num_workers: int = 2,
    precision: str | None = None,
    **options: Any,
) -> dict[str, float]:
    """Mean intersection over union of a segmenter; every image counts once, over any number of processes.

    Args:
        path: an export of a stage of segmentation.
        data: a folder with ``images`` and ``annotations``, of which the validation part is taken where there is one;
            or images, with ``annotations``.
        options: as of :func:`load_segmenter`.

    Raises:
        ValueError: no segmenter, images without label maps, or with other classes.
    """
    accelerator = make_accelerator(precision)
    task = load_segmenter(path, **options).to(accelerator.device)
    decoder = decoder_of(task.encoder, pixels_of(path))
    names = class_names_in(data)
    if names is not None and names != task.classes:
        raise ValueError(
            f"{data} names {len(names)} classes ({names[0]}, ...), which are not the {len(task.classes)} of the "
            f"segmenter ({task.classes[0]}, ...): judge it by images with its own classes"
        )
    source = validation_segments(
        data,
        decoder,
        annotations=annotations,
        classes=task.classes,
        ignore_zero=bool(task.first_label),
    )
    with accelerator.autocast():
        found = evaluate_whole_images(task, source, accelerator, num_workers=num_workers)
    problems = told(source.problems) if accelerator.is_main_process else []
    for line in problems:
        print(line, file=sys.stderr)
    report_corrupt(found.corrupt)
    return found.numbers


@torch.no_grad()
def evaluate_whole_images(
    task: Segmentation, source: Source, accelerator: Accelerator, *, num_workers: int = 0, is_sharded: bool = False
) -> Judged:
    """Look at whole images one by one, as the objective looks at them.

    Args:
        is_sharded: the weights are shared out among the processes. Then all look at all images, as each forward pass
            is one of all of them, and the number of windows depends on the image.

    Raises:
        ValueError: no image could be read, or none of their pixels has a label.
    """
    shares = (0, 1) if is_sharded else (accelerator.process_index, accelerator.num_processes)
    views = make_views(source, ShortSideResize(task.short_px), 1, False, shares, num_workers)
    assert isinstance(views, Batches)
    scores, images = MeanIoU(len(task.classes)), 0
    for batch in tqdm(views, unit="image", disable=None if accelerator.is_main_process else True):
        inputs = to_device(batch, accelerator.device)
        scores.add(task.scores(inputs).argmax(dim=1), inputs["segments"])
        images += 1
    if not is_sharded:
        scores.gather(gather_object)
        images = sum(gather_object([images]))
    if not images:
        report_corrupt(views.corrupt)
        raise ValueError(f"none of {len(source)} images, {source.name(0)} for one, could be read with its label map")
    numbers = scores.compute()
    if math.isnan(numbers["mean_iou"]):
        raise ValueError(f"no pixel of {images} images has a label: there is nothing to be judged by")
    of_classes = dict(zip(task.classes, scores.iou_per_class(), strict=True))
    return Judged({"images": float(images), **numbers}, of_classes, views.corrupt)


@torch.no_grad()
def predict_segments(task: Segmentation, images: Iterable[tuple[str, Tensor]]) -> Iterator[Shown]:
    """Segment images of any size.

    Args:
        images: names, and uint8 ``(c, H, W)``.
    """
    for name, image in images:
        seen = ShortSideResize(task.short_px).resize(TensorImage(image))
        scores = task.predict(seen[None].to(task.mean.device))
        found = resize_maps(scores, image.shape[-2:]).argmax(dim=1).cpu()
        counts = torch.bincount(found.flatten(), minlength=len(task.classes)).tolist()
        shares = {task.classes[label]: count / found.numel() for label, count in enumerate(counts) if count}
        yield Shown(
            name,
            drawing.draw_segmentation(drawing.to_rgb(image[None] / 255), None, found, task.classes),
            {"size": list(image.shape[-2:]), "classes": shares},
            drawing.label_map_image(found[0], len(task.classes), first=task.first_label),
        )
