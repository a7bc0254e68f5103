"""Loading images and videos from storage into uint8 batches, independent of masks and models."""

from simmim.data.clips import MiddleClip, RandomClip, Video, VideoDecoder, Views
from simmim.data.decode import Decoder, TensorImage
from simmim.data.loader import evaluation_batches, training_batches
from simmim.data.shapes import MovingShapes, Shapes
from simmim.data.sources import (
    Images,
    LabelledImages,
    LabelledSource,
    Source,
    Subset,
    labelled_sources,
    limit_labels,
    open_files,
    open_images,
    split_validation,
    training_images,
)
from simmim.data.transforms import CenterCrop, RandAugmentedCrop, RandomCrop

__all__ = [
    "CenterCrop",
    "Decoder",
    "Images",
    "LabelledImages",
    "LabelledSource",
    "MiddleClip",
    "MovingShapes",
    "RandAugmentedCrop",
    "RandomClip",
    "RandomCrop",
    "Shapes",
    "Source",
    "Subset",
    "TensorImage",
    "Video",
    "VideoDecoder",
    "Views",
    "evaluation_batches",
    "labelled_sources",
    "limit_labels",
    "open_files",
    "open_images",
    "split_validation",
    "training_batches",
    "training_images",
]
