"""Weights on one process, on several, or a part of them on each; whole on none that does not need them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from simmim.footprint import shape_of
from simmim.objectives.objective import Objective
from swin.blocks import SwinBlock


def distribute(
    objective: Objective,
    make_optimizer: Callable[[], torch.optim.Optimizer],
    ema_decay: float | None,
    accelerator: Accelerator,
) -> tuple[Any, torch.optim.Optimizer, ModelEmaV3 | None]:
    """Model, optimizer and average of the weights as the processes share them.

    Each has a copy; or under FSDP2 a part of each parameter, and then parameters that have no numbers yet (on the
    meta device) get them part by part: no process ever holds them all.
    """
    if not accelerator.is_fsdp2:
        draw_weights(give_memory(objective, torch.device("cpu")))  # where all draw the same
        objective.to(accelerator.device)
        average = average_of(objective, ema_decay, shapes_only=False) if ema_decay else None
        return *accelerator.prepare(objective, make_optimizer()), average
    average = average_of(objective, ema_decay, shapes_only=True) if ema_decay else None
    shared = [objective] if average is None else [objective, average.module]
    for module in shared:  # what accelerate wraps by itself when nothing else is configured
        module._no_split_modules = sorted({type(m).__name__ for m in module.modules() if isinstance(m, SwinBlock)})
    # accelerate shards no model without an optimizer, and finds the parameters of that one by addresses, which those
    # on the meta device share: it gets one to throw away, and the real one when there are parameters.
    model, _ = accelerator.prepare(objective, torch.optim.SGD(objective.parameters()))
    draw_weights(give_memory(objective, accelerator.device))
    if average is not None:
        fsdp2_prepare_model(accelerator, average.module)
        give_memory(average.module, accelerator.device)
        average.set(objective)
    for module in shared:
        for method in ("measure", "picture", "predict", "reconstruct"):
            if hasattr(module, method):
                register_fsdp_forward_method(module, method)
    return model, accelerator.prepare_optimizer(make_optimizer()), average


def average_of(objective: Objective, decay: float, *, shapes_only: bool) -> ModelEmaV3:
    """The average of the weights, which begins with a copy of them, or of their shapes on the meta device."""
    average = ModelEmaV3(objective.head, decay=decay)  # which must not be on the meta device
    copied: dict[int, Any] = {id(p): shape_of(p) for p in objective.parameters()} if shapes_only else {}
    average.module = deepcopy(objective, copied).eval()
    return average


Open = dict[nn.Module, list[str]]
"""Parameters that have a shape, and no numbers yet: their names, by the module that they belong to."""


def open_parameters(model: nn.Module) -> Open:
    """Those on the meta device."""
    own = {module: dict(module.named_parameters(recurse=False)) for module in model.modules()}
    found = {module: [name for name, p in those.items() if p.device.type == "meta"] for module, those in own.items()}
    return {module: names for module, names in found.items() if names}


def give_memory(model: nn.Module, device: torch.device) -> Open:
    """Memory, on ``device``, for parameters that had none; which these are."""
    found = open_parameters(model)
    model._apply(lambda x: torch.empty_like(x, device=device) if x.device.type == "meta" else x)
    return found


@torch.no_grad()
def draw_weights(found: Open) -> None:
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


def whole_weights(objective: nn.Module, accelerator: Accelerator) -> dict[str, Tensor]:
    """The weights of an objective; gathered on the first process where each holds a part."""
    if not accelerator.is_fsdp2:
        return objective.state_dict()
    whole = get_model_state_dict(objective, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return cast(dict[str, Tensor], whole)
