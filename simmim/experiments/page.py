"""Summary figure of an experiment: reconstructions, curves, pretrained against scratch, transfer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from simmim.config import DetectStage, PretrainStage, Recipe, SegmentStage, Stage
from simmim.training.run_log import read_json_lines
from simmim.visualization.drawing import fold_rows

PRETRAINED, SCRATCH = "C0", "C1"
Transfers = dict[str, dict[str, list[float]]]


class Measure(NamedTuple):
    """Metric by which stages with labels are compared."""

    title: str
    final: str
    """Key of the final value in ``summary.json``."""
    curve: str
    """Key of the training curve in ``metrics.jsonl``."""


TOP1 = Measure("top-1", "validation_top1", "validation_top1")
MEAN_IOU = Measure("mean IoU", "validation_mean_iou", "validation_pixel_accuracy")
BOX_AP = Measure("box AP", "validation_box_ap", "validation_loss")


def measure_of(stage: Stage) -> Measure:
    """Return the metric of a stage."""
    return MEAN_IOU if isinstance(stage, SegmentStage) else BOX_AP if isinstance(stage, DetectStage) else TOP1


def final_of(folder: Path, stage: Stage) -> float:
    """Return the final metric of a finished stage."""
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))[measure_of(stage).final]


def draw_page(
    folder: Path, recipe: Recipe, pairs: Sequence[tuple[str, ...]], transfers: Transfers, seeds: Sequence[int]
) -> None:
    """Draw ``folder / page.png`` from the run folder of a recipe.

    Args:
        folder: the run folder.
        recipe: the recipe that was run.
        pairs: names of stages to compare, from pretraining and from scratch.
        transfers: accuracies as in :class:`simmim.experiments.label_efficiency.Findings`.
        seeds: seeds to draw.
    """
    pretraining = next(name for name, stage in recipe.stages.items() if isinstance(stage, PretrainStage))
    previews = sorted((folder / pretraining / "reconstructions").glob("step_*.png"))
    figure = Figure(figsize=(15, 11), layout="constrained")
    figure.suptitle(f"{recipe.name}: {recipe.encoder.name}, seeds {', '.join(map(str, seeds))}")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    top, bottom = halves
    left, right = top.subplots(1, 2, width_ratios=(1.6, 1))
    left.axis("off")
    if previews:
        with Image.open(previews[-1]) as preview:
            left.imshow(fold_rows(preview))
        left.set_title(f"validation images, step {int(previews[-1].stem.removeprefix('step_'))}")
    draw_pretraining(right, folder / pretraining)
    curves, gains, larger = bottom.subplots(1, 3)
    draw_curves(curves, folder / "seeds", pairs[0], seeds, measure_of(recipe.stages[pairs[0][0]]).curve)
    draw_pairs(gains, folder / "seeds", pairs, seeds, recipe)
    draw_transfers(larger, transfers)
    figure.savefig(folder / "page.png", dpi=90)


def draw_pretraining(axis: Axes, folder: Path) -> None:
    """Plot training and validation loss, and the baselines as lines."""
    rows = read_json_lines(folder / "metrics.jsonl")
    for key, label, style in (("loss", "training", "-"), ("validation_loss", "validation", "o-")):
        found = [(row["step"], row[key]) for row in rows if key in row]
        if found:
            axis.plot(*zip(*found, strict=True), style, label=label, linewidth=1, markersize=3)
    summary = folder / "summary.json"
    baselines = json.loads(summary.read_text(encoding="utf-8"))["validation_masked_l1"] if summary.exists() else {}
    for color, (name, value) in enumerate(baselines.items(), start=3):
        if name != "model":
            axis.axhline(value, color=f"C{color}", linestyle=":", linewidth=1, label=name)
    axis.set(title="pretraining: masked loss", xlabel="step", ylim=(0, None))
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def draw_curves(axis: Axes, folder: Path, pair: tuple[str, ...], seeds: Sequence[int], curve: str) -> None:
    """Plot the validation metric of a pair of stages over epochs, one line per seed."""
    scale, unit = (1, "") if curve == "validation_loss" else (100, ", %")
    for stage, color, label in zip(pair, (PRETRAINED, SCRATCH), ("pretrained", "from scratch"), strict=True):
        for seed in seeds:
            rows = read_json_lines(folder / f"seed_{seed}" / stage / "metrics.jsonl")
            epochs_per_step = next(row["epoch"] / row["step"] for row in rows if "epoch" in row)
            points = [(row["step"] * epochs_per_step, scale * row[curve]) for row in rows if curve in row]
            axis.plot(
                *zip(*points, strict=True), "o-", markersize=3, color=color, label=label if seed == seeds[0] else None
            )
    axis.set(title=" and ".join(pair), xlabel="epoch", ylabel=f"{curve.replace('_', ' ')}{unit}")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def draw_pairs(
    axis: Axes, folder: Path, pairs: Sequence[tuple[str, ...]], seeds: Sequence[int], recipe: Recipe
) -> None:
    """Plot the final metric of every pair: a dot per seed, a bar for the mean."""
    for row, pair in enumerate(pairs):
        for stage, color, shift in zip(pair, (PRETRAINED, SCRATCH), (-0.2, 0.2), strict=True):
            values = [100 * final_of(folder / f"seed_{seed}" / stage, recipe.stages[stage]) for seed in seeds]
            axis.bar(row + shift, mean(values), 0.38, color=color, alpha=0.4)
            axis.plot([row + shift] * len(values), values, "o", color=color, markersize=4)
            axis.annotate(f"{mean(values):.1f}", (row + shift, 1), ha="center", fontsize=9)
    axis.set_xticks(range(len(pairs)), [pair[0] for pair in pairs])
    titles = " or ".join(dict.fromkeys(measure_of(recipe.stages[pair[0]]).title for pair in pairs))
    axis.set(title="pretrained (blue) and from scratch (orange)", ylabel=f"validation {titles}, %", ylim=(0, 100))
    axis.grid(alpha=0.3, axis="y")


def draw_transfers(axis: Axes, transfers: Transfers) -> None:
    """Plot accuracies at the larger image: not fine-tuned with either bias, and fine-tuned."""
    bars = [(name, treatment, values) for name, each in transfers.items() for treatment, values in each.items()]
    if not bars:
        axis.axis("off")
        return
    for row, (_, _, values) in enumerate(bars):
        axis.barh(row, 100 * mean(values), 0.6, color=f"C{2 + row}", alpha=0.4)
        axis.plot([100 * value for value in values], [row] * len(values), "o", color=f"C{2 + row}", markersize=4)
        axis.annotate(f"{100 * mean(values):.1f}", (2, row), va="center", fontsize=9)
    labels = [kind.replace(", ", ",\n") if len(transfers) == 1 else f"{name},\n{kind}" for name, kind, _ in bars]
    axis.set_yticks(range(len(bars)), labels)
    axis.invert_yaxis()
    axis.set(title=", ".join(transfers), xlabel="validation top-1, %", xlim=(0, 100))
    axis.grid(alpha=0.3, axis="x")
