"""Transforms of images or clips, the number of loader workers, and reports of unreadable data."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator

from simmim.config import Data, Video
from simmim.data import CenterCrop, MiddleClip, RandomClip, RandomCrop
from simmim.data.transforms import Transform

logger = logging.getLogger(__name__)


def transforms_of(crop: RandomCrop, view: CenterCrop, video: Video | None) -> tuple[Transform, Transform]:
    """Return the training and the evaluation transform, for images or for the clips of videos.

    Args:
        crop, view: the crops of training and of evaluation.
        video: None for images.
    """
    if video is None:
        return crop, view
    return RandomClip(crop, video.frames, video.stride), MiddleClip(view, video.frames, video.stride)


def describe_video(video: Video | None) -> dict[str, Any]:
    """Return the inference settings of videos for ``encoder.json``; empty for images."""
    return {} if video is None else {"video": video.inference}


def num_workers_of(data: Data, accelerator: Accelerator) -> int:
    """Return the number of loader workers of each training process: as the recipe says, else one per free core.

    On a CPU the training itself needs the cores; ``simmim data probe`` measures how many workers help.
    """
    if data.num_workers is not None:
        return data.num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(2 if accelerator.device.type == "cpu" else 16, own - (accelerator.device.type != "cpu")))


def report_corrupt(corrupt: Mapping[str, str]) -> None:
    """Log a warning for each image that could not be read.

    Args:
        corrupt: names of images, and why they could not be read.
    """
    for name, reason in corrupt.items():
        logger.warning("skipped a corrupt image: %s (%s)", name, reason)


def summarize_problems(problems: Sequence[tuple[str, str]], limit: int = 3) -> list[str]:
    """Summarize data problems in one line: their number, and the first ``limit`` of them.

    Returns:
        A list of one line; empty without problems.
    """
    if not problems:
        return []
    first = "; ".join(f"{name}: {reason}" for name, reason in problems[:limit])
    return [f"{len(problems)} problem(s) in the data: {first}{'; ...' if len(problems) > limit else ''}"]
