"""Images by number, from whatever they lie in. Where they lie is one thing, what they are another:
``Files`` give bytes, ``Images`` make pictures of them."""

from __future__ import annotations

import glob
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from simmim.data.clips import VideoDecoder
from simmim.data.decode import MODES, DecodedImage, Decoder, full_image
from simmim.data.listing import ARCHIVES, EXTENSIONS, LISTS, is_video, scan
from simmim.data.manifest import cached_manifest, keep_folder, load_manifest, open_manifest
from simmim.data.tables import PREFIX, STREAM, Array, open_data_set, open_stream, open_tables
from simmim.rng import derive_seed, permutation

INDEX = "index.arrow"
"""The manifest of a packed data set, beside its shards."""
VARIANTS = "imagenetv2-*"
ARRAYS = (".npy", ".tif", ".tiff")
"""Files that may have any number of channels."""


class Files(Protocol):
    """Contents of images by number: a folder, archives, a table, an array."""

    @property
    def classes(self) -> list[str] | None:
        """The names of classes in the order of their numbers, where somebody has written it down."""

    @property
    def blocks(self) -> Tensor | None:
        """int ``(n,)``, the block of each image, where images of one block had better be read together."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def fetch(self, index: int) -> bytes | np.ndarray: ...

    def labels(self) -> pa.Array | None: ...

    def part(self, name: str) -> Files | None: ...


class Source(Protocol):
    """Images by number."""

    @property
    def blocks(self) -> Tensor | None:
        """As of :class:`Files`."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a person would call this image: a path, usually."""

    def fetch(self, index: int) -> Any:
        """What disk or network are needed for; may take long, may be called by several threads at once."""

    def decode(self, content: Any) -> DecodedImage:
        """The picture of what ``fetch`` has brought. Damaged content raises almost anything."""


class LabelledSource(Source, Protocol):
    """Images with one class each."""

    @property
    def classes(self) -> Sequence[str]:
        """Their names; a label is a number into them."""

    def label(self, index: int) -> int: ...


class Images:
    """Pictures of any files; or videos, by a :class:`simmim.data.VideoDecoder`.

    Raises:
        ValueError: a number of channels that none of the files can have, videos for images or the other way round.
    """

    def __init__(self, files: Files, decoder: Decoder | None = None) -> None:
        self.files, self.decoder = files, decoder or Decoder()
        wants_videos = isinstance(self.decoder, VideoDecoder)
        if len(files) and is_video(files.name(0)) != wants_videos:
            kinds = ("videos", "images") if wants_videos else ("images", "videos")
            raise ValueError(f"wanted are {kinds[0]}, but {files.name(0)} is one of {len(files)} {kinds[1]}")
        if self.decoder.channels not in MODES and not isinstance(files, Array) and len(files):
            first = files.name(0)
            if Path(first).suffix and not first.lower().endswith(ARRAYS):
                raise ValueError(
                    f"image files have 1, 3 or 4 channels, but the encoder wants in_chans={self.decoder.channels}: "
                    f"only {', '.join(ARRAYS)} can have so many, not {first}"
                )

    @property
    def blocks(self) -> Tensor | None:
        return self.files.blocks

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files.name(index)

    def fetch(self, index: int) -> bytes | np.ndarray:
        return self.files.fetch(index)

    def decode(self, content: bytes | np.ndarray) -> DecodedImage:
        return self.decoder(content)

    def read(self, index: int) -> Tensor:
        """The whole image, uint8 ``(c, H, W)``."""
        return full_image(self.decode(self.fetch(index)))


class LabelledImages(Images):
    """Images that have a class: the first folder of their path, or the label of a list or table.

    Classes are in the order that the data set gives them, or of their names, in numeric order where
    every name is a whole number (``10`` after ``9``, as in ImageNet-V2).

    Args:
        classes: the names that other images have given numbers to, for a validation set.

    Raises:
        ValueError: images without a class, unknown classes, or fewer than two.
    """

    def __init__(self, files: Files, decoder: Decoder | None = None, classes: Sequence[str] | None = None) -> None:
        super().__init__(files, decoder)
        labels = files.labels()
        place = _place(files)
        if labels is None:
            raise ValueError(f"{place} says nothing of classes: labels come from folders, lists or columns of labels")
        if labels.null_count:
            loose = pc.indices_nonzero(pc.is_null(labels))
            raise ValueError(
                f"{labels.null_count} image(s) in {place} have no class, {files.name(loose[0].as_py())} for one: "
                "labels are read from one subfolder per class"
            )
        found = set(pc.unique(labels).to_pylist())
        if classes is None:
            if len(found) < 2:
                raise ValueError(f"{place} holds one class only, {found.pop()}: expected one subfolder per class")
            numeric = all(name.isdecimal() for name in found)
            classes = files.classes or (sorted(found, key=int) if numeric else sorted(found))
        if unknown := sorted(found - set(classes)):
            raise ValueError(
                f"{place} holds classes that are not among the {len(classes)} known ones: {', '.join(unknown[:5])}"
                f"{' and others' if len(unknown) > 5 else ''}"
            )
        self.classes = list(classes)
        numbers = pc.index_in(labels, value_set=pa.array(self.classes, labels.type))
        self._labels = torch.from_numpy(numbers.to_numpy(zero_copy_only=False).astype(np.int32))

    def label(self, index: int) -> int:
        return int(self._labels[index])


