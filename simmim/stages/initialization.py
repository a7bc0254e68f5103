"""Initial weights of a stage, its schedule, gradient accumulation and resume fingerprint."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from simmim.config import Recipe, Stage, encoder_config, video_of
from simmim.export.export import Export, open_export
from simmim.training.memory import choose_chunks
from simmim.training.optim import LearningRate, make_lr
from swin import SwinConfig, SwinEncoder, VideoConfig, inflate, transfer
from swin.config import Pair
from swin.inflation import inflated_config
from swin.video import build_encoder
from swin.weights.transfer import transferred_config

ARCHITECTURE = (
    "embed_dim",
    "depths",
    "num_heads",
    "patch_size",
    "mlp_ratio",
    "in_chans",
    "attention",
    "norm",
    "position_bias",
    "extra_norm_interval",
)
"""Fields of the encoder configuration that initial weights and recipe must agree on."""

MUTABLE_DATA = {"path", "num_workers", "max_corrupt_fraction", "read_timeout_s"}
"""Data settings that may change when a stage resumes."""


class Start(NamedTuple):
    """Initial weights of a stage."""

    encoder: SwinEncoder
    export: Export | None
    """Source of the weights; None: from scratch."""
    fingerprint: str
    """Hash of the weights, or ``scratch``."""


def derive_accumulation(stage: Stage, num_processes: int) -> int:
    """Compute the number of micro-batches per optimizer step and process.

    Raises:
        ValueError: the batch cannot be divided evenly; the error lists the micro-batch sizes that can.
    """
    batch_size, micro_batch_size = stage.batch_size, stage.micro_batch_size
    if batch_size % (micro_batch_size * num_processes) == 0:
        return batch_size // (micro_batch_size * num_processes)
    if batch_size % num_processes:
        raise ValueError(f"batch_size {batch_size} cannot be divided among {num_processes} processes: change it")
    choices = micro_batch_sizes(stage, num_processes)
    if not choices:
        raise ValueError(
            f"batch_size {batch_size} leaves {batch_size // num_processes} images to each of {num_processes} "
            "process(es), which mixup and cutmix cannot pair: change it"
        )
    raise ValueError(
        f"batch_size {batch_size} is not a multiple of micro_batch_size {micro_batch_size} x {num_processes} "
        f"process(es): set micro_batch_size to one of {', '.join(map(str, choices))}"
    )


def micro_batch_sizes(stage: Stage, num_processes: int) -> list[int]:
    """Return the micro-batch sizes that divide the batch, ascending; even ones only if images are mixed in pairs."""
    if stage.batch_size % num_processes:
        return []
    images = stage.batch_size // num_processes
    return [size for size in range(1, images + 1) if images % size == 0 and not (stage.in_pairs and size % 2)]


def schedule_of(stage: Stage, num_images: int, total_steps: int) -> LearningRate:
    """Return the learning rate of a stage as a function of the step."""
    return make_lr(
        batch_size=stage.batch_size,
        steps_per_epoch=num_images / stage.batch_size,
        total_steps=total_steps,
        **stage.schedule.model_dump(exclude={"epochs"}),
    )


def make_start(recipe: Recipe, name: str, out: Path) -> Start:
    """Load the encoder that a stage starts from, at the image and window size of the stage.

    From scratch its parameters are on the meta device: :func:`simmim.training.distributed.initialize_parameters`.

    Args:
        out: folder of the runs.

    Raises:
        ValueError: the stage to start from has not been run, or its encoder is not that of the recipe.
    """
    stage = recipe.stages[name]
    init = recipe.start_of(name)
    if init == "scratch":
        with torch.device("meta"):
            return Start(build_encoder(encoder_config(recipe.encoder, stage)), None, "scratch")
    path = Path(init).expanduser()
    if init in recipe.stages:
        path = out / recipe.name / init / "export"
        if not path.exists():
            raise ValueError(
                f"{name} starts from {init}, which has not been run: use `simmim run`, which runs all stages"
            )
    export = open_export(path)
    encoder = export.encoder()
    digest = weights_fingerprint(encoder)
    check_start(recipe, name, path, encoder.config)
    # Share the memory-mapped weights of the file, so that processes hold no copies of them.
    video, moved = video_of(stage), transfer(encoder, reuse_tensors=True, **transfer_settings(stage, encoder.config))
    if video is not None and not isinstance(moved.config, VideoConfig):
        moved = inflate(moved, **video.time)
    return Start(moved, export, digest)


def check_start(recipe: Recipe, name: str, path: Path, found: SwinConfig) -> None:
    """Check that the encoder to start from has the architecture of the recipe.

    Args:
        path: of the encoder, for error messages.
        found: its configuration.

    Raises:
        ValueError: the architecture differs.
    """
    wanted = encoder_config(recipe.encoder, recipe.stages[name])
    for field in ARCHITECTURE:
        if getattr(found, field) != getattr(wanted, field):
            raise ValueError(
                f"{name} starts from {path}, whose {field} is {getattr(found, field)}, but the recipe "
                f"says {getattr(wanted, field)}: correct the encoder settings of the recipe"
            )
    if isinstance(found, VideoConfig):
        if not isinstance(wanted, VideoConfig):
            raise ValueError(f"{name} starts from {path}, an encoder of clips: add a video block to stages.{name}")
        if found.temporal_patch != wanted.temporal_patch:
            raise ValueError(
                f"{name} starts from {path}, whose tokens are of {found.temporal_patch} frames: "
                f"set stages.{name}.video.temporal_patch to it, not to {wanted.temporal_patch}"
            )


def geometry(stage: Stage, old: SwinConfig) -> tuple[Pair, Pair]:
    """Return image and window size of a stage; by default those of the encoder, the window scaled with the image."""
    size = stage.image_size or old.image_size
    scaled = tuple(
        max(1, round(window * new / before))
        for window, new, before in zip(old.window_size, size, old.image_size, strict=True)
    )
    return size, stage.window_size or (scaled[0], scaled[1])


def transfer_settings(stage: Stage, old: SwinConfig) -> dict[str, Any]:
    """Return the arguments of :func:`swin.weights.transfer.transfer` that adapt an encoder to a stage."""
    size, window = geometry(stage, old)
    settings: dict[str, Any] = {"image_size": size, "window_size": window, "drop_path": stage.drop_path}
    video = video_of(stage)
    return settings | video.time if video and isinstance(old, VideoConfig) else settings


def moved_config(stage: Stage, old: SwinConfig) -> SwinConfig:
    """Return the configuration of an encoder after :func:`make_start`, which raises the same errors."""
    config, video = transferred_config(old, transfer_settings(stage, old), None), video_of(stage)
    return config if video is None or isinstance(config, VideoConfig) else inflated_config(config, **video.time)


def chunks_of(stage: Stage, config: SwinConfig, budget: int) -> list[int]:
    """Return the number of attention chunks of each stage of the encoder.

    Args:
        budget: bytes of memory, used if the recipe says ``auto``.
    """
    chunks = stage.memory.attention_chunks
    if isinstance(chunks, str):  # auto
        return choose_chunks(config, stage.micro_batch_size, budget)
    return [chunks] * len(config.depths) if isinstance(chunks, int) else list(chunks)


def weights_fingerprint(module: nn.Module) -> str:
    """Compute a hash of the weights of a module."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def resume_fingerprint(recipe: Recipe, name: str, start: Start, *, is_supervised: bool, **facts: Any) -> dict[str, Any]:
    """Collect the settings that must match when a stage resumes: all but names, paths and logging.

    Paths of initial weights may change; a hash of the weights is included instead.

    Args:
        is_supervised: the stage has labels; ``data`` settings of pretraining do not matter to it.
        facts: further values, such as the number of training images.
    """
    stage = recipe.stages[name]
    settings = recipe.model_dump(mode="json", exclude={"name": True, "stages": True, "data": MUTABLE_DATA})
    if is_supervised:
        settings["data"] = {key: settings["data"][key] for key in ("mean", "std", "value_range")}
    own = stage.model_dump(mode="json", exclude=stage.mutable_on_resume)
    config = start.encoder.config
    own |= {"image_size": list(config.image_size), "window_size": list(config.window_size)}
    return {**settings, "stage": own, "starts_from": start.fingerprint, **facts}
