"""Packing of images into shards: fewer and smaller files that decode several times faster.

Shards are tars in the WebDataset layout: ``000000042.jpg`` with a ``000000042.json`` that holds the
original name. ``index.arrow`` lists all images with their original names and in their original order,
so training from shards draws the same samples as training from the original files.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from simmim.data.decode import MODES, DecodedImage, Decoder, full_image
from simmim.data.listing import STORED, Entry
from simmim.data.loader import make_loader, reason_of
from simmim.data.manifest import Manifest, make_table, save_manifest
from simmim.data.reading import Reader
from simmim.data.sources import INDEX_FILE, Files, open_files
from simmim.data.survey import ImageStats, Summary, compute_stats, write_corrupt

SUMMARY, SETTINGS = "dataset.json", ".packing.json"


class Packing(NamedTuple):
    """Settings for packing."""

    short_side: int = 256
    """Shorter side in px to which larger images are reduced; smaller ones keep their size; 0: all keep it."""
    quality: int = 90
    """JPEG quality, with 4:2:0 chroma subsampling; 0: lossless (PNG)."""
    channels: int = 3
    value_range: tuple[float, float] | None = None
    shard_images: int = 2048
    """Number of images in each shard."""

    def check(self) -> None:
        """Raise ValueError for settings out of range."""
        for name, low, high in (("short_side", 0, 1 << 16), ("quality", 0, 100), ("shard_images", 1, 1 << 24)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be {low} to {high}, got {getattr(self, name)}")


def pack(path: str, out: Path, packing: Packing, *, num_workers: int = 0) -> dict[str, Any]:
    """Pack the images at ``path`` into the folder ``out``; shards that an earlier call finished are kept.

    Corrupt images are left out and listed in ``corrupt_images.csv``. If there are train and val parts, both
    are packed and stay separate.

    Returns:
        The content of ``dataset.json``: number of images, pixel mean and standard deviation, sizes, bytes.

    Raises:
        ValueError: invalid settings, no readable image, or ``out`` contains something else.
    """
    packing.check()
    parts = _parts(open_files(path))
    expanded = Path(path).expanduser()
    source = str(expanded.resolve()) if expanded.exists() else path
    settings = {"path": source, "images": sum(len(files) for _, files in parts), **packing._asdict()}
    settings = json.loads(json.dumps(settings))
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, settings)
    if (out / SUMMARY).exists():
        return json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    shards = _Shards(parts, out, packing)
    waiting = [[shard] for shard in range(len(shards)) if not shards.is_done(shard)]
    work = make_loader(shards, waiting, min(num_workers, len(waiting)))
    done = settings["images"] - sum(len(shards.indices(shard)) for (shard,) in waiting)
    with tqdm(total=settings["images"], initial=done, unit="image", disable=None) as bar:
        for count in work:
            bar.update(count)
    return _finish(shards, out, settings)


class _Shards(Dataset):
    """Data set whose item n writes shard n and is the number of images processed for it."""

    def __init__(self, parts: list[tuple[str, Files]], out: Path, packing: Packing) -> None:
        self.parts, self.out, self.packing = parts, out, packing
        self.decoder = Decoder(packing.channels, packing.value_range)
        self.starts = np.cumsum([0] + [len(files) for _, files in parts])
        self.labels = [_explicit_labels(files) for _, files in parts]

    def __len__(self) -> int:
        return -(-int(self.starts[-1]) // self.packing.shard_images)

    def indices(self, shard: int) -> range:
        start = shard * self.packing.shard_images
        return range(start, min(start + self.packing.shard_images, int(self.starts[-1])))

    def file(self, shard: int) -> Path:
        return self.out / f"shard-{shard:05d}.tar"

    def notes(self, shard: int) -> Path:
        """Return the path of the temporary JSON that describes a finished shard."""
        return self.out / f".shard-{shard:05d}.json"

    def is_done(self, shard: int) -> bool:
        return self.notes(shard).exists() and self.file(shard).exists()

    def __getitems__(self, shards: list[int]) -> int:
        return sum(self._write(shard) for shard in shards)

    def _fetch(self, index: int) -> Any:
        part, inner = self._locate(index)
        return self.parts[part][1].fetch(inner)

    def _locate(self, index: int) -> tuple[int, int]:
        """Return the part that an image belongs to, and its index in that part."""
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return part, index - int(self.starts[part])

    def _write(self, shard: int) -> int:
        indices = self.indices(shard)
        reader = Reader(self._fetch)
        entries, stats, before = [], [], 0
        unfinished = self.out / f".shard-{shard:05d}.tar.{os.getpid()}"
        with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index, content in zip(indices, reader.many(indices), strict=True):
                part, inner = self._locate(index)
                prefix, files = self.parts[part]
                name = files.relative_name(inner) if isinstance(files, Manifest) else f"{prefix}{inner:09d}"
                labels = self.labels[part]
                label = None if labels is None else labels[inner].as_py()
                try:
                    original = content()
                    image = self.decoder(original)
                    packed, suffix, pixels = encode(original, image, self.packing)
                except Exception as error:  # damaged bytes may raise any exception
                    stats.append(ImageStats(files.name(inner), reason_of(error)))
                    continue
                stats.append(compute_stats(name, image, pixels))
                before += len(original) if isinstance(original, bytes) else original.nbytes
                offset = _add(tar, f"{index:09d}{suffix}", packed)
                entries.append(Entry(name, label, shard, STORED, offset, len(packed)))
                _add(tar, f"{index:09d}.json", json.dumps({"name": name, "label": label}).encode())
        os.replace(unfinished, self.file(shard))
        notes = {"entries": entries, "stats": stats, "bytes_before": before}
        unfinished = self.notes(shard).with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(notes), encoding="utf-8")
        os.replace(unfinished, self.notes(shard))
        return len(indices)


def encode(original: Any, image: DecodedImage, packing: Packing) -> tuple[bytes, str, Tensor]:
    """Return content and suffix of the packed image, and its pixels, uint8 ``(c, H, W)``.

    Files that are small enough are copied unchanged if they are JPEG, or of any format with ``quality`` 0.
    """
    height, width = image.size
    reduction = packing.short_side / min(height, width) if packing.short_side else 1.0
    if reduction >= 1:
        pixels = full_image(image)
        if isinstance(original, bytes) and (packing.quality == 0 or image.kind == "JPEG"):
            return original, _SUFFIXES.get(image.kind.split()[0], ".img"), pixels
    else:
        size = (max(1, round(height * reduction)), max(1, round(width * reduction)))
        pixels = image.crop((0, 0, height, width), size, "bicubic")
    file = io.BytesIO()
    if packing.channels not in MODES:
        np.save(file, pixels.contiguous().numpy())
        return file.getvalue(), ".npy", pixels
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    encoded = Image.fromarray(array[..., 0] if packing.channels == 1 else array)
    if packing.channels == 4 or packing.quality == 0:
        encoded.save(file, "PNG", compress_level=4)
        return file.getvalue(), ".png", pixels
    encoded.save(file, "JPEG", quality=packing.quality, subsampling="4:2:0")
    return file.getvalue(), ".jpg", pixels


_SUFFIXES = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "TIFF": ".tif",
    "WEBP": ".webp",
    "GIF": ".gif",
    "BMP": ".bmp",
    "NPY": ".npy",
}


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> int:
    """Append a file and return the offset of its content, which follows one header block."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(content))
    return offset


