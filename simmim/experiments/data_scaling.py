"""Does masked pretraining need many images? Share of the data x size x length (arXiv 2206.04664, in small).

The paper's finding: large models overfit few images when trained for long, and the held-out loss, not that of training,
tells how well an encoder will be fine-tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from simmim.config import Recipe
from simmim.experiments.results import percent, write_results
from simmim.experiments.trials import Outcome, check_seeds, make_variant, pearson, pretraining_of, run_variant
from simmim.stages.datasets import make_datasets
from simmim.stages.pretrain import images_of_fraction
from simmim.training.distributed import make_accelerator

MARKS = "osD^v"
LINES = ("-", "--", ":", "-.")


class Cell(NamedTuple):
    """One point of the grid."""

    share: float
    """Of the training images of the recipe."""
    size: str
    """``key=value`` of ``encoder``."""
    length: float
    """Steps over those of the recipe."""


def data_scaling(
    recipe: Recipe,
    out: Path,
    shares: Sequence[float] = (0.02, 0.1, 1.0),
    sizes: Sequence[str] = ("embed_dim=16", "embed_dim=32"),
    lengths: Sequence[float] = (0.25, 0.5, 1.0),
    seeds: Sequence[int] = (0,),
    *,
    precision: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[Cell, list[Outcome]]:
    """Pretrain and fine-tune every cell of the grid; write ``data_scaling.txt``, ``.json`` and ``.png``.

    All lengths are in steps: a smaller share is seen more often. What is finished is not done again.

    Args:
        out: everything goes into ``out / recipe.name / data_scaling``.

    Raises:
        ValueError: a recipe without the stages, or values that are refused.
    """
    check_seeds(seeds)
    if any(not 0 < share <= 1 for share in shares) or any(length <= 0 for length in lengths):
        raise ValueError(f"shares lie above 0 and up to 1, lengths above 0; got {list(shares)} and {list(lengths)}")
    grid = [Cell(*cell) for cell in dict.fromkeys(product(shares, sizes, lengths))]
    folder = out / recipe.name / "data_scaling"
    whole, numbers = images_of(recipe, shares)
    if len(set(numbers.values())) < len(numbers):
        raise ValueError(f"shares {list(numbers)} are {list(numbers.values())} images: give some that differ")
    recipes = {cell: make_variant(recipe, overrides_of(recipe, cell, whole / numbers[cell.share])) for cell in grid}
    outcomes: dict[Cell, list[Outcome]] = {cell: [] for cell in grid}
    for number, (seed, cell) in enumerate(product(seeds, grid), start=1):
        where = f"({number} of {len(seeds) * len(grid)})"
        say(f"share {cell.share:g}, {cell.size}, length {cell.length:g}, seed {seed} {where}")
        place = folder / f"share_{cell.share:g}_{cell.size.replace('=', '_')}_length_{cell.length:g}_seed_{seed}"
        outcomes[cell].append(run_variant(recipes[cell], seed, place, precision))
    if make_accelerator(precision).is_main_process:
        cells = [{**cell._asdict(), "outcomes": [o._asdict() for o in each]} for cell, each in outcomes.items()]
        content = {"seeds": list(seeds), "cells": cells}
        table = format_table(outcomes, seeds, numbers)
        write_results(folder, "data_scaling", table, content, draw(outcomes), say)
    return outcomes


def images_of(recipe: Recipe, shares: Sequence[float]) -> tuple[int, dict[float, int]]:
    """How many images pretraining has as the recipe is, and with each share; they are looked for once."""
    name, _ = pretraining_of(recipe)
    whole = recipe.model_copy(update={"data": recipe.data.model_copy(update={"share": 1.0})})
    images = len(make_datasets(whole, name).training)
    numbers = {share: images_of_fraction(share, images) for share in (recipe.data.fraction, *shares)}
    return numbers[recipe.data.fraction], {share: numbers[share] for share in shares}


def overrides_of(recipe: Recipe, cell: Cell, fewer: float) -> list[str]:
    """Epochs become longer as their images become fewer, by so many times: the length is in steps."""
    name, stage = pretraining_of(recipe)
    factor, schedule = cell.length * fewer, stage.schedule
    times = {
        "epochs": schedule.epochs * factor,
        "warmup_epochs": schedule.warmup_epochs * factor,
        "milestones_epochs": [milestone * factor for milestone in schedule.milestones_epochs],
    }
    return [
        f"data.fraction={cell.share}",
        f"encoder.{cell.size}",
        *(f"stages.{name}.schedule.{key}={value}" for key, value in times.items()),
    ]


def correlations(outcomes: dict[Cell, list[Outcome]]) -> dict[str, Any]:
    """Of held-out loss and accuracy over sizes and lengths, each the mean of its seeds; by share, and over all.

    Over all there is no interval: the same size and length with another share is hardly another point.
    """
    means = {cell: (mean(o.masked_l1 for o in each), mean(o.top1 for o in each)) for cell, each in outcomes.items()}
    found = {}
    for share in dict.fromkeys(cell.share for cell in outcomes):
        points = [point for cell, point in means.items() if cell.share == share]
        found[f"share {share:g}"] = pearson(*zip(*points, strict=True))
    together = pearson(*zip(*means.values(), strict=True))
    found["all shares"] = together and (together[0], None)
    return found


def format_table(outcomes: dict[Cell, list[Outcome]], seeds: Sequence[int], numbers: dict[float, int]) -> str:
    """Rows are cells; then the correlations with their intervals."""
    width = max(len(cell.size) for cell in outcomes) + 2
    lines = [
        f"mean over seeds {', '.join(map(str, seeds))}: held-out masked L1 of pretraining, held-out top-1 after "
        "fine-tuning, %",
        f"{'share':>7}{'images':>10}  {'size':<{width}}{'length':>7}{'masked L1':>12}{'top-1':>14}",
    ]
    for cell, each in outcomes.items():
        loss, top1 = mean(o.masked_l1 for o in each), percent([o.top1 for o in each])
        lines.append(
            f"{cell.share:>7g}{numbers[cell.share]:>10,}  {cell.size:<{width}}{cell.length:>7g}{loss:>12.4f}{top1:>14}"
        )
    lines.append("correlation (Pearson) of held-out loss and accuracy, 95 % interval")
    for name, found in correlations(outcomes).items():
        if found is None:
            text = "cannot be told from so few points"
        else:
            r, interval = found
            text = f"{r:+.2f}" + (f"  {interval[0]:+.2f} to {interval[1]:+.2f}" if interval else "")
        lines.append(f"  {name:<14}{text}")
    return "\n".join(lines)


def draw(outcomes: dict[Cell, list[Outcome]]) -> Figure:
    """Loss and accuracy over the length, and one over the other; colours are shares, lines and marks are sizes."""
    shares = list(dict.fromkeys(cell.share for cell in outcomes))
    sizes = list(dict.fromkeys(cell.size for cell in outcomes))
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    losses, accuracies, both = figure.subplots(1, 3)
    for (row, share), (column, size) in product(enumerate(shares), enumerate(sizes)):
        cells = sorted((cell for cell in outcomes if cell[:2] == (share, size)), key=lambda cell: cell.length)
        lengths = [cell.length for cell in cells]
        look: dict[str, Any] = {"color": f"C{row}", "marker": MARKS[column % len(MARKS)]}
        line = {**look, "linestyle": LINES[column % len(LINES)], "label": f"{share:.3g} of the images, {size}"}
        losses.plot(lengths, [mean(o.masked_l1 for o in outcomes[cell]) for cell in cells], **line)
        accuracies.plot(lengths, [100 * mean(o.top1 for o in outcomes[cell]) for cell in cells], **line)
        points = [o for cell in cells for o in outcomes[cell]]
        both.plot([o.masked_l1 for o in points], [100 * o.top1 for o in points], linestyle="", **look)
    for axis, title in ((losses, "held-out masked L1"), (accuracies, "top-1 after fine-tuning, %")):
        axis.set_xlabel("steps, over those of the recipe")
        axis.set_xscale("log", base=2)
        lengths = sorted({cell.length for cell in outcomes})
        axis.set_xticks(lengths, [f"{length:g}" for length in lengths])
        axis.set_title(title)
    losses.legend(fontsize=8)
    both.set_xlabel("held-out masked L1")
    both.set_ylabel("top-1 after fine-tuning, %")
    found = correlations(outcomes)
    texts = [f"{name}: {value[0]:+.2f}" for name, value in found.items() if value is not None]
    both.set_title("correlation of loss and accuracy")
    both.text(0.97, 0.97, "\n".join(texts), transform=both.transAxes, ha="right", va="top")
    for axis in (losses, accuracies, both):
        axis.grid(alpha=0.3)
    return figure
