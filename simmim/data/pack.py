"""Pack any images into shards: smaller, decoded several times faster, few files instead of many.

Shards are tars in the layout of WebDataset, ``000000042.jpg`` with ``000000042.json`` beside it, which
says what the image was called. ``index.arrow`` lists all images under their old names and in their old
order, so training from shards draws the same samples as training from the originals.
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

from simmim.data.decode import MODES, Decoder, Picture, whole
from simmim.data.listing import STORED, Entry
from simmim.data.loader import in_workers, reason_of
from simmim.data.manifest import Manifest, make_table, save_manifest
from simmim.data.reading import Reader
from simmim.data.sources import INDEX, Files, open_files
from simmim.data.survey import Look, Summary, look_at, write_corrupt

SUMMARY, SETTINGS = "dataset.json", ".packing.json"


class Packing(NamedTuple):
    """How to pack.

    Raises:
        ValueError: settings that cannot be.
    """

    short_side: int = 256
    """px; larger images are reduced to it, smaller ones stay as they are; 0: all stay."""
    quality: int = 90
    """Of JPEG, with colours at half the resolution; 0: without loss (PNG)."""
    channels: int = 3
    value_range: tuple[float, float] | None = None
    shard_images: int = 2048
    """Images in each shard."""

    def check(self) -> None:
        """Raise for numbers that cannot be."""
        for name, low, high in (("short_side", 0, 1 << 16), ("quality", 0, 100), ("shard_images", 1, 1 << 24)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be {low} to {high}, got {getattr(self, name)}")


def pack(path: str, out: Path, packing: Packing, *, num_workers: int = 0) -> dict[str, Any]:
    """Pack what ``path`` names into ``out``; what an earlier call has finished is kept.

    Broken images are left out and named in ``corrupt_images.csv``. Both parts of a set with train and val
    are packed, and stay apart.

    Returns:
        What ``dataset.json`` says: how many, their mean and standard deviation, sizes, bytes.

    Raises:
        ValueError: nothing to pack, or ``out`` holds something else.
    """
    packing.check()
    parts = _parts(open_files(path))
    place = Path(path).expanduser()
    source = str(place.resolve()) if place.exists() else path
    settings = {"path": source, "images": sum(len(files) for _, files in parts), **packing._asdict()}
    settings = json.loads(json.dumps(settings))
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, settings)
    if (out / SUMMARY).exists():
        return json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    shards = _Shards(parts, out, packing)
    waiting = [[number] for number in range(len(shards)) if not shards.is_done(number)]
    work = in_workers(shards, waiting, min(num_workers, len(waiting)))
    done = settings["images"] - sum(len(shards.numbers(number)) for (number,) in waiting)
    with tqdm(total=settings["images"], initial=done, unit="image", disable=None) as bar:
        for count in work:
            bar.update(count)
    return _finish(shards, out, settings)


class _Shards(Dataset):
    """Getting number n writes shard n and gives how many images it was made of."""

    def __init__(self, parts: list[tuple[str, Files]], out: Path, packing: Packing) -> None:
        self.parts, self.out, self.packing = parts, out, packing
        self.decoder = Decoder(packing.channels, packing.value_range)
        self.starts = np.cumsum([0] + [len(files) for _, files in parts])
        self.labels = [_given_labels(files) for _, files in parts]

    def __len__(self) -> int:
        return -(-int(self.starts[-1]) // self.packing.shard_images)

    def numbers(self, shard: int) -> range:
        start = shard * self.packing.shard_images
        return range(start, min(start + self.packing.shard_images, int(self.starts[-1])))

    def file(self, shard: int) -> Path:
        return self.out / f"shard-{shard:05d}.tar"

    def about(self, shard: int) -> Path:
        return self.out / f".shard-{shard:05d}.json"

    def is_done(self, shard: int) -> bool:
        return self.about(shard).exists() and self.file(shard).exists()

    def __getitems__(self, shards: list[int]) -> int:
        return sum(self._write(shard) for shard in shards)

    def _fetch(self, number: int) -> Any:
        part, inner = self._place(number)
        return self.parts[part][1].fetch(inner)

    def _place(self, number: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        return part, number - int(self.starts[part])

    def _write(self, shard: int) -> int:
        numbers = self.numbers(shard)
        reader = Reader(self._fetch)
        entries, looks, before = [], [], 0
        unfinished = self.out / f".shard-{shard:05d}.tar.{os.getpid()}"
        with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number, content in zip(numbers, reader.many(numbers), strict=True):
                part, inner = self._place(number)
                prefix, files = self.parts[part]
                name = files.relative_name(inner) if isinstance(files, Manifest) else f"{prefix}{inner:09d}"
                labels = self.labels[part]
                label = None if labels is None else labels[inner].as_py()
                try:
                    original = content()
                    picture = self.decoder(original)
                    packed, suffix, pixels = encode(original, picture, self.packing)
                except Exception as error:  # damaged bytes raise almost anything
                    looks.append(Look(files.name(inner), reason_of(error)))
                    continue
                looks.append(look_at(name, picture, pixels))
                before += len(original) if isinstance(original, bytes) else original.nbytes
                offset = _add(tar, f"{number:09d}{suffix}", packed)
                entries.append(Entry(name, label, shard, STORED, offset, len(packed)))
                _add(tar, f"{number:09d}.json", json.dumps({"name": name, "label": label}).encode())
        os.replace(unfinished, self.file(shard))
        about = {"entries": entries, "looks": looks, "bytes_before": before}
        part_file = self.about(shard).with_suffix(f".{os.getpid()}")
        part_file.write_text(json.dumps(about), encoding="utf-8")
        os.replace(part_file, self.about(shard))
        return len(numbers)


def encode(original: Any, picture: Picture, packing: Packing) -> tuple[bytes, str, Tensor]:
    """Content and suffix of the packed image, and its pixels, uint8 ``(c, H, W)``.

    Files that need not change stay as they are: JPEG that is small enough, and with ``quality`` 0
    everything that is.
    """
    height, width = picture.size
    reduction = packing.short_side / min(height, width) if packing.short_side else 1.0
    if reduction >= 1:
        pixels = whole(picture)
        if isinstance(original, bytes) and (packing.quality == 0 or picture.kind == "JPEG"):
            return original, _SUFFIXES.get(picture.kind.split()[0], ".img"), pixels
    else:
        size = (max(1, round(height * reduction)), max(1, round(width * reduction)))
        pixels = picture.crop((0, 0, height, width), size, "bicubic")
    file = io.BytesIO()
    if packing.channels not in MODES:
        np.save(file, pixels.contiguous().numpy())
        return file.getvalue(), ".npy", pixels
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(array[..., 0] if packing.channels == 1 else array)
    if packing.channels == 4 or packing.quality == 0:
        image.save(file, "PNG", compress_level=4)
        return file.getvalue(), ".png", pixels
    image.save(file, "JPEG", quality=packing.quality, subsampling="4:2:0")
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
    """Append a file and give the place of its first byte: after one block of header."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(content))
    return offset


