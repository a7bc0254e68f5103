"""Measurement of how many data-loader workers help, on this machine and these images."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from simmim.data.loader import training_batches
from simmim.data.sources import Source
from simmim.data.transforms import RandomCrop

ENOUGH = 0.95
"""Fraction of the highest speed that the recommended number of workers must reach."""


def probe(
    source: Source,
    transform: RandomCrop,
    *,
    batch_size: int = 128,
    workers: Sequence[int] | None = None,
    seconds: float = 5.0,
) -> dict[int, float]:
    """Measure loading speed in images/s for several numbers of worker processes.

    The first batches, during which processes start, are not counted.

    Args:
        workers: numbers of workers to measure; None: 0, 1, 2, 4 and so on up to the number of cores.
        seconds: duration of each measurement.

    Raises:
        ValueError: too many corrupt images, an empty source or an empty batch.
    """
    if batch_size < 1 or not len(source):
        raise ValueError(f"batch size {batch_size} with {len(source)} images: both must be at least 1")
    counts = workers if workers is not None else _doubling(os.cpu_count() or 1)
    speeds = {}
    for count in counts:
        batches = training_batches(
            source,
            transform,
            seed=0,
            num_workers=count,
            batch_size=batch_size,
            micro_batch_size=batch_size,
            end_step=1 << 40,
        )
        iterator = iter(batches)
        for _ in range(1 + 2 * count):
            next(iterator)
        images, begin = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds or images < 2 * batch_size * max(1, count):
            images += len(next(iterator)["image"])
        speeds[count] = images / elapsed
        del iterator
    return speeds


def format_probe(speeds: dict[int, float]) -> str:
    """Format the speeds as a table that marks the smallest number of workers close to the highest speed."""
    best = max(speeds.values())
    enough = next(count for count, speed in speeds.items() if speed >= ENOUGH * best)
    lines = ["workers  images/s"]
    lines += [f"{count:>7}  {speed:>8.0f}{'  <-' if count == enough else ''}" for count, speed in speeds.items()]
    lines.append(f"data.num_workers={enough} loads {speeds[enough]:.0f} images/s; faster training would wait for data")
    return "\n".join(lines)


def _doubling(cores: int) -> list[int]:
    counts = [0, 1]
    while counts[-1] * 2 <= cores:
        counts.append(counts[-1] * 2)
    return counts
