"""Images that lie in tables and arrays: data sets of Hugging Face ``datasets``, parquet, ``.npy``."""

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

PREFIX, STREAM = "hf:", "stream:"
LABELS = ("label", "labels", "class", "category", "target", "fine_label")
BLOCKS_TOGETHER = 4
"""Row groups whose images are mixed with each other when a data set is streamed."""


class Table:
    """One split of a data set of ``datasets``.

    Args:
        splits: all splits.
        split: which one.
        path: what a person calls the data set.

    Raises:
        ValueError: no column of images.
    """

    blocks = None

    def __init__(self, splits: dict[str, Any], split: str, path: str) -> None:
        import datasets

        self._splits, self._split, self._path = splits, split, path
        rows = splits[split]
        kinds = {name: kind for name, kind in rows.features.items() if _holds_images(kind)}
        if not kinds:
            raise ValueError(f"{path} has no column of images: it has {dict(rows.features)}")
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
        """The name of the class of each image, or None."""
        if self._label is None:
            return None
        rows = self._splits[self._split].select_columns([self._label]).with_format("arrow")
        column = rows[:].column(0) if len(rows) else pa.array([])
        return _class_names(column, self.classes)

    def part(self, name: str) -> Table | None:
        """Another split: ``train``, or ``val`` (``validation``, ``test``)."""
        split = _split_of(name, self._splits)
        return Table(self._splits, split, self._path) if split else None


def open_data_set(path: str) -> Table:
    """``hf:NAME`` or ``hf:NAME:CONFIGURATION``, from the hub or a folder; the split to train on, if there is one.

    Raises:
        ValueError: it cannot be opened.
    """
    name, _, configuration = path.removeprefix(PREFIX).partition(":")
    folder = Path(name).expanduser()
    is_saved = any((folder / file).exists() for file in ("dataset_dict.json", "dataset_info.json"))
    return _open(path, *([folder] if is_saved else [name, configuration or None]), saved=is_saved)


