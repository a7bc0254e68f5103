"""Weights on one process, on several, or a part of them on each; whole on none that does not need them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from simmim.objectives.classify import Classify
from simmim.objectives.reconstruct import Reconstruct
from swin.blocks import SwinBlock


def distribute(
    objective: Reconstruct | Classify,
    make_optimizer: Callable[[], torch.optim.Optimizer],
    ema_decay: float | None,
    accelerator: Accelerator,
) -> tuple[Any, torch.optim.Optimizer, ModelEmaV3 | None]:
    """Model, optimizer and average of the weights as the processes share them.

    Each has a copy; or under FSDP2 a part of each parameter, and then parameters that have no numbers yet (on the
    meta device) get them part by part: no process ever holds them all.
    """
    sharded = accelerator.is_fsdp2
    if not sharded:
        draw_weights(objective)
        objective.to(accelerator.device)
    average = ModelEmaV3(objective, decay=ema_decay) if ema_decay else None
    # What accelerate wraps by itself when nothing else is configured.
    blocks = sorted({type(module).__name__ for module in objective.modules() if isinstance(module, SwinBlock)})
    for module in filter(None, (objective, average and average.module)):
        module._no_split_modules = blocks
    if not sharded:
        return *accelerator.prepare(objective, make_optimizer()), average
    # accelerate shards no model without an optimizer, and finds the parameters of that one by addresses, which those
    # on the meta device share: it gets one to throw away, and the real one when there are parameters.
    model, _ = accelerator.prepare(objective, torch.optim.SGD(objective.parameters()))
    if average is not None:
        fsdp2_prepare_model(accelerator, average.module)
        copied = [name for name, parameter in average.module.named_parameters() if is_open(parameter)]
    draw_weights(objective)
    if average is not None:
        for name in copied:
            owner, _, last = name.rpartition(".")
            own = objective.get_parameter(name).detach().clone()
            setattr(average.module.get_submodule(owner), last, nn.Parameter(own, requires_grad=False))
    for module in filter(None, (objective, average and average.module)):
        for method in ("measure", "picture", "reconstruct"):
            if hasattr(module, method):
                register_fsdp_forward_method(module, method)
    return model, accelerator.prepare_optimizer(make_optimizer()), average


def is_open(parameter: nn.Parameter) -> bool:
    """Whether it has a shape, and no numbers yet."""
    return parameter.device.type == "meta"


@torch.no_grad()
def draw_weights(model: nn.Module) -> None:
    """Numbers for the parameters that have none, from torch's generator, one module at a time.

    Of a module that is shared out every process draws the whole, the same as one alone would, and keeps its part.
    """
    for module in model.modules():
        open_ones = {name: p for name, p in module.named_parameters(recurse=False) if is_open(p)}
        if not open_ones:
            continue
        for name, parameter in open_ones.items():
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)))
        module.reset_parameters()  # type: ignore[operator]
        for name, parameter in open_ones.items():
            if isinstance(parameter, DTensor):
                whole = module.get_parameter(name).detach()
                own = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
                setattr(module, name, nn.Parameter(own))


def whole_weights(objective: nn.Module, accelerator: Accelerator) -> dict[str, Tensor]:
    """The weights of an objective; gathered on the first process where each holds a part."""
    if not accelerator.is_fsdp2:
        return objective.state_dict()
    whole = get_model_state_dict(objective, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return cast(dict[str, Tensor], whole)
