"""How laboratories say and keep what they found."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure


def write_results(
    folder: Path, name: str, table: str, content: dict[str, Any], figure: Figure, say: Callable[[str], None]
) -> None:
    """Say the table; write it, the numbers behind it and their figure to ``name.txt``, ``name.json``, ``name.png``."""
    say(table)
    (folder / f"{name}.txt").write_text(table + "\n", encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    figure.savefig(folder / f"{name}.png", dpi=120)
    say(f"table    {folder / name}.txt\npicture  {folder / name}.png")


def percent(values: Sequence[float]) -> str:
    """Mean and standard deviation: ``81.3 ± 0.4``"""
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"
