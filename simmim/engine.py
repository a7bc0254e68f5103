"""The one training loop. It trains any objective: a module that turns a batch into a loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from simmim.alarms import overfitting
from simmim.checkpoint import save_checkpoint
from simmim.counter_rng import derive_seed
from simmim.optim import LearningRate
from simmim.runlog import RunLog

Batch = dict[str, Any]


class NonFiniteLoss(RuntimeError):
    """Loss or gradient became NaN or infinite; the optimizer was not stepped."""


def fit(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[Batch],
    *,
    lr_at: LearningRate,
    start_step: int,
    total_steps: int,
    accumulation: int,
    clip_grad_norm: float | None,
    images_per_epoch: int,
    seed: int,
    log: RunLog,
    checkpoints: Path,
    settings: dict[str, Any],
    keep_checkpoints: int,
    metrics_every_steps: int,
    pictures_every_steps: int,
    checkpoint_every_steps: int,
    holdout: Iterable[Batch],
    preview: Batch,
    average: ModelEmaV3 | None = None,
) -> None:
    """Train from ``start_step`` to ``total_steps`` (optimizer steps) and save a checkpoint at the end.

    Args:
        model, optimizer: prepared by ``accelerator``.
        micro_batches: ``accumulation`` per step, this process's share.
        holdout: the held-out batches, none if nothing is held out; iterated many times.
        preview: the batch that pictures show.
        average: of the weights of ``model``; judged in its place.

    Raises:
        NonFiniteLoss: before the optimizer would have taken the step.
    """
    objective = accelerator.unwrap_model(model)
    judged = objective if average is None else average.module
    batches = iter(micro_batches)
    log.start(start_step, total_steps)
    model.train()
    for step in range(start_step + 1, total_steps + 1):
        lr = lr_at(step - 1)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        # Stochastic depth and mixup draw from global generators: tied to the step, they resume exactly.
        set_seed(derive_seed("step", seed, step, accelerator.process_index) % 2**32)
        losses, num_images = [], 0
        for micro_step in range(accumulation):
            batch = next(batches)
            log.broken(batch["broken"])
            # Gradients travel between processes once per step, not once per micro-step.
            with nullcontext() if micro_step == accumulation - 1 else accelerator.no_sync(model):
                loss = model(to_device(batch, accelerator.device))
                accelerator.backward(loss / accumulation)
            losses.append(loss.detach())
            num_images += len(batch["image"])
        loss = accelerator.reduce(torch.stack(losses).mean(), "mean")
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), clip_grad_norm or math.inf)
        loss_value, grad_norm_value = torch.stack([loss, grad_norm.to(loss.dtype)]).tolist()
        if not math.isfinite(loss_value) or not math.isfinite(grad_norm_value):
            log.end()
            raise NonFiniteLoss(
                f"step {step}: loss {loss_value}, gradient norm {grad_norm_value}; the step was not taken. "
                "Checkpoints of earlier steps are intact: lower base_lr or lengthen the warm-up"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.update(objective, step)

        log.count(num_images * accelerator.num_processes)
        is_last = step == total_steps
        if step % metrics_every_steps == 0 or is_last:
            images = num_images * accelerator.num_processes * step
            numbers = {"epoch": images / images_per_epoch, "loss": loss_value, "lr": lr, "grad_norm": grad_norm_value}
            log.metrics(step, numbers)
        if step % pictures_every_steps == 0 or is_last:
            with accelerator.autocast():
                judged.eval()
                log.picture(step, judged.picture(to_device(preview, accelerator.device)))
                numbers = evaluate(judged, holdout, accelerator)
                judged.train()
            if numbers:
                log.metrics(step, {f"holdout_{key}": value for key, value in numbers.items()})
                if warning := overfitting(log.history()):
                    log.warn(step, warning)
        if (step % checkpoint_every_steps == 0 or is_last) and accelerator.is_main_process:
            save_checkpoint(checkpoints, step, objective, optimizer, settings, keep=keep_checkpoints, average=average)
    log.end()
    accelerator.wait_for_everyone()


@torch.no_grad()
def evaluate(objective: nn.Module, batches: Iterable[Batch], accelerator: Accelerator) -> dict[str, float]:
    """The objective's ``measure``, averaged over all images; an empty dict when there are none.

    Args:
        batches: this process's share, no image twice.
    """
    totals: dict[str, float] = {}
    for batch in batches:
        images = len(batch["image"])
        numbers = objective.measure(to_device(batch, accelerator.device))  # type: ignore[operator]
        for name, value in {**numbers, "images": 1.0}.items():
            totals[name] = totals.get(name, 0.0) + float(value) * images
    return mean_over_images(totals)


def mean_over_images(totals: dict[str, float]) -> dict[str, float]:
    """Sums of every process over its images, with their number as ``images`` -> means over all of them."""
    shares = gather_object([totals])
    summed = {name: sum(share.get(name, 0.0) for share in shares) for name in {k: 0 for share in shares for k in share}}
    count = summed.pop("images", 0.0)
    return {name: total / count for name, total in summed.items()} if count else {}


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The tensors of a batch, on ``device``."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items() if isinstance(value, Tensor)}
