"""Arguments and argument types shared by several commands."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml


def add_command(
    commands: argparse._SubParsersAction, name: str, *, help: str, examples: str
) -> argparse.ArgumentParser:
    """Add a command whose help ends with ``examples``, printed verbatim."""
    return commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def as_count(text: str) -> int:
    """Parse an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of at least 1")
    return int(text)


def as_fraction(text: str) -> float:
    """Parse a number from 0 to 1."""
    try:
        fraction = float(text)
    except ValueError:
        fraction = -1.0
    if not 0 <= fraction <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 to 1")
    return fraction


def as_size(text: str) -> int | tuple[int, ...]:
    """Parse ``192`` or ``192x256`` (height first)."""
    if not all(side.isdecimal() for side in text.split("x")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer or HEIGHTxWIDTH")
    sides = tuple(int(side) for side in text.split("x"))
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} has {len(sides)} sides: expected an integer or HEIGHTxWIDTH")
    return sides[0] if len(sides) == 1 else sides


def split_options(given: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Split arguments into paths and ``key=value`` options, whose values are parsed as YAML.

    Raises:
        ValueError: a value is not valid YAML, or there is no path, or an empty one.
    """
    options, paths = {}, []
    for text in given:
        key, sign, value = text.partition("=")
        if sign and key.isidentifier():
            try:
                options[key] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ValueError(f"{text!r} is not valid YAML: {' '.join(str(error).split())}") from None
        else:
            paths.append(text)
    if not all(paths):
        raise ValueError("got an empty path: give a folder, or . for the current one")
    if not paths:
        raise ValueError(f"no data given, only the options {', '.join(given)}: give a path as well")
    return paths, options


def add_recipe(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the recipe and its overrides."""
    nargs = "?" if optional else None
    parser.add_argument("recipe", nargs=nargs, help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="override values of the recipe")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every command that trains."""
    parser.add_argument("--out", type=Path, default=Path("runs"), help="parent of the run folders (default: runs)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        help="default: the setting of accelerate; else bf16 on CPUs with bf16 instructions, fp32 elsewhere",
    )


def add_seeds(parser: argparse.ArgumentParser, default: list[int]) -> None:
    """Add ``--seeds``, the seeds that an experiment is repeated with."""
    text = f"seeds to repeat the experiment with (default: {' '.join(map(str, default))})"
    parser.add_argument("--seeds", type=int, nargs="+", default=default, metavar="N", help=text)
