"""Data scaling of masked pretraining: fraction of the images x encoder size x training length (arXiv 2206.04664).

The paper found that large models overfit small data sets in long training, and that the validation loss, unlike the
training loss, predicts the accuracy after fine-tuning.
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


class GridPoint(NamedTuple):
    """One setting of the experiment."""

    fraction: float
    """Fraction of the recipe's training images."""
    size: str
    """Encoder setting, ``key=value``."""
    length: float
    """Steps relative to the recipe."""


def data_scaling(
    recipe: Recipe,
    out: Path,
    fractions: Sequence[float] = (0.02, 0.1, 1.0),
    sizes: Sequence[str] = ("embed_dim=16", "embed_dim=32"),
    lengths: Sequence[float] = (0.25, 0.5, 1.0),
    seeds: Sequence[int] = (0,),
    *,
    precision: str | None = None,
    echo: Callable[[str], None] = print,
) -> dict[GridPoint, list[Outcome]]:
    """Pretrain and fine-tune every grid point; write ``data_scaling.txt``, ``.json`` and ``.png``.

    Lengths are in steps, so the images of a smaller fraction are seen more often. Finished runs are skipped, so the
    same call resumes an interrupted one.

    Args:
        recipe: a recipe with a pretraining stage and a classifier stage that starts from it.
        out: everything is written to ``out / recipe.name / data_scaling``.
        fractions: fractions of the training images.
        sizes: settings of the encoder, ``key=value``.
        lengths: steps relative to the recipe.
        seeds: every grid point is trained once per seed.
        precision: ``fp32``, ``bf16`` or None for the default.
        echo: called with every line of output.

    Raises:
        ValueError: the recipe lacks these stages, or an argument is invalid.
    """
    check_seeds(seeds)
    if any(not 0 < fraction <= 1 for fraction in fractions) or any(length <= 0 for length in lengths):
        raise ValueError(
            f"fractions must be above 0 and at most 1, and lengths above 0; got {list(fractions)} and {list(lengths)}"
        )
    grid = [GridPoint(*point) for point in dict.fromkeys(product(fractions, sizes, lengths))]
    folder = out / recipe.name / "data_scaling"
    images, counts = count_images(recipe, fractions)
    if len(set(counts.values())) < len(counts):
        raise ValueError(f"fractions {list(counts)} give {list(counts.values())} images: choose fractions that differ")
    recipes = {
        point: make_variant(recipe, overrides_of(recipe, point, images / counts[point.fraction])) for point in grid
    }
    outcomes: dict[GridPoint, list[Outcome]] = {point: [] for point in grid}
    for run, (seed, point) in enumerate(product(seeds, grid), start=1):
        progress = f"({run} of {len(seeds) * len(grid)})"
        echo(f"fraction {point.fraction:g}, {point.size}, length {point.length:g}, seed {seed} {progress}")
        name = f"fraction_{point.fraction:g}_{point.size.replace('=', '_')}_length_{point.length:g}_seed_{seed}"
        outcomes[point].append(run_variant(recipes[point], seed, folder / name, precision))
    if make_accelerator(precision).is_main_process:
        points = [{**point._asdict(), "outcomes": [o._asdict() for o in each]} for point, each in outcomes.items()]
        content = {"seeds": list(seeds), "points": points}
        table = format_table(outcomes, seeds, counts)
        write_results(folder, "data_scaling", table, content, draw(outcomes), echo)
    return outcomes


def count_images(recipe: Recipe, fractions: Sequence[float]) -> tuple[int, dict[float, int]]:
    """Return the number of pretraining images of the recipe, and by fraction; the data is opened once."""
    name, _ = pretraining_of(recipe)
    complete = recipe.model_copy(update={"data": recipe.data.model_copy(update={"fraction": 1.0})})
    images = len(make_datasets(complete, name).training)
    counts = {fraction: images_of_fraction(fraction, images) for fraction in (recipe.data.fraction, *fractions)}
    return counts[recipe.data.fraction], {fraction: counts[fraction] for fraction in fractions}


def overrides_of(recipe: Recipe, point: GridPoint, times_fewer: float) -> list[str]:
    """Return the overrides of a grid point.

    Args:
        times_fewer: images of the recipe over images of the point. Epochs increase by it, so that steps stay equal.
    """
    name, stage = pretraining_of(recipe)
    factor, schedule = point.length * times_fewer, stage.schedule
    durations = {
        "epochs": schedule.epochs * factor,
        "warmup_epochs": schedule.warmup_epochs * factor,
        "milestones_epochs": [milestone * factor for milestone in schedule.milestones_epochs],
    }
    return [
        f"data.fraction={point.fraction}",
        f"encoder.{point.size}",
        *(f"stages.{name}.schedule.{key}={value}" for key, value in durations.items()),
    ]