class Subset:
    """Some of the images of a source, in a given order; labelled if the source is."""

    def __init__(self, source: Source, indices: Sequence[int] | Tensor) -> None:
        self.source = source
        self.indices = torch.as_tensor(indices, dtype=torch.int64)

    @property
    def classes(self) -> Sequence[str]:
        return cast(LabelledSource, self.source).classes

    @property
    def blocks(self) -> Tensor | None:
        return None if self.source.blocks is None else self.source.blocks[self.indices]

    def label(self, index: int) -> int:
        return cast(LabelledSource, self.source).label(int(self.indices[index]))

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def fetch(self, index: int) -> Any:
        return self.source.fetch(int(self.indices[index]))

    def decode(self, content: Any) -> DecodedImage:
        return self.source.decode(content)


def open_files(path: str | Path) -> Files:
    """Whatever ``path`` names.

    - a folder: of images, flat or nested; else of videos; else of ``.tar`` or ``.zip`` shards; else of parquet or Arrow
      files; packed by ``simmim data pack``; or saved by ``datasets``
    - a file: ``.zip``, ``.tar``, a list (``.txt``, ``.csv``, ``.tsv``), ``.parquet``, ``.arrow``, ``.npy``
    - a pattern of such files: ``shards/*.tar``
    - ``hf:NAME`` of a data set of ``datasets``, ``stream:hf:NAME`` or ``stream:PATTERN`` of parquet to be streamed

    Raises:
        ValueError: nothing of that kind.
        OSError: it cannot be read.
    """
    text = str(path)
    if not text:
        raise ValueError("a place without a name: give a folder of images, or . for this one")
    if text.startswith(STREAM):
        return open_stream(text)
    if text.startswith(PREFIX):
        return open_data_set(text)
    place = Path(path).expanduser().absolute()  # manifests are kept, whatever the working directory is next time
    if place.is_dir():
        return _open_folder(place)
    if place.is_file():
        return _open_shards(place, [place])
    matches = [Path(match) for match in sorted(glob.glob(str(place), recursive=True))]
    if not matches:
        raise ValueError(
            f"{text!r} is not a folder, nor a file or a pattern of files: expected something that holds images"
        )
    return _open_shards(place, matches)


def open_images(path: str | Path, decoder: Decoder | None = None) -> Images:
    """All images that ``path`` names, or the split to train on, as :func:`open_files`; without labels."""
    return Images(open_files(path), decoder)


def _open_folder(folder: Path) -> Files:
    if (folder / INDEX).exists():
        packed = load_manifest(folder / INDEX)
        assert packed is not None
        return packed
    if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
        return open_data_set(f"{PREFIX}{folder}")
    if (manifest := cached_manifest(folder)) is not None:
        return manifest
    began = time.time()
    found = scan(folder)
    if found.images or found.videos:
        return keep_folder(folder, found, began)
    if found.shards:
        return _open_shards(folder, found.shards)
    raise ValueError(
        f"no images in {folder} or below it ({found.num_others} other files): expected {' '.join(sorted(EXTENSIONS))}"
    )


def _open_shards(path: Path, files: list[Path]) -> Files:
    """Files of one kind, called ``path`` together."""
    kinds = {file.suffix.lower() for file in files}
    if kinds <= ARCHIVES:
        return open_manifest(path, files)
    if kinds == {".parquet"} or kinds == {".arrow"}:
        return open_tables(str(path), files)
    if len(files) == 1 and kinds <= LISTS:
        return open_manifest(path)
    if len(files) == 1 and kinds == {".npy"}:
        return Array(files[0])
    advice = ": unpack it first, its images cannot be read one by one" if kinds & {".gz", ".tgz", ".bz2", ".xz"} else ""
    raise ValueError(
        f"{path} is a file of a kind that holds no set of images ({' '.join(sorted(kinds))}){advice}"
        f"{'' if advice else ': expected .zip .tar .parquet .arrow .npy .txt .csv, or a folder'}"
    )


