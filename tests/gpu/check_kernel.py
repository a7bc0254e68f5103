"""GPU checks of the fused attention kernel: ``python tests/gpu/check_kernel.py OUT`` writes tables and JSON.

Compares the kernel with reference operations in double precision, and training steps with it, without it and compiled;
then measures steps against timm at the largest batches that fit, and attention alone. Exit code 1 if results disagree.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from simmim.benchmarks.attention import attention_speed, exact, make_case, make_way, results, ways
from simmim.benchmarks.memory import make_task
from simmim.benchmarks.step import awake, make_step, step_speed
from simmim.tasks.simmim import SimMIM
from swin import SwinConfig
from swin.config import make_config

SIZES = ((192, 12), (256, 16), (384, 24))
MAX_RELATIVE_ERROR = {"fp32": 1e-4, "bf16": 2e-2}
"""Norm of the difference over the norm of the reference; rounding causes 1e-6 to 1e-5, and 4e-3."""
MAX_LOSS_ERROR = {"fp32": 1e-4, "bf16": 1e-2}
STEPS = 5
IMAGES = 2
BATCHES = {"swinv2_base": 128, "swinv2_huge": 16, "swinv2_3b": 2}
"""Micro-batch size to start doubling from."""
LADDER: tuple[tuple[list[str], bool], ...] = ((["timm"], True), ([], True), ([], False))
"""Baselines, and whether to compile: both need memory besides the measured encoder."""


def agreement(config: SwinConfig, precision: str, device: torch.device) -> dict[str, dict[str, list[float]]]:
    """Return the worst errors over stages of kernel and chunks, by kind of window: output, dqkv, dfactor and dbias."""
    found: dict[str, dict[str, list[float]]] = {}
    for stage, (h, w) in enumerate(config.grids()):
        kinds = {"plain": ((h, w), False), "shifted": ((h, w), True), "shifted, padded": ((h - h // 6, w - 1), True)}
        for kind, (grid, shifted) in kinds.items():
            case = make_case(config, stage, IMAGES, precision, device, grid=grid, shifted=shifted)
            expected = exact(case)
            for name in ("kernel", "chunks"):
                function, on_grid = ways(case)[name]
                off = distances(results(make_way(function, case, on_grid), case), expected)
                worst = found.setdefault(kind, {}).setdefault(name, [0.0] * len(off))
                # max() would ignore NaN.
                worst[:] = [y if not y <= x else x for x, y in zip(worst, off, strict=True)]
    return found


def distances(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(actual, expected, strict=True)]


def losses(task: SimMIM, batch_size: int, precision: str) -> dict[str, list[float]]:
    """Return the losses of AdamW steps from the same weights and images: without the kernel, with it, compiled."""
    device, config = task.mean.device, task.encoder.config
    images = torch.randn(batch_size, config.in_chans, *config.image_size, device=device)
    patch_mask = task.masks(torch.zeros(batch_size, dtype=torch.int64), torch.arange(batch_size)).to(device)
    found = {}
    for name in ("without", "kernel", "compiled"):
        own = copy.deepcopy(task)
        own.encoder.use_kernel(name == "kernel").use_compiler(name == "compiled")
        optimizer = torch.optim.AdamW(own.parameters())
        step = make_step(own.loss, optimizer, images, patch_mask, precision)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3  # large enough for a wrong gradient to change the next loss
        found[name] = [float(step()) for _ in range(STEPS)]
    return found


def largest_difference(losses_by_name: dict[str, list[float]]) -> float:
    """Return the largest relative difference of a loss from that without the kernel; NaN if any is NaN."""
    offs = [
        abs(x / y - 1)
        for other in losses_by_name.values()
        for x, y in zip(other, losses_by_name["without"], strict=True)
    ]
    return max(offs) if all(off == off for off in offs) else float("nan")


def largest_batches(encoder: str, batch_size: int, measure: Callable[[str, int, list[str], bool], None]) -> int:
    """Double the batch until it does not fit, then drop baselines and compiling; return the largest batch that fits."""
    largest, rung = 0, 0
    while rung < len(LADDER):
        try:
            measure(encoder, batch_size, *LADDER[rung])
            largest, batch_size = batch_size, 2 * batch_size
        except Exception as error:  # compilers report insufficient memory with their own errors
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print(f"{encoder} x {batch_size}, {_beside(*LADDER[rung])}: {reason}", flush=True)
            rung += 1
        gc.collect()  # models have reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return largest


def _beside(baselines: list[str], compiled: bool) -> str:
    return " and ".join(["ours", *baselines]) + (", compiled too" if compiled else "")


def check_agreement(out: Path, device: torch.device, names: Sequence[str], sizes: Sequence[tuple[int, int]]) -> int:
    """Print a table and write ``agreement.json``; return the number of rows that disagree."""
    rows, wrong = [], 0
    print(f"{'':<44}{'':<18}{'output':>10}{'dqkv':>10}{'dfactor':>10}{'dbias':>10}")
    for encoder in names:
        for px, side in sizes:
            config = make_config(encoder, image_size=px, window_size=side)
            for precision, furthest in MAX_RELATIVE_ERROR.items():
                for kind, both in agreement(config, precision, device).items():
                    fits = all(off <= furthest for off in both["kernel"])
                    wrong += not fits
                    for name, off in both.items():
                        title = f"{encoder} {px}/{side} {precision} {kind}"
                        verdict = "  DISAGREES" if name == "kernel" and not fits else ""
                        print(f"{title:<44}{name:<18}{''.join(f'{x:>10.1e}' for x in off)}{verdict}", flush=True)
                        rows.append({"title": title, "name": name, "off": off, "furthest": furthest})
    (out / "agreement.json").write_text(json.dumps(rows, indent=2) + "\n")
    return wrong


def check_losses(out: Path, device: torch.device, task: SimMIM, batch_size: int) -> int:
    """Print a table and write ``losses.json``; return the number of precisions that disagree."""
    found, wrong = {}, 0
    for precision, furthest in MAX_LOSS_ERROR.items():
        found[precision] = losses(task.to(device), batch_size, precision)
        off = largest_difference(found[precision])
        wrong += not off <= furthest
        for name, values in found[precision].items():
            print(f"{precision} {name:<12}{''.join(f'{loss:>12.6f}' for loss in values)}")
        print(f"{precision} differ by at most {off:.1e}{'' if off <= furthest else '  DISAGREES'}", flush=True)
    (out / "losses.json").write_text(json.dumps(found, indent=2) + "\n")
    return wrong


def check_speed(out: Path) -> None:
    """Print tables and write ``step_NAME_BATCH.json``, ``largest.json`` and ``attention.json``."""

    def measure(encoder: str, batch_size: int, baselines: list[str], compiled: bool) -> None:
        step_speed(
            [encoder],
            [(192, 12)],
            batch_size=batch_size,
            precisions=["bf16"],
            baselines=baselines,
            compiled=compiled,
            rounds=7,
            out=out / f"step_{encoder}_{batch_size}.json",
        )

    attention_speed(
        ["swinv2_tiny", "swinv2_base"],
        SIZES,
        batch_size=32,
        precisions=["fp32", "bf16"],
        rounds=9,
        out=out / "attention.json",
    )
    largest = {}
    for encoder, batch_size in BATCHES.items():
        largest[encoder] = largest_batches(encoder, batch_size, measure)
        (out / "largest.json").write_text(json.dumps(largest, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder for the JSON")
    folder = parser.parse_args().out
    if not torch.cuda.is_available():
        parser.exit(2, "error: no GPU: run this where torch.cuda.is_available()\n")
    folder.mkdir(parents=True, exist_ok=True)
    gpu = torch.device("cuda")
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    (folder / "machine.json").write_text(json.dumps(machine, indent=2) + "\n")
    print(machine)
    disagree = check_agreement(folder, gpu, ["swinv2_tiny", "swinv2_base"], SIZES)
    torch.manual_seed(0)
    disagree += check_losses(folder, gpu, awake(make_task("swinv2_tiny", 192, 12, 0.0)), 32)
    check_speed(folder)
    sys.exit(1 if disagree else 0)