def _parts(files: Files) -> list[tuple[str, Files]]:
    """Split a table into train and val; a manifest keeps them apart by the names of its images."""
    if not isinstance(files, Manifest):
        train, val = files.part("train"), files.part("val")
        if train is not None and val is not None:
            return [("train/", train), ("val/", val)]
    return [("", files)]


def _explicit_labels(files: Files) -> Any:
    """Return the labels that are not class folders in the image names, or None."""
    return files.explicit_labels() if isinstance(files, Manifest) else files.labels()


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Record the settings in ``out``, or check that those recorded there are the same."""
    file = out / SETTINGS
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != settings:
            changed = [
                f"{key} {before.get(key)} -> {value}" for key, value in settings.items() if before.get(key) != value
            ]
            raise ValueError(f"{out} was packed with different settings ({'; '.join(changed)}): choose another folder")
    elif any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose another folder")
    else:
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _finish(shards: _Shards, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the index, the summary and the list of corrupt images, and delete the notes of the shards."""
    entries: list[Entry] = []
    summary, before = Summary(), 0
    for shard in range(len(shards)):
        notes = json.loads(shards.notes(shard).read_text(encoding="utf-8"))
        entries += [Entry(*entry) for entry in notes["entries"]]
        for stats in notes["stats"]:
            summary.add(ImageStats(*stats))
        before += notes["bytes_before"]
    if not entries:
        for file in [*out.glob("shard-*.tar"), *out.glob(".shard-*"), out / SETTINGS]:
            file.unlink()  # so that the next attempt can use this folder
        raise ValueError(
            f"none of {settings['images']} images could be read, the last one: {': '.join(summary.corrupt[-1])}"
        )
    archives = [Path(shards.file(shard).name) for shard in range(len(shards))]
    classes = shards.parts[0][1].classes
    save_manifest(out / INDEX_FILE, Manifest(make_table(entries), Path("."), archives, classes=classes), [])
    if summary.corrupt:
        write_corrupt(out / "corrupt_images.csv", summary.corrupt)
    after = sum(shards.file(shard).stat().st_size for shard in range(len(shards)))
    result = {**summary.as_dict(), "bytes_before": before, "bytes_after": after, "packed": settings}
    unfinished = out / f".{SUMMARY}"
    unfinished.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, out / SUMMARY)
    for note in out.glob(".shard-*"):
        note.unlink()
    return result
