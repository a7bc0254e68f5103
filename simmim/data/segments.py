"""Images with label maps, one class per pixel, in the layout of ADE20K.

Label maps are uint8, which limits them to 255 classes; 255 marks pixels without a label.
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
"""Label of pixels that count neither in training nor in evaluation."""
MAX_CLASSES = 255
CLASS_NAME_FILES = ("objectInfo150.txt", "classes.txt")
_INDEX_MODES = ("1", "L", "P", "I;16", "I;16B", "I;16L", "I")
Problem = tuple[str, str]
"""The name of a file, and why it is left out."""


class SegmentedImage:
    """An image and its label map.

    Args:
        segments: uint8 ``(H, W)``: class indices, or ``IGNORED``.
    """

    def __init__(self, image: DecodedImage, segments: Tensor) -> None:
        self.image, self.segments = image, segments
        self.size, self.kind = image.size, image.kind

    def crop(self, box: Box, size: tuple[int, int], interpolation: str = "bilinear", *, flip: bool = False) -> Tensor:
        """Crop and resize the image alone, without its label map."""
        return self.image.crop(box, size, interpolation, flip=flip)


class SegmentedImages:
    """A source of :class:`SegmentedImage`: images and annotations, matched by relative path without the extension.

    ``problems`` lists images without an annotation and annotations without an image, which are left out. Of files
    that differ only in the extension, all but the first are left out and listed as well.

    Args:
        annotations: one integer per pixel: PNG with gray or palette indices, of any bit depth.
        classes: their names or count; None: read all annotations and take the count from the highest label. Classes
            without a name are called by their index.
        ignore_zero: label 0 marks pixels without a label and the first class has label 1 (ADE20K). 255 always marks
            pixels without a label.

    Raises:
        ValueError: no image has an annotation; fewer than two classes, or too many; channels as :class:`Images`.
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
        of_images, of_annotations = _index_by_path(images, self.problems), _index_by_path(annotations, self.problems)
        for files, these, others, reason in (
            (images, of_images, of_annotations, "has no annotation"),
            (annotations, of_annotations, of_images, "has no image"),
        ):
            self.problems += [(files.name(index), reason) for path, index in these.items() if path not in others]
        paths = [path for path in of_images if path in of_annotations]
        if not paths:
            first = "; ".join(f"{name} {reason}" for name, reason in self.problems[:2])
            raise ValueError(
                f"none of {len(of_images)} images has an annotation ({first}): expected the same relative path in the "
                "annotation folder, apart from the extension"
            )
        self.pairs = torch.tensor([(of_images[path], of_annotations[path]) for path in paths])
        """int64 ``(n, 2)``: index of the image and of its annotation."""
        highest = ""
        if classes is None:
            classes, highest = self._count_classes()
        names = [str(label) for label in range(classes)] if isinstance(classes, int) else list(classes)
        if not 2 <= len(names) <= MAX_CLASSES - ignore_zero:
            raise ValueError(f"{len(names)} classes in label maps{highest}: expected 2 to {MAX_CLASSES - ignore_zero}")
        self.classes = names

    @property
    def blocks(self) -> Tensor | None:
        return None if self.images.blocks is None else self.images.blocks[self.pairs[:, 0]]

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return self.images.name(int(self.pairs[index, 0]))

    def fetch(self, index: int) -> tuple[bytes | np.ndarray, bytes]:
        """Read both files."""
        image, annotation = self.pairs[index].tolist()
        return self.images.fetch(image), cast(bytes, self.annotations.fetch(annotation))

    def decode(self, content: tuple[bytes | np.ndarray, bytes]) -> SegmentedImage:
        """Combine the image with its label map.

        Raises:
            ValueError: the annotation is not a label map, has another size, or has labels that are not classes.
        """
        image, labels = self.images.decode(content[0]), read_label_map(content[1])
        if labels.shape != tuple(image.size):
            raise ValueError(f"is {_format_size(image.size)} px, but its annotation is {_format_size(labels.shape)} px")
        return SegmentedImage(image, torch.from_numpy(self._class_indices(labels)))

    def _class_indices(self, labels: np.ndarray) -> np.ndarray:
        """Convert the labels of a file to uint8 class indices."""
        ignored = self._is_ignored(labels)
        indices = np.where(ignored, 0, labels - self.ignore_zero)
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= len(self.classes):
            label, first = (low if low < 0 else high) + self.ignore_zero, int(self.ignore_zero)
            raise ValueError(
                f"its annotation contains the label {label}, but there are {len(self.classes)} classes, {first} to "
                f"{first + len(self.classes) - 1}{'' if first else ' (if 0 is not a class, set ignore_zero)'}"
            )
        return np.where(ignored, IGNORED, indices).astype(np.uint8)

    def _is_ignored(self, labels: np.ndarray) -> np.ndarray:
        return (labels == IGNORED) | (labels == 0) if self.ignore_zero else labels == IGNORED

    def _count_classes(self) -> tuple[int, str]:
        """Return the class count by the highest label of all readable annotations, and text about that label."""
        most, highest = 0, ""
        for index in self.pairs[:, 1].tolist():
            try:
                labels = read_label_map(cast(bytes, self.annotations.fetch(index)))
            except (ValueError, OSError):
                continue  # reported when the image itself is loaded
            found = labels[~self._is_ignored(labels)]
            count = int(found.max(initial=-1)) + 1 - self.ignore_zero
            if count > most:
                most, highest = count, f" (the highest label, {found.max()}, is in {self.annotations.name(index)})"
        return most, highest


