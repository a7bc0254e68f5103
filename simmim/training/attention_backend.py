"""Selects the attention backend by a benchmark cached in the run folder, and compiles blocks."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from simmim.config import Stage
from simmim.training.footprint import to_meta
from simmim.training.run_log import write_atomically
from swin import SwinEncoder
from swin.blocks import SwinBlock
from swin.encoder import SwinStage

logger = logging.getLogger(__name__)

FILE = "attention.json"
DEVICES = ("cuda",)  # devices on which the kernel is compared with the reference
MAX_RELATIVE_ERROR = {"no": 1e-2, "bf16": 0.1}
"""Largest norm of the difference over the norm of the reference, by precision; rounding causes 1e-6 and 1e-2."""
ROUNDS = 3


class Choice(NamedTuple):
    """Selected attention backend: the fused kernel or not, and the reason."""

    fused: bool
    reason: str
    is_warning: bool = False
    plain_ms: float | None = None
    """Milliseconds of all blocks without the kernel, forward and backward."""
    kernel_ms: float | None = None
    """Milliseconds of all blocks with the kernel, forward and backward."""


def configure_speed(
    encoder: SwinEncoder,
    stage: Stage,
    accelerator: Accelerator,
    folder: Path,
) -> list[str]:
    """Apply the speed settings of a stage: compile blocks, or select the attention backend.

    Args:
        encoder: its parameters may be on the meta device; they are not changed.
        folder: folder of the stage, where the result of the benchmark is cached.

    Returns:
        Warnings.

    Raises:
        ValueError: the recipe requires the fused kernel, which cannot run on this device.
    """
    if stage.speed.compile:
        return compile_blocks(encoder, stage.micro_batch_size, accelerator)
    return choose_attention_backend(encoder, stage, accelerator, folder)


def compile_blocks(encoder: SwinEncoder, batch_size: int, accelerator: Accelerator) -> list[str]:
    """Compile all blocks; compile none if compilation fails on any process.

    Two blocks of every stage are compiled here; the others have the same code.

    Returns:
        Warnings.
    """

    def switch(block: SwinBlock, on: bool) -> None:
        block.compiled = on

    parts = [block.attn.chunks for stage in cast(Iterable[SwinStage], encoder.layers) for block in blocks_of(stage)]
    if max(parts) > 1:
        encoder.use_compiler(False)
        return [f"blocks are not compiled: compiled attention has no chunks, but {max(parts)} are needed to fit memory"]
    begin, reason = time.perf_counter(), ""
    try:
        with _preserve_rng_state(accelerator):
            for stage, tokens in stages_with_inputs(encoder, batch_size, accelerator):
                make_step(stage, tokens, accelerator, switch)(True)
    except Exception as error:  # compilers raise many types
        reason = _one_line(error)
    failed = [text for text in gather_object([reason]) if text]
    encoder.use_compiler(not failed)
    if failed:
        return [f"blocks are not compiled: compilation failed ({failed[0]})"]
    if accelerator.is_main_process:
        logger.info("blocks compiled in %.0f s", time.perf_counter() - begin)
    return []


def choose_attention_backend(
    encoder: SwinEncoder,
    stage: Stage,
    accelerator: Accelerator,
    folder: Path,
) -> list[str]:
    """Select fused (:mod:`swin.triton_attention`) or reference attention by the recipe; if it is auto, by a benchmark.

    The first process runs the benchmark for all. The result is cached in ``folder`` for this device, micro-batch,
    precision and these versions, so that a resumed run uses the same backend and stays exact.

    Returns:
        Warnings.

    Raises:
        ValueError: the recipe requires the fused kernel, which cannot run on this device.
    """
    wanted, device = stage.speed.fused_attention, accelerator.device
    if wanted != "auto" or device.type not in DEVICES or not encoder.can_use_kernel(device):
        encoder.use_kernel(wanted is True, device=device)
        return []
    found: list[Any] = [None]
    if accelerator.is_main_process:
        machine = _machine(stage.micro_batch_size, accelerator)
        choice = read_choice(folder, machine)
        if choice is None:
            choice = benchmark(encoder, stage.micro_batch_size, accelerator)
            write_atomically(folder / FILE, json.dumps({**choice._asdict(), "machine": machine}, indent=2) + "\n")
        found[0] = choice
    choice = broadcast_object_list(found)[0]
    encoder.use_kernel(choice.fused, device=device)
    if choice.is_warning:
        return [choice.reason]
    if accelerator.is_main_process:
        logger.info(choice.reason)
    return []


def restore_attention_backend(encoder: SwinEncoder, stage: Stage, folder: Path, device: torch.device) -> None:
    """Select the backend recorded in the folder of a stage, if it can run on ``device``."""
    kept, wanted = read_choice(folder), stage.speed.fused_attention
    fused = wanted is True or (wanted == "auto" and kept is not None and kept.fused)
    encoder.use_kernel(fused and encoder.can_use_kernel(device), device=device)


def read_choice(folder: Path, machine: dict[str, Any] | None = None) -> Choice | None:
    """Read the cached choice.

    Args:
        machine: return None if the choice was made on a different machine; None: any machine.
    """
    try:
        about = json.loads((folder / FILE).read_text(encoding="utf-8"))
        recorded = about.pop("machine")
        return Choice(**about) if machine in (None, recorded) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _machine(batch_size: int, accelerator: Accelerator) -> dict[str, Any]:
    import triton

    device = accelerator.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "precision": accelerator.mixed_precision,
        "micro_batch_size": batch_size,
    }


def benchmark(encoder: SwinEncoder, batch_size: int, accelerator: Accelerator) -> Choice:
    """Benchmark forward and backward of every stage, alternately with and without the fused kernel.

    Two blocks with random weights represent their stage, so that no second encoder has to fit into memory.
    """

    def switch(block: SwinBlock, on: bool) -> None:
        block.attn.fused = on

    device, max_error = accelerator.device, MAX_RELATIVE_ERROR[accelerator.mixed_precision]
    seconds, fits = {False: 0.0, True: 0.0}, True
    with _preserve_rng_state(accelerator):
        for stage, tokens in stages_with_inputs(encoder, batch_size, accelerator):
            step = make_step(stage, tokens, accelerator, switch)
            try:
                expected = step(False)
            except torch.OutOfMemoryError:
                expected, fits = None, False
            try:
                found = step(True)
            except Exception as error:  # compilers and drivers raise many types
                text = f"attention without the fused kernel, which failed on this device ({_one_line(error)})"
                return Choice(False, text, True)
            if expected is not None:
                error_found = max(relative_error(x, y) for x, y in zip(found, expected, strict=True))
                if not error_found <= max_error:  # true for NaN as well
                    text = (
                        "attention without the fused kernel, which gives different results on this device "
                        f"(relative error {error_found:.2g})"
                    )
                    return Choice(False, text, True)
            del expected, found
            if fits:
                repeats = len(stage.blocks) / len(blocks_of(stage)[:2])
                for fused, times in time_alternately(step, device).items():
                    seconds[fused] += repeats * median(times)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if not fits:
        return Choice(True, "attention with the fused kernel: without it, memory is insufficient")
    plain, kernel = (1e3 * seconds[fused] for fused in (False, True))
    if kernel < plain:
        return Choice(
            True, f"attention with the fused kernel: {kernel:.1f} ms, without it {plain:.1f} ms", False, plain, kernel
        )
    return Choice(
        False, f"attention without the fused kernel: {plain:.1f} ms, with it {kernel:.1f} ms", False, plain, kernel
    )


def stages_with_inputs(
    encoder: SwinEncoder, batch_size: int, accelerator: Accelerator
) -> Iterator[tuple[SwinStage, Tensor]]:
    """Yield every encoder stage with uninitialized input tokens ``(b, h, w, c)``.

    The tokens have the dtype that the blocks get under autocast, which depends on the device and on the layers before.
    """
    device = accelerator.device
    before: nn.Module = encoder.patch_embed
    sample = torch.zeros(1, encoder.config.in_chans, *(1 for _ in encoder.config.input_size), device=device)
    for stage, grid in zip(cast(Iterable[SwinStage], encoder.layers), encoder.config.grids(), strict=True):
        with torch.no_grad(), accelerator.autocast():
            sample = _copy(before, device)(sample)
        yield stage, sample.new_empty(batch_size, *grid, sample.shape[-1])
        before = stage.downsample


def blocks_of(stage: SwinStage) -> list[SwinBlock]:
    """Return the blocks of an encoder stage as a typed list."""
    return list(cast(Iterable[SwinBlock], stage.blocks))


def _copy(module: nn.Module, device: torch.device) -> Any:
    """Copy a module to ``device`` with uninitialized parameters."""
    return copy.deepcopy(module, {id(p): to_meta(p) for p in module.parameters()}).to_empty(device=device)


def make_step(
    stage: SwinStage, tokens: Tensor, accelerator: Accelerator, switch: Callable[[SwinBlock, bool], None]
) -> Callable[[bool], list[Tensor]]:
    """Create a function that runs forward and backward of two blocks like those of ``stage``.

    Args:
        tokens: ``(b, h, w, c)``; shape, dtype and device of the input.
        switch: turns the compared option of a block on or off.

    Returns:
        A function of the option (on or off) that returns the output and the gradients of input and weights.
    """
    device = accelerator.device
    part = SwinStage(blocks_of(stage)[:2], nn.Identity())
    part.checkpointing = stage.checkpointing
    part = _copy(part, device).train()
    torch.manual_seed(0)
    for parameter in part.parameters():  # some are initialized to zero, which would hide errors
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn_like(tokens)
    incoming = torch.randn_like(x)

    def step(on: bool) -> list[Tensor]:
        for block in blocks_of(part):
            switch(block, on)
        torch.manual_seed(0)  # stochastic depth drops the same branches
        given = x.clone().requires_grad_()
        with accelerator.autocast():
            out = part(given)
        return [out.detach(), *torch.autograd.grad(out, [given, *part.parameters()], incoming.to(out.dtype))]

    return step


def time_alternately(step: Callable[[bool], object], device: torch.device) -> dict[bool, list[float]]:
    """Measure the seconds of every round, alternating between off and on."""
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for fused in times:
            _synchronize(device)
            begin = time.perf_counter()
            step(fused)
            _synchronize(device)
            times[fused].append(time.perf_counter() - begin)
    return times


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _preserve_rng_state(accelerator: Accelerator) -> Iterator[None]:
    """Restore the state of the random number generators afterwards."""
    with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
        yield


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def relative_error(x: Tensor, y: Tensor) -> float:
    """Return ``|x - y| / |y|``."""
    return float((x.float() - y.float()).norm() / y.float().norm().clamp(min=1e-12))
