"""Images in tables and arrays: data sets of Hugging Face ``datasets``, Parquet, ``.npy``."""

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from simmim.data.listing import part_names, part_of

HF_PREFIX, STREAM_PREFIX = "hf:", "stream:"
LABELS = ("label", "labels", "class", "category", "target", "fine_label")
SHUFFLED_BLOCKS = 4
"""Number of row groups whose images are shuffled together when a data set is streamed."""
STORAGE_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""URL scheme -> optional dependency group of this package that can read it."""


class Table:
    """One split of a data set of ``datasets``.

    Args:
        splits: all splits of the data set, by name.
        split: name of the split to read.
        path: name of the data set in image names and error messages.

    Raises:
        ValueError: there is no image column.
    """

    blocks = None

    def __init__(self, splits: dict[str, Any], split: str, path: str) -> None:
        import datasets

        self._splits, self._split, self._path = splits, split, path
        rows = splits[split]
        kinds = {name: kind for name, kind in rows.features.items() if _holds_images(kind)}
        if not kinds:
            raise ValueError(f"{path} has no image column, only {dict(rows.features)}")
        self.column = _image_column(list(kinds))
        if isinstance(kinds[self.column], datasets.Image):
            rows = rows.cast_column(self.column, datasets.Image(decode=False))
        self._images = rows.select_columns([self.column])
        self._label, self.classes = _label_column(rows.features)

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f"{self._path}/{self._split}/{index}"

    def fetch(self, index: int) -> bytes:
        return _content(self._images[index][self.column])

    def labels(self) -> pa.Array | None:
        """Return the class name of each image, or None."""
        if self._label is None:
            return None
        rows = self._splits[self._split].select_columns([self._label]).with_format("arrow")
        column = rows[:].column(0) if len(rows) else pa.array([])
        return _class_names(column, self.classes)

    def part(self, name: str) -> Table | None:
        """Return another split, ``train`` or ``val`` (also called ``validation`` or ``test``), or None."""
        split = _split_of(name, self._splits)
        return Table(self._splits, split, self._path) if split else None


def open_data_set(path: str) -> Table:
    """Open ``hf:NAME`` or ``hf:NAME:CONFIGURATION`` from the hub or a folder, at its training split if there is one.

    Raises:
        ValueError: it cannot be opened.
    """
    name, _, configuration = path.removeprefix(HF_PREFIX).partition(":")
    folder = Path(name).expanduser()
    is_saved = any((folder / file).exists() for file in ("dataset_dict.json", "dataset_info.json"))
    return _open(path, *([folder] if is_saved else [name, configuration or None]), saved=is_saved)


def open_tables(path: str, files: Sequence[Path]) -> Table:
    """Open local ``.parquet`` or ``.arrow`` files; Parquet is copied once into the cache of ``datasets``.

    Raises:
        ValueError: it cannot be opened.
    """
    kind = "parquet" if files[0].suffix == ".parquet" else "arrow"
    found: dict[str, list[str]] = {}
    for file in files:  # train-00000-of-00004.parquet
        found.setdefault(part_of(file.name) or "train", []).append(str(file))
    return _open(path, kind, data_files=found)


def _open(path: str, *arguments: Any, saved: bool = False, **options: Any) -> Table:
    import datasets

    datasets.disable_progress_bars()
    try:
        splits = datasets.load_from_disk(*arguments) if saved else datasets.load_dataset(*arguments, **options)
    except Exception as error:  # loaders of different formats raise different exceptions
        raise ValueError(f"{path} cannot be opened by datasets: {error}") from None
    if not isinstance(splits, dict):
        splits = {"train": splits}
    return Table(splits, "train" if "train" in splits else next(iter(splits)), path)


class RowGroups:
    """Local or remote Parquet files, read by row groups without copying or downloading them first.

    Row counts are read from the file footers, so every image has an index, and a stream has the same
    deterministic order and exact resume as a folder. An epoch shuffles the row groups, then shuffles the
    images of ``SHUFFLED_BLOCKS`` row groups together; a reader keeps that many in memory.

    Args:
        urls: anything that fsspec opens: paths, ``hf://``, ``s3://``, ``https://``.
        path: name of the data set in error messages.
        splits: URLs of every split, by name.

    Raises:
        ValueError: unreadable files, or no image column.
    """

    def __init__(self, urls: Sequence[str], path: str, splits: dict[str, Sequence[str]] | None = None) -> None:
        self._urls, self._path, self._splits = list(urls), path, splits or {}
        try:
            with ThreadPoolExecutor(16) as pool:
                files = list(pool.map(_row_counts, self._urls))
        except (OSError, pa.ArrowInvalid, ImportError) as error:
            raise ValueError(f"{path} cannot be streamed: {error}") from None
        self._groups = [(url, group) for url, file in zip(self._urls, files, strict=True) for group in range(len(file))]
        rows = [count for file in files for count in file]
        self._starts = [0, *torch.tensor(rows).cumsum(0).tolist()]
        self.blocks = torch.repeat_interleave(torch.arange(len(rows), dtype=torch.int32), torch.tensor(rows))
        schema, features = _schema(self._urls[0])
        kinds = [field.name for field in schema if _is_arrow_image(field.type)]
        if not kinds:
            raise ValueError(f"{path} has no image column, only {', '.join(schema.names)}")
        self.column = _image_column(kinds)
        self._label, self.classes = _label_column(features)
        self._reset()

    def _reset(self) -> None:
        self._cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_cache", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return self._starts[-1]

    def name(self, index: int) -> str:
        group, row = self._locate(index)
        url, part = self._groups[group]
        return f"{url}/{part}/{row}"

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the row group of an image and its row in it."""
        group = bisect.bisect_right(self._starts, index) - 1
        return group, index - self._starts[group]

    def fetch(self, index: int) -> bytes:
        group, row = self._locate(index)
        with self._lock:
            if group not in self._cache:
                url, part = self._groups[group]
                with _open_url(url) as file:
                    self._cache[group] = pq.ParquetFile(file).read_row_group(part, columns=[self.column]).column(0)
            self._cache.move_to_end(group)
            while len(self._cache) > SHUFFLED_BLOCKS:
                self._cache.popitem(last=False)
            column = self._cache[group]
        return _content(column[row].as_py())

    def labels(self) -> pa.Array | None:
        """Return the class name of each image, or None; reads the label column of every file."""
        if self._label is None:
            return None
        columns = []
        for url in self._urls:
            with _open_url(url) as file:
                columns.append(pq.read_table(file, columns=[self._label]).column(0))
        return _class_names(pa.chunked_array([chunk for column in columns for chunk in column.chunks]), self.classes)

    def part(self, name: str) -> RowGroups | None:
        """Return another split, ``train`` or ``val`` (also called ``validation`` or ``test``), or None."""
        split = _split_of(name, self._splits)
        if split is None:
            return None
        urls = list(self._splits[split])
        # For the split that is already open, the file footers need not be read again.
        return self if urls == self._urls else RowGroups(urls, self._path, self._splits)


