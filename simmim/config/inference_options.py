"""What may be changed of an export where it judges or shows: options of commands and of loaders."""

from __future__ import annotations

from pydantic import Field, model_validator

from simmim.config.dense_stages import DetectTest, SegmentInference
from simmim.config.sections import Count, Settings, SizeOrNone


class ClassifierOptions(Settings):
    """Of videos."""

    views: Count | None = Field(None, description="clips of a video; null: as it was judged")
    crops: Count | None = Field(None, description="of each of them; null: as it was judged")


class SegmenterOptions(SegmentInference):
    """Of whole images."""

    window: SizeOrNone = Field(None, description="px; null: the whole image at once")


class SegmenterEvaluationOptions(SegmenterOptions):
    """Of whole images and where their label maps are."""

    annotations: str | None = Field(None, description="label maps of the images")


class DetectorOptions(DetectTest):
    """Of whole images; what is not given is of the export, so that they are compared there."""

    @model_validator(mode="after")
    def _ordered(self) -> DetectorOptions:
        return self
