"""What commands of the command line have in common."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml


def add_command(
    commands: argparse._SubParsersAction, name: str, *, help: str, examples: str
) -> argparse.ArgumentParser:
    """A command whose help ends with examples, shown as they are written."""
    return commands.add_parser(name, help=help, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)


def as_count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def as_fraction(text: str) -> float:
    """A number from 0 to 1."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 to 1")
    return number


def as_size(text: str) -> int | tuple[int, ...]:
    """``192`` or ``192x256``, height first."""
    if not all(side.isdecimal() for side in text.split("x")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected one number or HEIGHTxWIDTH")
    sides = tuple(int(side) for side in text.split("x"))
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} has {len(sides)} sides: expected one number or HEIGHTxWIDTH")
    return sides[0] if len(sides) == 1 else sides


def split_options(given: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Places, and what has the form ``key=value``, its value read as YAML.

    Raises:
        ValueError: a value that is no YAML, or no place.
    """
    options, places = {}, []
    for text in given:
        key, sign, value = text.partition("=")
        if sign and key.isidentifier():
            try:
                options[key] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ValueError(f"{text!r} is not valid YAML: {' '.join(str(error).split())}") from None
        else:
            places.append(text)
    if not all(places):
        raise ValueError("a place without a name: give a folder, or . for this one")
    if not places:
        raise ValueError(f"no data: {', '.join(given)} are options")
    return places, options


def add_recipe(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """The recipe and what is changed of it."""
    nargs = "?" if optional else None
    parser.add_argument("recipe", nargs=nargs, help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replace values of the recipe")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What every command that trains takes beside its recipe."""
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where run folders are made (default: runs)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        help="default: what accelerate is configured for; else bf16 on processors that multiply it, and fp32",
    )
