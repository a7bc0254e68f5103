"""Listing of folders, path lists, zip and tar files: one entry for each image or video."""

from __future__ import annotations

import csv
import io
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PHOTOS = frozenset((".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".avif", ".jp2", ".bmp"))
EXTENSIONS = PHOTOS | {".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".npy"}
VIDEOS = frozenset((".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"))
ARCHIVES = frozenset((".zip", ".tar"))
SHARDS = ARCHIVES | {".parquet", ".arrow"}
LISTS = frozenset((".txt", ".lst", ".csv", ".tsv"))
TRAINING, VALIDATION = ("train", "training"), ("val", "validation", "test")
PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "video", "name")
LABEL_COLUMNS = ("label", "class", "category", "target")
KINETICS = ("youtube_id", "time_start", "time_end")
"""Columns of the Kinetics lists, which name a part of a video instead of a file."""
FILE, STORED, ZIPPED, UNREADABLE = 0, 1, 2, 3  # storage of an image: own file, bytes in a tar, zip entry, damaged
DEFLATED = 1 << 62  # flag bit in ``Entry.size``: the bytes are compressed with deflate


class Entry(NamedTuple):
    """One image: ``archive`` is the index of its archive, -1 for a file of its own."""

    name: str
    label: str | None = None
    archive: int = -1
    kind: int = FILE
    offset: int = 0
    size: int = 0


class Found(NamedTuple):
    """Contents of a folder and its subfolders."""

    images: list[str]
    """Relative paths, sorted."""
    folders: list[Path]
    """The folder and its subfolders."""
    shards: list[Path]
    """Archives and tables, sorted."""
    videos: list[str]
    """Relative paths, sorted."""
    num_others: int


def scan(root: Path) -> Found:
    """List a folder recursively; directory symlinks are followed once, hidden files are skipped.

    Raises:
        OSError: a folder cannot be read.
    """
    images: list[str] = []
    videos: list[str] = []
    shards: list[Path] = []
    watched: list[Path] = []
    num_others = 0
    folders, seen = [("", root)], set()
    while folders:
        prefix, folder = folders.pop()
        identity = os.stat(folder)
        if (identity.st_dev, identity.st_ino) in seen:
            continue
        seen.add((identity.st_dev, identity.st_ino))
        watched.append(folder)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append((f"{prefix}{entry.name}/", Path(entry.path)))
                elif is_image(entry.name) and entry.is_file():
                    images.append(prefix + entry.name)
                elif is_video(entry.name) and entry.is_file():
                    videos.append(prefix + entry.name)
                elif os.path.splitext(entry.name)[1].lower() in SHARDS:
                    shards.append(Path(entry.path))
                else:
                    num_others += 1
    return Found(sorted(images), watched, sorted(shards), sorted(videos), num_others)


def is_image(name: str) -> bool:
    """Return True if the extension is that of an image format."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def is_video(name: str) -> bool:
    """Return True if the extension is that of a video format."""
    return os.path.splitext(name)[1].lower() in VIDEOS


def read_list(path: Path) -> tuple[list[Entry], list[Path]]:
    """Read a text file with one path per line, a table with a path column and optionally labels, or a Kinetics list.

    Returns:
        The entries, and the files and folders that they depend on.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    if path.suffix.lower() in (".txt", ".lst"):
        lines = text.split("\n")
        entries = [Entry(line.strip()) for line in lines if line.strip() and not line.startswith("#")]
    else:
        rows = _read_table(path, text)
        head = [name.strip().lower() for name in rows[0]] if rows else []
        column, label = 0, 1
        if set(KINETICS) <= set(head):
            found = scan(path.parent)
            named = [dict(zip(head, row, strict=False)) for row in rows[1:]]
            return _find_kinetics(path, found.videos, named), [path, *found.folders]
        if rows and not (is_image(rows[0][0]) or is_video(rows[0][0])):
            column = next((head.index(word) for word in PATH_COLUMNS if word in head), -1)
            label = next((head.index(word) for word in LABEL_COLUMNS if word in head), len(head))
            if column < 0:
                raise ValueError(
                    f"{path} has the columns {', '.join(head)}: name the path column {' or '.join(PATH_COLUMNS)}"
                )
            rows = rows[1:]
        if short := next((row for row in rows if len(row) <= column), None):
            raise ValueError(f"{path} has a row without a path: {', '.join(short)}")
        entries = [Entry(row[column], (row[label] if label < len(row) else "") or None) for row in rows]
    if not entries:
        raise ValueError(f"{path} lists no images: expected one path per line, relative to {path.parent}")
    return entries, [path]


def _read_table(path: Path, text: str) -> list[list[str]]:
    """Split a CSV or TSV file into its non-empty rows."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        return [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    except csv.Error as error:
        raise ValueError(f"{path} is not a table of paths: {error}") from None


def _find_kinetics(path: Path, videos: list[str], rows: list[dict[str, str]]) -> list[Entry]:
    """Find videos with Kinetics file names, ``ID_000010_000020.mp4``, anywhere below the folder of the list.

    A missing video keeps its entry, so that reading it reports and counts it; some are no longer available online.
    """
    by_stem = {video.rpartition("/")[2].rpartition(".")[0]: video for video in videos}
    entries = []
    for line, row in enumerate(rows, start=2):
        try:
            stem = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
        except (KeyError, ValueError):
            raise ValueError(
                f"row {line} of {path} is {', '.join(row.values())}: expected {', '.join(KINETICS)}, times in seconds"
            ) from None
        entries.append(Entry(by_stem.get(stem, f"{stem}.mp4"), row.get("label")))
    if not {entry.name for entry in entries} & set(videos):
        raise ValueError(
            f"none of the {len(entries)} videos of {path} are in {path.parent} or below it ({len(videos)} others): "
            "expected files named ID_START_END.mp4, with six digits for each time, like dQw4w9WgXcQ_000010_000020.mp4"
        )
    return entries


def part_names(part: str) -> tuple[str, ...]:
    """Return the accepted names of the ``train`` or ``val`` part."""
    return {"val": VALIDATION, "train": TRAINING}.get(part, (part,))


def part_of(name: str) -> str | None:
    """Return ``train`` or ``val`` if a shard name contains it, as in ``imagenet-train-0001.tar``, else None."""
    words = re.split(r"[^a-z]+", name.lower())
    return "train" if "train" in words else "val" if any(word in words for word in VALIDATION) else None


def list_archives(archives: list[Path]) -> Iterator[Entry]:
    """List the images of all archives, sorted by name within each archive.

    If one of several archives is damaged, it is listed as one unreadable image. If archive names contain train and
    val, their images get these folders.
    """
    count = 0
    parts = [part_of(archive.name) for archive in archives]
    are_parts = "train" in parts and "val" in parts
    for index, archive in enumerate(archives):
        try:
            entries = _list_zip(archive, index) if archive.suffix.lower() == ".zip" else _list_tar(archive, index)
        except (zipfile.BadZipFile, tarfile.TarError, ValueError) as error:
            if len(archives) == 1:
                raise ValueError(f"{archive} is damaged or not an archive ({error})") from None
            entries = [Entry("", None, index, UNREADABLE)]
        count += len(entries)
        if are_parts and parts[index]:
            entries = [entry._replace(name=f"{parts[index]}/{entry.name}") for entry in entries]
        yield from sorted(entries, key=lambda entry: entry.name)
    if not count:
        raise ValueError(f"no images in {archives[0]}{' and others' if len(archives) > 1 else ''}")


def _list_zip(archive: Path, index: int) -> list[Entry]:
    with zipfile.ZipFile(archive) as file:
        found = [info for info in file.infolist() if not info.is_dir() and _is_visible(info.filename)]
    for info in found:
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
            raise ValueError(f"{info.filename} is encrypted or compressed by a method other than deflate")
    entries = []
    for info in found:
        size = info.compress_size | (DEFLATED if info.compress_type == zipfile.ZIP_DEFLATED else 0)
        entries.append(Entry(info.filename, None, index, ZIPPED, info.header_offset, size))
    return _without_common_folder(entries)


def _list_tar(archive: Path, index: int) -> list[Entry]:
    """List the images of a tar; in the WebDataset layout ``key.cls`` holds the label of ``key.jpg``."""
    entries: list[Entry] = []
    labels: dict[str, str] = {}
    try:
        with tarfile.open(archive, "r:") as file:
            for member in file:
                if not member.isfile():
                    continue
                if _is_visible(member.name):
                    name = member.name.removeprefix("./")
                    entries.append(Entry(name, None, index, STORED, member.offset_data, member.size))
                elif member.name.endswith(".cls") and member.size < 1000:
                    content = file.extractfile(member)
                    assert content is not None
                    labels[member.name.removeprefix("./")[:-4]] = content.read().decode("utf-8", "replace").strip()
    except tarfile.ReadError:
        if not entries:
            raise
    entries = [entry._replace(label=labels.get(os.path.splitext(entry.name)[0])) for entry in entries]
    return _without_common_folder(entries)


def _is_visible(name: str) -> bool:
    return is_image(name) and not any(part.startswith(".") for part in name.removeprefix("./").split("/"))


def _without_common_folder(entries: list[Entry]) -> list[Entry]:
    """Remove the folder that contains everything else in an archive, because it is not a class name."""
    while entries:
        folders = {entry.name.partition("/")[:2] for entry in entries}
        folder, slash = folders.pop()
        # A folder directly above the images is a class folder and has to stay.
        if folders or not slash or not all("/" in entry.name[len(folder) + 1 :] for entry in entries):
            return entries
        entries = [entry._replace(name=entry.name[len(folder) + 1 :]) for entry in entries]
    return entries
