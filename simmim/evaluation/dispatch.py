"""Evaluation of any export: the kind of its head selects the metric."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from simmim.config import ClassifierOptions, DetectorOptions, SegmenterEvaluationOptions, SegmenterOptions, Settings
from simmim.config.loading import read_options
from simmim.evaluation.classification import evaluate_classifier
from simmim.evaluation.detection import evaluate_detector
from simmim.evaluation.segmentation import evaluate_segmenter
from simmim.export.export import Export, open_export

INFERENCE_OPTIONS: dict[str, type[Settings]] = {
    "classifier": ClassifierOptions,
    "segmenter": SegmenterOptions,
    "detector": DetectorOptions,
}
"""Inference options by kind of head, besides ``image_size`` and ``window_size``."""
EVALUATION_OPTIONS = INFERENCE_OPTIONS | {"segmenter": SegmenterEvaluationOptions}
EVALUATORS: dict[str, Callable[..., dict[str, float]]] = {
    "classifier": evaluate_classifier,
    "segmenter": evaluate_segmenter,
    "detector": evaluate_detector,
}


def check_head_kind(export: Export) -> str:
    """Return the kind of the head: ``classifier``, ``segmenter`` or ``detector``.

    Raises:
        ValueError: the export has none of these heads.
    """
    if export.head_kind not in EVALUATORS:
        raise ValueError(
            f"{export.path} holds no classifier, segmenter or detector: give the export of a stage with labels"
        )
    return export.head_kind


def evaluate_export(
    source: Export | Path | str,
    data: str,
    options: Mapping[str, Any] | None = None,
    *,
    batch_size: int | None = None,
    **common: Any,
) -> dict[str, float]:
    """Compute the metrics of an export; each image counts once, over any number of processes.

    Args:
        source: an export, or a classifier of another project.
        data: evaluation data.
        options: inference options of the kind of head, see :data:`EVALUATION_OPTIONS`.
        batch_size: None: 64 for a classifier and 1 for a detector. Segmenters process whole images one by one.
        common: ``num_workers``, ``precision``, ``image_size``, ``window_size``.

    Raises:
        ValueError: export, data and options do not fit each other.
    """
    export = open_export(source)
    kind = check_head_kind(export)
    given = read_options(EVALUATION_OPTIONS[kind], options or {})
    if batch_size is not None:
        if kind == "segmenter":
            raise ValueError("a segmenter processes whole images one by one: leave the batch size out")
        common["batch_size"] = batch_size
    return EVALUATORS[kind](export, data, **common, **given)


def write_results(path: Path, results: Any) -> None:
    """Write results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
