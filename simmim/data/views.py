"""How images, or clips, are looked at."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator

from simmim.config import Data, Video
from simmim.data import (
    CenterCrop,
    MiddleClip,
    RandomClip,
    RandomCrop,
    Source,
    evaluation_batches,
)
from simmim.data.loader import Batches
from simmim.data.transforms import Transform


def transforms_of(crop: RandomCrop, view: CenterCrop, video: Video | None) -> tuple[Transform, Transform]:
    """Of training and of held-out images; or of the clips of videos, cropped by the same."""
    if video is None:
        return crop, view
    return RandomClip(crop, video.frames, video.stride), MiddleClip(view, video.frames, video.stride)


def about_video(video: Video | None) -> dict[str, Any]:
    """What ``encoder.json`` says of clips beside the configuration of the encoder."""
    return {} if video is None else {"video": video.model_dump(include={"stride", "views", "crops"})}


def num_workers_of(data: Data, accelerator: Accelerator) -> int:
    """Loader processes beside each training process: as the recipe says, else one per core that is left.

    On a processor the training itself needs the cores; ``simmim data probe`` measures what pays.
    """
    if data.num_workers is not None:
        return data.num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(2 if accelerator.device.type == "cpu" else 16, share - (accelerator.device.type != "cpu")))


def report_corrupt(corrupt: Mapping[str, str]) -> None:
    """Images that could not be read, with the reason, on stderr."""
    for name, reason in corrupt.items():
        print(f"left out a broken image: {name} ({reason})", file=sys.stderr)


def make_views(
    source: Source | None,
    view: Transform,
    batch_size: int,
    labelled: bool,
    shares: tuple[int, int] = (0, 1),
    num_workers: int = 0,
    timeout_s: float = 60.0,
) -> Batches | list:
    """Fixed views, the same in every epoch and run; of (rank, world size) the share of one process."""
    if source is None:
        return []
    rank, world_size = shares
    return evaluation_batches(
        source,
        view,
        batch_size=batch_size,
        labelled=labelled,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        timeout_s=timeout_s,
    )


def told(problems: Sequence[tuple[str, str]], shown: int = 3) -> list[str]:
    """How many there are, and the first of them, in one line; none without problems."""
    if not problems:
        return []
    first = "; ".join(f"{name}: {reason}" for name, reason in problems[:shown])
    return [f"{len(problems)} problem(s) in the data: {first}{'; ...' if len(problems) > shown else ''}"]