def correlations(outcomes: dict[GridPoint, list[Outcome]]) -> dict[str, Any]:
    """Correlate validation loss and accuracy, averaged over seeds, for each fraction and for all together.

    The correlation over all fractions has no interval, because points that differ in the fraction only are not
    independent.
    """
    means = {point: (mean(o.masked_l1 for o in each), mean(o.top1 for o in each)) for point, each in outcomes.items()}
    found = {}
    for fraction in dict.fromkeys(point.fraction for point in outcomes):
        points = [pair for point, pair in means.items() if point.fraction == fraction]
        found[f"fraction {fraction:g}"] = pearson(*zip(*points, strict=True))
    together = pearson(*zip(*means.values(), strict=True))
    found["all fractions"] = together and (together[0], None)
    return found


def format_table(outcomes: dict[GridPoint, list[Outcome]], seeds: Sequence[int], counts: dict[float, int]) -> str:
    """Format one row per grid point, then the correlations with their intervals."""
    width = max(len(point.size) for point in outcomes) + 2
    lines = [
        f"mean over seeds {', '.join(map(str, seeds))}: validation masked L1 of pretraining, validation top-1 "
        "after fine-tuning, %",
        f"{'fraction':>8}{'images':>10}  {'size':<{width}}{'length':>7}{'masked L1':>12}{'top-1':>14}",
    ]
    for point, each in outcomes.items():
        loss, top1 = mean(o.masked_l1 for o in each), percent([o.top1 for o in each])
        lines.append(
            f"{point.fraction:>8g}{counts[point.fraction]:>10,}  {point.size:<{width}}{point.length:>7g}"
            f"{loss:>12.4f}{top1:>14}"
        )
    lines.append("correlation (Pearson) of validation loss and accuracy, 95 % interval")
    for name, found in correlations(outcomes).items():
        if found is None:
            text = "too few points"
        else:
            r, interval = found
            text = f"{r:+.2f}" + (f"  {interval[0]:+.2f} to {interval[1]:+.2f}" if interval else "")
        lines.append(f"  {name:<16}{text}")
    return "\n".join(lines)


def draw(outcomes: dict[GridPoint, list[Outcome]]) -> Figure:
    """Plot loss and accuracy over the length, and accuracy over loss; colors are fractions, line styles are sizes."""
    fractions = list(dict.fromkeys(point.fraction for point in outcomes))
    sizes = list(dict.fromkeys(point.size for point in outcomes))
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    losses, accuracies, both = figure.subplots(1, 3)
    for (row, fraction), (column, size) in product(enumerate(fractions), enumerate(sizes)):
        points = sorted((point for point in outcomes if point[:2] == (fraction, size)), key=lambda point: point.length)
        lengths = [point.length for point in points]
        style: dict[str, Any] = {"color": f"C{row}", "marker": MARKS[column % len(MARKS)]}
        line = {**style, "linestyle": LINES[column % len(LINES)], "label": f"{fraction:.3g} of the images, {size}"}
        losses.plot(lengths, [mean(o.masked_l1 for o in outcomes[point]) for point in points], **line)
        accuracies.plot(lengths, [100 * mean(o.top1 for o in outcomes[point]) for point in points], **line)
        every = [o for point in points for o in outcomes[point]]
        both.plot([o.masked_l1 for o in every], [100 * o.top1 for o in every], linestyle="", **style)
    for axis, title in ((losses, "validation masked L1"), (accuracies, "top-1 after fine-tuning, %")):
        axis.set_xlabel("steps relative to the recipe")
        axis.set_xscale("log", base=2)
        lengths = sorted({point.length for point in outcomes})
        axis.set_xticks(lengths, [f"{length:g}" for length in lengths])
        axis.set_title(title)
    losses.legend(fontsize=8)
    both.set_xlabel("validation masked L1")
    both.set_ylabel("top-1 after fine-tuning, %")
    found = correlations(outcomes)
    texts = [f"{name}: {value[0]:+.2f}" for name, value in found.items() if value is not None]
    both.set_title("correlation of loss and accuracy")
    both.text(0.97, 0.97, "\n".join(texts), transform=both.transAxes, ha="right", va="top")
    for axis in (losses, accuracies, both):
        axis.grid(alpha=0.3)
    return figure
