"""Where each image lies: in a file of its own, or between two bytes of a zip or tar.

A manifest is one table, kept as an Arrow file and mapped into memory: a million images cost no
Python objects, workers share its pages, and the second start reads it instead of the folder.
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
    LOST,
    STORED,
    WHOLE,
    Entry,
    Found,
    list_archives,
    part_names,
    part_of,
    read_list,
)

MAX_BYTES = 1 << 30  # of one image
_SETTLED_S = 2.0  # a folder changed later than that before it was listed may change again within one tick of its clock


SCHEMA = pa.schema(
    [
        ("name", pa.large_string()),
        ("label", pa.large_string()),
        ("place", pa.int32()),
        ("kind", pa.int8()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
    ]
)


class Manifest:
    """Images of a folder, a list, zips or tars; ``fetch`` gives the content of one.

    Args:
        table: with the columns of ``SCHEMA``.
        root: what names of files are relative to.
        places: the archives.
    """

    blocks = None

    def __init__(
        self,
        table: pa.Table,
        root: Path,
        places: list[Path],
        *,
        prefix: str = "",
        classes: list[str] | None = None,
        file: Path | None = None,
    ) -> None:
        self.table, self.root, self.places, self.prefix, self.classes = table, root, places, prefix, classes
        self._file, self._folder = file, str(root)
        columns = [table.column(name) for name in SCHEMA.names]
        self._columns = [c.chunk(0) if c.num_chunks == 1 else c.combine_chunks() for c in columns]

    def __len__(self) -> int:
        return self.table.num_rows

    def __reduce__(self) -> Any:
        if self._file is not None:  # a worker that is started afresh maps the file instead of receiving the table
            return _reopen, (self._file, self.prefix)
        return _rebuild, (self.table, self.root, self.places, self.prefix, self.classes)

    def name(self, index: int) -> str:
        """A path for a person to find the image by."""
        if self._columns[3][index].as_py() == WHOLE:
            return os.path.join(self._folder, self._columns[0][index].as_py())
        entry = self._entry(index)
        part = part_of(self.places[entry.place].name)
        name = entry.name.removeprefix(f"{part}/") if part else entry.name
        return f"{self.places[entry.place]}/{name}".rstrip("/")

    def relative_name(self, index: int) -> str:
        """The path below the folder or in the archive."""
        return self._columns[0][index].as_py().removeprefix(self.prefix)

    def fetch(self, index: int) -> bytes:
        """The content of the image.

        Raises:
            OSError, ValueError, zlib.error: it cannot be had.
        """
        if self._columns[3][index].as_py() == WHOLE:
            with open(os.path.join(self._folder, self._columns[0][index].as_py()), "rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size > MAX_BYTES:
                    raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
                return file.readall()
        entry = self._entry(index)
        if entry.kind == LOST:
            raise ValueError("the archive is damaged or cut short")
        with open(self.places[entry.place], "rb", buffering=0) as file:
            start = entry.offset if entry.kind == STORED else _content_of_zip_entry(file, entry.offset)
            content = _read(file, start, entry.size & ~DEFLATED)
        return _inflate(content) if entry.size & DEFLATED else content

    def labels(self) -> pa.Array | None:
        """The name of the class of each image: that of the list or shard, else its first folder; None where none."""
        if (given := self.given_labels()) is not None:
            return given
        names = self._columns[0]
        names = pc.utf8_slice_codeunits(names, len(self.prefix)) if self.prefix else names
        parts = pc.split_pattern(names, "/", max_splits=1)
        return pc.if_else(pc.equal(pc.list_value_length(parts), 2), pc.list_element(parts, 0), None)

    def given_labels(self) -> pa.Array | None:
        """Those of the list or shard; None where there are none."""
        given = self._columns[1]
        return given if given.null_count < len(given) else None

    def part(self, name: str) -> Manifest | None:
        """Only what lies below ``train``, or ``val`` (``validation``, ``test``); None where there is nothing."""
        for folder in part_names(name):
            rows = self._below(f"{self.prefix}{folder}/")
            if rows is not None:
                return rows
        return None

    def _below(self, prefix: str) -> Manifest | None:
        numbers = pc.indices_nonzero(pc.starts_with(self._columns[0], prefix))
        if not len(numbers):
            return None
        first, count = numbers[0].as_py(), len(numbers)
        in_one_piece = numbers[-1].as_py() - first + 1 == count  # the usual case; it costs no memory
        table = self.table.slice(first, count) if in_one_piece else self.table.take(numbers).combine_chunks()
        return Manifest(table, self.root, self.places, prefix=prefix, classes=self.classes, file=self._file)

    def _entry(self, index: int) -> Entry:
        return Entry(*(column[index].as_py() for column in self._columns))


def _rebuild(table: pa.Table, root: Path, places: list[Path], prefix: str, classes: list[str] | None) -> Manifest:
    return Manifest(table, root, places, prefix=prefix, classes=classes)


def _reopen(file: Path, prefix: str) -> Manifest | None:
    manifest = load_manifest(file)
    return manifest if manifest is None or not prefix else manifest._below(prefix)


def open_manifest(path: Path, archives: list[Path] | None = None) -> Manifest:
    """The manifest of a list (``.txt``, ``.csv``) or of archives, from the cache where it still holds.

    Args:
        path: the list; for archives, what they are called together.

    Raises:
        ValueError: nothing in it, or an archive that is damaged (one of several is counted as one broken image).
        OSError: it cannot be read.
    """
    if (manifest := cached_manifest(path, archives)) is not None:
        return manifest
    began = time.time()
    if archives is not None:
        return _keep(path, Manifest(make_table(list_archives(archives)), path.parent, archives), archives, began)
    entries, watched = read_list(path)
    return _keep(path, Manifest(make_table(entries), path.parent, []), watched, began)


def keep_folder(root: Path, found: Found, began: float) -> Manifest:
    """The manifest of a folder that was listed at ``began``, s: its images, or its videos where it has none."""
    table = make_table(Entry(name) for name in found.images or found.videos)
    return _keep(root, Manifest(table, root, []), found.folders, began)


def _keep(path: Path, manifest: Manifest, watched: list[Path], began: float) -> Manifest:
    """Save it in the cache, if what was listed had settled before."""
    stamps = [_stamp(file) for file in watched]
    if all(modified < (began - _SETTLED_S) * 1e9 for _, modified, _ in stamps):
        try:
            cached = _cache_file(path, manifest.places)
            save_manifest(cached, manifest, stamps)
            return load_manifest(cached) or manifest
        except OSError:
            pass  # no place for a cache: it is listed again next time
    return manifest


def cached_manifest(path: Path, archives: list[Path] | None = None) -> Manifest | None:
    """That of an earlier time, if nothing has changed."""
    cached = _cache_file(path, archives)
    return load_manifest(cached, check=True) if cached.exists() else None


def make_table(entries: Iterable[Entry]) -> pa.Table:
    """One column for each field."""
    columns = list(zip(*entries, strict=True)) or [()] * len(SCHEMA)
    return pa.table([pa.array(c, field.type) for c, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def save_manifest(file: Path, manifest: Manifest, stamps: list[Any]) -> None:
    """Write beside and rename: several processes may do it at the same time.

    Relative places are below the folder of the file, which may then be moved.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    places = [str(place) for place in manifest.places]
    about = {"root": str(manifest.root), "places": places, "classes": manifest.classes, "stamps": stamps}
    schema = SCHEMA.with_metadata({"simmim": json.dumps(about)})
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(manifest.table.combine_chunks(), max_chunksize=max(1, len(manifest)))
    os.replace(unfinished, file)