def validation_files(path: str | Path) -> Files:
    """What a model is judged by: the ``val`` part of ``path``, or all where it has none.

    Raises:
        ValueError, OSError: as :func:`open_files`.
    """
    files = open_files(path)
    return files.part("val") or files


def variants(data: str) -> list[str]:
    """The folders of ImageNet-V2 (arXiv 1902.10811) where data is what they lie in; else the data alone."""
    found = [] if is_name(data) else sorted(Path(data).expanduser().glob(VARIANTS))
    return [str(path) for path in found if path.is_dir()] or [data]


def is_name(path: str | Path) -> bool:
    """Whether a path is no path: the name of a data set, or built in."""
    return str(path).startswith((PREFIX, STREAM, "builtin:"))


def split_validation(source: Source, validation_images: int) -> tuple[Source, Source | None]:
    """Take a fixed random set of images out of training: ``(training, holdout)``.

    The same images for every seed and recipe, so that held-out losses compare. Never more than a
    tenth of the source; None when that leaves nothing. Of a stream it is the first images, so that
    they lie together.
    """
    count = min(validation_images, len(source) // 10)
    if count == 0:
        return source, None
    generator = torch.Generator().manual_seed(derive_seed("validation", 0))
    in_blocks = source.blocks is not None
    order = torch.arange(len(source)) if in_blocks else torch.randperm(len(source), generator=generator)
    return Subset(source, order[count:].sort().values), Subset(source, order[:count])


def training_images(path: str | Path, decoder: Decoder, validation_images: int) -> tuple[Source, Source | None]:
    """Images for training without labels, and held-out ones (None where too few are left to hold any out).

    Where there is a train and a val part only the first is used: no stage may see the other.

    Raises:
        ValueError, OSError: as :func:`open_files`.
    """
    files = open_files(path)
    train, val = files.part("train"), files.part("val")
    if train is not None and val is not None:
        files = train
    return split_validation(Images(files, decoder), validation_images)


def labelled_sources(
    path: str | Path, decoder: Decoder, validation_images: int, val_path: str | Path | None = None
) -> tuple[LabelledSource, LabelledSource]:
    """Training and held-out images with labels.

    ``path`` (its ``train`` where it has one) and ``val_path``; or ``path/train`` and ``path/val`` (or
    ``validation``, ``test``) where both are there; else the split of :func:`split_validation`.

    Raises:
        ValueError: as :class:`LabelledImages`; too few images to hold any out.
    """
    files = open_files(path)
    train, val = files.part("train"), files.part("val")
    if val_path is not None:
        training = LabelledImages(train or files, decoder)
        return training, LabelledImages(open_files(val_path), decoder, training.classes)
    if train is not None and val is not None:
        training = LabelledImages(train, decoder)
        return training, LabelledImages(val, decoder, training.classes)
    kept, validation = split_validation(LabelledImages(files, decoder), validation_images)
    if validation is None:
        raise ValueError(f"{path} holds {len(kept)} images: too few to hold a tenth out, 10 are the least")
    return cast(LabelledSource, kept), cast(LabelledSource, validation)


def few_labels(source: LabelledSource, labels_per_class: int, seed: int) -> LabelledSource:
    """``labels_per_class`` images of every class, drawn by ``seed``.

    Raises:
        ValueError: a class has fewer.
    """
    wanted = {label: labels_per_class for label in range(len(source.classes))}
    chosen = []
    for number in permutation(seed, 0, len(source)).tolist():
        label = source.label(number)
        if wanted.get(label):
            chosen.append(number)
            wanted[label] -= 1
            if not wanted[label]:
                del wanted[label]
        if not wanted:
            return cast(LabelledSource, Subset(source, chosen))
    label, missing = next(iter(wanted.items()))
    raise ValueError(
        f"class {source.classes[label]} has {labels_per_class - missing} images, but labels_per_class is {labels_per_class}: lower it"
    )


def _place(files: Files) -> str:
    """What a person calls all of it."""
    return str(getattr(files, "root", "") or (files.name(0).rpartition("/")[0] if len(files) else "the data"))
