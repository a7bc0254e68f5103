"""What every stage needs: the machine, the images, where to start, and a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from simmim.config import Recipe, Stage, Supervised, encoder_config, video_of
from simmim.training.memory import choose_chunks
from simmim.training.optim import LearningRate, make_lr
from swin import SwinConfig, SwinEncoder, VideoConfig, import_encoder, inflate, load_encoder, transfer
from swin.config import Pair
from swin.inflation import inflated
from swin.video import build
from swin.weights.serialization import DESCRIPTION
from swin.weights.transfer import changed

FIXED = (
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

MUTABLE_DATA = {"path", "num_workers", "max_corrupt_fraction", "read_timeout_s"}


class Start(NamedTuple):
    """Where a stage starts: fresh weights, or those of ``path``."""

    encoder: SwinEncoder
    path: Path | None
    fingerprint: str
    """Of the weights; the same weights give the same stage."""


def derive_accumulation(stage: Stage, num_processes: int) -> int:
    """Micro-steps per optimizer step.

    Raises:
        ValueError: the batch cannot be divided; names the micro-batches that would.
    """
    batch_size, micro_batch_size = stage.batch_size, stage.micro_batch_size
    if batch_size % (micro_batch_size * num_processes) == 0:
        return batch_size // (micro_batch_size * num_processes)
    if batch_size % num_processes:
        raise ValueError(f"batch_size {batch_size} does not divide among {num_processes} processes: change it")
    choices = micro_batch_sizes(stage, num_processes)
    if not choices:
        raise ValueError(
            f"batch_size {batch_size} leaves {batch_size // num_processes} images to each of {num_processes} "
            "process(es), which mixup and cutmix cannot pair: change it"
        )
    raise ValueError(
        f"batch_size {batch_size} is not a multiple of micro_batch_size {micro_batch_size} x {num_processes} "
        f"process(es): take a micro_batch_size of {', '.join(map(str, choices))}"
    )


def micro_batch_sizes(stage: Stage, num_processes: int) -> list[int]:
    """Those that the batch can be divided into, in ascending order; even ones where images are mixed in pairs."""
    if stage.batch_size % num_processes:
        return []
    share = stage.batch_size // num_processes
    return [size for size in range(1, share + 1) if share % size == 0 and not (stage.in_pairs and size % 2)]


def schedule_of(stage: Stage, num_images: int, total_steps: int) -> LearningRate:
    """The learning rate of every step of a stage."""
    return make_lr(
        batch_size=stage.batch_size,
        steps_per_epoch=num_images / stage.batch_size,
        total_steps=total_steps,
        **stage.schedule.model_dump(exclude={"epochs"}),
    )


def make_start(recipe: Recipe, name: str, out: Path) -> Start:
    """The encoder that a stage starts from, at its own image and window size.

    From scratch its parameters are on the meta device: :func:`simmim.training.distributed.initialize_parameters`.

    Raises:
        ValueError: the stage before has not been run, or weights that are not what the recipe says.
    """
    stage = recipe.stages[name]
    init = recipe.start_of(name)
    if init == "scratch":
        with torch.device("meta"):
            return Start(build(encoder_config(recipe.encoder, stage)), None, "scratch")
    path = Path(init).expanduser()
    if init in recipe.stages:
        path = out / recipe.name / init / "export"
        if not path.exists():
            raise ValueError(f"{name} starts from {init}, which has not been run: `simmim run` walks all stages")
    encoder = load_encoder(path) if (path / DESCRIPTION).exists() else import_encoder(path)[0]
    digest = fingerprint(encoder)
    check_start(recipe, name, path, encoder.config)
    # The weights stay in the file, which every process maps, until they are moved or changed.
    video, moved = video_of(stage), transfer(encoder, share=True, **settings_of(stage, encoder.config))
    if video is not None and not isinstance(moved.config, VideoConfig):
        moved = inflate(moved, **video.time)
    return Start(moved, path, digest)


def check_start(recipe: Recipe, name: str, path: Path, found: SwinConfig) -> None:
    """Raises ValueError: an encoder to start from that is not the one of the recipe."""
    wanted = encoder_config(recipe.encoder, recipe.stages[name])
    for field in FIXED:
        if getattr(found, field) != getattr(wanted, field):
            raise ValueError(
                f"{name} starts from {path}, whose {field} is {getattr(found, field)}, but the recipe "
                f"says {getattr(wanted, field)}: correct encoder in the recipe"
            )
    if isinstance(found, VideoConfig):
        if not isinstance(wanted, VideoConfig):
            raise ValueError(f"{name} starts from {path}, an encoder of clips: give stages.{name} a video block")
        if found.temporal_patch != wanted.temporal_patch:
            raise ValueError(
                f"{name} starts from {path}, whose tokens are of {found.temporal_patch} frames: "
                f"stages.{name}.video.temporal_patch must be that, not {wanted.temporal_patch}"
            )


def geometry(stage: Stage, old: SwinConfig) -> tuple[Pair, Pair]:
    """Image and window of a stage: as given, else those of the encoder, the window in proportion to the image."""
    size = stage.image_size or old.image_size
    in_proportion = tuple(
        max(1, round(window * new / before))
        for window, new, before in zip(old.window_size, size, old.image_size, strict=True)
    )
    return size, stage.window_size or (in_proportion[0], in_proportion[1])


def settings_of(stage: Stage, old: SwinConfig) -> dict[str, Any]:
    """What :func:`swin.weights.transfer.transfer` changes of an encoder to start from, for a stage."""
    size, window = geometry(stage, old)
    settings: dict[str, Any] = {"image_size": size, "window_size": window, "drop_path": stage.drop_path}
    video = video_of(stage)
    return settings | video.time if video and isinstance(old, VideoConfig) else settings


def moved_config(stage: Stage, old: SwinConfig) -> SwinConfig:
    """The configuration that :func:`make_start` makes of one to start from, which raises the same."""
    config, video = changed(old, settings_of(stage, old), None), video_of(stage)
    return config if video is None or isinstance(config, VideoConfig) else inflated(config, **video.time)


def chunks_of(stage: Stage, config: SwinConfig, budget: int) -> list[int]:
    """In how many chunks each stage of the encoder computes its attention; ``budget`` in bytes decides what is open."""
    chunks = stage.memory.attention_chunks
    if isinstance(chunks, str):  # auto
        return choose_chunks(config, stage.micro_batch_size, budget)
    return [chunks] * len(config.depths) if isinstance(chunks, int) else list(chunks)


def fingerprint(module: nn.Module) -> str:
    """Of its weights: equal for equal weights."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def resume_fingerprint(recipe: Recipe, name: str, start: Start, **facts: Any) -> dict[str, Any]:
    """What must not change when a stage continues: everything but names, places and bookkeeping.

    Where a place is left out (``init_from``, ``head``), what was found there is not.
    """
    stage = recipe.stages[name]
    settings = recipe.model_dump(mode="json", exclude={"name": True, "stages": True, "data": MUTABLE_DATA})
    if isinstance(stage, Supervised):
        settings["data"] = {key: settings["data"][key] for key in ("mean", "std", "value_range")}
    own = stage.model_dump(mode="json", exclude=stage.mutable_on_resume)
    config = start.encoder.config
    own |= {"image_size": list(config.image_size), "window_size": list(config.window_size)}
    return {**settings, "stage": own, "starts_from": start.fingerprint, **facts}
