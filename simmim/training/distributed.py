"""Weights on one process, on several, or a part of them on each; whole on none that does not need them."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from simmim.tasks.task import Task
from simmim.training.footprint import to_meta
from simmim.training.run_log import ENVIRONMENT
from swin.blocks import SwinBlock


def distribute(
    task: Task,
    make_optimizer: Callable[[], torch.optim.Optimizer],
    ema_decay: float | None,
    accelerator: Accelerator,
) -> tuple[Any, torch.optim.Optimizer, ModelEmaV3 | None]:
    """Model, optimizer and average of the weights as the processes share them.

    Each has a copy; or under FSDP2 a part of each parameter, and then parameters that have no numbers yet (on the
    meta device) get them part by part: no process ever holds them all.
    """
    if not accelerator.is_fsdp2:
        initialize_parameters(allocate_parameters(task, torch.device("cpu")))  # where all draw the same
        task.to(accelerator.device)
        ema = make_ema(task, ema_decay, shapes_only=False) if ema_decay else None
        return *accelerator.prepare(task, make_optimizer()), ema
    ema = make_ema(task, ema_decay, shapes_only=True) if ema_decay else None
    shared = [task] if ema is None else [task, ema.module]
    for module in shared:  # what accelerate wraps by itself when nothing else is configured
        module._no_split_modules = sorted({type(m).__name__ for m in module.modules() if isinstance(m, SwinBlock)})
    # accelerate shards no model without an optimizer, and finds the parameters of that one by addresses, which those
    # on the meta device share: it gets one to throw away, and the real one when there are parameters.
    model, _ = accelerator.prepare(task, torch.optim.SGD(task.parameters()))
    initialize_parameters(allocate_parameters(task, accelerator.device))
    if ema is not None:
        fsdp2_prepare_model(accelerator, ema.module)
        allocate_parameters(ema.module, accelerator.device)
        ema.set(task)
    for module in shared:
        for method in ("measure", "picture", "predict", "reconstruct"):
            if hasattr(module, method):
                register_fsdp_forward_method(module, method)
    return model, accelerator.prepare_optimizer(make_optimizer()), ema


def make_ema(task: Task, decay: float, *, shapes_only: bool) -> ModelEmaV3:
    """The average of the weights, which begins with a copy of them, or of their shapes on the meta device."""
    ema = ModelEmaV3(task.head, decay=decay)  # which must not be on the meta device
    copied: dict[int, Any] = {id(p): to_meta(p) for p in task.parameters()} if shapes_only else {}
    ema.module = deepcopy(task, copied).eval()
    return ema


Open = dict[nn.Module, list[str]]
"""Parameters that have a shape, and no numbers yet: their names, by the module that they belong to."""


def meta_parameters(model: nn.Module) -> Open:
    """Those on the meta device."""
    own = {module: dict(module.named_parameters(recurse=False)) for module in model.modules()}
    found = {module: [name for name, p in those.items() if p.device.type == "meta"] for module, those in own.items()}
    return {module: names for module, names in found.items() if names}


def allocate_parameters(model: nn.Module, device: torch.device) -> Open:
    """Memory, on ``device``, for parameters that had none; which these are."""
    found = meta_parameters(model)
    model._apply(lambda x: torch.empty_like(x, device=device) if x.device.type == "meta" else x)
    return found


@torch.no_grad()
def initialize_parameters(found: Open) -> None:
    """Numbers from torch's generator, one module at a time.

    Of a module that is shared out every process draws the whole, the same as one alone would, and keeps its part.
    """
    for module, names in found.items():
        kept = {name: module.get_parameter(name) for name in names}
        shards = {name: own for name, own in kept.items() if isinstance(own, DTensor)}
        for name, own in shards.items():
            setattr(module, name, nn.Parameter(torch.empty(own.shape, dtype=own.dtype)))
        module.reset_parameters()  # type: ignore[operator]
        for name, own in shards.items():
            whole = module.get_parameter(name).detach()
            part = distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)
            own.to_local().copy_(part.to_local())
            setattr(module, name, kept[name])


def full_state_dict(task: nn.Module, accelerator: Accelerator) -> dict[str, Tensor]:
    """The weights of an objective; gathered on the first process where each holds a part."""
    if not accelerator.is_fsdp2:
        return task.state_dict()
    whole = get_model_state_dict(task, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return cast(dict[str, Tensor], whole)


KINDS_OF_DISTRIBUTION = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


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


def default_precision(folder: Path | None = None) -> str | None:
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
