"""Image sources. Storage and decoding are separate: ``Files`` return encoded images, ``Images`` decode them."""

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
from simmim.data.manifest import cached_manifest, load_manifest, make_folder_manifest, open_manifest
from simmim.data.tables import HF_PREFIX, STREAM_PREFIX, Array, open_data_set, open_stream, open_tables
from simmim.rng import derive_seed, permutation

INDEX_FILE = "index.arrow"
"""The manifest of a packed data set, next to its shards."""
IMAGENET_V2 = "imagenetv2-*"
ARRAY_EXTENSIONS = (".npy", ".tif", ".tiff")
"""Formats that may have any number of channels."""


class Files(Protocol):
    """Encoded images by index, in a folder, archives, a table or an array."""

    @property
    def classes(self) -> list[str] | None:
        """Class names in the order of their indices, if the data set defines it."""

    @property
    def blocks(self) -> Tensor | None:
        """int ``(n,)``: the storage block of each image, if images of a block should be read together."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def fetch(self, index: int) -> bytes | np.ndarray: ...

    def labels(self) -> pa.Array | None:
        """Return the class name of each image, or None."""

    def part(self, name: str) -> Files | None:
        """Return the ``train`` or ``val`` part, or None."""


class Source(Protocol):
    """Images by index."""

    @property
    def blocks(self) -> Tensor | None:
        """See :class:`Files`."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return a name that helps the user find this image, usually its path."""

    def fetch(self, index: int) -> Any:
        """Read the content from disk or network; may block, and several threads may call it at once."""

    def decode(self, content: Any) -> DecodedImage:
        """Decode the content that ``fetch`` returned. Damaged content may raise any exception."""


class LabelledSource(Source, Protocol):
    """Images with one label each."""

    @property
    def classes(self) -> Sequence[str]:
        """Class names; a label is an index into them."""

    def label(self, index: int) -> int: ...


