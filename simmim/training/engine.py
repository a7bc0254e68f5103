"""The training loop. It trains any task: a module that turns a batch into a loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from simmim.data.loader import Batch
from simmim.rng import derive_seed
from simmim.signals import Stopped, StopRequest
from simmim.training.checkpoint import Checkpoints, State, training_state
from simmim.training.health import Stability, overfitting
from simmim.training.nonfinite_dump import MicroBatch, write_nonfinite_dump
from simmim.training.optim import LearningRate
from simmim.training.run_log import RunLog
from swin.attention import watch_attention


class NonFiniteLoss(RuntimeError):
    """Loss or gradient became NaN or infinite; the optimizer was not stepped."""


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Steps, seed, clipping and intervals of a training run; all steps are optimizer steps."""

    start_step: int
    """Steps already taken; 0 for a new run."""
    total_steps: int
    accumulation: int
    """Micro-batches per step and process."""
    images_per_epoch: int
    seed: int
    clip_grad_norm: float | None
    """Largest norm of the gradient; None: no clipping."""
    metrics_every_steps: int
    evaluate_every_steps: int
    checkpoint_every_steps: int


class StepTotals(NamedTuple):
    """Result of the backward passes of one step, over all processes."""

    loss: float
    """Mean over the images of the step."""
    grad_norm: float
    """Before clipping."""
    num_images: float
    is_stop_requested: bool

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def fit(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[Batch],
    settings: LoopSettings,
    *,
    lr_at: LearningRate,
    log: RunLog,
    checkpoints: Checkpoints,
    stop: StopRequest,
    validation: Iterable[Batch],
    preview: Batch,
    ema: ModelEmaV3 | None = None,
) -> None:
    """Train from ``settings.start_step`` to ``settings.total_steps`` and save a checkpoint at the end.

    Args:
        model, optimizer: prepared by ``accelerator``.
        micro_batches: the micro-batches of this process, ``settings.accumulation`` per step.
        lr_at: learning rate by step, from 0.
        stop: checked after every step.
        validation: validation batches of this process, may be empty; iterated at every evaluation.
        preview: batch shown in the preview images.
        ema: exponential moving average (EMA) of the weights of ``model``; evaluated in place of ``model``.

    Raises:
        NonFiniteLoss: loss or gradient is not finite; raised before the optimizer step.
        Stopped: a process received a stop signal; raised after the step, when its checkpoint is saved.
        OSError: a checkpoint could not be written.
    """
    task = accelerator.unwrap_model(model)
    evaluated = task if ema is None else ema.module
    batches = iter(micro_batches)
    log.start(settings.start_step, settings.total_steps)
    stability = Stability(log.read_metrics())
    model.train()

    for step in range(settings.start_step + 1, settings.total_steps + 1):
        is_last = step == settings.total_steps
        lr = lr_at(step - 1)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        # Stochastic depth and mixup draw from global generators: seeded by the step, they resume exactly.
        set_seed(derive_seed("step", settings.seed, step, accelerator.process_index) % 2**32)

        # Compute gradients.
        taken = accumulate_gradients(accelerator, model, batches, settings.accumulation, log)
        totals = reduce_step(accelerator, model, taken, settings.clip_grad_norm, stop)
        if not totals.is_finite:
            state = training_state(task, optimizer, ema and ema.module)
            raise_nonfinite(step, totals, state, taken, accelerator, settings.seed, log)

        # Step.
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update(task, step)

        # Log.
        log.count_step(int(totals.num_images))
        if warning := stability.warning(totals.loss, totals.grad_norm):
            log.log_event(step, "warning", warning)
        if step % settings.metrics_every_steps == 0 or is_last:
            epoch = totals.num_images * step / settings.images_per_epoch
            values = {"epoch": epoch, "loss": totals.loss, "lr": lr, "grad_norm": totals.grad_norm}
            log.log_metrics(step, values)

        # Evaluate.
        if step % settings.evaluate_every_steps == 0 or is_last:
            evaluate_and_log(evaluated, validation, preview, accelerator, step, log)

        # Save a checkpoint.
        checkpoints.check()
        if step % settings.checkpoint_every_steps == 0 or is_last or totals.is_stop_requested:
            log.sync_to_disk()
            checkpoints.save(step, training_state(task, optimizer, ema and ema.module))
        if totals.is_stop_requested:
            raise_stopped(step, stop, checkpoints, accelerator, log)
    checkpoints.wait()
    log.close()
    accelerator.wait_for_everyone()


def accumulate_gradients(
    accelerator: Accelerator, model: nn.Module, batches: Iterator[Batch], accumulation: int, log: RunLog
) -> list[MicroBatch]:
    """Run forward and backward of ``accumulation`` micro-batches, accumulating the mean gradient."""
    taken = []
    for micro_step in range(accumulation):
        batch = next(batches)
        log.log_corrupt_images(batch["corrupt"])
        # Processes exchange gradients once per step, not once per micro-batch.
        with nullcontext() if micro_step == accumulation - 1 else accelerator.no_sync(model):
            with accelerator.autocast():
                loss = model(to_device(batch, accelerator.device))
            accelerator.backward(loss / accumulation)
        taken.append(MicroBatch(batch["epoch"], batch["index"], loss.detach()))
    return taken


