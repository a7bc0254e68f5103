"""Inference options of exports, for commands and loaders."""

from __future__ import annotations

from pydantic import Field, model_validator

from simmim.config.dense_stages import DetectTest, SegmentInference
from simmim.config.sections import Count, Settings, SizeOrNone


class ClassifierOptions(Settings):
    """Inference options of video classifiers."""

    views: Count | None = Field(None, description="clips per video; null: as in the evaluation of the export")
    crops: Count | None = Field(None, description="crops per clip; null: as in the evaluation of the export")


class SegmenterOptions(SegmentInference):
    """Inference options of segmentation models."""

    window: SizeOrNone = Field(None, description="size of sliding windows, px; null: the full image at once")


class SegmenterEvaluationOptions(SegmenterOptions):
    """Inference options of segmentation models, and the label maps to evaluate on."""

    annotations: str | None = Field(None, description="label maps of the images")


class DetectorOptions(DetectTest):
    """Inference options of detectors; options that are not given are taken from the export."""

    @model_validator(mode="after")
    def _ordered(self) -> DetectorOptions:
        """Skip the check of sides, which is made after the options of the export are filled in."""
        return self
