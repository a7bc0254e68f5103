"""What every stage needs: the machine, the images, where to start, and a folder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from simmim.memory import choose_chunks
from simmim.optim import LearningRate, make_lr
from simmim.runlog import ENVIRONMENT
from simmim.schema import Recipe, Stage, Supervised, encoder_config, video_of
from swin import SwinConfig, SwinEncoder, VideoConfig, import_encoder, inflate, load_encoder, transfer
from swin.config import Pair
from swin.inflation import inflated
from swin.transfer import changed
from swin.video import build
from swin.weights import DESCRIPTION

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

KINDS_OF_DISTRIBUTION = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
PASSING_DATA = {"path", "num_workers", "max_broken_share", "read_timeout_s"}


class Start(NamedTuple):
    """Where a stage starts: fresh weights, or those of ``path``."""

    encoder: SwinEncoder
    path: Path | None
    fingerprint: str
    """Of the weights; the same weights give the same stage."""


def make_accelerator(precision: str | None, trackers: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """An Accelerator, after checking that the launch is what it seems.

    Args:
        trackers: of accelerate, which write below ``folder`` or to their servers.

    Raises:
        ValueError: several independent copies were started instead of one distributed run, a kind of
            distribution or precision that is not supported, or a tracker that is not installed.
    """
    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ValueError(f"log.trackers names {tracker}, which is not installed: pip install {tracker}")
    # cuDNN may sum the gradient of a convolution in any order; in one order, a run continues bit for bit.
    torch.backends.cudnn.deterministic = True
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(precision or "", precision),
        log_with=list(trackers) or None,
        project_dir=folder,
        # A weight is used once in a pass: a copy of it in bf16 would wait for nothing.
        kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but each of them believes to be alone: on a machine without "
            "GPUs start with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ..."
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        _configure_sharding(accelerator.state.fsdp_plugin)
    elif accelerator.distributed_type not in KINDS_OF_DISTRIBUTION:
        raise ValueError(
            f"accelerate is configured for {accelerator.distributed_type.value}, which is not supported: use one of "
            "recipes/accelerate (ddp_8, zero2_8, zero3_8), or start with --multi_gpu"
        )
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed precision {accelerator.mixed_precision!r} is not supported: use bf16, which needs no "
            "loss scaling, or no for fp32"
        )
    return accelerator


def usual_precision(folder: Path | None = None) -> str | None:
    """What a stage is trained in where nobody says: what it was begun in, which its folder knows; else bf16 on
    processors that multiply it; None is accelerate's own."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return None
    if folder is not None and (folder / ENVIRONMENT).is_file():
        with suppress(OSError, ValueError, AttributeError):
            begun = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8")).get("precision")
            return {"no": "fp32"}.get(begun, begun)
    if torch.accelerator.is_available():
        return None
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # of newer versions of torch
    return "bf16" if any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else None


def _configure_sharding(plugin: FullyShardedDataParallelPlugin) -> None:
    """FSDP2 with the numbers of a single process: autocast decides what is computed in bf16, as it does there.

    Raises:
        ValueError: a setting with which it would not be so.
    """
    for setting, wanted, why in (
        ("fsdp_version", 2, "version 1 is not supported"),
        ("activation_checkpointing", False, "it gives wrong gradients with stochastic depth"),
        ("cpu_ram_efficient_loading", False, "every process makes the same weights itself"),
    ):
        if getattr(plugin, setting) != wanted:
            name = f"fsdp_{setting.removeprefix('fsdp_')}"
            raise ValueError(f"accelerate's {name} must be {str(wanted).lower()} ({why}): see recipes/accelerate")
    plugin.mixed_precision_policy = MixedPrecisionPolicy()


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

    From scratch its parameters are on the meta device: :func:`simmim.stages.sharding.draw_weights`.

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
    """What :func:`swin.transfer.transfer` changes of an encoder to start from, for a stage."""
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


def decisive_settings(recipe: Recipe, name: str, start: Start, **facts: Any) -> dict[str, Any]:
    """What must not change when a stage continues: everything but names, places and bookkeeping.

    Where a place is left out (``init_from``, ``head``), what was found there is not.
    """
    stage = recipe.stages[name]
    settings = recipe.model_dump(mode="json", exclude={"name": True, "stages": True, "data": PASSING_DATA})
    if isinstance(stage, Supervised):
        settings["data"] = {key: settings["data"][key] for key in ("mean", "std", "value_range")}
    own = stage.model_dump(mode="json", exclude=stage.passing)
    config = start.encoder.config
    own |= {"image_size": list(config.image_size), "window_size": list(config.window_size)}
    return {**settings, "stage": own, "starts_from": start.fingerprint, **facts}