def open_stream(path: str) -> RowGroups:
    """Open ``stream:hf:NAME``, or ``stream:`` with a pattern of Parquet files on any file system of fsspec.

    Raises:
        ValueError: no Parquet files found, or the package for this file system is not installed.
    """
    name = path.removeprefix(STREAM_PREFIX)
    if not name.startswith(HF_PREFIX):
        urls = _matching_urls(name)
        splits: dict[str, Sequence[str]] = {"train": urls}
    else:
        import datasets

        repository, _, configuration = name.removeprefix(HF_PREFIX).partition(":")
        try:
            data_files = datasets.load_dataset_builder(repository, configuration or None).config.data_files or {}
        except Exception as error:  # formats and network raise many different exceptions
            raise ValueError(f"{path} cannot be opened by datasets: {error}") from None
        splits = {str(split): [str(file) for file in found] for split, found in data_files.items()}
        urls = list(splits.get("train") or next(iter(splits.values()), []))
    if not urls or not all(url.endswith(".parquet") for url in urls):
        raise ValueError(
            f"{path} is not a set of Parquet files, and only these can be streamed in a deterministic order: "
            f"download {name}, or pack it with simmim data pack"
        )
    return RowGroups(urls, path, splits)


def _matching_urls(pattern: str) -> list[str]:
    """List the URLs that match a glob pattern, sorted.

    Raises:
        ValueError: the package for this URL scheme is not installed.
    """
    import fsspec

    try:
        file_system, path = fsspec.core.url_to_fs(pattern)
    except ImportError as error:
        scheme = pattern.partition("://")[0]
        extra = STORAGE_EXTRAS.get(scheme)
        advice = f"pip install 'simmim[{extra}]'" if extra else str(error)
        raise ValueError(f"reading {pattern} needs a package for {scheme}:// that is not installed: {advice}") from None
    return sorted(file_system.unstrip_protocol(found) for found in file_system.glob(path))


