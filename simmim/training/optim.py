"""AdamW over two parameter groups, and learning rates as pure functions of the optimizer step."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

REFERENCE_BATCH_SIZE = 512

LearningRate = Callable[[int], float]
"""Maps an optimizer step, from 0, to its learning rate."""


def make_optimizer(
    model: nn.Module,
    no_decay: set[nn.Parameter],
    *,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    layer_decay: float = 1.0,
    depths: Mapping[nn.Parameter, int] | None = None,
) -> torch.optim.AdamW:
    """Create AdamW with weight decay for all parameters but those in ``no_decay`` (by identity, not by name).

    The learning rate is 0 at first: the loop sets it before every step, times ``lr_scale`` of the group.

    Args:
        layer_decay: ``lr_scale`` of a group is ``layer_decay ** (deepest - depth)``.
        depths: depth of every parameter; needed if ``layer_decay`` is below 1.
    """
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (depths[parameter] if depths else 0, parameter not in no_decay)
            groups.setdefault(key, []).append(parameter)
    deepest = max(depth for depth, _ in groups)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": weight_decay if is_decayed else 0.0,
                "lr_scale": layer_decay ** (deepest - depth),
            }
            for (depth, is_decayed), parameters in sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))
        ],
        lr=0.0,
        betas=betas,
        eps=eps,
        fused=True,
    )


def make_lr(
    name: str,
    *,
    batch_size: int,
    steps_per_epoch: float,
    total_steps: int,
    base_lr: float,
    warmup_epochs: float,
    warmup_lr: float,
    min_lr: float = 0.0,
    milestones_epochs: Sequence[float] = (),
    gamma: float = 0.1,
) -> LearningRate:
    """Create a schedule: linear warm-up from ``warmup_lr``, then cosine or linear decay, or multiple steps.

    All three rates are given for 512 images per step and scaled linearly with ``batch_size``, as in the
    official recipes. Cosine and linear decay start at the end of the warm-up, without a jump, and end at ``min_lr``.

    Args:
        name: ``cosine``, ``linear`` or ``multistep``.
        milestones_epochs: epochs at which ``multistep`` multiplies the rate by ``gamma``.
    """
    lr, warmup, lowest = (rate * batch_size / REFERENCE_BATCH_SIZE for rate in (base_lr, warmup_lr, min_lr))
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    milestones = [round(epochs * steps_per_epoch) for epochs in milestones_epochs]

    def lr_at(step: int) -> float:
        if step < warmup_steps:
            return warmup + (lr - warmup) * step / warmup_steps
        if name == "multistep":
            return lr * gamma ** bisect.bisect_right(milestones, step)
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        remaining = 1 - progress if name == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return lowest + (lr - lowest) * remaining

    return lr_at
