"""Measure: `python tools/benchmark.py step`, `attention`, `memory`, `data FOLDER_OF_PHOTOS`."""

from __future__ import annotations

import argparse
from pathlib import Path

from simmim.benchmarks.attention import attention_speed
from simmim.benchmarks.data import data_speed
from simmim.benchmarks.memory import memory_costs
from simmim.benchmarks.step import step_speed


def as_size(text: str) -> tuple[int, int]:
    """``192/12``: px and tokens."""
    size, _, window = text.partition("/")
    return int(size), int(window)


def count(text: str) -> int:
    """From 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def new_file(text: str) -> Path:
    """In a folder that is there: said before anything is measured."""
    if not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{Path(text).parent} is no folder")
    return Path(text)


def add_settings(
    parser: argparse.ArgumentParser, encoders: list[str], *, batch_size: int, precisions: list[str], rounds: int
) -> None:
    """What training steps are measured at."""
    parser.add_argument("--encoders", nargs="+", default=encoders, metavar="NAME")
    parser.add_argument("--sizes", nargs="+", type=as_size, default=[(192, 12)], metavar="PX/WINDOW")
    parser.add_argument("--batch-size", type=count, default=batch_size, metavar="N", help="default: %(default)s")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=precisions)
    parser.add_argument("--rounds", type=count, default=rounds, metavar="N", help="default: %(default)s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What is measured on this machine, side by side in one run.")
    what = parser.add_subparsers(required=True, metavar="WHAT")
    data = what.add_parser("data", help="loaders: images per second and core, bytes, start-up")
    data.add_argument("path", type=Path, help="a folder of photographs")
    data.add_argument("--rounds", type=count, default=30, metavar="N", help="default: %(default)s")
    data.add_argument("--images", type=count, default=250, metavar="N", help="at most so many (default: %(default)s)")
    data.add_argument("--files", type=count, default=60_000, metavar="N", help="of the tree (default: %(default)s)")
    data.set_defaults(
        run=lambda given: data_speed(given.path, rounds=given.rounds, images=given.images, files=given.files)
    )
    memory = what.add_parser("memory", help="checkpointing and attention in chunks: bytes, planned and measured; time")
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
    step = what.add_parser("step", help="training steps beside timm, transformers and any module: time and bytes kept")
    add_settings(step, ["swinv2_tiny"], batch_size=4, precisions=["fp32"], rounds=7)
    step.add_argument(
        "--baselines", nargs="*", default=["timm", "transformers"], metavar="NAME", help="also FILE.py:FUNCTION"
    )
    step.add_argument("--compiled", action="store_true", help="all of them through torch.compile as well")
    step.add_argument("--out", type=new_file, metavar="FILE", help="the numbers as JSON")
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
    attention = what.add_parser("attention", help="window attention alone: ours, its kernel and torch's; time, bytes")
    add_settings(attention, ["swinv2_tiny"], batch_size=2, precisions=["fp32"], rounds=7)
    attention.add_argument("--out", type=new_file, metavar="FILE", help="the numbers as JSON")
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
