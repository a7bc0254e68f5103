"""Memory and FLOPs of training a task, computed before it is trained.

The bytes of activations are those of a training step on torch's fake tensors, which runs the code of training and
allocates and frees the same tensors, without values. The shards of ZeRO follow by arithmetic (arXiv 1910.02054).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from simmim.tasks.task import Task
from simmim.training.memory import TrackedMemory
from swin.activation_checkpointing import Checkpointing
from swin.attention import WindowAttention
from swin.blocks import SwinBlock

ZEROS = ("none", "1", "2", "3")
FREE_FRACTION = 0.05  # fraction of the memory reserved for allocator and libraries
OPTIMIZER_STATE, FP32 = 8, 4  # bytes per parameter: state of AdamW, and a value in fp32


class Footprint(NamedTuple):
    """Bytes of activations on one rank as a linear function of the micro-batch size."""

    fixed: float
    per_image: float

    def of(self, batch_size: int) -> float:
        """Return the bytes of a micro-batch."""
        return self.fixed + self.per_image * batch_size

    def largest_batch(self, free: float) -> int:
        """Return the largest micro-batch that fits into ``free`` bytes."""
        return max(0, int((free - self.fixed) / self.per_image))


class Sizes(NamedTuple):
    """Numbers of parameters of a task."""

    all: int
    encoder: int
    largest_block: int
    """Unit that ZeRO-3 gathers at a time."""


class Flops(NamedTuple):
    """Multiply-adds of all matrix products for one image."""

    forward: float
    """Forward pass."""
    training: float
    """Training step, including recomputation by activation checkpointing."""


def states_bytes(parameters: Sizes, zero: str, ranks: int, ema: bool = False) -> float:
    """Return the bytes of weights, gradients, optimizer state and EMA on one rank.

    They take 16 bytes per parameter, and 4 more with EMA, sharded according to the ZeRO stage. FSDP2 holds the full
    weights through a step for ZeRO-2; for ZeRO-3 it holds the full weights of two blocks and the gradients of one.

    Args:
        zero: ZeRO stage: ``none``, ``1``, ``2`` or ``3``.
        ranks: number of processes.
        ema: whether an EMA of the weights is kept.
    """
    size = parameters.all
    optimizer_state = OPTIMIZER_STATE * size / (1 if zero == "none" else ranks)
    if ema:
        optimizer_state += FP32 * size / (ranks if zero in "23" else 1)
    gradients = FP32 * size / (ranks if zero in "23" else 1)
    if zero == "3":
        return optimizer_state + gradients + FP32 * (size / ranks + 3 * parameters.largest_block)
    weights = size * (1 + 1 / ranks) if zero == "2" else size
    return optimizer_state + gradients + FP32 * weights


def free_bytes(memory: float, states: float) -> float:
    """Return the bytes that are left for activations.

    Args:
        memory: bytes of the device.
        states: bytes of weights, gradients and optimizer state.
    """
    return memory * (1 - FREE_FRACTION) - states


def gigabytes(size: float) -> str:
    """Format bytes as ``12.3 GB`` (10^9 bytes), or as ``12.3 MB`` below 0.1 GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def sizes(task: Task) -> Sizes:
    """Count the parameters of a task."""
    blocks = [module for module in task.encoder.modules() if isinstance(module, SwinBlock)]
    return Sizes(_size(task), _size(task.encoder), max(_size(block) for block in blocks))


def flops(task: Task, checkpointing: Checkpointing) -> Flops:
    """Count the multiply-adds of the matrix products of a training step for one image."""
    # Use the GPU code path: the CPU path splits the same products into many parts that are slow to count.
    with _on_fake_tensors(task, "cuda") as shapes:
        shapes.encoder.save_memory(checkpointing=checkpointing)
        with FlopCounterMode(display=False) as forward:
            loss = _loss(shapes, 1)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    in_forward, in_backward = forward.get_total_flops() / 2, backward.get_total_flops() / 2
    return Flops(in_forward, in_forward + in_backward)


def footprint(
    task: Task,
    checkpointing: Checkpointing,
    chunks: int | Sequence[int],
    *,
    precision: str = "bf16",
    device: str = "cuda",
) -> Footprint:
    """Measure the peak of activations in a training step, from steps with one and with two images."""
    peaks = []
    for batch_size in (1, 2):
        with _on_fake_tensors(task, device) as shapes:
            shapes.encoder.save_memory(checkpointing=checkpointing, attention_chunks=chunks)
            peaks.append(measure_step(shapes, batch_size, precision))
    return Footprint(2 * peaks[0] - peaks[1], peaks[1] - peaks[0])


def measure_step(task: Task, batch_size: int, precision: str) -> int:
    """Measure the peak bytes of a training step, without weights and gradients."""
    for parameter in task.parameters():
        parameter.grad = torch.zeros_like(parameter)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
    with TrackedMemory() as memory:
        with autocast:
            loss = _loss(task, batch_size)
        loss.backward()
    return memory.peak


@contextmanager
def _on_fake_tensors(original: Task, device: str) -> Iterator[Task]:
    """Yield a copy on fake CPU tensors; for ``cuda`` with the casts of its autocast, which normalizes in fp32."""
    tensors = [*original.parameters(), *original.buffers()]
    task = copy.deepcopy(original, {id(x): to_meta(x) for x in tensors})
    if device == "cuda":
        for module in task.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))
            elif isinstance(module, WindowAttention):
                module.in_cache = False
    task.encoder.use_kernel(False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield task.to_empty(device="cpu")


def to_meta(tensor: Tensor) -> Tensor:
    """Return a tensor or parameter of the same shape on the meta device."""
    shape = torch.empty_like(tensor, device="meta")
    return nn.Parameter(shape) if isinstance(tensor, nn.Parameter) else shape


def _loss(task: Task, batch_size: int) -> Tensor:
    """Return the loss of a batch of fake images."""
    config = task.encoder.config
    return task.loss_on_fake_tensors(task.normalize(torch.zeros(batch_size, config.in_chans, *config.input_size)))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
