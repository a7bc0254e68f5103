"""Judging an export: accuracy of its classifier, and probes of its frozen features, stage by stage."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from einops import reduce
from torch import Tensor
from tqdm import tqdm

from simmim.data import (
    CenterCrop,
    Decoder,
    LabelledImages,
    LabelledSource,
    MiddleClip,
    MovingShapes,
    Shapes,
    VideoDecoder,
    Views,
    labelled_sources,
)
from simmim.data.loader import Batches
from simmim.data.sources import validation_files
from simmim.data.transforms import Transform
from simmim.data.views import make_views, report_corrupt
from simmim.export.classifier import Classifier, load_classifier
from simmim.metrics.probes import effective_rank, few_shot, knn, linear, require_scikit_learn
from simmim.tasks.classification import Classification
from simmim.training.distributed import make_accelerator
from simmim.training.engine import evaluate, to_device
from swin import SwinEncoder, VideoEncoder, import_encoder, load_description, load_encoder
from swin.weights.serialization import DESCRIPTION

SIZES = ("image_size", "window_size")
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def evaluate_classifier(
    path: Path,
    data: str,
    *,
    batch_size: int = 64,
    num_workers: int = 2,
    precision: str | None = None,
    views: int | None = None,
    crops: int | None = None,
    **sizes: Any,
) -> dict[str, float]:
    """Top-1, top-5 and loss of a classifier; every image or video counts once, over any number of processes.

    Args:
        path: an export of a stage with labels, or a classifier of another project.
        data: anything with labels, of which ``val`` is taken where there is one; or builtin:shapes.
        views, crops: clips of a video and crops of each, over which probabilities are averaged; None for those that
            the export was judged by.
        sizes: ``image_size`` and ``window_size``, as for :func:`swin.load_encoder`.

    Raises:
        ValueError: no classifier, labels that do not belong to it, or views of images.
    """
    accelerator = make_accelerator(precision)
    encoder, pixels = open_encoder(path, **sizes)
    given = {key: number for key, number in (("views", views), ("crops", crops)) if number is not None}
    video = looked_at(path, encoder, given)
    classifier = load_classifier(path)
    source = labelled_images(data, encoder, pixels, classifier.classes, len(classifier.weight))
    return evaluate_with_head(
        encoder,
        classifier,
        source,
        pixels,
        accelerator,
        interpolation=interpolation_of(path),
        video=video,
        batch_size=batch_size,
        num_workers=num_workers,
    )


def evaluate_with_head(
    encoder: SwinEncoder,
    classifier: Classifier,
    source: LabelledSource,
    pixels: dict[str, Any],
    accelerator: Accelerator,
    *,
    interpolation: str,
    video: Mapping[str, int] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict[str, float]:
    """What :func:`evaluate_classifier` gives, of an encoder, a classifier and images that are open already.

    Args:
        video: ``stride``, ``views`` and ``crops`` of clips.

    Raises:
        ValueError: no image could be read.
    """
    task = with_head(encoder, classifier, pixels).to(accelerator.device).eval()
    view = view_of(encoder, interpolation, video)
    if isinstance(view, Views):  # as many clips at a time as there would be images
        batch_size = max(1, batch_size // (view.temporal * view.spatial))
    views = _views(source, view, batch_size, accelerator, num_workers)
    with accelerator.autocast():
        numbers = evaluate(task, _with_progress(views, accelerator), accelerator)
    report_corrupt(views.corrupt)
    images = len(source) - sum(gather_object([len(views.corrupt)]))
    if not images:
        raise ValueError(f"none of {len(source)} images, {source.name(0)} for one, could be read")
    return {"images": images, **numbers}


def probe(
    path: Path, data: str, *, batch_size: int = 64, num_workers: int = 2, precision: str | None = None, **sizes: Any
) -> list[dict[str, Any]]:
    """k-NN, few-shot ridge, linear probe and effective rank of every stage of a frozen encoder.

    The last stage of a masked autoencoder is rarely its best. Rows are ``stage 1`` and so on, pooled
    over the image, and ``final norm``, what :meth:`SwinEncoder.forward` gives.

    Raises:
        ValueError: data without labels, or an encoder that cannot be read.
    """
    accelerator = make_accelerator(precision)
    if accelerator.num_processes > 1:
        raise ValueError("probes run in one process: start simmim probe without accelerate launch")
    require_scikit_learn()
    encoder, pixels = open_encoder(path, **sizes)
    training, validation = _labelled_pair(data, encoder, pixels)
    task = (
        Classification(encoder, list(training.classes), mean=pixels["mean"], std=pixels["std"])
        .to(accelerator.device)
        .eval()
    )
    crop = CenterCrop(encoder.config.image_size, "bicubic")
    view: Transform = crop
    if isinstance(encoder, VideoEncoder):
        view = MiddleClip(crop, encoder.config.frames, clips_of(path).get("stride", 1))
    known, labels = _features(task, _views(training, view, batch_size, accelerator, num_workers), accelerator)
    new, new_labels = _features(task, _views(validation, view, batch_size, accelerator, num_workers), accelerator)
    rows = []
    for stage, features in known.items():
        split = (features, labels, new[stage], new_labels)
        rows.append(
            {
                "stage": stage,
                "features": features.shape[1],
                "knn": knn(*split),
                "few_shot": few_shot(*split),
                "linear": linear(*split),
                "effective_rank": effective_rank(features),
            }
        )
    return rows


def format_probe(rows: Sequence[dict[str, Any]]) -> str:
    """The table of :func:`probe`, accuracies in percent; few-shot as the mean over its seeds."""
    ks, labels_per_class = rows[0]["knn"], rows[0]["few_shot"]
    head = ["stage", "features", *(f"{k}-NN" for k in ks), *(f"{n}-shot" for n in labels_per_class), "linear", "rank"]
    lines = [head]
    for row in rows:
        few = [f"{100 * sum(row['few_shot'][n]) / len(row['few_shot'][n]):.1f}" for n in labels_per_class]
        near = [f"{100 * row['knn'][k]:.1f}" for k in ks]
        lines.append(
            [
                row["stage"],
                str(row["features"]),
                *near,
                *few,
                f"{100 * row['linear']:.1f}",
                f"{row['effective_rank']:.0f}",
            ]
        )
    return "\n".join(f"{line[0]:<12}" + "".join(f"{cell:>10}" for cell in line[1:]) for line in lines)


def open_encoder(path: Path, **sizes: Any) -> tuple[SwinEncoder, dict[str, Any]]:
    """An export, or the file of another project, and the statistics of its pixels.

    Raises:
        ValueError: unreadable, or sizes that do not fit.
    """
    encoder = load_encoder(path, **sizes) if (path / DESCRIPTION).exists() else import_encoder(path, **sizes)[0]
    return encoder, pixels_of(path)


def pixels_of(path: Path) -> dict[str, Any]:
    """The statistics of the pixels of an export; ImageNet's of other files."""
    about = load_description(path) if (path / DESCRIPTION).exists() else {}
    return about.get("pixels", IMAGENET)


