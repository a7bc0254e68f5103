"""Manifests: tables that give the storage location of each image, a file or a byte range of a zip or tar.

A manifest is saved as an Arrow file and memory-mapped: it needs no Python objects per image, workers
share its pages, and the next run reads it instead of listing the folder again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from simmim.data.listing import (
    DEFLATED,
    FILE,
    STORED,
    UNREADABLE,
    Entry,
    Found,
    list_archives,
    part_names,
    part_of,
    read_list,
)

MAX_BYTES = 1 << 30  # largest accepted size of one image
_SETTLED_S = 2.0  # a folder modified less than this before listing may change again with the same time stamp

SCHEMA = pa.schema(
    [
        ("name", pa.large_string()),
        ("label", pa.large_string()),
        ("archive", pa.int32()),
        ("kind", pa.int8()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
    ]
)


class Manifest:
    """Image files of a folder, a list, or zip and tar archives.

    Args:
        table: one row per image, with the columns of ``SCHEMA``.
        root: folder that file names are relative to.
        archives: paths that the ``archive`` column indexes.
        prefix: folder of the selected part, removed from relative names.
        classes: class names in order, if the data set defines them.
        file: Arrow file that the table is mapped from.
    """

    blocks = None

    def __init__(
        self,
        table: pa.Table,
        root: Path,
        archives: list[Path],
        *,
        prefix: str = "",
        classes: list[str] | None = None,
        file: Path | None = None,
    ) -> None:
        self.table, self.root, self.archives, self.prefix, self.classes = table, root, archives, prefix, classes
        self._file, self._folder = file, str(root)
        columns = [table.column(name) for name in SCHEMA.names]
        self._columns = [c.chunk(0) if c.num_chunks == 1 else c.combine_chunks() for c in columns]

    def __len__(self) -> int:
        return self.table.num_rows

    def __reduce__(self) -> Any:
        if self._file is not None:  # a spawned worker maps the file instead of receiving the table
            return _reopen, (self._file, self.prefix)
        return _rebuild, (self.table, self.root, self.archives, self.prefix, self.classes)

    def name(self, index: int) -> str:
        """Return a path by which the user can find the image."""
        if self._columns[3][index].as_py() == FILE:
            return os.path.join(self._folder, self._columns[0][index].as_py())
        entry = self._entry(index)
        part = part_of(self.archives[entry.archive].name)
        name = entry.name.removeprefix(f"{part}/") if part else entry.name
        return f"{self.archives[entry.archive]}/{name}".rstrip("/")

    def relative_name(self, index: int) -> str:
        """Return the path relative to the folder, or inside the archive."""
        return self._columns[0][index].as_py().removeprefix(self.prefix)

    def fetch(self, index: int) -> bytes:
        """Read the encoded image.

        Raises:
            OSError, ValueError, zlib.error: it cannot be read.
        """
        if self._columns[3][index].as_py() == FILE:
            with open(os.path.join(self._folder, self._columns[0][index].as_py()), "rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size > MAX_BYTES:
                    raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
                return file.readall()
        entry = self._entry(index)
        if entry.kind == UNREADABLE:
            raise ValueError("the archive is damaged or truncated")
        with open(self.archives[entry.archive], "rb", buffering=0) as file:
            start = entry.offset if entry.kind == STORED else _content_of_zip_entry(file, entry.offset)
            content = _read(file, start, entry.size & ~DEFLATED)
        return _inflate(content) if entry.size & DEFLATED else content

    def labels(self) -> pa.Array | None:
        """Return the class name of each image: the label of the list or shard, else its first folder, else null."""
        if (labels := self.explicit_labels()) is not None:
            return labels
        names = self._columns[0]
        names = pc.utf8_slice_codeunits(names, len(self.prefix)) if self.prefix else names
        parts = pc.split_pattern(names, "/", max_splits=1)
        return pc.if_else(pc.equal(pc.list_value_length(parts), 2), pc.list_element(parts, 0), None)

    def explicit_labels(self) -> pa.Array | None:
        """Return the labels of the list or shard, or None if it has none."""
        labels = self._columns[1]
        return labels if labels.null_count < len(labels) else None

    def part(self, name: str) -> Manifest | None:
        """Select the images below ``train``, or ``val`` (``validation``, ``test``); None if there are none."""
        for folder in part_names(name):
            rows = self._below(f"{self.prefix}{folder}/")
            if rows is not None:
                return rows
        return None

    def _below(self, prefix: str) -> Manifest | None:
        indices = pc.indices_nonzero(pc.starts_with(self._columns[0], prefix))
        if not len(indices):
            return None
        first, count = indices[0].as_py(), len(indices)
        is_contiguous = indices[-1].as_py() - first + 1 == count  # the usual case, which needs no copy
        table = self.table.slice(first, count) if is_contiguous else self.table.take(indices).combine_chunks()
        return Manifest(table, self.root, self.archives, prefix=prefix, classes=self.classes, file=self._file)

    def _entry(self, index: int) -> Entry:
        return Entry(*(column[index].as_py() for column in self._columns))


def _rebuild(table: pa.Table, root: Path, archives: list[Path], prefix: str, classes: list[str] | None) -> Manifest:
    return Manifest(table, root, archives, prefix=prefix, classes=classes)


def _reopen(file: Path, prefix: str) -> Manifest | None:
    manifest = load_manifest(file)
    return manifest if manifest is None or not prefix else manifest._below(prefix)


def open_manifest(path: Path, archives: list[Path] | None = None) -> Manifest:
    """Open the manifest of a list (``.txt``, ``.csv``) or of archives, from the cache if it is still valid.

    Args:
        path: the list; for archives, the path or pattern that names them together.
        archives: the archives, or None for a list.

    Raises:
        ValueError: no images, or a damaged archive (one of several is counted as one corrupt image).
        OSError: it cannot be read.
    """
    if (manifest := cached_manifest(path, archives)) is not None:
        return manifest
    began = time.time()
    if archives is not None:
        manifest = Manifest(make_table(list_archives(archives)), path.parent, archives)
        return _cache_manifest(path, manifest, archives, began)
    entries, watched = read_list(path)
    return _cache_manifest(path, Manifest(make_table(entries), path.parent, []), watched, began)


def make_folder_manifest(root: Path, found: Found, began: float) -> Manifest:
    """Make the manifest of a folder, of its images or else its videos, and cache it.

    Args:
        found: contents of the folder.
        began: time at which listing began, s since the epoch.
    """
    table = make_table(Entry(name) for name in found.images or found.videos)
    return _cache_manifest(root, Manifest(table, root, []), found.folders, began)


def _cache_manifest(path: Path, manifest: Manifest, watched: list[Path], began: float) -> Manifest:
    """Save a manifest in the cache, unless a file or folder that it depends on was modified just before listing."""
    stamps = [_stamp(file) for file in watched]
    if all(modified < (began - _SETTLED_S) * 1e9 for _, modified, _ in stamps):
        try:
            cached = _cache_file(path, manifest.archives)
            save_manifest(cached, manifest, stamps)
            return load_manifest(cached) or manifest
        except OSError:
            pass  # the cache is not writable: list again next time
    return manifest


def cached_manifest(path: Path, archives: list[Path] | None = None) -> Manifest | None:
    """Load a manifest from the cache, or None if there is none or the files have changed."""
    cached = _cache_file(path, archives)
    return load_manifest(cached, check=True) if cached.exists() else None


def make_table(entries: Iterable[Entry]) -> pa.Table:
    """Make the manifest table, with one column for each field of the entries."""
    columns = list(zip(*entries, strict=True)) or [()] * len(SCHEMA)
    return pa.table([pa.array(c, field.type) for c, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def save_manifest(file: Path, manifest: Manifest, stamps: list[Any]) -> None:
    """Write a manifest to a temporary file and rename it, so that several processes may do so at the same time.

    Relative archive paths are relative to the folder of ``file``, so that this folder can be moved.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    archives = [str(archive) for archive in manifest.archives]
    metadata = {"root": str(manifest.root), "archives": archives, "classes": manifest.classes, "stamps": stamps}
    schema = SCHEMA.with_metadata({"simmim": json.dumps(metadata)})
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(manifest.table.combine_chunks(), max_chunksize=max(1, len(manifest)))
    os.replace(unfinished, file)


