"""The schema of a recipe: one YAML file with data, encoder and an ordered set of stages."""

from simmim.schema.dense import Detect, DetectTest, Segment, SegmentLabels
from simmim.schema.images import Finetune, Pretrain, Video, video_of
from simmim.schema.options import ClassifierOptions, DetectorOptions, JudgedSegmenterOptions, SegmenterOptions
from simmim.schema.parts import Data, Encoder, Optimizer, Settings, Stage, Supervised
from simmim.schema.recipe import KINDS, Recipe, encoder_config

__all__ = [
    "KINDS",
    "ClassifierOptions",
    "Data",
    "Detect",
    "DetectTest",
    "DetectorOptions",
    "Encoder",
    "Finetune",
    "JudgedSegmenterOptions",
    "Optimizer",
    "Pretrain",
    "Recipe",
    "Segment",
    "SegmentLabels",
    "SegmenterOptions",
    "Settings",
    "Stage",
    "Supervised",
    "Video",
    "encoder_config",
    "video_of",
]
