"""Bytes and FLOPs of training an objective, before it is trained.

The bytes of activations are those of a training step whose tensors are made, kept and freed as in training, without
numbers (torch's fake tensors): what is measured is the code that will run. What ZeRO divides among ranks follows by
arithmetic (arXiv 1910.02054).
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
FREE_FRACTION = 0.05  # of a memory, left to allocator and libraries
OPTIMIZER_STATE, NUMBER = 8, 4  # bytes of a parameter: AdamW and fp32; bf16 is what autocast computes in


class Footprint(NamedTuple):
    """Bytes of activations of one rank, beside weights, gradients and moments, by the micro-batch."""

    fixed: float
    per_image: float

    def of(self, batch_size: int) -> float:
        return self.fixed + self.per_image * batch_size

    def largest_batch(self, free: float) -> int:
        return max(0, int((free - self.fixed) / self.per_image))


class Sizes(NamedTuple):
    """Parameters of an objective."""

    all: int
    encoder: int
    largest_block: int
    """What ZeRO-3 gathers at a time."""


class Flops(NamedTuple):
    """Of one image."""

    forward: float
    """Multiply-adds of all matrix products of one image."""
    training: float
    """The same of a training step, with what checkpointing computes again."""


def states_bytes(parameters: Sizes, zero: str, ranks: int, ema: bool = False) -> float:
    """Bytes of weights, gradients and moments of one rank: 16 a parameter, divided among ranks as ZeRO says; 4 more
    where an average of the weights is kept.

    FSDP2 holds whole weights through a step for ZeRO-2, and for ZeRO-3 those of two blocks and the gradients of one.
    """
    size = parameters.all
    optimizer_state = OPTIMIZER_STATE * size / (1 if zero == "none" else ranks)
    if ema:
        optimizer_state += NUMBER * size / (ranks if zero in "23" else 1)
    gradients = NUMBER * size / (ranks if zero in "23" else 1)
    if zero == "3":
        return optimizer_state + gradients + NUMBER * (size / ranks + 3 * parameters.largest_block)
    whole = size * (1 + 1 / ranks) if zero == "2" else size
    return optimizer_state + gradients + NUMBER * whole


def free_bytes(memory: float, states: float) -> float:
    """What is left for activations."""
    return memory * (1 - FREE_FRACTION) - states


def gigabytes(size: float) -> str:
    """``12.3 GB``, of 10^9 bytes; ``12.3 MB`` where that says more."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def sizes(task: Task) -> Sizes:
    """How many parameters, exactly."""
    blocks = [module for module in task.encoder.modules() if isinstance(module, SwinBlock)]
    return Sizes(_size(task), _size(task.encoder), max(_size(block) for block in blocks))


def flops(task: Task, checkpointing: Checkpointing) -> Flops:
    """Count the matrix products of a training step."""
    # As on a GPU, in one piece: the pieces that suit a processor's cache are the same products, and too many to count.
    with _without_numbers(task, "cuda") as shapes:
        shapes.encoder.save_memory(checkpointing=checkpointing)
        with FlopCounterMode(display=False) as forward:
            loss = _loss(shapes, 1)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    products, behind = forward.get_total_flops() / 2, backward.get_total_flops() / 2
    return Flops(products, products + behind)


def footprint(
    task: Task,
    checkpointing: Checkpointing,
    chunks: int | Sequence[int],
    *,
    precision: str = "bf16",
    device: str = "cuda",
) -> Footprint:
    """Activations at the highest point of a training step, from steps with one image and with two."""
    peaks = []
    for batch_size in (1, 2):
        with _without_numbers(task, device) as shapes:
            shapes.encoder.save_memory(checkpointing=checkpointing, attention_chunks=chunks)
            peaks.append(measure_step(shapes, batch_size, precision))
    return Footprint(2 * peaks[0] - peaks[1], peaks[1] - peaks[0])


def measure_step(task: Task, batch_size: int, precision: str) -> int:
    """Bytes at the highest point of a training step, beside weights and gradients."""
    for parameter in task.parameters():
        parameter.grad = torch.zeros_like(parameter)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)
    with TrackedMemory() as memory:
        with autocast:
            loss = _loss(task, batch_size)
        loss.backward()
    return memory.peak


@contextmanager
def _without_numbers(planned: Task, device: str) -> Iterator[Task]:
    """A copy with fake tensors of the processor; with the casts of a GPU's autocast, which normalises in fp32."""
    tensors = [*planned.parameters(), *planned.buffers()]
    task = copy.deepcopy(planned, {id(x): to_meta(x) for x in tensors})
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
    """The same on the meta device."""
    shape = torch.empty_like(tensor, device="meta")
    return nn.Parameter(shape) if isinstance(tensor, nn.Parameter) else shape


def _loss(task: Task, batch_size: int) -> Tensor:
    """The loss of images without numbers."""
    config = task.encoder.config
    return task.loss_on_fake_tensors(task.normalize(torch.zeros(batch_size, config.in_chans, *config.input_size)))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
