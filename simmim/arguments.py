"""What commands of the command line have in common."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_command(
    commands: argparse._SubParsersAction, name: str, *, help: str, examples: str
) -> argparse.ArgumentParser:
    """A command whose help ends with examples, shown as they are written."""
    return commands.add_parser(name, help=help, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)


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
