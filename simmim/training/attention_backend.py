"""Which way to the same numbers is the quicker one here: measured before a stage begins, and kept in its folder."""

from __future__ import annotations

import copy
import json
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

FILE = "attention.json"
DEVICES = ("cuda",)  # where there is something to choose
MAX_RELATIVE_ERROR = {"no": 1e-2, "bf16": 0.1}
"""Two ways that are further apart, by the norm of the difference over the norm, do not have the same numbers. Rounding
leaves 1e-6 and 1e-2."""
ROUNDS = 3


class Choice(NamedTuple):
    """Whether attention is one kernel, and why."""

    fused: bool
    reason: str
    is_warning: bool = False
    plain_ms: float | None = None
    """Of all blocks, forward and backward."""
    kernel_ms: float | None = None


def configure_speed(
    encoder: SwinEncoder,
    stage: Stage,
    accelerator: Accelerator,
    folder: Path,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Do what the stage says of speed; ``folder`` is the stage's, where measurements are kept.

    Args:
        encoder: with or without numbers in its parameters, which are left alone.

    Returns:
        Warnings.

    Raises:
        ValueError: the stage wants the kernel of attention where it cannot run.
    """
    if stage.speed.compile:
        return compile_blocks(encoder, stage.micro_batch_size, accelerator, say)
    return choose_attention_backend(encoder, stage, accelerator, folder, say)


def compile_blocks(
    encoder: SwinEncoder, batch_size: int, accelerator: Accelerator, say: Callable[[str], None] = print
) -> list[str]:
    """Compile two blocks of every stage, which the others are like; leave all as they are where a process cannot.

    Returns:
        Warnings.
    """

    def switch(block: SwinBlock, on: bool) -> None:
        block.compiled = on

    parts = [block.attn.chunks for stage in cast(Iterable[SwinStage], encoder.layers) for block in blocks_of(stage)]
    if max(parts) > 1:
        encoder.use_compiler(False)
        return [f"blocks are not compiled: compiled attention goes at once, and memory asks for {max(parts)} chunks"]
    begin, reason = time.perf_counter(), ""
    try:
        with _preserve_rng_state(accelerator):
            for stage, tokens in stages_with_inputs(encoder, batch_size, accelerator):
                make_step(stage, tokens, accelerator, switch)(True)
    except Exception as error:  # whatever a compiler may say
        reason = _in_a_line(error)
    failed = [text for text in gather_object([reason]) if text]
    encoder.use_compiler(not failed)
    if failed:
        return [f"blocks are not compiled, which failed here ({failed[0]})"]
    say(f"blocks compiled in {time.perf_counter() - begin:.0f} s")
    return []


def choose_attention_backend(
    encoder: SwinEncoder,
    stage: Stage,
    accelerator: Accelerator,
    folder: Path,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Attend by the kernel of :mod:`swin.triton_attention` or without it, as the stage says or as is quicker on this device.

    The first process measures, for all. What it chooses is kept in ``folder`` and holds for as long as the device, the
    versions and the micro-batch are the same: a run that continues does it bit for bit.

    Returns:
        Warnings.

    Raises:
        ValueError: the stage wants it where it cannot run.
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
            choice = measure(encoder, stage.micro_batch_size, accelerator)
            write_atomically(folder / FILE, json.dumps({**choice._asdict(), "machine": machine}, indent=2) + "\n")
        found[0] = choice
    choice = broadcast_object_list(found)[0]
    encoder.use_kernel(choice.fused, device=device)
    if choice.is_warning:
        return [choice.reason]
    say(choice.reason)
    return []


def restore_attention_backend(encoder: SwinEncoder, stage: Stage, folder: Path, device: torch.device) -> None:
    """As the stage of that folder did, where the kernel can run."""
    kept, wanted = read_choice(folder), stage.speed.fused_attention
    fused = wanted is True or (wanted == "auto" and kept is not None and kept.fused)
    encoder.use_kernel(fused and encoder.can_use_kernel(device), device=device)


def read_choice(folder: Path, machine: dict[str, Any] | None = None) -> Choice | None:
    """What was chosen before; with ``machine``, only if on the like of it."""
    try:
        about = json.loads((folder / FILE).read_text(encoding="utf-8"))
        made_on = about.pop("machine")
        return Choice(**about) if machine in (None, made_on) else None
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


def measure(encoder: SwinEncoder, batch_size: int, accelerator: Accelerator) -> Choice:
    """Forward and backward of two blocks of every stage, in turns with the kernel and without it.

    Two blocks, of fresh weights, stand for all of their stage: no second encoder is held, and none that is whole.
    """

    def switch(block: SwinBlock, on: bool) -> None:
        block.attn.fused = on

    device, furthest = accelerator.device, MAX_RELATIVE_ERROR[accelerator.mixed_precision]
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
            except Exception as error:  # whatever a compiler or a driver may say
                text = f"attention goes without its kernel, which failed here ({_in_a_line(error)})"
                return Choice(False, text, True)
            if expected is not None:
                apart = max(distance(x, y) for x, y in zip(found, expected, strict=True))
                if not apart <= furthest:  # or no number
                    text = f"attention goes without its kernel, whose numbers are others here ({apart:.2g} apart)"
                    return Choice(False, text, True)
            del expected, found
            if fits:
                share = len(stage.blocks) / len(blocks_of(stage)[:2])
                for fused, times in timed(step, device).items():
                    seconds[fused] += share * median(times)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if not fits:
        return Choice(True, "attention by its kernel: without it memory is not enough")
    plain, kernel = (1e3 * seconds[fused] for fused in (False, True))
    if kernel < plain:
        return Choice(True, f"attention by its kernel: {kernel:.1f} ms against {plain:.1f}", False, plain, kernel)
    return Choice(False, f"attention without its kernel: {plain:.1f} ms against {kernel:.1f}", False, plain, kernel)


def stages_with_inputs(encoder: SwinEncoder, batch_size: int, accelerator: Accelerator) -> Iterator[tuple[SwinStage, Tensor]]:
    """Every stage, and tokens ``(b, h, w, c)`` without numbers of the kind that its blocks get: what autocast makes of
    them depends on the device and on what comes before."""
    device = accelerator.device
    before: nn.Module = encoder.patch_embed
    seen = torch.zeros(1, encoder.config.in_chans, *(1 for _ in encoder.config.input_size), device=device)
    for stage, grid in zip(cast(Iterable[SwinStage], encoder.layers), encoder.config.grids(), strict=True):
        with torch.no_grad(), accelerator.autocast():
            seen = _copy(before, device)(seen)
        yield stage, seen.new_empty(batch_size, *grid, seen.shape[-1])
        before = stage.downsample


def blocks_of(stage: SwinStage) -> list[SwinBlock]:
    """Typed."""
    return list(cast(Iterable[SwinBlock], stage.blocks))


def _copy(module: nn.Module, device: torch.device) -> Any:
    """The same without numbers."""
    return copy.deepcopy(module, {id(p): to_meta(p) for p in module.parameters()}).to_empty(device=device)


def make_step(
    stage: SwinStage, tokens: Tensor, accelerator: Accelerator, switch: Callable[[SwinBlock, bool], None]
) -> Callable[[bool], list[Tensor]]:
    """Two blocks like those of a stage, forward and backward -> the output, and the gradients of input and weights.

    Args:
        tokens: like what they get, ``(b, h, w, c)``.
        switch: puts a block to the other way, or back.
    """
    device = accelerator.device
    part = SwinStage(blocks_of(stage)[:2], nn.Identity())
    part.checkpointing = stage.checkpointing
    part = _copy(part, device).train()
    torch.manual_seed(0)
    for parameter in part.parameters():  # none zero, as some are at first: every part must be seen
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn_like(tokens)
    incoming = torch.randn_like(x)

    def step(other: bool) -> list[Tensor]:
        for block in blocks_of(part):
            switch(block, other)
        torch.manual_seed(0)  # the same branches are dropped
        given = x.clone().requires_grad_()
        with accelerator.autocast():
            out = part(given)
        return [out.detach(), *torch.autograd.grad(out, [given, *part.parameters()], incoming.to(out.dtype))]

    return step


def timed(step: Callable[[bool], object], device: torch.device) -> dict[bool, list[float]]:
    """Seconds of every round, in turns."""
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
    """Random numbers go on afterwards as if there had been none."""
    with torch.random.fork_rng(devices=[accelerator.device] if accelerator.device.type == "cuda" else []):
        yield


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def distance(x: Tensor, y: Tensor) -> float:
    """``|x - y| / |y|``"""
    return float((x.float() - y.float()).norm() / y.float().norm().clamp(min=1e-12))