def load_manifest(file: Path, *, check: bool = False) -> Manifest | None:
    """Map a saved manifest; None if ``check`` finds that what it lists has changed, or it is damaged."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        about = json.loads(table.schema.metadata[b"simmim"])
        if check and any(_stamp(Path(stamp[0])) != tuple(stamp) for stamp in about["stamps"]):
            return None
    except (OSError, pa.ArrowInvalid, KeyError, TypeError):
        if check:
            return None
        raise
    places = [file.parent / place for place in about["places"]]
    return Manifest(table, file.parent / about["root"], places, classes=about["classes"], file=file)


def _cache_file(path: Path, archives: list[Path] | None) -> Path:
    home = os.environ.get("SIMMIM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "simmim")
    key = "\0".join(str(place.resolve()) for place in [path, *(archives or [])])
    return Path(home).expanduser() / "manifests" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.arrow"


def _stamp(file: Path) -> tuple[str, int, int]:
    status = file.stat()
    # The size of a folder says nothing, and some file systems count it anew.
    return str(file), status.st_mtime_ns, 0 if file.is_dir() else status.st_size


def _content_of_zip_entry(file: Any, header: int) -> int:
    """Where the bytes begin: the names in the header before them may be longer than in the directory."""
    start = _read(file, header, 30)
    return header + 30 + int.from_bytes(start[26:28], "little") + int.from_bytes(start[28:30], "little")


def _read(file: Any, start: int, size: int) -> bytes:
    if size > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
    file.seek(start)
    content = file.read(size)
    if len(content) < size:
        raise ValueError(f"the archive is cut short: {len(content)} bytes of {size}")
    return content


def _inflate(content: bytes) -> bytes:
    """Of a zip entry; one that grows beyond all bounds is refused."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    result = stream.decompress(content, MAX_BYTES)
    if stream.unconsumed_tail:
        raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
    if not stream.eof:
        raise ValueError("the deflated content is cut short")
    return result