def reduce_step(
    accelerator: Accelerator,
    model: nn.Module,
    taken: Sequence[MicroBatch],
    clip_grad_norm: float | None,
    stop: StopRequest,
) -> StepTotals:
    """Clip the gradient and sum up the step over all processes, in one all-reduce."""
    grad_norm = accelerator.clip_grad_norm_(model.parameters(), clip_grad_norm or math.inf)
    if isinstance(grad_norm, DTensor):
        grad_norm = grad_norm.full_tensor()
    counts = [len(batch.indices) for batch in taken]
    loss_sum = torch.stack([batch.loss * count for batch, count in zip(taken, counts, strict=True)]).sum()
    sums = torch.stack([loss_sum, loss_sum.new_tensor(sum(counts)), loss_sum.new_tensor(stop.reason() is not None)])
    sums = torch.cat([accelerator.reduce(sums, "sum"), grad_norm[None].to(loss_sum.dtype)])
    loss_total, num_images, num_stops, grad_norm_value = sums.tolist()
    return StepTotals(loss_total / num_images, grad_norm_value, num_images, num_stops > 0)


def raise_nonfinite(
    step: int,
    totals: StepTotals,
    state: State,
    taken: Sequence[MicroBatch],
    accelerator: Accelerator,
    seed: int,
    log: RunLog,
) -> NoReturn:
    """Write the non-finite dump of a step and raise.

    Args:
        state: training state before the step.

    Raises:
        NonFiniteLoss: always.
    """
    log.close()
    text = f"step {step}: loss {totals.loss}, gradient norm {totals.grad_norm}; the step was not taken"
    try:
        log.log_event(step, "nonfinite", text)
        report = write_nonfinite_dump(
            log.folder, step, state, taken, accelerator, loss=totals.loss, grad_norm=totals.grad_norm, seed=seed
        )
        more = f"`simmim replay {report}` repeats the step and names the images and modules at fault"
    except OSError as error:
        more = f"The non-finite dump could not be written: {error}"
    raise NonFiniteLoss(
        f"{text}. {more}. Checkpoints of earlier steps are intact; often a lower base_lr helps: "
        "resume with it and --allow-changes"
    )


def raise_stopped(
    step: int, stop: StopRequest, checkpoints: Checkpoints, accelerator: Accelerator, log: RunLog
) -> NoReturn:
    """Wait until the checkpoint of ``step`` is written and raise.

    Raises:
        Stopped: the checkpoint is saved.
        OSError: the checkpoint could not be written.
    """
    checkpoints.wait()
    log.close()
    reason = stop.reason() or "another process"
    log.log_event(step, "stopped", f"by {reason}")
    accelerator.wait_for_everyone()
    raise Stopped(f"stopped by {reason} after step {step}, which is saved: run the same command again to resume")


def evaluate_and_log(
    task: nn.Module,
    validation: Iterable[Batch],
    preview: Batch,
    accelerator: Accelerator,
    step: int,
    log: RunLog,
) -> None:
    """Save a preview image, log validation metrics (prefix ``validation_``) and warn of overfitting."""
    task.eval()
    with accelerator.autocast():
        with watch_attention(task) as values:
            image = task.visualize(to_device(preview, accelerator.device))  # type: ignore[operator]
        values |= {f"validation_{key}": v for key, v in evaluate(task, validation, accelerator, preview).items()}
    task.train()
    log.save_image(step, image)
    log.log_metrics(step, values)
    if warning := overfitting(log.read_metrics()):
        log.log_event(step, "warning", warning)


@torch.no_grad()
def evaluate(
    task: nn.Module, batches: Iterable[Batch], accelerator: Accelerator, filler: Batch | None = None
) -> dict[str, float]:
    """Average the task's ``eval_step`` over all images; an empty dict when there are none.

    Args:
        batches: batches of this process; no image occurs twice over all processes.
        filler: see :func:`synchronized_batches`.
    """
    totals: dict[str, float] = {}
    for batch, images in synchronized_batches(batches, accelerator, filler):
        values = task.eval_step(to_device(batch, accelerator.device))  # type: ignore[operator]
        for name, value in {**values, "images": 1.0}.items():
            totals[name] = totals.get(name, 0.0) + float(value) * images
    return mean_over_images(totals)


def synchronized_batches(
    batches: Iterable[Batch], accelerator: Accelerator, filler: Batch | None = None
) -> Iterator[tuple[Batch, int]]:
    """Yield every batch with its number of images; under FSDP2 every process yields equally many batches.

    With sharded weights each forward pass needs all processes.

    Args:
        filler: yielded, with 0 images, by a process that has no batch left while another process has one.
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
    """Turn sums over the images of each process into means over all images of all processes.

    Args:
        totals: sums of this process; ``images`` is its number of images.
    """
    parts = gather_object([totals])
    summed = {name: sum(part.get(name, 0.0) for part in parts) for name in {k: 0 for part in parts for k in part}}
    count = summed.pop("images", 0.0)
    return {name: total / count for name, total in summed.items()} if count else {}


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """Return the tensors of a batch on ``device``."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items() if isinstance(value, Tensor)}
