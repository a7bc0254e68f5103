"""Output files and number formats of experiments."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.figure import Figure


def write_results(
    folder: Path, name: str, table: str, content: dict[str, Any], figure: Figure, echo: Callable[[str], None]
) -> None:
    """Print the table; write table, data and figure to ``name.txt``, ``name.json`` and ``name.png`` in ``folder``."""
    echo(table)
    (folder / f"{name}.txt").write_text(table + "\n", encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    figure.savefig(folder / f"{name}.png", dpi=120)
    echo(f"table   {folder / name}.txt\nfigure  {folder / name}.png")


def percent(values: Sequence[float]) -> str:
    """Format mean and standard deviation in percent: ``81.3 ± 0.4``."""
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"