def load_manifest(file: Path, *, check: bool = False) -> Manifest | None:
    """Memory-map a saved manifest; with ``check``, return None if it is damaged or the listed files have changed."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        metadata = json.loads(table.schema.metadata[b"simmim"])
        archives = [file.parent / archive for archive in metadata["archives"]]
        if check and any(_stamp(Path(stamp[0])) != tuple(stamp) for stamp in metadata["stamps"]):
            return None
    except (OSError, pa.ArrowInvalid, KeyError, TypeError):
        if check:
            return None
        raise
    return Manifest(table, file.parent / metadata["root"], archives, classes=metadata["classes"], file=file)


def _cache_file(path: Path, archives: list[Path] | None) -> Path:
    home = os.environ.get("SIMMIM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "simmim")
    key = "\0".join(str(part.resolve()) for part in [path, *(archives or [])])
    return Path(home).expanduser() / "manifests" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.arrow"


def _stamp(file: Path) -> tuple[str, int, int]:
    status = file.stat()
    # The size of a folder has no meaning, and some file systems recompute it.
    return str(file), status.st_mtime_ns, 0 if file.is_dir() else status.st_size


def _content_of_zip_entry(file: Any, header: int) -> int:
    """Find the first content byte after the local header, whose name and extra fields may differ from the directory."""
    start = _read(file, header, 30)
    return header + 30 + int.from_bytes(start[26:28], "little") + int.from_bytes(start[28:30], "little")


def _read(file: Any, start: int, size: int) -> bytes:
    if size > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
    file.seek(start)
    content = file.read(size)
    if len(content) < size:
        raise ValueError(f"the archive is truncated: {len(content)} of {size} bytes")
    return content


def _inflate(content: bytes) -> bytes:
    """Decompress a zip entry, up to ``MAX_BYTES``."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    result = stream.decompress(content, MAX_BYTES)
    if stream.unconsumed_tail:
        raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
    if not stream.eof:
        raise ValueError("the compressed content is truncated")
    return result
