"""Images with a label map each, as ADE20K has them: what every pixel is.

Maps travel as uint8, so that there are at most 255 classes; 255 is a pixel that says nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from simmim.data.decode import Box, DecodedImage, Decoder, open_image
from simmim.data.listing import TRAINING, VALIDATION
from simmim.data.sources import Files, Images, Source, Subset, open_files, split_validation

IGNORED = 255
"""The label of pixels that are neither trained on nor judged."""
MAX_CLASSES = 255
NAME_FILES = ("objectInfo150.txt", "classes.txt")
_INDEX_MODES = ("1", "L", "P", "I;16", "I;16B", "I;16L", "I")
Problem = tuple[str, str]
"""The name of a file, and why it is left out."""


class SegmentedImage:
    """A picture, and what each of its pixels is.

    Args:
        segments: uint8 ``(H, W)``: numbers of classes, or ``IGNORED``.
    """

    def __init__(self, picture: DecodedImage, segments: Tensor) -> None:
        self.picture, self.segments = picture, segments
        self.size, self.kind = picture.size, picture.kind

    def crop(self, box: Box, size: tuple[int, int], interpolation: str = "bilinear", *, flip: bool = False) -> Tensor:
        """Of the picture alone."""
        return self.picture.crop(box, size, interpolation, flip=flip)


class SegmentedImages:
    """Images and their annotations, matched by their paths below either folder without the ending.

    ``problems`` names images without an annotation and annotations without an image, which are left out, as are
    files of which only the ending differs, but for the first.

    Args:
        annotations: one number per pixel: PNG with grey or palette indices, of any depth.
        classes: their names, or how many; None: as many as the highest label in the annotations asks for, which
            are all read for it. Classes without a name are called by their number.
        ignore_zero: 0 says nothing and the first class is 1 (ADE20K). 255 says nothing in any case.

    Raises:
        ValueError: no pair is left; fewer than two classes, or too many; channels as of :class:`Images`.
    """

    def __init__(
        self,
        images: Files,
        annotations: Files,
        decoder: Decoder | None = None,
        *,
        classes: Sequence[str] | int | None = None,
        ignore_zero: bool = False,
    ) -> None:
        self.images, self.annotations, self.ignore_zero = Images(images, decoder), annotations, ignore_zero
        self.problems: list[Problem] = []
        of_images, of_annotations = _by_path(images, self.problems), _by_path(annotations, self.problems)
        for files, these, others, reason in (
            (images, of_images, of_annotations, "has no annotation"),
            (annotations, of_annotations, of_images, "has no image"),
        ):
            self.problems += [(files.name(number), reason) for path, number in these.items() if path not in others]
        paths = [path for path in of_images if path in of_annotations]
        if not paths:
            first = "; ".join(f"{name} {reason}" for name, reason in self.problems[:2])
            raise ValueError(
                f"none of {len(of_images)} images has an annotation ({first}): expected the same path below the "
                "folder of annotations, but for the ending"
            )
        self.numbers = torch.tensor([(of_images[path], of_annotations[path]) for path in paths])
        counted = ""
        if classes is None:
            classes, counted = self._counted()
        names = [str(number) for number in range(classes)] if isinstance(classes, int) else list(classes)
        if not 2 <= len(names) <= MAX_CLASSES - ignore_zero:
            raise ValueError(f"{len(names)} classes in label maps{counted}: expected 2 to {MAX_CLASSES - ignore_zero}")
        self.classes = names

    @property
    def blocks(self) -> Tensor | None:
        return None if self.images.blocks is None else self.images.blocks[self.numbers[:, 0]]

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, index: int) -> str:
        return self.images.name(int(self.numbers[index, 0]))

    def fetch(self, index: int) -> tuple[bytes | np.ndarray, bytes]:
        """The content of both files."""
        image, annotation = self.numbers[index].tolist()
        return self.images.fetch(image), cast(bytes, self.annotations.fetch(annotation))

    def decode(self, content: tuple[bytes | np.ndarray, bytes]) -> SegmentedImage:
        """The picture with its map.

        Raises:
            ValueError: an annotation that is no label map, of another size, or with labels that are no classes.
        """
        picture, labels = self.images.decode(content[0]), read_label_map(content[1])
        if labels.shape != tuple(picture.size):
            raise ValueError(f"is {_by(picture.size)} px, but its annotation {_by(labels.shape)}")
        return SegmentedImage(picture, torch.from_numpy(self._numbered(labels)))

    def _numbered(self, labels: np.ndarray) -> np.ndarray:
        """Labels of a file -> uint8 numbers of classes."""
        ignored = self._says_nothing(labels)
        numbers = np.where(ignored, 0, labels - self.ignore_zero)
        low, high = int(numbers.min()), int(numbers.max())
        if low < 0 or high >= len(self.classes):
            label, first = (low if low < 0 else high) + self.ignore_zero, int(self.ignore_zero)
            raise ValueError(
                f"its annotation holds the label {label}, but there are {len(self.classes)} classes, {first} to "
                f"{first + len(self.classes) - 1}{'' if first else ' (where 0 is no class, set ignore_zero)'}"
            )
        return np.where(ignored, IGNORED, numbers).astype(np.uint8)

    def _says_nothing(self, labels: np.ndarray) -> np.ndarray:
        return (labels == IGNORED) | (labels == 0) if self.ignore_zero else labels == IGNORED

    def _counted(self) -> tuple[int, str]:
        """As many classes as the highest label asks for, of all annotations that can be read; and where it is."""
        most, where = 0, ""
        for number in self.numbers[:, 1].tolist():
            try:
                labels = read_label_map(cast(bytes, self.annotations.fetch(number)))
            except (ValueError, OSError):
                continue  # it is named when it is its turn
            found = labels[~self._says_nothing(labels)]
            count = int(found.max(initial=-1)) + 1 - self.ignore_zero
            if count > most:
                most, where = count, f" (the highest label, {found.max()}, is in {self.annotations.name(number)})"
        return most, where


def read_label_map(content: bytes) -> np.ndarray:
    """The numbers in an annotation, int32 ``(H, W)``; of a palette the indices, never the colours.

    Raises:
        ValueError: an empty or damaged file, colours, or a JPEG, whose numbers are not those that were saved.
    """
    if not content:
        raise ValueError("its annotation is an empty file")
    try:
        image = open_image(content)
        if image.mode not in _INDEX_MODES or image.format == "JPEG":
            raise ValueError(
                f"its annotation is a picture ({image.format} {image.mode}), no label map: expected one number per "
                "pixel, as a PNG with grey or palette indices"
            )
        # Pillow stretches grey of 2 and 4 bit to 0..255; the depth is the 25th byte of a PNG.
        stretched = image.format == "PNG" and image.mode == "L"
        return np.asarray(image).astype(np.int32) // (255 // (2 ** content[24] - 1) if stretched else 1)
    except UnidentifiedImageError:
        raise ValueError(f"its annotation is no image, it begins with {content[:16]!r}") from None
    except (OSError, SyntaxError) as error:  # Pillow says both of damaged PNG
        raise ValueError(f"its annotation is damaged: {error}") from None


class SegmentedSources(NamedTuple):
    """What a stage is trained on and judged by."""

    training: Source
    validation: Source
    classes: list[str]
    problems: list[Problem]
    """Files that are left out, with the reason."""


def segmented_sources(
    path: str | Path,
    decoder: Decoder,
    validation_images: int,
    *,
    annotations: str | Path | None = None,
    val_path: str | Path | None = None,
    val_annotations: str | Path | None = None,
    classes: Sequence[str] | int | None = None,
    ignore_zero: bool = False,
) -> SegmentedSources:
    """Images with label maps, and held-out ones.

    - ``path`` alone: a folder with ``images`` and ``annotations``, each with ``training`` and ``validation`` (or
      ``train``, ``val``, ``test``) as ADE20K has them, or without, then with the split of :func:`split_validation`: those
      images that are kept from pretraining as well.
    - ``path`` and ``annotations``: two folders (or archives); held-out ones are ``val_path`` and
      ``val_annotations``, or those of the split.

    Args:
        classes: names or number; None: ``objectInfo150.txt`` or ``classes.txt`` in ``path``, see
            :func:`read_class_names`; else the annotations are counted.
        ignore_zero: as of :class:`SegmentedImages`.

    Raises:
        ValueError: as :class:`SegmentedImages`; folders that are missing, too few images to hold any out.
        OSError: something cannot be read.
    """
    if (val_path is None) != (val_annotations is None):
        raise ValueError("held-out images need both val_path and val_annotations: give the one that is missing")
    training_part, val_part = "", ""
    if classes is None:
        classes = class_names_in(path)
    images = path
    if annotations is None:
        images, annotations = _folders(path)
        if val_path is None:
            training_part, val_part = _part(images, TRAINING), _part(images, VALIDATION)
    if training_part and val_part:
        val_path, val_annotations = Path(images) / val_part, Path(annotations) / val_part
        images, annotations = Path(images) / training_part, Path(annotations) / training_part
    training = _open_pair(images, annotations, decoder, classes, ignore_zero)
    if val_path is not None and val_annotations is not None:
        validation = _open_pair(val_path, val_annotations, decoder, training.classes, ignore_zero)
        return SegmentedSources(training, validation, training.classes, training.problems + validation.problems)
    kept, held = (_pairs_of(training, part) for part in split_validation(training.images, validation_images))
    if not len(held):
        raise ValueError(f"{path} holds {len(training)} images: too few to hold a tenth out, 10 are the least")
    return SegmentedSources(kept, held, training.classes, training.problems)


def validation_segments(
    path: str | Path,
    decoder: Decoder,
    *,
    annotations: str | Path | None = None,
    classes: Sequence[str] | int | None = None,
    ignore_zero: bool = False,
) -> SegmentedImages:
    """Images with label maps that a model is to be judged by: of a folder as ADE20K has it the validation part, where
    it has one; of two folders all.

    Raises:
        ValueError, OSError: as of :func:`segmented_sources`.
    """
    images = path
    if annotations is None:
        images, annotations = _folders(path)
        if part := _part(images, VALIDATION):
            images, annotations = images / part, annotations / part
    return _open_pair(images, annotations, decoder, classes, ignore_zero)


def class_names_in(folder: str | Path) -> list[str] | None:
    """From a file of names that lies in the folder of a data set; None where there is none."""
    files = (Path(folder).expanduser() / name for name in NAME_FILES)
    return next((read_class_names(file) for file in files if file.is_file()), None)


def read_class_names(file: Path) -> list[str]:
    """One name a line; of a table with tabs (ADE20K) the last column, without a first line that calls it Name.

    Raises:
        ValueError: the file is empty.
    """
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if rows and len(rows[0]) > 1 and rows[0][-1].strip().lower() == "name":
        rows = rows[1:]
    if not rows:
        raise ValueError(f"{file} names no classes: expected one name per line")
    return [row[-1].strip() for row in rows]


def _open_pair(
    images: str | Path,
    annotations: str | Path,
    decoder: Decoder,
    classes: Sequence[str] | int | None,
    ignore_zero: bool,
) -> SegmentedImages:
    return SegmentedImages(
        open_files(images), open_files(annotations), decoder, classes=classes, ignore_zero=ignore_zero
    )


def _pairs_of(source: SegmentedImages, images: Source | None) -> Subset:
    """Those whose image is among some of the images."""
    numbers = images.indices if isinstance(images, Subset) else torch.empty(0)
    return Subset(source, torch.isin(source.numbers[:, 0], numbers).nonzero().flatten())


def _folders(path: str | Path) -> tuple[Path, Path]:
    """Those of images and of annotations."""
    root = Path(path).expanduser()
    images, annotations = root / "images", root / "annotations"
    if not (images.is_dir() and annotations.is_dir()):
        raise ValueError(f"{path} has no folders images and annotations: say where the annotations are")
    return images, annotations


def _part(folder: Path, names: Sequence[str]) -> str:
    """The first of these folders that is there, or nothing."""
    return next((name for name in names if (folder / name).is_dir()), "")


def _by_path(files: Files, problems: list[Problem]) -> dict[str, int]:
    """The number of every file by its path below the folder or archive, without the ending."""
    places = getattr(files, "archives", [])
    root = f"{places[0] if len(places) == 1 else getattr(files, 'root', '')}/"
    numbers: dict[str, int] = {}
    for number in range(len(files)):
        path = os.path.splitext(files.name(number).removeprefix(root))[0]
        if numbers.setdefault(path, number) != number:
            problems.append((files.name(number), f"has the same name as {files.name(numbers[path])}"))
    return numbers


def _by(size: Sequence[int]) -> str:
    return " x ".join(str(side) for side in size)