class Array:
    """Images in one memory-mapped ``.npy`` file, ``(n, c, H, W)``, ``(n, H, W, c)`` or ``(n, H, W)``.

    Raises:
        ValueError: the file is not such an array.
    """

    blocks, classes = None, None

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        try:
            self._array = np.load(self._path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is not a readable NumPy array: {error}") from None
        if self._array.ndim not in (3, 4):
            raise ValueError(
                f"{path} has the shape {self._array.shape}: expected (n, c, H, W), (n, H, W, c) or (n, H, W)"
            )

    def __reduce__(self) -> Any:
        return Array, (self._path,)

    def __len__(self) -> int:
        return len(self._array)

    def name(self, index: int) -> str:
        return f"{self._path}/{index}"

    def fetch(self, index: int) -> np.ndarray:
        return np.array(self._array[index])

    def labels(self) -> None:
        """Return None: an array has no labels."""

    def part(self, name: str) -> None:
        """Return None: an array has no train or val part."""


def _split_of(part: str, splits: dict[str, Any]) -> str | None:
    """Return the name that this data set uses for a part, or None."""
    return next((name for name in part_names(part) if name in splits), None)


def _image_column(names: list[str]) -> str:
    """Choose among several image columns: ``image``, ``img``, or else the first."""
    return next((name for name in ("image", "img") if name in names), names[0])


def _holds_images(kind: Any) -> bool:
    import datasets

    if isinstance(kind, datasets.Image):
        return True
    if isinstance(kind, datasets.Value):
        return kind.dtype in ("binary", "large_binary")
    return isinstance(kind, dict) and "bytes" in kind


def _is_arrow_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _content(value: Any) -> bytes:
    """Return the bytes of an image value of ``datasets``, which holds them or a path to them."""
    if isinstance(value, dict):
        return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
    if value is None:
        raise ValueError("the row has no image")
    return value


def _label_column(features: Any) -> tuple[str | None, list[str] | None]:
    """Return the name of the label column and the class names, each None if there is none."""
    import datasets

    for name, kind in features.items():
        if isinstance(kind, datasets.ClassLabel):
            return name, list(kind.names)
    named = (name for name in LABELS if name in features)
    return next(named, None), None


def _class_names(column: Any, classes: list[str] | None) -> pa.Array:
    """Map the labels of a column to class names; -1, which means no label, becomes null."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if classes is None:
        return array.cast(pa.large_string())
    indices = array.cast(pa.int64())
    known = pc.if_else(pc.greater_equal(indices, 0), indices, None)
    return pa.array(classes, pa.large_string()).take(known)


def _open_url(url: str) -> Any:
    import fsspec

    return fsspec.open(url, "rb").open()


def _row_counts(url: str) -> list[int]:
    """Read the number of rows of each row group of a Parquet file."""
    with _open_url(url) as file:
        metadata = pq.ParquetFile(file).metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def _schema(url: str) -> tuple[pa.Schema, Any]:
    """Read the schema of a Parquet file and the features that ``datasets`` stored in it."""
    import datasets

    with _open_url(url) as file:
        schema = pq.ParquetFile(file).schema_arrow
    return schema, datasets.Features.from_arrow_schema(schema)
