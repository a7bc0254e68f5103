"""How many loader processes pay? Measured, on this machine and these images."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from simmim.data.loader import training_batches
from simmim.data.sources import Source
from simmim.data.transforms import RandomCrop

ENOUGH = 0.95


def probe(
    source: Source,
    transform: RandomCrop,
    *,
    batch_size: int = 128,
    workers: Sequence[int] | None = None,
    seconds: float = 5.0,
) -> dict[int, float]:
    """Images per second from files to batches, for several numbers of worker processes.

    The first batches, while processes start, do not count.

    Args:
        workers: which numbers; None for 0, 1, 2, 4 and so on up to the number of cores.
        seconds: how long each of them is measured.

    Raises:
        ValueError: too many broken images, or a batch of none.
    """
    if batch_size < 1 or not len(source):
        raise ValueError(f"a batch of {batch_size} out of {len(source)} images: both have to be at least 1")
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
    """A table, and the least number of workers that comes near the best."""
    best = max(speeds.values())
    enough = next(count for count, speed in speeds.items() if speed >= ENOUGH * best)
    lines = ["workers  images/s"]
    lines += [f"{count:>7}  {speed:>8.0f}{'  <-' if count == enough else ''}" for count, speed in speeds.items()]
    lines.append(f"data.num_workers={enough} brings {speeds[enough]:.0f} images/s; faster training waits for data")
    return "\n".join(lines)


def _doubling(cores: int) -> list[int]:
    counts = [0, 1]
    while counts[-1] * 2 <= cores:
        counts.append(counts[-1] * 2)
    return counts