class Images:
    """Files with a decoder: images, or videos with a :class:`simmim.data.VideoDecoder`.

    Raises:
        ValueError: the file format cannot have that many channels; or videos were expected and images found, or
            the other way round.
    """

    def __init__(self, files: Files, decoder: Decoder | None = None) -> None:
        self.files, self.decoder = files, decoder or Decoder()
        wants_videos = isinstance(self.decoder, VideoDecoder)
        if len(files) and is_video(files.name(0)) != wants_videos:
            kinds = ("videos", "images") if wants_videos else ("images", "videos")
            raise ValueError(f"expected {kinds[0]}, found {len(files)} {kinds[1]}, for example {files.name(0)}")
        if self.decoder.channels not in MODES and not isinstance(files, Array) and len(files):
            first = files.name(0)
            if Path(first).suffix and not first.lower().endswith(ARRAY_EXTENSIONS):
                raise ValueError(
                    f"image files have 1, 3 or 4 channels, but the encoder has in_chans={self.decoder.channels}: "
                    f"only {', '.join(ARRAY_EXTENSIONS)} files can have that many channels, not {first}"
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
        """Decode the full image: uint8 ``(c, H, W)``."""
        return full_image(self.decode(self.fetch(index)))


class LabelledImages(Images):
    """Images with a class each: the first folder of their path, or the label in a list or table.

    Classes keep the order that the data set defines; otherwise they are sorted by name, numerically if
    all names are integers (``10`` after ``9``, as in ImageNet-V2).

    Args:
        classes: class names of the training images, when these images are for validation.

    Raises:
        ValueError: images without a class, unknown classes, or fewer than two classes.
    """

    def __init__(self, files: Files, decoder: Decoder | None = None, classes: Sequence[str] | None = None) -> None:
        super().__init__(files, decoder)
        labels = files.labels()
        path = _describe(files)
        if labels is None:
            raise ValueError(f"{path} has no class labels: they are read from class folders, lists or label columns")
        if labels.null_count:
            unlabelled = pc.indices_nonzero(pc.is_null(labels))
            raise ValueError(
                f"{labels.null_count} image(s) in {path} have no class, "
                f"for example {files.name(unlabelled[0].as_py())}: put each class into its own subfolder"
            )
        found = set(pc.unique(labels).to_pylist())
        if classes is None:
            if len(found) < 2:
                raise ValueError(f"{path} has only one class, {found.pop()}: expected one subfolder per class")
            numeric = all(name.isdecimal() for name in found)
            classes = files.classes or (sorted(found, key=int) if numeric else sorted(found))
        if unknown := sorted(found - set(classes)):
            raise ValueError(
                f"{path} has classes that are not among the {len(classes)} training classes: {', '.join(unknown[:5])}"
                f"{' and others' if len(unknown) > 5 else ''}"
            )
        self.classes = list(classes)
        indices = pc.index_in(labels, value_set=pa.array(self.classes, labels.type))
        self._labels = torch.from_numpy(indices.to_numpy(zero_copy_only=False).astype(np.int32))

    def label(self, index: int) -> int:
        return int(self._labels[index])


class Subset:
    """Selected images of a source, in a given order; labelled if the source is labelled."""

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
    """Open the image files at ``path``.

    - a folder: with images, flat or nested; else videos; else ``.tar`` or ``.zip`` shards; else Parquet or Arrow
      files; or packed by ``simmim data pack``; or saved by ``datasets``
    - a file: ``.zip``, ``.tar``, a list (``.txt``, ``.csv``, ``.tsv``), ``.parquet``, ``.arrow``, ``.npy``
    - a glob pattern of such files: ``shards/*.tar``
    - ``hf:NAME``: a data set of ``datasets``; ``stream:hf:NAME`` or ``stream:PATTERN``: Parquet files to stream

    Raises:
        ValueError: ``path`` is none of these.
        OSError: it cannot be read.
    """
    text = str(path)
    if not text:
        raise ValueError("empty path: give a folder of images, or . for the current one")
    if text.startswith(STREAM_PREFIX):
        return open_stream(text)
    if text.startswith(HF_PREFIX):
        return open_data_set(text)
    absolute = Path(path).expanduser().absolute()  # cached manifests must not depend on the working directory
    if absolute.is_dir():
        return _open_folder(absolute)
    if absolute.is_file():
        return _open_shards(absolute, [absolute])
    matches = [Path(match) for match in sorted(glob.glob(str(absolute), recursive=True))]
    if not matches:
        raise ValueError(f"{text!r} is not a folder, a file or a pattern that matches files: give a path with images")
    return _open_shards(absolute, matches)


def open_images(path: str | Path, decoder: Decoder | None = None) -> Images:
    """Open the images at ``path``, or its training split, without labels; see :func:`open_files`."""
    return Images(open_files(path), decoder)


def _open_folder(folder: Path) -> Files:
    if (folder / INDEX_FILE).exists():
        packed = load_manifest(folder / INDEX_FILE)
        assert packed is not None
        return packed
    if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
        return open_data_set(f"{HF_PREFIX}{folder}")
    if (manifest := cached_manifest(folder)) is not None:
        return manifest
    began = time.time()
    found = scan(folder)
    if found.images or found.videos:
        return make_folder_manifest(folder, found, began)
    if found.shards:
        return _open_shards(folder, found.shards)
    raise ValueError(
        f"no images in {folder} or its subfolders ({found.num_others} other files): "
        f"expected {' '.join(sorted(EXTENSIONS))}"
    )


def _open_shards(path: Path, files: list[Path]) -> Files:
    """Open files of one format; ``path`` names them together."""
    kinds = {file.suffix.lower() for file in files}
    if kinds <= ARCHIVES:
        return open_manifest(path, files)
    if kinds == {".parquet"} or kinds == {".arrow"}:
        return open_tables(str(path), files)
    if len(files) == 1 and kinds <= LISTS:
        return open_manifest(path)
    if len(files) == 1 and kinds == {".npy"}:
        return Array(files[0])
    is_compressed = bool(kinds & {".gz", ".tgz", ".bz2", ".xz"})
    advice = (
        "unpack it first, because single images cannot be read from a compressed archive"
        if is_compressed
        else "expected .zip .tar .parquet .arrow .npy .txt .csv, or a folder"
    )
    raise ValueError(f"{path} is not a supported image container ({' '.join(sorted(kinds))}): {advice}")


def validation_files(path: str | Path) -> Files:
    """Open the evaluation data at ``path``: its ``val`` part, or all files if there is none.

    Raises:
        ValueError, OSError: see :func:`open_files`.
    """
    files = open_files(path)
    return files.part("val") or files


def imagenet_v2_parts(data: str) -> list[str]:
    """Return the ImageNet-V2 folders (arXiv 1902.10811) inside ``data``, or ``data`` itself if there are none."""
    found = [] if is_data_set_name(data) else sorted(Path(data).expanduser().glob(IMAGENET_V2))
    return [str(path) for path in found if path.is_dir()] or [data]


def is_data_set_name(path: str | Path) -> bool:
    """Return True for the name of a data set (``hf:``, ``stream:``, ``builtin:``), False for a file system path."""
    return str(path).startswith((HF_PREFIX, STREAM_PREFIX, "builtin:"))


def split_validation(source: Source, validation_images: int) -> tuple[Source, Source | None]:
    """Split off a fixed random validation set: ``(training, validation)``.

    The same images for every seed and recipe, so that validation losses are comparable. At most a
    tenth of the source; None if that is no image. From a stream the first images are taken, so that
    they are stored together.
    """
    count = min(validation_images, len(source) // 10)
    if count == 0:
        return source, None
    generator = torch.Generator().manual_seed(derive_seed("validation", 0))
    in_blocks = source.blocks is not None
    order = torch.arange(len(source)) if in_blocks else torch.randperm(len(source), generator=generator)
    return Subset(source, order[count:].sort().values), Subset(source, order[:count])


def training_images(path: str | Path, decoder: Decoder, validation_images: int) -> tuple[Source, Source | None]:
    """Open images for training without labels, and for validation (None if there are too few images to split).

    If there are both a train and a val part, only train is used: no stage may train on the val part.

    Raises:
        ValueError, OSError: see :func:`open_files`.
    """
    files = open_files(path)
    train, val = files.part("train"), files.part("val")
    if train is not None and val is not None:
        files = train
    return split_validation(Images(files, decoder), validation_images)


def labelled_sources(
    path: str | Path, decoder: Decoder, validation_images: int, val_path: str | Path | None = None
) -> tuple[LabelledSource, LabelledSource]:
    """Open training and validation images with labels.

    These are ``path`` (or its ``train`` part) and ``val_path`` if that is given; else ``path/train`` and ``path/val``
    (or ``validation``, ``test``) if both exist; else the split of :func:`split_validation`.

    Raises:
        ValueError: see :class:`LabelledImages`; or too few images to split.
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
        raise ValueError(
            f"{path} has {len(kept)} images: too few to use a tenth for validation; "
            "give at least 10 images, or separate validation data"
        )
    return cast(LabelledSource, kept), cast(LabelledSource, validation)


def limit_labels(source: LabelledSource, labels_per_class: int, seed: int) -> LabelledSource:
    """Select ``labels_per_class`` images of every class at random, as a function of ``seed``.

    Raises:
        ValueError: a class has fewer images.
    """
    missing = {label: labels_per_class for label in range(len(source.classes))}
    chosen = []
    for index in permutation(seed, 0, len(source)).tolist():
        label = source.label(index)
        if missing.get(label):
            chosen.append(index)
            missing[label] -= 1
            if not missing[label]:
                del missing[label]
        if not missing:
            return cast(LabelledSource, Subset(source, chosen))
    label, count = next(iter(missing.items()))
    raise ValueError(
        f"class {source.classes[label]} has {labels_per_class - count} images, "
        f"but labels_per_class is {labels_per_class}: lower it"
    )


def _describe(files: Files) -> str:
    """Name the whole data set for error messages."""
    return str(getattr(files, "root", "") or (files.name(0).rpartition("/")[0] if len(files) else "the data"))
