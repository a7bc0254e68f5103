"""The schema of a recipe: one YAML file with data, encoder and an ordered set of stages."""

from simmim.config.dense_stages import DetectStage, DetectTest, SegmentLabels, SegmentStage
from simmim.config.image_stages import FinetuneStage, PretrainStage, Video, video_of
from simmim.config.inference_options import (
    ClassifierOptions,
    DetectorOptions,
    SegmenterEvaluationOptions,
    SegmenterOptions,
)
from simmim.config.recipe import KINDS, Recipe, add_kinds, encoder_config, remove_kinds
from simmim.config.sections import Data, Encoder, Optimizer, Settings, Stage, Supervised

__all__ = [
    "KINDS",
    "ClassifierOptions",
    "Data",
    "DetectStage",
    "DetectTest",
    "DetectorOptions",
    "Encoder",
    "FinetuneStage",
    "Optimizer",
    "PretrainStage",
    "Recipe",
    "SegmentLabels",
    "SegmentStage",
    "SegmenterEvaluationOptions",
    "SegmenterOptions",
    "Settings",
    "Stage",
    "Supervised",
    "Video",
    "add_kinds",
    "encoder_config",
    "remove_kinds",
    "video_of",
]