def _parts(files: Files) -> list[tuple[str, Files]]:
    """Tables keep train and val apart; a manifest has them in its names."""
    if not isinstance(files, Manifest):
        train, val = files.part("train"), files.part("val")
        if train is not None and val is not None:
            return [("train/", train), ("val/", val)]
    return [("", files)]


def _given_labels(files: Files) -> Any:
    """Labels that are not the folders of the names."""
    return files.given_labels() if isinstance(files, Manifest) else files.labels()


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Write down what is packed here, or compare with what was written."""
    file = out / SETTINGS
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != settings:
            changed = [
                f"{key} {before.get(key)} -> {value}" for key, value in settings.items() if before.get(key) != value
            ]
            raise ValueError(f"{out} was packed with other settings ({'; '.join(changed)}): give another folder")
    elif any(out.iterdir()):
        raise ValueError(f"{out} is not empty: give another folder")
    else:
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _finish(shards: _Shards, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The index, the summary and the list of broken images; the notes of single shards go."""
    entries: list[Entry] = []
    summary, before = Summary(), 0
    for shard in range(len(shards)):
        about = json.loads(shards.about(shard).read_text(encoding="utf-8"))
        entries += [Entry(*entry) for entry in about["entries"]]
        for look in about["looks"]:
            summary.add(Look(*look))
        before += about["bytes_before"]
    if not entries:
        for file in [*out.glob("shard-*.tar"), *out.glob(".shard-*"), out / SETTINGS]:
            file.unlink()  # nothing worth keeping: another try begins anew
        raise ValueError(
            f"none of {settings['images']} images could be read, the last: {': '.join(summary.corrupt[-1])}"
        )
    places = [Path(shards.file(shard).name) for shard in range(len(shards))]
    classes = shards.parts[0][1].classes
    save_manifest(out / INDEX, Manifest(make_table(entries), Path("."), places, classes=classes), [])
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
