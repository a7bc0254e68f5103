"""Judging any export by any data: what is measured depends on what the export is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from simmim.stages.evaluate import SIZES, evaluate_classifier
from simmim.stages.evaluate_objects import evaluate_objects
from simmim.stages.evaluate_segments import evaluate_segments
from swin import load_description
from swin.weights import DESCRIPTION

OPTIONS: dict[str, set[str]] = {
    "classifier": {"views", "crops"},
    "segmenter": {"annotations", "short_px", "window", "stride", "scales", "flip"},
    "detector": {"short_px", "long_px", "zooms", "flips", "soft_nms"},
}
"""Beside ``image_size`` and ``window_size``, which all of them have."""
JUDGES: dict[str, Callable[..., dict[str, float]]] = {
    "classifier": evaluate_classifier,
    "segmenter": evaluate_segments,
    "detector": evaluate_objects,
}
COMMON = ("num_workers", "precision", *SIZES)
VARIANTS = "imagenetv2-*"


def kind_of(path: Path) -> str:
    """classifier, segmenter or detector; files of other projects are classifiers."""
    about = load_description(path) if (path / DESCRIPTION).exists() else {}
    return "segmenter" if "segmentation" in about else "detector" if "detection" in about else "classifier"


def check_options(kind: str, options: dict[str, Any]) -> None:
    """Raises ValueError: an option that exports of this kind have not."""
    if unknown := sorted(set(options) - OPTIONS[kind]):
        raise ValueError(f"a {kind} has no option {unknown[0]!r}: it has {', '.join(sorted(OPTIONS[kind]))}")


def evaluate_export(path: Path, data: str, *, batch_size: int | None = None, **options: Any) -> dict[str, float]:
    """The numbers of an export on held-out data, every image once over any number of processes.

    Args:
        batch_size: None for 64 of a classifier and 1 of a detector; segmenters see whole images one by one.
        options: ``num_workers``, ``precision``, ``image_size``, ``window_size``, and what is in :data:`OPTIONS`.

    Raises:
        ValueError: an export, data or options that do not belong to each other.
    """
    kind = kind_of(path)
    check_options(kind, {key: value for key, value in options.items() if key not in COMMON})
    if batch_size is not None:
        if kind == "segmenter":
            raise ValueError("a segmenter looks at whole images one by one: leave the batch size out")
        options["batch_size"] = batch_size
    return JUDGES[kind](path, data, **options)


def variants(data: str) -> list[str]:
    """The folders of ImageNet-V2 (arXiv 1902.10811) where data is what they lie in; else the data alone."""
    found = sorted(path for path in Path(data).expanduser().glob(VARIANTS) if path.is_dir())
    return [str(path) for path in found] or [data]
