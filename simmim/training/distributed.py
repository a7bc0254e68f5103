"""Accelerator, initialization and sharding of parameters: single process, DDP or FSDP2."""

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
    """Initialize the parameters that are on the meta device, and prepare model, optimizer and EMA for all processes.

    With a single process or DDP each process holds all parameters. Under FSDP2 it holds a shard of each; they are
    initialized module by module, so that no process ever holds the full model.

    Args:
        make_optimizer: creates the optimizer of the parameters of ``task`` as they are when it is called.
        ema_decay: decay of the EMA of the weights; None: no EMA.
    """
    if not accelerator.is_fsdp2:
        initialize_parameters(allocate_parameters(task, torch.device("cpu")))  # every process draws the same numbers
        task.to(accelerator.device)
        ema = make_ema(task, ema_decay, shapes_only=False) if ema_decay else None
        return *accelerator.prepare(task, make_optimizer()), ema
    ema = make_ema(task, ema_decay, shapes_only=True) if ema_decay else None
    sharded = [task] if ema is None else [task, ema.module]
    for module in sharded:  # accelerate's default for the modules to wrap
        module._no_split_modules = sorted({type(m).__name__ for m in module.modules() if isinstance(m, SwinBlock)})
    # accelerate shards a model only together with an optimizer, whose parameters it finds by address. Parameters on
    # the meta device share one address: prepare a temporary optimizer here, and the real one after initialization.
    model, _ = accelerator.prepare(task, torch.optim.SGD(task.parameters()))
    initialize_parameters(allocate_parameters(task, accelerator.device))
    if ema is not None:
        fsdp2_prepare_model(accelerator, ema.module)
        allocate_parameters(ema.module, accelerator.device)
        ema.set(task)
    for module in sharded:
        for method in ("eval_step", "visualize", "predict", "reconstruct"):
            if hasattr(module, method):
                register_fsdp_forward_method(module, method)
    return model, accelerator.prepare_optimizer(make_optimizer()), ema


def make_ema(task: Task, decay: float, *, shapes_only: bool) -> ModelEmaV3:
    """Create the EMA of the weights: a copy of them, or with ``shapes_only`` parameters on the meta device."""
    ema = ModelEmaV3(task.head, decay=decay)  # any module that is not on the meta device; replaced below
    copied: dict[int, Any] = {id(p): to_meta(p) for p in task.parameters()} if shapes_only else {}
    ema.module = deepcopy(task, copied).eval()
    return ema


ParameterNames = dict[nn.Module, list[str]]
"""Names of parameters by the module that they belong to."""


def meta_parameters(model: nn.Module) -> ParameterNames:
    """Return the parameters on the meta device: they have a shape but no values yet."""
    own = {module: dict(module.named_parameters(recurse=False)) for module in model.modules()}
    found = {module: [name for name, p in those.items() if p.device.type == "meta"] for module, those in own.items()}
    return {module: names for module, names in found.items() if names}


def allocate_parameters(model: nn.Module, device: torch.device) -> ParameterNames:
    """Allocate memory on ``device`` for the parameters on the meta device and return their names."""
    found = meta_parameters(model)
    model._apply(lambda x: torch.empty_like(x, device=device) if x.device.type == "meta" else x)
    return found


@torch.no_grad()
def initialize_parameters(found: ParameterNames) -> None:
    """Initialize parameters module by module, with ``reset_parameters`` and torch's global generator.

    For a sharded module every process draws the full parameters, as a single process would, and keeps its shard.
    """
    for module, names in found.items():
        kept = {name: module.get_parameter(name) for name in names}
        shards = {name: own for name, own in kept.items() if isinstance(own, DTensor)}
        for name, own in shards.items():
            setattr(module, name, nn.Parameter(torch.empty(own.shape, dtype=own.dtype)))
        module.reset_parameters()  # type: ignore[operator]
        for name, own in shards.items():
            full = module.get_parameter(name).detach()
            part = distribute_tensor(full, own.device_mesh, own.placements, src_data_rank=None)
            own.to_local().copy_(part.to_local())
            setattr(module, name, kept[name])


def full_state_dict(task: nn.Module, accelerator: Accelerator) -> dict[str, Tensor]:
    """Return the state dict of a task; if it is sharded, gathered on the CPU of the first process."""
    if not accelerator.is_fsdp2:
        return task.state_dict()
    state = get_model_state_dict(task, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return cast(dict[str, Tensor], state)


SUPPORTED_WITHOUT_SHARDING = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def make_accelerator(precision: str | None, trackers: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """Create the Accelerator and check how the processes were launched.

    Args:
        precision: ``bf16``, ``fp32``, or None for the configuration of accelerate.
        trackers: trackers of accelerate, which write into ``folder`` or to their servers.

    Raises:
        ValueError: several independent processes instead of one distributed run, an unsupported
            distribution or precision, or a tracker that is not installed.
    """
    for tracker in trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ValueError(f"log.trackers names {tracker}, which is not installed: pip install {tracker}")
    # By default cuDNN may sum the gradient of a convolution in any order; exact resume needs a fixed order.
    torch.backends.cudnn.deterministic = True
    accelerator = Accelerator(
        mixed_precision={"fp32": "no"}.get(precision or "", precision),
        log_with=list(trackers) or None,
        project_dir=folder,
        # Each weight is used once per forward pass, so caching its bf16 copy would only cost memory.
        kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but each of them sees {accelerator.num_processes}: on a machine "
            "without GPUs start with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ..."
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        _configure_sharding(accelerator.state.fsdp_plugin)
    elif accelerator.distributed_type not in SUPPORTED_WITHOUT_SHARDING:
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
    """Return the precision of a stage if the user gives none.

    Args:
        folder: folder of the stage.

    Returns:
        The precision recorded in the folder if the stage was started before; else ``bf16`` on CPUs with bf16
        instructions; else None: accelerate's configuration.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return None
    if folder is not None and (folder / ENVIRONMENT).is_file():
        with suppress(OSError, ValueError, AttributeError):
            recorded = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8")).get("precision")
            return {"no": "fp32"}.get(recorded, recorded)
    if torch.accelerator.is_available():
        return None
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # only in newer versions of torch
    return "bf16" if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else None


def _configure_sharding(plugin: FullyShardedDataParallelPlugin) -> None:
    """Check and complete the FSDP2 settings, so that results equal those of a single process.

    Autocast decides what is computed in bf16, as without sharding.

    Raises:
        ValueError: a setting that would change the results or that is not supported.
    """
    for setting, wanted, why in (
        ("fsdp_version", 2, "version 1 is not supported"),
        ("activation_checkpointing", False, "it gives wrong gradients with stochastic depth"),
        ("cpu_ram_efficient_loading", False, "every process initializes the same weights itself"),
    ):
        if getattr(plugin, setting) != wanted:
            name = f"fsdp_{setting.removeprefix('fsdp_')}"
            raise ValueError(f"accelerate's {name} must be {str(wanted).lower()} ({why}): see recipes/accelerate")
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
