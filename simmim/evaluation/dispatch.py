"""Judging any export by any data: what is measured depends on what the export is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from simmim.config import ClassifierOptions, DetectorOptions, SegmenterEvaluationOptions, SegmenterOptions, Settings
from simmim.config.loading import read_options
from simmim.evaluation.classification import evaluate_classifier
from simmim.evaluation.detection import evaluate_detector
from simmim.evaluation.segmentation import evaluate_segmenter
from simmim.export.classifier import WEIGHTS
from swin import load_description
from swin.weights.serialization import DESCRIPTION

OPTIONS: dict[str, type[Settings]] = {
    "classifier": ClassifierOptions,
    "segmenter": SegmenterOptions,
    "detector": DetectorOptions,
}
"""How an export looks at things, beside ``image_size`` and ``window_size``."""
EVALUATION_OPTIONS = OPTIONS | {"segmenter": SegmenterEvaluationOptions}
JUDGES: dict[str, Callable[..., dict[str, float]]] = {
    "classifier": evaluate_classifier,
    "segmenter": evaluate_segmenter,
    "detector": evaluate_detector,
}


def kind_of(path: Path) -> str:
    """classifier, segmenter or detector; files of other projects are classifiers.

    Raises:
        ValueError: an export that is none of them.
    """
    about = load_description(path) if (path / DESCRIPTION).exists() else {}
    kind = "segmenter" if "segmentation" in about else "detector" if "detection" in about else "classifier"
    if about and kind == "classifier" and not (path / WEIGHTS).exists():
        raise ValueError(f"{path} holds no classifier, segmenter or detector: give the export of a stage with labels")
    return kind


def evaluate_export(
    path: Path, data: str, options: Mapping[str, Any] | None = None, *, batch_size: int | None = None, **common: Any
) -> dict[str, float]:
    """The numbers of an export on held-out data, every image once over any number of processes.

    Args:
        options: of :data:`EVALUATION_OPTIONS`.
        batch_size: None for 64 of a classifier and 1 of a detector; segmenters see whole images one by one.
        common: ``num_workers``, ``precision``, ``image_size``, ``window_size``.

    Raises:
        ValueError: an export, data or options that do not belong to each other.
    """
    kind = kind_of(path)
    given = read_options(EVALUATION_OPTIONS[kind], options or {})
    if batch_size is not None:
        if kind == "segmenter":
            raise ValueError("a segmenter looks at whole images one by one: leave the batch size out")
        common["batch_size"] = batch_size
    return JUDGES[kind](path, data, **common, **given)