def open_tables(path: str, files: Sequence[Path]) -> Table:
    """Local ``.parquet`` or ``.arrow`` files; parquet is copied once into the cache of ``datasets``.

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
    except Exception as error:  # whatever the many formats raise
        raise ValueError(f"{path} cannot be opened by datasets: {error}") from None
    if not isinstance(splits, dict):
        splits = {"train": splits}
    return Table(splits, "train" if "train" in splits else next(iter(splits)), path)


class RowGroups:
    """Parquet files read where they are, near or far, by row groups: nothing is copied or downloaded first.

    Sizes are read from the ends of the files, so any image can be had by its number and a stream has
    the same exact order and resume as a folder. An epoch shuffles the row groups, then mixes the
    images of ``BLOCKS_TOGETHER`` of them at a time; a reader keeps so many in memory.

    Args:
        urls: anything that fsspec opens: paths, ``hf://``, ``s3://``, ``https://``.
        path: what a person calls the data set.

    Raises:
        ValueError: unreadable, or no column of images.
    """

    def __init__(self, urls: Sequence[str], path: str, splits: dict[str, Sequence[str]] | None = None) -> None:
        self._urls, self._path, self._splits = list(urls), path, splits or {}
        try:
            with ThreadPoolExecutor(16) as pool:
                files = list(pool.map(_parquet, self._urls))
        except (OSError, pa.ArrowInvalid, ImportError) as error:
            raise ValueError(f"{path} cannot be streamed: {error}") from None
        self._groups = [(url, group) for url, file in zip(self._urls, files, strict=True) for group in range(len(file))]
        rows = [count for file in files for count in file]
        self._starts = [0, *torch.tensor(rows).cumsum(0).tolist()]
        numbers = torch.arange(len(rows), dtype=torch.int32)
        self.blocks = torch.repeat_interleave(numbers, torch.tensor(rows))
        schema, features = _schema(self._urls[0])
        kinds = [field.name for field in schema if _is_arrow_image(field.type)]
        if not kinds:
            raise ValueError(f"{path} has no column of images: it has {', '.join(schema.names)}")
        self.column = _image_column(kinds)
        self._label, self.classes = _label_column(features)
        self._reset()

    def _reset(self) -> None:
        self._kept: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_kept", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return self._starts[-1]

    def name(self, index: int) -> str:
        group, row = self._place(index)
        url, part = self._groups[group]
        return f"{url}/{part}/{row}"

    def _place(self, index: int) -> tuple[int, int]:
        """Row group, and row in it."""
        group = bisect.bisect_right(self._starts, index) - 1
        return group, index - self._starts[group]

    def fetch(self, index: int) -> bytes:
        group, row = self._place(index)
        with self._lock:
            if group not in self._kept:
                url, part = self._groups[group]
                with _opened(url) as file:
                    self._kept[group] = pq.ParquetFile(file).read_row_group(part, columns=[self.column]).column(0)
            self._kept.move_to_end(group)
            while len(self._kept) > BLOCKS_TOGETHER:
                self._kept.popitem(last=False)
            column = self._kept[group]
        return _content(column[row].as_py())

    def labels(self) -> pa.Array | None:
        """The name of the class of each image, or None; reads the column of labels of every file."""
        if self._label is None:
            return None
        columns = []
        for url in self._urls:
            with _opened(url) as file:
                columns.append(pq.read_table(file, columns=[self._label]).column(0))
        return _class_names(pa.chunked_array([chunk for column in columns for chunk in column.chunks]), self.classes)

    def part(self, name: str) -> RowGroups | None:
        """Another split: ``train``, or ``val`` (``validation``, ``test``)."""
        split = _split_of(name, self._splits)
        if split is None:
            return None
        urls = list(self._splits[split])
        # Its own part needs no second look at the ends of all files.
        return self if urls == self._urls else RowGroups(urls, self._path, self._splits)


def open_stream(path: str) -> RowGroups:
    """``stream:hf:NAME``, or ``stream:`` and a pattern of parquet files on anything that fsspec knows.

    Raises:
        ValueError: not parquet, or not there.
    """
    name = path.removeprefix(STREAM)
    if not name.startswith(PREFIX):
        import fsspec

        system, pattern = fsspec.core.url_to_fs(name)
        urls = sorted(system.unstrip_protocol(found) for found in system.glob(pattern))
        splits: dict[str, Sequence[str]] = {"train": urls}
    else:
        import datasets

        place, _, configuration = name.removeprefix(PREFIX).partition(":")
        try:
            data_files = datasets.load_dataset_builder(place, configuration or None).config.data_files or {}
        except Exception as error:  # whatever the many formats and the network raise
            raise ValueError(f"{path} cannot be opened by datasets: {error}") from None
        splits = {str(split): [str(file) for file in found] for split, found in data_files.items()}
        urls = list(splits.get("train") or next(iter(splits.values()), []))
    if not urls or not all(url.endswith(".parquet") for url in urls):
        raise ValueError(
            f"{path} is not a set of parquet files, and only these can be streamed in an exact order: "
            f"download it ({name}), or pack it (simmim data pack)"
        )
    return RowGroups(urls, path, splits)


class Array:
    """Images in one ``.npy`` file, ``(n, c, H, W)``, ``(n, H, W, c)`` or ``(n, H, W)``, mapped into memory.

    Raises:
        ValueError: not such a file.
    """

    blocks, classes = None, None

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        try:
            self._array = np.load(self._path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is not an array that can be read: {error}") from None
        if self._array.ndim not in (3, 4):
            raise ValueError(
                f"{path} holds an array of shape {self._array.shape}: expected (n, c, H, W), (n, H, W, c) or (n, H, W)"
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
        """There are none."""

    def part(self, name: str) -> None:
        """There are none."""


def _split_of(part: str, splits: dict[str, Any]) -> str | None:
    """What the part is called here."""
    return next((name for name in part_names(part) if name in splits), None)


def _image_column(names: list[str]) -> str:
    """Of the columns of images the one that is meant."""
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


def _content(cell: Any) -> bytes:
    """Of an image of ``datasets``: bytes, or a path to them."""
    if isinstance(cell, dict):
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
    if cell is None:
        raise ValueError("the row has no image")
    return cell


def _label_column(features: Any) -> tuple[str | None, list[str] | None]:
    """Its name, and the names of the classes."""
    import datasets

    for name, kind in features.items():
        if isinstance(kind, datasets.ClassLabel):
            return name, list(kind.names)
    named = (name for name in LABELS if name in features)
    return next(named, None), None


def _class_names(column: Any, classes: list[str] | None) -> pa.Array:
    """Numbers or words of a column as the names of classes; -1, which stands for no label, as null."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if classes is None:
        return array.cast(pa.large_string())
    numbers = array.cast(pa.int64())
    known = pc.if_else(pc.greater_equal(numbers, 0), numbers, None)
    return pa.array(classes, pa.large_string()).take(known)


def _opened(url: str) -> Any:
    import fsspec

    return fsspec.open(url, "rb").open()


def _parquet(url: str) -> list[int]:
    """Rows of each row group."""
    with _opened(url) as file:
        about = pq.ParquetFile(file).metadata
        return [about.row_group(number).num_rows for number in range(about.num_row_groups)]


def _schema(url: str) -> tuple[pa.Schema, Any]:
    """Of a parquet file, and the features that ``datasets`` wrote into it."""
    import datasets

    with _opened(url) as file:
        schema = pq.ParquetFile(file).schema_arrow
    return schema, datasets.Features.from_arrow_schema(schema)
