"""Run a benchmark: ``python tools/benchmark.py step|attention|memory``, or ``data FOLDER_OF_PHOTOS``."""

from __future__ import annotations

import argparse
from pathlib import Path

from simmim.benchmarks.attention import attention_speed
from simmim.benchmarks.data import data_speed
from simmim.benchmarks.memory import memory_costs
from simmim.benchmarks.step import step_speed


def as_size(text: str) -> tuple[int, int]:
    """Parse ``192/12``: image size in px and window size in tokens."""
    size, _, window = text.partition("/")
    if not size.isdecimal() or not window.isdecimal():
        raise argparse.ArgumentTypeError(f"expected PX/WINDOW such as 192/12, got {text!r}")
    return int(size), int(window)


def count(text: str) -> int:
    """Parse an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def new_file(text: str) -> Path:
    """Parse the path of an output file; fail before anything is measured if its folder does not exist."""
    if not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {Path(text).parent}: create it first")
    return Path(text)


def add_settings(
    parser: argparse.ArgumentParser, encoders: list[str], *, batch_size: int, precisions: list[str], rounds: int
) -> None:
    """Add the settings shared by the benchmarks of training steps."""
    parser.add_argument("--encoders", nargs="+", default=encoders, metavar="NAME")
    parser.add_argument("--sizes", nargs="+", type=as_size, default=[(192, 12)], metavar="PX/WINDOW")
    parser.add_argument("--batch-size", type=count, default=batch_size, metavar="N", help="default: %(default)s")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=precisions)
    parser.add_argument("--rounds", type=count, default=rounds, metavar="N", help="default: %(default)s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Benchmarks of this machine against other implementations.")
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK")
    data = benchmarks.add_parser("data", help="data loading: images per second and core, bytes, start-up time")
    data.add_argument("path", type=Path, help="a folder of photographs")
    data.add_argument("--rounds", type=count, default=30, metavar="N", help="default: %(default)s")
    data.add_argument("--images", type=count, default=250, metavar="N", help="maximum number (default: %(default)s)")
    data.add_argument(
        "--files", type=count, default=60_000, metavar="N", help="files in the start-up test (default: %(default)s)"
    )
    data.set_defaults(
        run=lambda given: data_speed(given.path, rounds=given.rounds, images=given.images, files=given.files)
    )
    memory = benchmarks.add_parser(
        "memory", help="checkpointing and chunked attention: estimated and measured bytes, time"
    )
    add_settings(memory, ["swinv2_tiny", "swinv2_base"], batch_size=2, precisions=["fp32", "bf16"], rounds=5)
    memory.set_defaults(
        run=lambda given: memory_costs(
            given.encoders,
            given.sizes,
            batch_size=given.batch_size,
            precisions=given.precisions,
            rounds=given.rounds,
        )
    )
    step = benchmarks.add_parser("step", help="training steps against timm, transformers or your own code: time, bytes")
    add_settings(step, ["swinv2_tiny"], batch_size=4, precisions=["fp32"], rounds=7)
    step.add_argument(
        "--baselines",
        nargs="*",
        default=["timm", "transformers"],
        metavar="NAME",
        help="timm, transformers or FILE.py:FUNCTION",
    )
    step.add_argument("--compiled", action="store_true", help="also measure all with torch.compile")
    step.add_argument("--out", type=new_file, metavar="FILE", help="also write the results as JSON")
    step.set_defaults(
        run=lambda given: step_speed(
            given.encoders,
            given.sizes,
            batch_size=given.batch_size,
            precisions=given.precisions,
            baselines=given.baselines,
            compiled=given.compiled,
            rounds=given.rounds,
            out=given.out,
        )
    )
    attention = benchmarks.add_parser(
        "attention", help="window attention alone: chunked, fused kernel, and PyTorch's: time, bytes"
    )
    add_settings(attention, ["swinv2_tiny"], batch_size=2, precisions=["fp32"], rounds=7)
    attention.add_argument("--out", type=new_file, metavar="FILE", help="also write the results as JSON")
    attention.set_defaults(
        run=lambda given: attention_speed(
            given.encoders,
            given.sizes,
            batch_size=given.batch_size,
            precisions=given.precisions,
            rounds=given.rounds,
            out=given.out,
        )
    )
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
