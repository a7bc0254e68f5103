"""Parallel check of all images of a data set: corrupt files, image sizes, pixel statistics."""

from __future__ import annotations

import csv
import math
import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from simmim.data.decode import DecodedImage, full_image
from simmim.data.loader import make_loader, reason_of
from simmim.data.reading import Reader
from simmim.data.sources import Images

CHUNK = 64


class ImageStats(NamedTuple):
    """Statistics of one image, or the reason why it is corrupt."""

    name: str
    corrupt: str = ""
    kind: str = ""
    size: tuple[int, int] = (0, 0)
    """``(H, W)``, px."""
    mean: tuple[float, ...] = ()
    """Mean of the pixels in [0, 1], per channel."""
    square: tuple[float, ...] = ()
    """Mean of the squared pixels, per channel."""


@dataclass
class Summary:
    """Statistics of a data set, in which every image has the same weight, whatever its size."""

    corrupt: list[tuple[str, str]] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    heights: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    _sums: Any = 0.0
    _squares: Any = 0.0

    def add(self, stats: ImageStats) -> None:
        """Add one image."""
        if stats.corrupt:
            self.corrupt.append((stats.name, stats.corrupt))
            return
        self.kinds[stats.kind] += 1
        self.heights.append(stats.size[0])
        self.widths.append(stats.size[1])
        self._sums = self._sums + np.array(stats.mean)
        self._squares = self._squares + np.array(stats.square)

    def as_dict(self) -> dict[str, Any]:
        """Return the summary for JSON: pixel statistics in [0, 1] per channel, sizes in px."""
        count = len(self.heights)
        result: dict[str, Any] = {
            "images": count,
            "corrupt": len(self.corrupt),
            "kinds": dict(self.kinds.most_common()),
        }
        if count:
            mean = self._sums / count
            std = np.sqrt(np.maximum(self._squares / count - mean**2, 0))
            result |= {"channels": len(mean), "mean": mean.round(4).tolist(), "std": std.round(4).tolist()}
            for name, sides in (("height", self.heights), ("width", self.widths)):
                result[name] = {"min": min(sides), "median": statistics.median(sides), "max": max(sides)}
        return result


class _StatsDataset(Dataset):
    """Data set whose items are the statistics of a list of images."""

    def __init__(self, images: Images, timeout_s: float) -> None:
        self.images, self._reader = images, Reader(images.fetch, timeout_s)

    def __getitems__(self, indices: list[int]) -> list[ImageStats]:
        stats = []
        for index, content in zip(indices, self._reader.many(indices), strict=True):
            try:
                image = self.images.decode(content())
                stats.append(compute_stats(self.images.name(index), image, full_image(image)))
            except Exception as error:  # damaged bytes may raise any exception
                stats.append(ImageStats(self.images.name(index), reason_of(error)))
        return stats


def survey(images: Images, *, num_workers: int = 0, timeout_s: float = 60.0) -> Iterator[ImageStats]:
    """Decode every image completely and yield its statistics, in order."""
    indices = [list(range(start, min(start + CHUNK, len(images)))) for start in range(0, len(images), CHUNK)]
    chunks = make_loader(_StatsDataset(images, timeout_s), indices, num_workers)
    with tqdm(total=len(images), unit="image", disable=None) as bar:
        for stats in chunks:
            yield from stats
            bar.update(len(stats))


def check(images: Images, report: Path, *, num_workers: int = 0, timeout_s: float = 60.0) -> Summary:
    """Check every image, and list the corrupt ones in the CSV file ``report`` if there are any."""
    summary = Summary()
    for stats in survey(images, num_workers=num_workers, timeout_s=timeout_s):
        summary.add(stats)
    if summary.corrupt:
        write_corrupt(report, summary.corrupt)
    return summary


def write_corrupt(file: Path, corrupt: list[tuple[str, str]]) -> None:
    """Write one line per corrupt image: name and reason."""
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows(corrupt)


def compute_stats(name: str, image: DecodedImage, pixels: Tensor) -> ImageStats:
    """Compute the statistics of a valid image with ``pixels`` uint8 ``(c, H, W)``."""
    values = pixels.float() / 255
    mean = tuple(values.mean(dim=(1, 2)).tolist())
    square = tuple(values.square().mean(dim=(1, 2)).tolist())
    return ImageStats(name, "", image.kind, image.size, mean, square)


def format_summary(summary: Summary) -> str:
    """Format a summary for the terminal."""
    values = summary.as_dict()
    count, corrupt = values["images"], values["corrupt"]
    lines = [f"{count:,} valid images, {corrupt:,} corrupt ({100 * corrupt / max(1, count + corrupt):.2g} %)"]
    if count:
        kinds = ", ".join(f"{images:,} {kind}" for kind, images in values["kinds"].items())
        lines.append(f"kinds    {kinds}")
        for name in ("height", "width"):
            low, middle, high = values[name].values()
            lines.append(f"{name:<8} {low} to {high} px, median {middle:g}")
        lines.append(f"data.mean={_as_override(values['mean'])} data.std={_as_override(values['std'])}")
    reasons = Counter(reason for _, reason in summary.corrupt)
    lines += [f"{images:>8,} x {reason}" for reason, images in reasons.most_common(10)]
    return "\n".join(lines)


def _as_override(values: list[float]) -> str:
    """Format numbers as a recipe override, without spaces."""
    return f"[{','.join(f'{value:.4g}' if math.isfinite(value) else '0' for value in values)}]"
