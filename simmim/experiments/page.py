"""One picture of a whole chain: reconstructions, curves, pretrained against scratch, transfer."""

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
from simmim.visualization.drawing import folded

PRETRAINED, SCRATCH = "C0", "C1"
Transfers = dict[str, dict[str, list[float]]]


class Measure(NamedTuple):
    """What stages with labels are compared by."""

    title: str
    final: str
    """In ``summary.json``."""
    curve: str
    """In ``metrics.jsonl``, while a stage is trained."""


TOP1 = Measure("top-1", "validation_top1", "validation_top1")
MEAN_IOU = Measure("mean IoU", "validation_mean_iou", "validation_pixel_accuracy")
BOX_AP = Measure("box AP", "validation_box_ap", "validation_loss")


def measure_of(stage: Stage) -> Measure:
    """By the kind of a stage."""
    return MEAN_IOU if isinstance(stage, SegmentStage) else BOX_AP if isinstance(stage, DetectStage) else TOP1


def final_of(folder: Path, stage: Stage) -> float:
    """What came of a stage."""
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))[measure_of(stage).final]


def draw_page(
    folder: Path, recipe: Recipe, pairs: Sequence[tuple[str, ...]], transfers: Transfers, seeds: Sequence[int]
) -> None:
    """Draw ``folder / page.png`` from what the stages of a recipe have left in ``folder``.

    Args:
        pairs: stages to compare, from pretraining and from scratch.
        transfers: accuracies as in :class:`simmim.experiments.label_efficiency.Findings`.
    """
    pretraining = next(name for name, stage in recipe.stages.items() if isinstance(stage, PretrainStage))
    pictures = sorted((folder / pretraining / "reconstructions").glob("step_*.png"))
    figure = Figure(figsize=(15, 11), layout="constrained")
    figure.suptitle(f"{recipe.name}: {recipe.encoder.name}, seeds {', '.join(map(str, seeds))}")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.15, 1))
    top, bottom = halves
    left, right = top.subplots(1, 2, width_ratios=(1.6, 1))
    left.axis("off")
    if pictures:
        with Image.open(pictures[-1]) as picture:
            left.imshow(folded(picture))
        left.set_title(f"held-out images, step {int(pictures[-1].stem.removeprefix('step_'))}")
    draw_pretraining(right, folder / pretraining)
    curves, gains, larger = bottom.subplots(1, 3)
    draw_curves(curves, folder / "seeds", pairs[0], seeds, measure_of(recipe.stages[pairs[0][0]]).curve)
    draw_pairs(gains, folder / "seeds", pairs, seeds, recipe)
    draw_transfers(larger, transfers)
    figure.savefig(folder / "page.png", dpi=90)


def draw_pretraining(axis: Axes, folder: Path) -> None:
    """Training and held-out loss, and the trivial predictors as lines."""
    rows = read_json_lines(folder / "metrics.jsonl")
    for key, label, style in (("loss", "training", "-"), ("validation_loss", "held out", "o-")):
        found = [(row["step"], row[key]) for row in rows if key in row]
        if found:
            axis.plot(*zip(*found, strict=True), style, label=label, linewidth=1, markersize=3)
    summary = folder / "summary.json"
    anchors = json.loads(summary.read_text(encoding="utf-8"))["validation_masked_l1"] if summary.exists() else {}
    for number, (name, value) in enumerate(anchors.items()):
        if name != "model":
            axis.axhline(value, color=f"C{number + 3}", linestyle=":", linewidth=1, label=name)
    axis.set(title="pretraining: masked loss", xlabel="step", ylim=(0, None))
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def draw_curves(axis: Axes, folder: Path, pair: tuple[str, ...], seeds: Sequence[int], curve: str) -> None:
    """Held-out accuracy, or loss, over the epochs of a pair, one thin line per seed."""
    scale, unit = (1, "") if curve == "validation_loss" else (100, ", %")
    for stage, colour, label in zip(pair, (PRETRAINED, SCRATCH), ("pretrained", "from scratch"), strict=True):
        for seed in seeds:
            rows = read_json_lines(folder / f"seed_{seed}" / stage / "metrics.jsonl")
            epochs_per_step = next(row["epoch"] / row["step"] for row in rows if "epoch" in row)
            points = [(row["step"] * epochs_per_step, scale * row[curve]) for row in rows if curve in row]
            axis.plot(
                *zip(*points, strict=True), "o-", markersize=3, color=colour, label=label if seed == seeds[0] else None
            )
    axis.set(title=" and ".join(pair), xlabel="epoch", ylabel=f"{curve.replace('_', ' ')}{unit}")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def draw_pairs(
    axis: Axes, folder: Path, pairs: Sequence[tuple[str, ...]], seeds: Sequence[int], recipe: Recipe
) -> None:
    """Final accuracy of every pair: a dot per seed, a bar for the mean."""
    for number, pair in enumerate(pairs):
        for stage, colour, shift in zip(pair, (PRETRAINED, SCRATCH), (-0.2, 0.2), strict=True):
            values = [100 * final_of(folder / f"seed_{seed}" / stage, recipe.stages[stage]) for seed in seeds]
            axis.bar(number + shift, mean(values), 0.38, color=colour, alpha=0.4)
            axis.plot([number + shift] * len(values), values, "o", color=colour, markersize=4)
            axis.annotate(f"{mean(values):.1f}", (number + shift, 1), ha="center", fontsize=9)
    axis.set_xticks(range(len(pairs)), [pair[0] for pair in pairs])
    titles = " or ".join(dict.fromkeys(measure_of(recipe.stages[pair[0]]).title for pair in pairs))
    axis.set(title="pretrained (blue) and from scratch (orange)", ylabel=f"held-out {titles}, %", ylim=(0, 100))
    axis.grid(alpha=0.3, axis="y")


def draw_transfers(axis: Axes, transfers: Transfers) -> None:
    """At the larger image: untrained with either bias, and fine-tuned."""
    bars = [(name, what, values) for name, ways in transfers.items() for what, values in ways.items()]
    if not bars:
        axis.axis("off")
        return
    for number, (_, _, values) in enumerate(bars):
        axis.barh(number, 100 * mean(values), 0.6, color=f"C{2 + number}", alpha=0.4)
        axis.plot([100 * value for value in values], [number] * len(values), "o", color=f"C{2 + number}", markersize=4)
        axis.annotate(f"{100 * mean(values):.1f}", (2, number), va="center", fontsize=9)
    labels = [what.replace(", ", ",\n") if len(transfers) == 1 else f"{name},\n{what}" for name, what, _ in bars]
    axis.set_yticks(range(len(bars)), labels)
    axis.invert_yaxis()
    axis.set(title=", ".join(transfers), xlabel="held-out top-1, %", xlim=(0, 100))
    axis.grid(alpha=0.3, axis="x")