def with_head(encoder: SwinEncoder, classifier: Classifier, pixels: dict[str, Any]) -> Classification:
    """Both together; classes without names are called by their numbers."""
    names = classifier.classes or [str(number) for number in range(len(classifier.weight))]
    task = Classification(encoder, names, mean=pixels["mean"], std=pixels["std"])
    task.head.load_state_dict({"weight": classifier.weight, "bias": classifier.bias})
    return task


def interpolation_of(path: Path) -> str:
    """How the images were enlarged that an export was judged on in training; bicubic if it does not say."""
    trained = load_description(path).get("trained", {}) if (path / DESCRIPTION).exists() else {}
    return trained.get("settings", {}).get("stage", {}).get("crop", {}).get("interpolation", "bicubic")


def clips_of(path: Path) -> dict[str, int]:
    """``stride``, ``views`` and ``crops`` of an export of clips; empty if it says nothing of them."""
    return load_description(path).get("video", {}) if (path / DESCRIPTION).exists() else {}


def looked_at(path: Path, encoder: SwinEncoder, given: dict[str, int]) -> dict[str, int]:
    """:func:`clips_of`, with other ``views`` and ``crops`` where they are given.

    Raises:
        ValueError: given for images.
    """
    if given and not isinstance(encoder, VideoEncoder):
        raise ValueError(f"{path} encodes images, which have no {' and '.join(given)}: leave them out")
    return clips_of(path) | given


def view_of(encoder: SwinEncoder, interpolation: str, video: Mapping[str, int] | None) -> Transform:
    """What an image, or a video, is judged by; where nobody says, a video by 4 x 5 views of frames in a row."""
    size = encoder.config.image_size
    if not isinstance(encoder, VideoEncoder):
        return CenterCrop(size, interpolation)
    stride, views, crops = ((video or {}).get(key, n) for key, n in (("stride", 1), ("views", 4), ("crops", 5)))
    frames = encoder.config.frames
    return Views(size, frames, stride, temporal=views, spatial=crops, interpolation=interpolation)


def labelled_images(
    data: str, encoder: SwinEncoder, pixels: dict[str, Any], classes: Sequence[str] | None, count: int
) -> LabelledSource:
    """Validation images whose labels are the numbers of a classifier.

    Classes are matched by name. Names that are numbers are the numbers of the classes themselves,
    ``10`` after ``9`` (ImageNet-V2), where the classifier does not call its classes by numbers.

    Raises:
        ValueError: classes that the classifier does not know.
    """
    size, channels = encoder.config.image_size, encoder.config.in_chans
    if data == "builtin:shapes":
        shapes = _shapes(encoder)(500, size, channels, validation=True)
        if list(shapes.classes) != list(classes or shapes.classes) or len(shapes.classes) != count:
            raise ValueError(f"{data} has {len(shapes.classes)} classes that are not the {count} of the classifier")
        return shapes
    files = validation_files(data)
    labels = files.labels()
    found = sorted(set(labels.drop_null().to_pylist())) if labels is not None else []
    names_are_numbers = bool(classes) and all(name.isdecimal() for name in classes or [])
    by_number = bool(found) and all(name.isdecimal() for name in found) and not names_are_numbers
    if by_number:
        numbers = [str(number) for number in range(count)]
        if unknown := sorted(set(found) - set(numbers), key=int):
            raise ValueError(f"{data} has a class {unknown[0]}, but the classifier has classes 0 to {count - 1}")
        known = numbers
    else:
        known = list(classes or files.classes or found)
        if len(known) != count:
            raise ValueError(
                f"{data} has {len(known)} classes, but the classifier {count} without names: give all of them"
            )
    return LabelledImages(files, decoder_of(encoder, pixels), known)


def _shapes(encoder: SwinEncoder) -> type[Shapes]:
    return MovingShapes if isinstance(encoder, VideoEncoder) else Shapes


def decoder_of(encoder: SwinEncoder, pixels: dict[str, Any]) -> Decoder:
    """Of the images or videos that the encoder was trained on."""
    channels, low_high = encoder.config.in_chans, pixels.get("value_range")
    if isinstance(encoder, VideoEncoder):
        return VideoDecoder(channels)
    return Decoder(channels, (low_high[0], low_high[1]) if low_high else None)


def _labelled_pair(data: str, encoder: SwinEncoder, pixels: dict[str, Any]) -> tuple[LabelledSource, LabelledSource]:
    size, channels = encoder.config.image_size, encoder.config.in_chans
    if data == "builtin:shapes":
        make = _shapes(encoder)
        return make(2000, size, channels), make(500, size, channels, validation=True)
    return labelled_sources(data, decoder_of(encoder, pixels), 5000)


def _views(
    source: LabelledSource, view: Transform, batch_size: int, accelerator: Accelerator, num_workers: int
) -> Batches:
    shares = (accelerator.process_index, accelerator.num_processes)
    views = make_views(source, view, batch_size, True, shares, num_workers)
    assert isinstance(views, Batches)
    return views


@torch.no_grad()
def _features(task: Classification, views: Batches, accelerator: Accelerator) -> tuple[dict[str, Tensor], Tensor]:
    """Features of every stage, pooled over the image, and labels."""
    found: dict[str, list[Tensor]] = {}
    labels = []
    for batch in _with_progress(views, accelerator):
        images = to_device(batch, accelerator.device)
        with accelerator.autocast():
            maps = task.encoder.pyramid(task.normalize(images["image"]))
            final = task.encoder.norm(maps[-1].movedim(1, -1))
        for number, stage in enumerate(maps, start=1):
            found.setdefault(f"stage {number}", []).append(reduce(stage.float(), "b c ... -> b c", "mean"))
        found.setdefault("final norm", []).append(reduce(final.float(), "b ... c -> b c", "mean"))
        labels.append(images["label"])
    return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(labels)


def _with_progress(views: Batches, accelerator: Accelerator) -> Any:
    return tqdm(views, total=len(views), unit="batch", disable=None if accelerator.is_main_process else True)


def write_results(path: Path, results: Any) -> None:
    """As JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
