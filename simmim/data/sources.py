"""Where images come from. A source has a length and gives uint8 images ``(c, H, W)`` by number."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from simmim.counter_rng import derive_seed, permutation

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
VALIDATION = ("val", "validation", "test")
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)
"""What Pillow raises for a file that is not a good image."""


class Source(Protocol):
    """Images by number."""

    def __len__(self) -> int: ...

    def read(self, number: int) -> Tensor:
        """uint8 ``(c, H, W)``. Raises one of ``UNREADABLE`` for a broken image."""

    def name(self, number: int) -> str:
        """What a person would call this image: a path, usually."""


class Labelled(Source, Protocol):
    """Images with one class each."""

    @property
    def classes(self) -> Sequence[str]:
        """Their names; a label is a number into them."""

    def label(self, number: int) -> int: ...


class Folder:
    """All images below a folder, flat or nested, in the order of their sorted paths; no labels needed.

    Raises:
        ValueError: no such folder, no image in it, or a number of channels that no image file has.
    """

    def __init__(self, path: str | Path, channels: int = 3) -> None:
        self.root = Path(path).expanduser()
        if not self.root.is_dir():
            raise ValueError(f"data.path {str(path)!r} is not a folder: set data.path=FOLDER_OF_IMAGES")
        if channels not in MODES:
            raise ValueError(f"image files have 1, 3 or 4 channels, but the encoder wants in_chans={channels}")
        self.mode = MODES[channels]
        self.paths, num_others = _scan(self.root)
        if not self.paths:
            raise ValueError(
                f"no images in {self.root} or below it ({num_others} other files): expected "
                f"{' '.join(sorted(EXTENSIONS))}"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, number: int) -> str:
        return str(self.root / self.paths[number])

    def read(self, number: int) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(self.root / self.paths[number]) as file:
                image = ImageOps.exif_transpose(file)
                if image.mode.startswith("I;16"):  # Pillow clips these instead of scaling them
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                pixels = np.array(image.convert(self.mode))
        return torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1)


class ClassFolder(Folder):
    """A folder with one subfolder for each class; below that, flat or nested.

    Classes are in the order of their names, in numeric order where every name is a whole number
    (``10`` after ``9``, as in ImageNet-V2).

    Args:
        classes: the names that another folder has given numbers to, for a validation set.

    Raises:
        ValueError: as :class:`Folder`; images outside of class folders, or fewer than two classes.
    """

    def __init__(self, path: str | Path, channels: int = 3, classes: Sequence[str] | None = None) -> None:
        super().__init__(path, channels)
        parts = [Path(image).parts for image in self.paths]
        loose = [part[0] for part in parts if len(part) == 1]
        if loose:
            raise ValueError(
                f"{len(loose)} image(s) lie in {self.root} itself, {loose[0]} for one: labels are read from one "
                "subfolder per class"
            )
        found = {part[0] for part in parts}
        if classes is None:
            if len(found) < 2:
                raise ValueError(f"{self.root} holds one class only, {found.pop()}: expected one subfolder per class")
            numeric = all(name.isdecimal() for name in found)
            classes = sorted(found, key=int) if numeric else sorted(found)
        elif unknown := sorted(found - set(classes)):
            raise ValueError(
                f"{self.root} holds classes that the training images lack: {', '.join(unknown[:5])}"
                f"{' and others' if len(unknown) > 5 else ''}"
            )
        self.classes = list(classes)
        number_of = {name: number for number, name in enumerate(self.classes)}
        self._labels = [number_of[part[0]] for part in parts]

    def label(self, number: int) -> int:
        return self._labels[number]


class Subset:
    """Some of the images of a source, in a given order; labelled if the source is."""

    def __init__(self, source: Source, numbers: list[int]) -> None:
        self.source = source
        self.numbers = numbers

    @property
    def classes(self) -> Sequence[str]:
        return cast(Labelled, self.source).classes

    def label(self, number: int) -> int:
        return cast(Labelled, self.source).label(self.numbers[number])

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, number: int) -> Tensor:
        return self.source.read(self.numbers[number])

    def name(self, number: int) -> str:
        return self.source.name(self.numbers[number])


def split_holdout(source: Source, holdout_images: int, reserved: int = 0) -> tuple[Source, Source | None]:
    """Take a fixed random set of images out of training: ``(training, holdout)``.

    The same images for every seed and recipe, so that held-out losses compare. Never more than a
    tenth of the source; None when that leaves nothing.

    Args:
        reserved: as many are kept out of training, if that is more: other stages are judged by them.
    """
    count = min(holdout_images, len(source) // 10)
    unseen = min(max(holdout_images, reserved), len(source) // 10)
    if unseen == 0:
        return source, None
    generator = torch.Generator().manual_seed(derive_seed("holdout", 0))
    order = torch.randperm(len(source), generator=generator).tolist()
    return Subset(source, sorted(order[unseen:])), Subset(source, order[:count]) if count else None


def labelled_sources(
    path: str | Path, channels: int, holdout_images: int, val_path: str | Path | None = None, reserved: int = 0
) -> tuple[Labelled, Labelled]:
    """Training and held-out images of a folder with one subfolder per class.

    ``path`` (its ``train`` where it has one) and ``val_path``; or ``path/train`` and ``path/val`` (or
    ``validation``, ``test``) where both are there; else the split of :func:`split_holdout`.

    Raises:
        ValueError: as :class:`ClassFolder`; too few images to hold any out.
    """
    root = Path(path).expanduser()
    if val_path is not None:
        training = ClassFolder(root / "train" if (root / "train").is_dir() else root, channels)
        return training, ClassFolder(val_path, channels, training.classes)
    for name in VALIDATION:
        if (root / "train").is_dir() and (root / name).is_dir():
            training = ClassFolder(root / "train", channels)
            return training, ClassFolder(root / name, channels, training.classes)
    kept, holdout = split_holdout(ClassFolder(root, channels), holdout_images, reserved)
    if holdout is None:
        raise ValueError(f"{root} holds {len(kept)} images: too few to hold a tenth out, 10 are the least")
    return cast(Labelled, kept), cast(Labelled, holdout)


def few_labels(source: Labelled, shots: int, seed: int) -> Labelled:
    """``shots`` images of every class, drawn by ``seed``.

    Raises:
        ValueError: a class has fewer.
    """
    wanted = {label: shots for label in range(len(source.classes))}
    chosen = []
    for number in permutation(seed, 0, len(source)).tolist():
        label = source.label(number)
        if wanted.get(label):
            chosen.append(number)
            wanted[label] -= 1
            if not wanted[label]:
                del wanted[label]
        if not wanted:
            return cast(Labelled, Subset(source, chosen))
    label, missing = next(iter(wanted.items()))
    raise ValueError(f"class {source.classes[label]} has {shots - missing} images, but shots is {shots}: lower it")


def _scan(root: Path) -> tuple[list[str], int]:
    """Image paths relative to ``root``, sorted, and how many files are something else."""
    paths, num_others = [], 0
    for folder, _, files in os.walk(root, onerror=_raise):
        for file in files:
            path = Path(folder, file)
            if path.suffix.lower() in EXTENSIONS and not file.startswith("."):
                paths.append(str(path.relative_to(root)))
            else:
                num_others += 1
    return sorted(paths), num_others


def _raise(error: OSError) -> None:
    raise error
