"""Images from where they lie to uint8 batches. Knows nothing of masks or models."""

from simmim.data.loader import evaluation_batches, training_batches
from simmim.data.shapes import Shapes
from simmim.data.sources import Folder, Source, Subset, split_holdout
from simmim.data.transforms import CenterCrop, RandomCrop

__all__ = [
    "CenterCrop",
    "Folder",
    "RandomCrop",
    "Shapes",
    "Source",
    "Subset",
    "evaluation_batches",
    "split_holdout",
    "training_batches",
]