def read_label_map(content: bytes) -> np.ndarray:
    """Read the integers of an annotation, int32 ``(H, W)``; for a palette image its indices, never its colors.

    Raises:
        ValueError: the file is empty or damaged, has colors, or is a JPEG, whose lossy compression changes labels.
    """
    if not content:
        raise ValueError("its annotation is an empty file")
    try:
        image = open_image(content)
        if image.mode not in _INDEX_MODES or image.format == "JPEG":
            raise ValueError(
                f"its annotation is not a label map ({image.format} {image.mode}): expected one integer per pixel, "
                "as a PNG with gray or palette indices"
            )
        # Pillow stretches gray of 2 and 4 bits to 0..255; the bit depth is the 25th byte of a PNG.
        stretched = image.format == "PNG" and image.mode == "L"
        return np.asarray(image).astype(np.int32) // (255 // (2 ** content[24] - 1) if stretched else 1)
    except UnidentifiedImageError:
        raise ValueError(f"its annotation is not an image (starts with {content[:16]!r})") from None
    except (OSError, SyntaxError) as error:  # Pillow raises either for a damaged PNG
        raise ValueError(f"its annotation is damaged: {error}") from None


class SegmentedSources(NamedTuple):
    """The training and validation data of a stage."""

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
    """Open training and validation images with label maps.

    - ``path`` alone: a folder with ``images`` and ``annotations``, either each with ``training`` and ``validation`` (or
      ``train``, ``val``, ``test``) as in ADE20K, or without; then the validation images are those of
      :func:`split_validation`, which are excluded from pretraining as well.
    - ``path`` and ``annotations``: two folders (or archives); the validation images are ``val_path`` and
      ``val_annotations``, or those of the split.

    Args:
        classes: names or count; None: the names in ``objectInfo150.txt`` or ``classes.txt`` in ``path``, see
            :func:`read_class_names`; without such a file the classes of the annotations are counted.
        ignore_zero: see :class:`SegmentedImages`.

    Raises:
        ValueError: as :class:`SegmentedImages`; missing folders, or too few images for a validation split.
        OSError: a file cannot be read.
    """
    if (val_path is None) != (val_annotations is None):
        raise ValueError("validation images need both val_path and val_annotations: give the missing one")
    training_part, val_part = "", ""
    if classes is None:
        classes = class_names_in(path)
    images = path
    if annotations is None:
        images, annotations = _image_and_annotation_folders(path)
        if val_path is None:
            training_part, val_part = _first_subfolder(images, TRAINING), _first_subfolder(images, VALIDATION)
    if training_part and val_part:
        val_path, val_annotations = Path(images) / val_part, Path(annotations) / val_part
        images, annotations = Path(images) / training_part, Path(annotations) / training_part
    training = _open_pair(images, annotations, decoder, classes, ignore_zero)
    if val_path is not None and val_annotations is not None:
        validation = _open_pair(val_path, val_annotations, decoder, training.classes, ignore_zero)
        return SegmentedSources(training, validation, training.classes, training.problems + validation.problems)
    kept, unseen = (_subset_of(training, part) for part in split_validation(training.images, validation_images))
    if not len(unseen):
        raise ValueError(
            f"{path} has only {len(training)} images: a validation split of a tenth needs at least 10; "
            "add images, or give val_path and val_annotations"
        )
    return SegmentedSources(kept, unseen, training.classes, training.problems)


