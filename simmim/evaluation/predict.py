"""Inference on any images: a preview image of each prediction, and its values as JSON lines."""

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
from simmim.evaluation.classification import load_classifier, make_view, video_settings
from simmim.evaluation.detection import detect_objects, load_detector
from simmim.evaluation.dispatch import INFERENCE_OPTIONS, check_head_kind
from simmim.evaluation.segmentation import load_segmenter, segment_image
from simmim.export.export import SIZES, Export, open_export
from simmim.tasks.classification import Classification
from simmim.training.distributed import make_accelerator
from simmim.visualization import drawing
from swin import SwinConfig

LINES = "predictions.jsonl"
TOP_CLASSES = 5


class Prediction(NamedTuple):
    """Prediction for one image or video."""

    preview: Image.Image
    facts: dict[str, Any]
    """Plain JSON."""
    label_map: Image.Image | None = None


Predict = Callable[[Any], Prediction]
"""Maps a decoded image or video to its prediction."""


def predict(
    source: Export | Path | str,
    data: str,
    out: Path,
    options: Mapping[str, Any] | None = None,
    *,
    images: int | None = None,
    precision: str | None = None,
    least_score: float = 0.5,
    **sizes: Any,
) -> int:
    """Predict the classes, label map or objects of images, and write preview images and ``predictions.jsonl``.

    Images that cannot be read are skipped with a warning.

    Args:
        source: the export of a classifier, segmenter or detector, or a classifier of another project.
        data: images, as ``data.path`` of a recipe.
        out: output folder.
        options: inference options, see :data:`simmim.evaluation.dispatch.INFERENCE_OPTIONS`.
        images: process only the first images; None: all.
        least_score: objects with a lower score are left out.
        sizes: ``image_size``, ``window_size``.

    Returns:
        Number of images predicted.

    Raises:
        ValueError: export, data and options do not fit each other; no image could be read.
    """
    accelerator = make_accelerator(precision)
    if accelerator.num_processes > 1:
        raise ValueError("predict runs in one process: start simmim predict without accelerate launch")
    export = open_export(source)
    given = {**sizes, **read_options(INFERENCE_OPTIONS[check_head_kind(export)], options or {})}
    predict_one, config = _load(export, accelerator.device, least_score, given)
    files = _open_images(data, export.make_decoder(config), config, images)
    count = len(files) if images is None else min(images, len(files))
    if (out / LINES).exists():
        raise ValueError(f"{out} holds predictions already: give another --out, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    done, reason = 0, "there is none"
    with (out / LINES).open("w", encoding="utf-8") as lines:
        for index in tqdm(range(count), unit="image"):
            name = files.name(index)
            try:
                decoded = files.decode(files.fetch(index))
            except Exception as error:  # corrupt files raise almost anything
                reason = reason_of(error)
                report_corrupt({name: reason})
                continue
            with accelerator.autocast():
                prediction = predict_one(decoded)
            preview = f"{index:05d}_{Path(name).stem}.png"
            prediction.preview.save(out / preview)
            facts = {"image": name, "preview": preview, **prediction.facts}
            if prediction.label_map is not None:
                facts["label_map"] = preview.replace(".png", "_labels.png")
                prediction.label_map.save(out / facts["label_map"])
            lines.write(json.dumps(facts) + "\n")
            done += 1
    if not done:
        raise ValueError(f"none of {count} images of {data} could be read, the last: {reason}")
    return done


def _open_images(data: str, decoder: Decoder, config: SwinConfig, images: int | None) -> Source:
    if data == "builtin:shapes":
        kind = MovingShapes if isinstance(decoder, VideoDecoder) else Shapes
        return kind(images or 16, config.image_size, decoder.channels, validation=True)
    return Images(open_files(data), decoder)


def _load(
    export: Export, device: torch.device, least_score: float, options: dict[str, Any]
) -> tuple[Predict, SwinConfig]:
    """Load the model of an export as a function of one image, and the configuration of its encoder."""
    if export.head_kind == "segmenter":
        segmenter = load_segmenter(export, **options).to(device)
        return partial(_predict_segments, segmenter), segmenter.encoder.config
    if export.head_kind == "detector":
        detector, size = load_detector(export, **options)
        detector.to(device)
        return partial(_predict_objects, detector, view=size, least_score=least_score), detector.encoder.config
    sizes = {key: options.pop(key) for key in SIZES if key in options}
    classifier = load_classifier(export, **sizes).to(device)
    config = classifier.encoder.config
    view = make_view(config, export.interpolation, video_settings(export, config, **options))
    return partial(_predict_classes, classifier, view), config


@torch.no_grad()
def _predict_classes(task: Classification, view: Any, decoded: Any) -> Prediction:
    """Predict the most probable classes of an image or video."""
    views = view(decoded, [])[None]
    probabilities = task.predict(views.to(task.mean.device)).softmax(dim=1)[0].cpu()
    best, labels = probabilities.topk(min(TOP_CLASSES, len(task.classes)))
    ranked = [(task.classes[label], p) for label, p in zip(labels.tolist(), best.tolist(), strict=True)]
    middle = views if views.ndim < 6 else views[:, views.shape[1] // 2]  # videos have several views
    image = drawing.to_rgb(drawing.frames_side_by_side(middle / 255))[0]
    return Prediction(drawing.draw_ranked(image, ranked), {"classes": dict(ranked)})


def _predict_segments(task: Any, decoded: Any) -> Prediction:
    return Prediction(*segment_image(task, _pixels(decoded)))


def _predict_objects(task: Any, decoded: Any, *, view: Any, least_score: float) -> Prediction:
    overlay, objects = detect_objects(task, _pixels(decoded), view=view, least_score=least_score)
    return Prediction(overlay, {"objects": objects})


def _pixels(decoded: Any) -> Tensor:
    """Return all pixels of a decoded image, uint8 ``(c, H, W)``."""
    height, width = decoded.size
    pixels: Tensor = decoded.crop((0, 0, height, width), (height, width))
    return pixels
