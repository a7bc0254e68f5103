"""Judging a detector: average precision over all held-out images, and what it finds in any picture."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
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
from simmim.data import Pixels, Source, Subset, evaluation_batches
from simmim.data.box_transforms import EvaluationSize, collate_scenes
from simmim.data.boxes import CocoImages, Scene, has_split, open_coco
from simmim.data.views import report_corrupt, told
from simmim.evaluation.classification import SIZES, decoder_of, pixels_of
from simmim.export.heads import HEAD, load_head
from simmim.metrics.average_precision import AveragePrecision, coco_results
from simmim.tasks.detection import Detection
from simmim.training.distributed import make_accelerator
from simmim.training.engine import Batch, synchronized_batches, to_device
from simmim.visualization import drawing
from swin import load_description, load_encoder

SMALLEST_PICTURE = 256


def evaluate_detector(
    path: Path, data: str, *, batch_size: int = 1, num_workers: int = 2, precision: str | None = None, **options: Any
) -> dict[str, float]:
    """Average precision of boxes and masks; every image counts once, over any number of processes.

    Args:
        path: the export of a stage of kind ``detect``.
        data: in the layout of COCO; its ``val``, or where there is none all of ``train``.
        options: of :func:`load_detector`.

    Returns:
        ``images``, and what :meth:`AveragePrecision.compute` gives.

    Raises:
        ValueError: no detector, data that do not belong to it, or none that could be read.
    """
    accelerator = make_accelerator(precision)
    task, view = load_detector(path, **options)
    decoder = decoder_of(task.encoder, pixels_of(path))
    split = "val" if has_split(data, "val") else "train"
    source = open_coco(data, split, decoder, training=False, keep_empty=True, masks=task.masks, categories=task.classes)
    for text in told(source.problems):
        accelerator.print(text, file=sys.stderr)
    if not len(source.annotations.boxes):
        raise ValueError(
            f"{data} has no object of the {len(task.classes)} classes of the detector "
            f"({', '.join(task.classes[:3])}{', ...' if len(task.classes) > 3 else ''}): judge it by such"
        )
    shares = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    views = evaluation_batches(source, view, batch_size=batch_size, num_workers=num_workers, **shares)
    task.to(accelerator.device)
    quiet = None if accelerator.is_main_process else True
    with accelerator.autocast():
        numbers = average_precision(task, tqdm(views, unit="batch", disable=quiet), source, accelerator)
    report_corrupt(views.corrupt)
    if not numbers:
        raise ValueError(f"none of {len(source)} images, {source.name(0)} for one, could be read")
    return numbers


@torch.no_grad()
def average_precision(
    task: Detection, batches: Iterable[Batch], source: Source, accelerator: Accelerator, filler: Batch | None = None
) -> dict[str, float]:
    """Of all images of ``batches`` in every process, beside their number as ``images``; empty where there are none.

    Args:
        batches: this process's share of ``source``, no image twice.
        source: knows the truth: :class:`CocoImages`, or a subset of it.
        filler: as of :func:`simmim.training.engine.synchronized_batches`.
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


def load_detector(path: Path, **options: Any) -> tuple[Detection, EvaluationSize]:
    """The detector of an export, ready to predict, and how it looks at images.

    Args:
        options: instead of what the stage was judged with: ``short_px``, ``long_px``, ``scales``, ``flip``,
            ``soft_nms``; and ``image_size`` and ``window_size``, as for :func:`swin.load_encoder`.

    Raises:
        ValueError: an export of something else, damaged or missing files, options that cannot be.
    """
    description = load_description(path)
    about = description.get("detection")
    if about is None:
        raise ValueError(f"{path} holds no detector: give the export of a stage of kind detect")
    sizes = {name: options.pop(name) for name in SIZES if name in options}
    try:
        test, head = dict(about["test"]), {key: value for key, value in about.items() if key not in ("classes", "test")}
        interpolation = test.pop("interpolation")
        test |= read_options(DetectTest, test | options)
        looks = {key: test[key] for key in ("soft_nms", "scales", "flip")}
        view = EvaluationSize(test["short_px"], test["long_px"], interpolation)
        pixels, encoder = description["pixels"], load_encoder(path, **sizes)
        task = Detection(encoder, about["classes"], mean=pixels["mean"], std=pixels["std"], **head, **looks)
    except (KeyError, TypeError) as error:
        raise ValueError(f"encoder.json of {path} does not describe a detector ({error!r})") from None
    load_head(path / HEAD, task)
    return task.eval(), view


@torch.no_grad()
def predict_objects(
    task: Detection, images: Iterable[tuple[str, Tensor]], *, view: EvaluationSize, least_score: float = 0.5
) -> Iterator[tuple[str, Image.Image, list[dict[str, Any]]]]:
    """Name, picture with all that is found in it drawn on, and the same as JSON: ``class``, ``score``, ``bbox``
    (left, top, width, height, px) and with masks ``segmentation`` (run lengths of COCO), best first.

    Args:
        images: names, and uint8 ``(c, H, W)``.
        view: as of :func:`load_detector`.
        least_score: from which on objects are shown and told.
    """
    for name, image in images:
        scene = Scene(Pixels(image), 0, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), None)
        batch = to_device(collate_scenes([view(scene, [])]), task.mean.device)
        (found,) = task.predict(batch)
        found = {key: value[found["scores"] >= least_score].cpu() for key, value in found.items()}
        facts = [
            {"class": task.classes[result["category_id"]], **_without_ids(result)}
            for result in coco_results([found], [0], range(len(task.classes)))
        ]
        names = [f"{fact['class']} {fact['score']:.2f}" for fact in facts]
        zoom = max(1, -(-SMALLEST_PICTURE // min(image.shape[-2:])))  # names need room
        shown = F.interpolate(drawing.to_rgb(image[None] / 255), scale_factor=zoom)[0]
        overlay = drawing.with_objects(shown, zoom * found["boxes"], found["labels"], names, found.get("masks"))
        yield name, to_pil_image(overlay), facts


def _without_ids(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if not key.endswith("_id")}