def validation_segments(
    path: str | Path,
    decoder: Decoder,
    *,
    annotations: str | Path | None = None,
    classes: Sequence[str] | int | None = None,
    ignore_zero: bool = False,
) -> SegmentedImages:
    """Open images with label maps to evaluate on: the validation part of ``path`` if it has one, else all images.

    Raises:
        ValueError, OSError: as :func:`segmented_sources`.
    """
    images = path
    if annotations is None:
        images, annotations = _image_and_annotation_folders(path)
        if part := _first_subfolder(images, VALIDATION):
            images, annotations = images / part, annotations / part
    return _open_pair(images, annotations, decoder, classes, ignore_zero)


def class_names_in(folder: str | Path) -> list[str] | None:
    """Read the class names from a file in the folder of a data set; None if there is no such file."""
    files = (Path(folder).expanduser() / name for name in CLASS_NAME_FILES)
    return next((read_class_names(file) for file in files if file.is_file()), None)


def read_class_names(file: Path) -> list[str]:
    """Read one class name per line; from a table with tabs (ADE20K) the last column, without a header ``Name``.

    Raises:
        ValueError: the file is empty.
    """
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if rows and len(rows[0]) > 1 and rows[0][-1].strip().lower() == "name":
        rows = rows[1:]
    if not rows:
        raise ValueError(f"{file} contains no class names: expected one name per line")
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


def _subset_of(source: SegmentedImages, images: Source | None) -> Subset:
    """Return the examples whose image is among some of the images."""
    indices = images.indices if isinstance(images, Subset) else torch.empty(0)
    return Subset(source, torch.isin(source.pairs[:, 0], indices).nonzero().flatten())


def _image_and_annotation_folders(path: str | Path) -> tuple[Path, Path]:
    root = Path(path).expanduser()
    images, annotations = root / "images", root / "annotations"
    if not (images.is_dir() and annotations.is_dir()):
        raise ValueError(
            f"{path} does not contain the folders images and annotations: give the path of the annotations"
        )
    return images, annotations


def _first_subfolder(folder: Path, names: Sequence[str]) -> str:
    """Return the first of these names that is a subfolder, or an empty string."""
    return next((name for name in names if (folder / name).is_dir()), "")


def _index_by_path(files: Files, problems: list[Problem]) -> dict[str, int]:
    """Return the index of every file by its path relative to the folder or archive, without the extension."""
    archives = getattr(files, "archives", [])
    root = f"{archives[0] if len(archives) == 1 else getattr(files, 'root', '')}/"
    indices: dict[str, int] = {}
    for index in range(len(files)):
        path = os.path.splitext(files.name(index).removeprefix(root))[0]
        if indices.setdefault(path, index) != index:
            problems.append((files.name(index), f"has the same name as {files.name(indices[path])}"))
    return indices


def _format_size(size: Sequence[int]) -> str:
    return " x ".join(str(side) for side in size)
