"""Memory options: estimated and measured bytes of a pretraining step, and the time they cost.

On GPUs, bytes are those of the caching allocator; on CPUs, those of PyTorch's profiler.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from simmim.masking import MaskGenerator
from simmim.tasks.simmim import SimMIM
from simmim.training.footprint import footprint
from swin import make_encoder
from swin.activation_checkpointing import Checkpointing

MASK_PATCH_SIZE = 32
MEMORY_OPTIONS: tuple[tuple[Checkpointing, int], ...] = (
    ("none", 1),
    ("none", 16),
    ("selective", 1),
    ("full", 1),
    ("full", 16),
)


class Cost(NamedTuple):
    """Measurements of one memory option."""

    encoder: str
    size: int
    precision: str
    checkpointing: Checkpointing
    chunks: int
    estimated: float
    """Estimated peak bytes of a step without weights and gradients."""
    measured: int
    """Measured peak bytes of a step without weights and gradients."""
    time: float
    """Time relative to a step with the first option; median over rounds."""


def memory_costs(
    encoders: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    *,
    batch_size: int,
    precisions: Sequence[str],
    rounds: int,
    memory_options: Sequence[tuple[Checkpointing, int]] = MEMORY_OPTIONS,
    echo: Callable[[str], None] = print,
) -> list[Cost]:
    """Measure every encoder at every image and window size, and print a line per memory option.

    Args:
        encoders: names of encoders.
        sizes: pairs of image size in px and window size in tokens.
        batch_size: images per step.
        precisions: ``fp32`` and ``bf16``.
        rounds: timed rounds; the median is reported.
        memory_options: pairs of checkpointing and attention chunks; times are relative to the first.
        echo: called with every line of output.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    echo(f"{'':<28}{'checkpointing':>14}{'chunks':>8}{'estimate MB':>12}{'measured MB':>13}{'ratio':>7}{'time':>7}")
    found = []
    for name in encoders:
        for size, window in sizes:
            task = make_task(name, size, window).to(device).train()
            for precision in precisions:
                times: list[list[float]] = [[] for _ in memory_options]
                for round_index in range(rounds + 1):
                    for option, (kind, chunks) in enumerate(memory_options):
                        task.encoder.save_memory(checkpointing=kind, attention_chunks=chunks)
                        begin = time.perf_counter()
                        step(task, batch_size, precision)
                        if round_index:  # the first round builds tables and compiles kernels
                            times[option].append(time.perf_counter() - begin)
                for option, (kind, chunks) in enumerate(memory_options):
                    task.encoder.save_memory(checkpointing=kind, attention_chunks=chunks)
                    estimated = footprint(task, kind, chunks, precision=precision, device=device.type)
                    ratios = [own / plain for own, plain in zip(times[option], times[0], strict=True)]
                    measured = measured_bytes(task, batch_size, precision)
                    cost = Cost(name, size, precision, kind, chunks, estimated.of(batch_size), measured, median(ratios))
                    echo(
                        f"{f'{name} {size}/{window} {precision}':<28}{kind:>14}{chunks:>8}{cost.estimated / 1e6:>12.1f}"
                        f"{measured / 1e6:>13.1f}{cost.estimated / measured:>7.3f}{cost.time:>7.2f}"
                    )
                    found.append(cost)
    return found


def make_task(encoder: str, size: int, window: int, drop_path: float = 0.1) -> SimMIM:
    """Build SimMIM with 60 % of patches of 32 px masked."""
    built = make_encoder(encoder, image_size=size, window_size=window, drop_path=drop_path)
    masks = MaskGenerator((size, size), MASK_PATCH_SIZE, 0.6)
    return SimMIM(built, masks, mean=[0.5] * 3, std=[0.25] * 3)


def step(task: SimMIM, batch_size: int, precision: str) -> None:
    """Run forward and backward on noise; gradients accumulate."""
    device, config = task.mean.device, task.encoder.config
    batch = {
        "image": torch.randint(0, 256, (batch_size, config.in_chans, *config.input_size), dtype=torch.uint8),
        "epoch": torch.zeros(batch_size, dtype=torch.int64),
        "index": torch.arange(batch_size),
    }
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
    with autocast:
        loss = task({key: value.to(device) for key, value in batch.items()})
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_of_gpu(run: Callable[[], object]) -> int:
    """Return the peak of the bytes allocated by ``run``."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def measured_bytes(task: SimMIM, batch_size: int, precision: str) -> int:
    """Return the peak bytes of a step without weights and gradients."""
    for parameter in task.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step(task, batch_size, precision)  # builds position tables, which are kept
    gc.collect()
    if task.mean.device.type == "cuda":
        return peak_of_gpu(lambda: step(task, batch_size, precision))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(task, batch_size, precision)
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak
