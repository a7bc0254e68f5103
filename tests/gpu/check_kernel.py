"""What a GPU must say of speed: ``python tests/gpu/check_kernel.py OUT``, tables and JSON.

The kernel of attention against plain operations in double precision; training steps with it, without it and compiled;
then steps beside timm at the largest batches that fit, and attention alone. Ends with 1 if any numbers disagree.
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
"""By the norm of the difference over the norm; rounding leaves 1e-6 to 1e-5, and 4e-3."""
FURTHEST_LOSS = {"fp32": 1e-4, "bf16": 1e-2}
STEPS = 5
IMAGES = 2
BATCHES = {"swinv2_base": 128, "swinv2_huge": 16, "swinv2_3b": 2}
"""Where doubling begins."""
LADDER: tuple[tuple[list[str], bool], ...] = ((["timm"], True), ([], True), ([], False))
"""Rivals and compiling, both of which take memory beside ours."""


def agreement(config: SwinConfig, precision: str, device: torch.device) -> dict[str, dict[str, list[float]]]:
    """How far kernel and chunks are off, by kind of window: of output, dqkv, dfactor and dbias, the worst stage's."""
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
                # max() would lose what is not a number.
                worst[:] = [y if not y <= x else x for x, y in zip(worst, off, strict=True)]
    return found


def distances(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(actual, expected, strict=True)]


def losses(task: SimMIM, batch_size: int, precision: str) -> dict[str, list[float]]:
    """Of some steps of AdamW, from the same weights, on the same images: without the kernel, with it, compiled."""
    device, config = task.mean.device, task.encoder.config
    images = torch.randn(batch_size, config.in_chans, *config.image_size, device=device)
    cells = task.masks(torch.zeros(batch_size, dtype=torch.int64), torch.arange(batch_size)).to(device)
    found = {}
    for name in ("without", "kernel", "compiled"):
        own = copy.deepcopy(task)
        own.encoder.use_kernel(name == "kernel").use_compiler(name == "compiled")
        optimizer = torch.optim.AdamW(own.parameters())
        step = make_step(own.loss, optimizer, images, cells, precision)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3  # so that a wrong gradient shows in the next loss
        found[name] = [float(step()) for _ in range(STEPS)]
    return found


def apart(of: dict[str, list[float]]) -> float:
    """The largest relative difference of any loss from that without the kernel."""
    offs = [abs(x / y - 1) for other in of.values() for x, y in zip(other, of["without"], strict=True)]
    return max(offs) if all(off == off for off in offs) else float("nan")


def largest_batches(encoder: str, batch_size: int, measure: Callable[[str, int, list[str], bool], None]) -> int:
    """Measure at twice the batch again and again, and with less beside ours where that failed -> the largest."""
    largest, rung = 0, 0
    while rung < len(LADDER):
        try:
            measure(encoder, batch_size, *LADDER[rung])
            largest, batch_size = batch_size, 2 * batch_size
        except Exception as error:  # a compiler may say in its own words that memory is not enough
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print(f"{encoder} x {batch_size}, {_beside(*LADDER[rung])}: {reason}", flush=True)
            rung += 1
        gc.collect()  # models hold each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return largest


def _beside(baselines: list[str], compiled: bool) -> str:
    return " and ".join(["ours", *baselines]) + (", compiled too" if compiled else "")


def check_agreement(out: Path, device: torch.device, names: Sequence[str], sizes: Sequence[tuple[int, int]]) -> int:
    """A table and ``agreement.json`` -> how many lines disagree."""
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
    """A table and ``losses.json`` -> how many precisions disagree."""
    found, wrong = {}, 0
    for precision, furthest in FURTHEST_LOSS.items():
        found[precision] = losses(task.to(device), batch_size, precision)
        off = apart(found[precision])
        wrong += not off <= furthest
        for name, values in found[precision].items():
            print(f"{precision} {name:<12}{''.join(f'{loss:>12.6f}' for loss in values)}")
        print(f"{precision} differ by at most {off:.1e}{'' if off <= furthest else '  DISAGREES'}", flush=True)
    (out / "losses.json").write_text(json.dumps(found, indent=2) + "\n")
    return wrong


def check_speed(out: Path) -> None:
    """Tables and ``step_NAME_BATCH.json``, ``largest.json``, ``attention.json``."""

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
