"""Images from where they lie to uint8 batches. Knows nothing of masks or models."""

from simmim.data.loader import evaluation_batches, training_batches
from simmim.data.shapes import Shapes
from simmim.data.sources import (
    ClassFolder,
    Folder,
    Labelled,
    Source,
    Subset,
    few_labels,
    labelled_sources,
    split_holdout,
)
from simmim.data.transforms import CenterCrop, RandAugmentedCrop, RandomCrop

__all__ = [
    "CenterCrop",
    "ClassFolder",
    "Folder",
    "Labelled",
    "RandAugmentedCrop",
    "RandomCrop",
    "Shapes",
    "Source",
    "Subset",
    "evaluation_batches",
    "few_labels",
    "labelled_sources",
    "split_holdout",
    "training_batches",
]
