"""The one training loop. It trains any objective: a module that turns a batch into a loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from simmim.rng import derive_seed
from simmim.signals import Stopped, StopRequest
from simmim.training.checkpoint import Checkpoints, training_state
from simmim.training.health import Stability, overfitting
from simmim.training.nonfinite_dump import MicroBatch, write_nonfinite_dump
from simmim.training.optim import LearningRate
from simmim.training.run_log import RunLog
from swin.attention import watch_attention

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
    checkpoints: Checkpoints,
    stop: StopRequest,
    metrics_every_steps: int,
    evaluate_every_steps: int,
    checkpoint_every_steps: int,
    validation: Iterable[Batch],
    preview: Batch,
    ema: ModelEmaV3 | None = None,
) -> None:
    """Train from ``start_step`` to ``total_steps`` (optimizer steps) and save a checkpoint at the end.

    Args:
        model, optimizer: prepared by ``accelerator``.
        micro_batches: ``accumulation`` per step, this process's share.
        stop: asked after every step.
        holdout: the held-out batches, none if nothing is held out; iterated many times.
        preview: the batch that pictures show.
        average: of the weights of ``model``; judged in its place.

    Raises:
        NonFiniteLoss: before the optimizer would have taken the step.
        Stopped: after the step in which a process was asked to stop, when it is saved.
        OSError: a checkpoint could not be written.
    """
    task = accelerator.unwrap_model(model)
    judged = task if ema is None else ema.module
    batches = iter(micro_batches)
    log.start(start_step, total_steps)
    stability = Stability(log.history())
    model.train()
    for step in range(start_step + 1, total_steps + 1):
        lr = lr_at(step - 1)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        # Stochastic depth and mixup draw from global generators: tied to the step, they resume exactly.
        set_seed(derive_seed("step", seed, step, accelerator.process_index) % 2**32)
        taken: list[MicroBatch] = []
        for micro_step in range(accumulation):
            batch = next(batches)
            log.corrupt(batch["corrupt"])
            # Gradients travel between processes once per step, not once per micro-step.
            with nullcontext() if micro_step == accumulation - 1 else accelerator.no_sync(model):
                with accelerator.autocast():
                    loss = model(to_device(batch, accelerator.device))
                accelerator.backward(loss / accumulation)
            taken.append(MicroBatch(batch["epoch"], batch["index"], loss.detach()))
        grad_norm = accelerator.clip_grad_norm_(model.parameters(), clip_grad_norm or math.inf)
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        # Sums over images, and whether any process was asked to stop: all of them in one message.
        counts = [len(batch.indices) for batch in taken]
        loss_sum = torch.stack([batch.loss * count for batch, count in zip(taken, counts, strict=True)]).sum()
        sums = torch.stack([loss_sum, loss.new_tensor(sum(counts)), loss.new_tensor(stop.reason() is not None)])
        sums = torch.cat([accelerator.reduce(sums, "sum"), grad_norm[None].to(loss.dtype)])
        loss_total, num_images, num_stops, grad_norm_value = sums.tolist()
        loss_value = loss_total / num_images
        if not math.isfinite(loss_value) or not math.isfinite(grad_norm_value):
            log.end()
            text = f"step {step}: loss {loss_value}, gradient norm {grad_norm_value}; the step was not taken"
            numbers = {"loss": loss_value, "grad_norm": grad_norm_value, "seed": seed}
            state = training_state(task, optimizer, ema and ema.module)
            try:
                log.event(step, "not finite", text)
                report = write_nonfinite_dump(log.folder, step, state, taken, accelerator, **numbers)
                more = f"`simmim replay {report}` does it again and names the images and modules"
            except OSError as error:
                more = f"its black box is missing: {error}"
            raise NonFiniteLoss(
                f"{text}. {more}. Checkpoints of earlier steps are intact; a lower base_lr often helps, "
                "from there on with --allow-changes"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update(task, step)

        log.count(int(num_images))
        if warning := stability.warning(loss_value, grad_norm_value):
            log.event(step, "warning", warning)
        is_last = step == total_steps
        if step % metrics_every_steps == 0 or is_last:
            epoch = num_images * step / images_per_epoch
            log.metrics(step, {"epoch": epoch, "loss": loss_value, "lr": lr, "grad_norm": grad_norm_value})
        if step % evaluate_every_steps == 0 or is_last:
            judged.eval()
            with accelerator.autocast():
                with watch_attention(judged) as numbers:
                    picture = judged.visualize(to_device(preview, accelerator.device))
                numbers |= {
                    f"validation_{key}": v for key, v in evaluate(judged, validation, accelerator, preview).items()
                }
            judged.train()
            log.image(step, picture)
            log.metrics(step, numbers)
            if warning := overfitting(log.history()):
                log.event(step, "warning", warning)
        is_stopped = num_stops > 0
        checkpoints.check()
        if step % checkpoint_every_steps == 0 or is_last or is_stopped:
            log.settle()
            checkpoints.save(step, training_state(task, optimizer, ema and ema.module))
        if is_stopped:
            checkpoints.wait()
            log.end()
            reason = stop.reason() or "another process"
            log.event(step, "stopped", f"by {reason}")
            accelerator.wait_for_everyone()
            raise Stopped(f"stopped by {reason} after step {step}, which is saved: the same command continues")
    checkpoints.wait()
    log.end()
    accelerator.wait_for_everyone()


@torch.no_grad()
def evaluate(
    task: nn.Module, batches: Iterable[Batch], accelerator: Accelerator, filler: Batch | None = None
) -> dict[str, float]:
    """The objective's ``eval_step``, averaged over all images; an empty dict when there are none.

    Args:
        batches: this process's share, no image twice.
        filler: as of :func:`in_step`.
    """
    totals: dict[str, float] = {}
    for batch, images in in_step(batches, accelerator, filler):
        numbers = task.eval_step(to_device(batch, accelerator.device))  # type: ignore[operator]
        for name, value in {**numbers, "images": 1.0}.items():
            totals[name] = totals.get(name, 0.0) + float(value) * images
    return mean_over_images(totals)


def in_step(
    batches: Iterable[Batch], accelerator: Accelerator, filler: Batch | None = None
) -> Iterator[tuple[Batch, int]]:
    """Every batch with its number of images; all processes get equally many where their weights are shared out.

    There, each forward pass is one of all processes.

    Args:
        filler: for processes that have none left while others have; counted as no images.
    """
    if not accelerator.is_fsdp2:
        yield from ((batch, len(batch["image"])) for batch in batches)
        return
    own = iter(batches)
    while True:
        batch = next(own, None)
        anyone = accelerator.reduce(torch.tensor(float(batch is not None), device=accelerator.device), "sum")
        if not anyone:
            return
        if batch is not None:
            yield batch, len(batch["image"])
        elif filler is not None:
            yield filler, 0


def mean_over_images(totals: dict[str, float]) -> dict[str, float]:
    """Sums of every process over its images, with their number as ``images`` -> means over all of them."""
    shares = gather_object([totals])
    summed = {name: sum(share.get(name, 0.0) for share in shares) for name in {k: 0 for share in shares for k in share}}
    count = summed.pop("images", 0.0)
    return {name: total / count for name, total in summed.items()} if count else {}


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The tensors of a batch, on ``device``."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items() if isinstance(value, Tensor)}
