"""Data sets of Hugging Face ``datasets``: from the hub, from a folder it knows, or saved to disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageOps
from torch import Tensor

from simmim.data.sources import MODES, VALIDATION

PREFIX = "hf:"


class Hub:
    """One split of a data set with a column of images and one of class labels.

    Args:
        path: ``hf:`` and the name of a data set, or of a folder that ``load_dataset`` or ``load_from_disk`` opens.
        split: ``train``, or ``val`` for whichever of validation, val and test there is.

    Raises:
        ValueError: a data set that cannot be opened, or without such a split or columns.
    """

    def __init__(self, path: str, channels: int = 3, split: str = "train") -> None:
        if channels not in MODES:
            raise ValueError(f"image files have 1, 3 or 4 channels, but the encoder wants in_chans={channels}")
        import datasets

        name, self.mode = path.removeprefix(PREFIX), MODES[channels]
        datasets.disable_progress_bars()
        try:
            is_saved = (Path(name) / "dataset_dict.json").exists() or (Path(name) / "dataset_info.json").exists()
            splits: Any = datasets.load_from_disk(name) if is_saved else datasets.load_dataset(name)
        except Exception as error:  # whatever the many formats raise
            raise ValueError(f"{path} cannot be opened by datasets: {error}") from None
        if not isinstance(splits, dict):
            splits = {"train": splits}
        wanted = ["train"] if split == "train" else list(VALIDATION)
        found = next((word for word in wanted if word in splits), None)
        if found is None:
            raise ValueError(f"{path} has no split {' or '.join(wanted)}: it has {', '.join(splits)}")
        self.rows, self.path = splits[found], f"{path}/{found}"
        features = self.rows.features
        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        if not images or not labels:
            raise ValueError(f"{path} needs a column of images and one of class labels: it has {dict(features)}")
        self.image, self.classes = images[0], list(features[labels[0]].names)
        self._labels: list[int] = list(self.rows[labels[0]])

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, number: int) -> str:
        return f"{self.path}/{number}"

    def label(self, number: int) -> int:
        return self._labels[number]

    def read(self, number: int) -> Tensor:
        pixels = np.array(ImageOps.exif_transpose(self.rows[number][self.image]).convert(self.mode))
        return torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1)


def hub_sources(path: str, channels: int) -> tuple[Hub, Hub]:
    """Training and validation images of a data set.

    Raises:
        ValueError: as :class:`Hub`; splits with other classes.
    """
    training, holdout = Hub(path, channels), Hub(path, channels, "val")
    if training.classes != holdout.classes:
        raise ValueError(f"{path}: the splits have other classes than each other")
    return training, holdout


def is_hub(path: str | Path) -> bool:
    """Whether a path names a data set of ``datasets``."""
    return str(path).startswith(PREFIX)
