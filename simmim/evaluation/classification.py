"""Accuracy of classifiers of images or videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from simmim.data import (
    CenterCrop,
    Decoder,
    LabelledImages,
    LabelledSource,
    MovingShapes,
    Shapes,
    Views,
    evaluation_batches,
)
from simmim.data.sources import validation_files
from simmim.data.transforms import Transform
from simmim.data.views import report_corrupt
from simmim.export.export import Export, open_export
from simmim.tasks.classification import Classification
from simmim.training.distributed import make_accelerator
from simmim.training.engine import evaluate
from swin import SwinConfig, VideoConfig

DEFAULT_VIDEO = {"stride": 1, "views": 4, "crops": 5}
"""Inference settings of videos where an export records none: 4 x 5 views of consecutive frames."""


def evaluate_classifier(
    source: Export | Path | str,
    data: str,
    *,
    batch_size: int = 64,
    num_workers: int = 2,
    precision: str | None = None,
    views: int | None = None,
    crops: int | None = None,
    **sizes: Any,
) -> dict[str, float]:
    """Compute top-1 and top-5 accuracy and the loss; each image or video counts once, over any number of processes.

    Args:
        source: the export of a fine-tuning stage, or a classifier of another project.
        data: any labelled data, its ``val`` part if it has one; or builtin:shapes.
        views, crops: clips per video and crops per clip, over which probabilities are averaged; None: those of the
            evaluation after training.
        sizes: ``image_size`` and ``window_size``, as for :func:`swin.load_encoder`.

    Raises:
        ValueError: no classifier, labels that do not belong to it, or views of images.
    """
    export = open_export(source)
    accelerator = make_accelerator(precision)
    task = load_classifier(export, **sizes)
    config = task.encoder.config
    video = video_settings(export, config, views=views, crops=crops)
    classes, count = export.classifier_head().classes, len(task.classes)
    images = labelled_images(data, config, export.make_decoder(config), classes, count)
    return evaluate_images(
        task,
        images,
        make_view(config, export.interpolation, video),
        accelerator,
        batch_size=batch_size,
        num_workers=num_workers,
    )


def load_classifier(source: Export | Path | str, **settings: Any) -> Classification:
    """Load the classifier of an export, on the CPU and in evaluation mode.

    Classes without names are named by their indices.

    Args:
        settings: of :func:`swin.load_encoder`: ``image_size``, ``window_size``, ...

    Raises:
        ValueError: there is no classifier, or it cannot be read.
    """
    export = open_export(source)
    encoder, head = export.encoder(**settings), export.classifier_head()
    names = head.classes or [str(index) for index in range(len(head.weight))]
    task = Classification(encoder, names, mean=export.mean, std=export.std)
    task.head.load_state_dict({"weight": head.weight, "bias": head.bias})
    return task.eval()


def evaluate_images(
    task: Classification,
    source: LabelledSource,
    view: Transform,
    accelerator: Accelerator,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict[str, float]:
    """Evaluate a classifier on labelled images or videos.

    Args:
        view: evaluation transform, see :func:`make_view`.
        batch_size: images, or clips.

    Raises:
        ValueError: no image could be read.
    """
    task.to(accelerator.device).eval()
    if isinstance(view, Views):
        batch_size = max(1, batch_size // (view.temporal * view.spatial))
    batches = evaluation_batches(
        source,
        view,
        batch_size=batch_size,
        labelled=True,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=num_workers,
    )
    progress = tqdm(batches, total=len(batches), unit="batch", disable=None if accelerator.is_main_process else True)
    with accelerator.autocast():
        numbers = evaluate(task, progress, accelerator)
    report_corrupt(batches.corrupt)
    images = len(source) - sum(gather_object([len(batches.corrupt)]))
    if not images:
        raise ValueError(f"none of {len(source)} images could be read, for instance {source.name(0)}")
    return {"images": images, **numbers}


def video_settings(export: Export, config: SwinConfig, **given: int | None) -> dict[str, int]:
    """Return the video inference settings of an export, overridden by the ``views`` and ``crops`` that are given.

    Raises:
        ValueError: views or crops are given for an encoder of images.
    """
    overrides = {key: count for key, count in given.items() if count is not None}
    if overrides and not isinstance(config, VideoConfig):
        raise ValueError(f"{export.path} encodes images, which have no {' and '.join(overrides)}: leave them out")
    return export.video | overrides


def make_view(config: SwinConfig, interpolation: str, video: Mapping[str, int] | None = None) -> Transform:
    """Make the evaluation transform: a central crop of an image, or several views of a video.

    Args:
        video: ``stride``, ``views`` and ``crops``; what is missing is taken from :data:`DEFAULT_VIDEO`.
    """
    if not isinstance(config, VideoConfig):
        return CenterCrop(config.image_size, interpolation)
    settings = {**DEFAULT_VIDEO, **(video or {})}
    return Views(
        config.image_size,
        config.frames,
        settings["stride"],
        temporal=settings["views"],
        spatial=settings["crops"],
        interpolation=interpolation,
    )


def labelled_images(
    data: str, config: SwinConfig, decoder: Decoder, classes: Sequence[str] | None, count: int
) -> LabelledSource:
    """Open validation images whose labels are the class indices of a classifier.

    Classes are matched by name. Class names in the data that are numbers are class indices, ``10`` after ``9``
    (ImageNet-V2), unless the classifier itself has numbers for class names.

    Args:
        config: of the encoder; sets the size of builtin images.
        classes: names of the classes of the classifier, if known.
        count: number of classes of the classifier.

    Raises:
        ValueError: the data have classes that the classifier does not know.
    """
    if data == "builtin:shapes":
        shapes = builtin_kind(config)(500, config.image_size, config.in_chans, validation=True)
        if list(shapes.classes) != list(classes or shapes.classes) or len(shapes.classes) != count:
            raise ValueError(f"{data} has {len(shapes.classes)} classes that are not the {count} of the classifier")
        return shapes
    files = validation_files(data)
    labels = files.labels()
    found = sorted(set(labels.drop_null().to_pylist())) if labels is not None else []
    names_are_numbers = bool(classes) and all(name.isdecimal() for name in classes or [])
    by_index = bool(found) and all(name.isdecimal() for name in found) and not names_are_numbers
    if by_index:
        known = [str(index) for index in range(count)]
        if unknown := sorted(set(found) - set(known), key=int):
            raise ValueError(f"{data} has a class {unknown[0]}, but the classifier has classes 0 to {count - 1}")
    else:
        known = list(classes or files.classes or found)
        if len(known) != count:
            raise ValueError(
                f"{data} has {len(known)} classes, but the classifier has {count} without names: "
                "give data with all of them"
            )
    return LabelledImages(files, decoder, known)


def builtin_kind(config: SwinConfig) -> type[Shapes]:
    """Return the builtin data for an encoder of images or of clips."""
    return MovingShapes if isinstance(config, VideoConfig) else Shapes
