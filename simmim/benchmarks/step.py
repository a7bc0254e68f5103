"""Speed of a training step: this project and other implementations on the same weights, images and masks, in turns.

A step is forward, backward and AdamW. Ratios are computed within a round, so that other load on the machine affects
all implementations alike; the median over rounds is reported.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from simmim.benchmarks.competitors import make_baseline
from simmim.benchmarks.memory import make_task, peak_of_gpu
from simmim.masking import expand_mask
from simmim.planning.plan import product_rate
from simmim.tasks.simmim import SimMIM
from simmim.training.footprint import flops
from simmim.training.optim import make_optimizer
from swin.triton_attention import available

Step = Callable[[], Tensor]
"""Function that runs one training step and returns its loss."""


@dataclass
class Speed:
    """Measurements of one implementation at one setting."""

    encoder: str
    image_size: int
    window_size: int
    batch_size: int
    precision: str
    name: str
    loss: float
    """Loss of the first step, with equal weights."""
    seconds: float
    ratio: float
    """Time relative to this project: above 1, this project is faster."""
    saved_bytes: int
    """Bytes that autograd keeps for the backward pass, without weights; on GPUs the peak of a step."""
    fraction_of_limit: float
    """FLOP/s relative to those of matrix products, measured in the same run."""


def step_speed(
    encoders: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    *,
    batch_size: int,
    precisions: Sequence[str],
    baselines: Sequence[str],
    compiled: bool,
    rounds: int,
    out: Path | None = None,
    echo: Callable[[str], None] = print,
) -> list[Speed]:
    """Measure every encoder at every image and window size; print a table and write it as JSON.

    Args:
        encoders: names of encoders.
        sizes: pairs of image size in px and window size in tokens.
        batch_size: images per step.
        precisions: ``fp32`` and ``bf16``.
        baselines: names for :func:`simmim.benchmarks.competitors.make_baseline`.
        compiled: also measure with ``torch.compile``: this project block by block as in recipes, baselines in one.
        rounds: timed rounds; the median is reported.
        out: JSON file to write.
        echo: called with every line of output.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: list[Speed] = []
    for precision in precisions:
        limit = product_rate(device, precision)
        echo(f"{device.type}, {torch.get_num_threads()} thread(s), {precision}: products at {limit / 1e9:,.0f} GFLOP/s")
        echo(f"{'':<34}{'':<22}{'loss':>9}{'s / step':>10}{'ratio':>9}{'kept MB':>10}{'of limit':>10}")
        for encoder in encoders:
            for size, window in sizes:
                torch.manual_seed(0)
                task = perturb(make_task(encoder, size, window, drop_path=0.0))
                # A multiply-add is two operations, and the backward pass has two products for each forward one.
                work = 2 * 3 * flops(task, "none").forward * batch_size
                steps = make_steps(task, baselines, compiled, batch_size, precision, device)
                measured = compare(steps, rounds, device)
                own = measured["simmim"][1]
                for name, (loss, seconds, kept) in measured.items():
                    speed = Speed(
                        encoder,
                        size,
                        window,
                        batch_size,
                        precision,
                        name,
                        loss,
                        median(seconds),
                        median(theirs / ours for theirs, ours in zip(seconds, own, strict=True)),
                        kept,
                        work / median(seconds) / limit,
                    )
                    title = f"{encoder} {size}/{window} x {batch_size} {precision}"
                    echo(
                        f"{title:<34}{name:<22}{loss:>9.4f}{speed.seconds:>10.3f}{speed.ratio:>9.2f}"
                        f"{kept / 1e6:>10.0f}{speed.fraction_of_limit:>10.0%}"
                    )
                    found.append(speed)
    if out is not None:
        out.write_text(json.dumps([asdict(speed) for speed in found], indent=2) + "\n", encoding="utf-8")
    return found


@torch.no_grad()
def perturb(task: SimMIM) -> SimMIM:
    """Add noise to all parameters, because blocks output zero at initialization and would not affect the loss."""
    for parameter in task.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return task.train()


def make_steps(
    task: SimMIM,
    baselines: Sequence[str],
    compiled: bool,
    batch_size: int,
    precision: str,
    device: torch.device,
) -> dict[str, Step]:
    """Build the same step by every implementation, by name; this project comes first."""
    task = task.to(device)
    config, masks = task.encoder.config, task.mask_generator
    images = torch.randn(batch_size, config.in_chans, *config.image_size, device=device)
    patch_mask = masks(torch.zeros(batch_size, dtype=torch.int64), torch.arange(batch_size)).to(device)
    token_mask = expand_mask(patch_mask, masks.mask_patch_size // config.patch_size)
    steps: dict[str, Step] = {}
    own = copy.deepcopy(task)
    optimizer: torch.optim.Optimizer = make_optimizer(
        own, own.no_decay_parameters(), weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8
    )

    def ours(fused: bool, is_compiled: bool) -> Step:  # steps barely change the weights, so all may share them

        def forward(images: Tensor, mask: Tensor) -> Tensor:
            own.encoder.use_kernel(fused).use_compiler(is_compiled)
            return own.loss(images, mask)

        return make_step(forward, optimizer, images, patch_mask, precision)

    for is_compiled in (False, True) if compiled else (False,):
        suffix = ", compiled" if is_compiled else ""
        steps["simmim" + suffix] = ours(False, is_compiled)
        if available(device) and not is_compiled:  # compiled blocks do not use the kernel
            steps["simmim, kernel"] = ours(True, False)
        for name in baselines:
            module = make_baseline(name, task).to(device).train()
            forward = torch.compile(module) if is_compiled else module
            their_optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.05)
            title = Path(name.partition(":")[0]).stem + suffix
            steps[title] = make_step(forward, their_optimizer, images, token_mask, precision)
    return steps


def make_step(
    forward: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    mask: Tensor,
    precision: str,
) -> Step:
    """Build a step of forward, backward and AdamW, with a learning rate too small to change the loss."""
    for group in optimizer.param_groups:
        group["lr"] = 1e-9

    def step() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = forward(images, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if images.is_cuda:
            torch.cuda.synchronize()
        return loss.detach()

    return step


def compare(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, tuple[float, list[float], int]]:
    """Return, by name, the loss, the seconds of every round and the bytes kept."""
    first = {name: (float(step()), kept_bytes(step, device)) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    return {name: (first[name][0], seconds[name], first[name][1]) for name in steps}


def kept_bytes(step: Step, device: torch.device) -> int:
    """Return the bytes that a step keeps for its backward pass; on GPUs the peak of the step."""
    if device.type == "cuda":
        return peak_of_gpu(step)
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        step()
    return sum(storages.values())
