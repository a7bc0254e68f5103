"""Showing what an export says of images: a picture of each, and a line of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from simmim.config.loading import read_options
from simmim.data import Decoder, Images, MovingShapes, Shapes, Source, VideoDecoder, open_files
from simmim.data.loader import reason_of
from simmim.data.views import report_corrupt
from simmim.evaluation.classification import (
    SIZES,
    decoder_of,
    interpolation_of,
    looked_at,
    open_encoder,
    pixels_of,
    view_of,
    with_head,
)
from simmim.evaluation.detection import load_detector, predict_objects
from simmim.evaluation.dispatch import OPTIONS, kind_of
from simmim.evaluation.segmentation import load_segmenter, predict_segments
from simmim.export.classifier import load_classifier
from simmim.tasks.classification import Classification
from simmim.training.distributed import make_accelerator
from simmim.visualization import drawing

LINES = "predictions.jsonl"
FIRST = 5


class Shown(NamedTuple):
    """What was found in one image or video."""

    picture: Image.Image
    facts: dict[str, Any]
    """Plain JSON."""
    label_map: Image.Image | None = None


Show = Callable[[Any], Shown]
"""Something that a decoder gave -> what was found in it."""


def predict(
    path: Path,
    data: str,
    out: Path,
    options: Mapping[str, Any] | None = None,
    *,
    images: int | None = None,
    precision: str | None = None,
    least_score: float = 0.5,
    **sizes: Any,
) -> int:
    """Write a picture of every image into a folder, with its classes, label map or objects drawn on it, and all
    of it as ``predictions.jsonl``.

    Args:
        path: the export of a classifier, a segmenter or a detector.
        data: anything that ``data.path`` of a recipe takes.
        images: so many of the first; None for all.
        options: of :data:`simmim.evaluation.dispatch.OPTIONS`.
        least_score: of objects that are shown and told.
        sizes: ``image_size``, ``window_size``.

    Returns:
        How many were shown; what could not be read is named on stderr.

    Raises:
        ValueError: an export, data or options that do not belong to each other; no image that can be read.
    """
    accelerator = make_accelerator(precision)
    if accelerator.num_processes > 1:
        raise ValueError("pictures are made by one process: start simmim predict without accelerate launch")
    kind = kind_of(path)
    look = {**sizes, **read_options(OPTIONS[kind], options or {})}
    show, decoder, size = _open(path, kind, accelerator.device, least_score, look)
    if data == "builtin:shapes":
        drawn = MovingShapes if isinstance(decoder, VideoDecoder) else Shapes
        source: Source = drawn(images or 16, size, decoder.channels, validation=True)
    else:
        source = Images(open_files(data), decoder)
    count = len(source) if images is None else min(images, len(source))
    if (out / LINES).exists():
        raise ValueError(f"{out} holds predictions already: give another --out, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    done, reason = 0, "there is none"
    with (out / LINES).open("w", encoding="utf-8") as lines:
        for number in tqdm(range(count), unit="image"):
            name = source.name(number)
            try:
                picture = source.decode(source.fetch(number))
            except Exception as error:  # damaged bytes raise almost anything
                reason = reason_of(error)
                report_corrupt({name: reason})
                continue
            with accelerator.autocast():
                shown = show(picture)
            file = f"{number:05d}_{Path(name).stem}.png"
            shown.picture.save(out / file)
            facts = {"image": name, "picture": file, **shown.facts}
            if shown.label_map is not None:
                facts["label_map"] = file.replace(".png", "_labels.png")
                shown.label_map.save(out / facts["label_map"])
            lines.write(json.dumps(facts) + "\n")
            done += 1
    if not done:
        raise ValueError(f"none of {count} images of {data} could be shown, the last: {reason}")
    return done


def _open(
    path: Path, kind: str, device: torch.device, least_score: float, options: dict[str, Any]
) -> tuple[Show, Decoder, tuple[int, int]]:
    """How an export shows things, what reads them, and their nominal size."""
    show: Show
    if kind == "segmenter":
        segmenter = load_segmenter(path, **options).to(device)
        show, encoder = partial(_segments, segmenter), segmenter.encoder
    elif kind == "detector":
        detector, view = load_detector(path, **options)
        show = partial(_objects, detector.to(device), view=view, least_score=least_score)
        encoder = detector.encoder
    else:
        sizes = {key: options.pop(key) for key in SIZES if key in options}
        encoder, pixels = open_encoder(path, **sizes)
        look = view_of(encoder, interpolation_of(path), looked_at(path, encoder, options))
        classifier = with_head(encoder, load_classifier(path), pixels)
        show = partial(_classes, classifier.to(device).eval(), look)
    return show, decoder_of(encoder, pixels_of(path)), encoder.config.image_size


@torch.no_grad()
def _classes(task: Classification, view: Any, picture: Any) -> Shown:
    """The likeliest classes of an image, or of a video."""
    seen = view(picture, [])[None]
    shares, numbers = (
        task.predict(seen.to(task.mean.device)).softmax(dim=1)[0].cpu().topk(min(FIRST, len(task.classes)))
    )
    best = [(task.classes[number], share) for number, share in zip(numbers.tolist(), shares.tolist(), strict=True)]
    middle = seen if seen.ndim < 6 else seen[:, seen.shape[1] // 2]  # of the views of a video
    image = drawing.to_rgb(drawing.frames_side_by_side(middle / 255))[0]
    return Shown(drawing.draw_ranked(image, best), {"classes": dict(best)})


def _segments(task: Any, picture: Any) -> Shown:
    (found,) = predict_segments(task, [("", _whole(picture))])
    return Shown(found.overlay, found.facts, found.label_map)


def _objects(task: Any, picture: Any, *, view: Any, least_score: float) -> Shown:
    ((_, overlay, facts),) = predict_objects(task, [("", _whole(picture))], view=view, least_score=least_score)
    return Shown(overlay, {"objects": facts})


def _whole(picture: Any) -> Tensor:
    """uint8 ``(c, H, W)``"""
    height, width = picture.size
    pixels: Tensor = picture.crop((0, 0, height, width), (height, width))
    return pixels
