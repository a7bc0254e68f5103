"""Which images, or clips, a stage has, and how they are looked at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from simmim.counter_rng import permutation
from simmim.data import (
    CenterCrop,
    Decoder,
    MiddleClip,
    MovingShapes,
    RandomClip,
    RandomCrop,
    Shapes,
    Source,
    VideoDecoder,
    evaluation_batches,
    training_images,
)
from simmim.data.boxes import coco_sources
from simmim.data.loader import Batches
from simmim.data.sources import Subset
from simmim.data.transforms import Transform
from simmim.schema import Data, Detect, Finetune, Recipe, Segment, Video
from swin.config import Pair


def make_sources(
    data: Data, size: Pair, channels: int, reserved: int = 0, video: Video | None = None
) -> tuple[Source, Source | None]:
    """The share of the training images, or videos, that is asked for, and held-out ones, as :func:`training_images`."""
    training, holdout = _all_sources(data, size, channels, reserved, video)
    if data.share < 1:
        count = images_of_share(data.share, len(training))
        # One order for all seeds and shares; of a stream the first, so that they lie together.
        in_blocks = training.blocks is not None
        order = torch.arange(len(training)) if in_blocks else permutation(0, 0, len(training))
        training = Subset(training, order[:count].sort().values)
    return training, holdout


def images_of_share(share: float, images: int) -> int:
    """How many of the training images ``data.share`` leaves."""
    return max(1, round(share * images))


def _all_sources(
    data: Data, size: Pair, channels: int, reserved: int, video: Video | None
) -> tuple[Source, Source | None]:
    if data.path == "builtin:shapes":
        held_out = shapes(data.holdout_images, size, channels, video, held_out=True)
        training = shapes(data.num_images, size, channels, video)
        return training, held_out if data.holdout_images else None
    if data.path.startswith("builtin:"):
        raise ValueError(f"data.path {data.path!r}: the only builtin data is builtin:shapes")
    if not data.path:
        raise ValueError("the recipe names no images: set data.path=FOLDER_OF_IMAGES (or builtin:shapes)")
    return training_images(data.path, decoder_of(data, channels, video), data.holdout_images, reserved)


def decoder_of(data: Data, channels: int, video: Video | None) -> Decoder:
    """Of images, or of videos."""
    return Decoder(channels, data.value_range) if video is None else VideoDecoder(channels)


def shapes(count: int, size: Pair, channels: int, video: Video | None, *, held_out: bool = False) -> Shapes:
    """``builtin:shapes``, which move where videos are wanted."""
    return (Shapes if video is None else MovingShapes)(count, size, channels, held_out=held_out)


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


def reserved_images(recipe: Recipe, path: str) -> int:
    """How many images of ``path`` the stages with labels hold out for themselves: none may be trained on before."""
    labels = [stage.labels for stage in recipe.stages.values() if isinstance(stage, Finetune | Segment)]
    own = [each for each in labels if each.of_images(recipe.data.path) == path and not each.val_path]
    return max((each.val_images for each in own), default=0)


def without_held_out(source: Source, recipe: Recipe) -> Source:
    """Images of ``data.path`` but those that stages with objects hold out for themselves; these are known by name.

    Raises:
        ValueError: such a stage holds out images of the same folder, which cannot be read; or nothing is left.
    """
    place = Path(recipe.data.path).expanduser().absolute()
    unseen: set[str] = set()
    for stage in recipe.stages.values():
        if isinstance(stage, Detect):
            root = Path(stage.labels.path or recipe.data.path).expanduser().absolute()
            if root == place or root in place.parents:
                _, holdout, _ = coco_sources(root, Decoder(), stage.labels.val_images, masks=False)
                unseen |= {holdout.name(number) for number in range(len(holdout))}
    if not unseen:
        return source
    kept = [number for number in range(len(source)) if source.name(number) not in unseen]
    if not kept:
        raise ValueError(f"{place} holds only images that other stages are judged by: name another data.path")
    return Subset(source, kept)


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
