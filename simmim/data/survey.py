"""Every image of a set looked at once, in parallel: what is broken, how large the others are, their statistics."""

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
from simmim.data.loader import in_workers, reason_of
from simmim.data.reading import Reader
from simmim.data.sources import Images

CHUNK = 64


class Look(NamedTuple):
    """What was found in one image: a reason why it is broken, or its size and the moments of its pixels."""

    name: str
    corrupt: str = ""
    kind: str = ""
    size: tuple[int, int] = (0, 0)
    mean: tuple[float, ...] = ()
    square: tuple[float, ...] = ()


@dataclass
class Summary:
    """Of all looks; every image weighs the same in the statistics, whatever its size."""

    corrupt: list[tuple[str, str]] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    heights: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    _sums: Any = 0.0
    _squares: Any = 0.0

    def add(self, look: Look) -> None:
        """Count one image."""
        if look.corrupt:
            self.corrupt.append((look.name, look.corrupt))
            return
        self.kinds[look.kind] += 1
        self.heights.append(look.size[0])
        self.widths.append(look.size[1])
        self._sums = self._sums + np.array(look.mean)
        self._squares = self._squares + np.array(look.square)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: pixels in [0, 1] per channel, sizes in px."""
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


class _Looks(Dataset):
    def __init__(self, images: Images, timeout_s: float) -> None:
        self.images, self._reader = images, Reader(images.fetch, timeout_s)

    def __getitems__(self, numbers: list[int]) -> list[Look]:
        looks = []
        for number, content in zip(numbers, self._reader.many(numbers), strict=True):
            try:
                picture = self.images.decode(content())
                looks.append(look_at(self.images.name(number), picture, full_image(picture)))
            except Exception as error:  # damaged bytes raise almost anything
                looks.append(Look(self.images.name(number), reason_of(error)))
        return looks


def survey(images: Images, *, num_workers: int = 0, timeout_s: float = 60.0) -> Iterator[Look]:
    """Decode every image completely, in order."""
    numbers = [list(range(start, min(start + CHUNK, len(images)))) for start in range(0, len(images), CHUNK)]
    chunks = in_workers(_Looks(images, timeout_s), numbers, num_workers)
    with tqdm(total=len(images), unit="image", disable=None) as bar:
        for looks in chunks:
            yield from looks
            bar.update(len(looks))


def check(images: Images, report: Path, *, num_workers: int = 0, timeout_s: float = 60.0) -> Summary:
    """Look at every image, and name the broken ones in a CSV file, if there are any."""
    summary = Summary()
    for look in survey(images, num_workers=num_workers, timeout_s=timeout_s):
        summary.add(look)
    if summary.corrupt:
        write_corrupt(report, summary.corrupt)
    return summary


def write_corrupt(file: Path, corrupt: list[tuple[str, str]]) -> None:
    """One line for each: name and reason."""
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows(corrupt)


def look_at(name: str, picture: DecodedImage, pixels: Tensor) -> Look:
    """The look of a good image, ``pixels`` uint8 ``(c, H, W)``."""
    values = pixels.float() / 255
    mean = tuple(values.mean(dim=(1, 2)).tolist())
    square = tuple(values.square().mean(dim=(1, 2)).tolist())
    return Look(name, "", picture.kind, picture.size, mean, square)


def format_summary(summary: Summary) -> str:
    """For the console."""
    numbers = summary.as_dict()
    count, corrupt = numbers["images"], numbers["corrupt"]
    lines = [f"{count:,} good images, {corrupt:,} broken ({100 * corrupt / max(1, count + corrupt):.2g} %)"]
    if count:
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in numbers["kinds"].items())
        lines.append(f"kinds    {kinds}")
        for name in ("height", "width"):
            low, middle, high = numbers[name].values()
            lines.append(f"{name:<8} {low} to {high} px, median {middle:g}")
        lines.append(f"data.mean={_row(numbers['mean'])} data.std={_row(numbers['std'])}")
    reasons = Counter(reason for _, reason in summary.corrupt)
    lines += [f"{number:>8,} x {reason}" for reason, number in reasons.most_common(10)]
    return "\n".join(lines)


def _row(values: list[float]) -> str:
    """As an override of a recipe, without spaces."""
    return f"[{','.join(f'{value:.4g}' if math.isfinite(value) else '0' for value in values)}]"
