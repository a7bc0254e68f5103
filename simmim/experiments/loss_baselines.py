"""Loss baselines: the masked loss of predictors that learn nothing, on the images of a recipe.

Losses with different mask patch sizes, ratios or targets cannot be compared with each other, so each has its own
baselines. A trained model that is not better than they are has learned nothing useful.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from simmim.config import PretrainStage, Recipe
from simmim.data import CenterCrop, evaluation_batches
from simmim.data.sources import Subset
from simmim.masking import MaskGenerator, expand_mask
from simmim.metrics.baselines import average_distance, copy_nearest_visible, masked_l1, mean_of_visible
from simmim.stages.datasets import make_datasets
from simmim.tasks.simmim import mean_of_squares, normalize_locally

BATCH = 16


class Baseline(NamedTuple):
    """Baseline losses of one kind of mask: L1 over masked pixels, in units of ``data.std``."""

    mask_patch_size: int
    ratio: float
    average_distance: float
    """AvgDist, px; SimMIM found 10 to 20 px best at 192 px (section 4.1.2)."""
    zero: float
    mean_of_visible: float
    nearest_visible: float
    zero_normalized: float | None
    """Loss of predicting 0 if the target is normalized over ``target.norm_window``, else None."""


def loss_baselines(
    recipe: Recipe,
    out: Path,
    mask_patch_sizes: Sequence[int] | None = None,
    ratios: Sequence[float] | None = None,
    *,
    images: int = 120,
    echo: Callable[[str], None] = print,
) -> list[Baseline]:
    """Evaluate predictors that learn nothing on validation images; write ``loss_baselines.txt`` and ``.json``.

    Args:
        recipe: a recipe with a pretraining stage on images.
        out: the files are written to ``out / recipe.name``.
        mask_patch_sizes, ratios: every combination is evaluated; None for the value of the recipe.
        images: maximum number of images.
        echo: called with every line of output.

    Raises:
        ValueError: there is no pretraining stage, there are no images, or the masks do not fit the image.
    """
    pretraining = [(name, stage) for name, stage in recipe.stages.items() if isinstance(stage, PretrainStage)]
    name, stage = next(((name, stage) for name, stage in pretraining if stage.video is None), ("", None))
    if images < 1:
        raise ValueError(f"--images must be at least 1, got {images}")
    if stage is None:
        raise ValueError(f"{recipe.name} has no pretraining stage on images, only {', '.join(recipe.stages)}")
    wanted = [
        (size, ratio, MaskGenerator(stage.image_size, size, ratio, seed=recipe.seed, strategy=stage.mask.strategy))
        for size in mask_patch_sizes or [stage.mask.patch_size]
        for ratio in ratios or [stage.mask.ratio]
    ]
    batches = load_batches(recipe, name, images)
    baselines = [
        Baseline(size, ratio, *measure(batches, generator, stage.target.norm_window, stage.target.downsample))
        for size, ratio, generator in tqdm(wanted, unit="mask", disable=None)
    ]
    table = format_table(baselines, recipe, stage, sum(len(pixels) for pixels, _ in batches))
    echo(table)
    folder = out / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "loss_baselines.txt").write_text(table + "\n", encoding="utf-8")
    content = json.dumps([baseline._asdict() for baseline in baselines], indent=2)
    (folder / "loss_baselines.json").write_text(content + "\n", encoding="utf-8")
    echo(f"table  {folder / 'loss_baselines.txt'}")
    return baselines


def load_batches(recipe: Recipe, name: str, images: int) -> list[tuple[Tensor, Tensor]]:
    """Return normalized images ``(b, c, H, W)`` and their indices ``(b,)``: of the validation part if there is one."""
    stage, sources = recipe.stages[name], make_datasets(recipe, name)
    assert isinstance(stage, PretrainStage)
    source = sources.validation or sources.training
    subset = Subset(source, list(range(min(images, len(source)))))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (recipe.data.mean, recipe.data.std))
    views = evaluation_batches(subset, CenterCrop(stage.image_size, stage.crop.interpolation), batch_size=BATCH)
    return [((batch["image"] / 255 - mean) / std, batch["index"]) for batch in views]


def measure(
    batches: Sequence[tuple[Tensor, Tensor]], generator: MaskGenerator, norm_window: int | None, downsample: int = 1
) -> tuple[float, float, float, float, float | None]:
    """Return AvgDist and the losses in the order of :class:`Baseline`; every image has the same weight."""
    sums, count = [0.0] * 5, 0
    for images, index in batches:
        mask = expand_mask(generator(torch.zeros_like(index), index), generator.mask_patch_size)[:, None]
        zeros = torch.zeros_like(images)
        pairs = [
            (zeros, images),
            (mean_of_visible(images, mask), images),
            (copy_nearest_visible(images, mask), images),
            (zeros, normalize_locally(images, norm_window) if norm_window else images),
        ]
        values = [sum(average_distance(one[0]) for one in mask) / len(mask)]
        for pair in pairs:
            predicted, target = (mean_of_squares(x, downsample) for x in pair)
            values.append(masked_l1(predicted, target, mask).item())
        sums = [total + value * len(images) for total, value in zip(sums, values, strict=True)]
        count += len(images)
    distance, zero, mean, nearest, normalized = (total / count for total in sums)
    return distance, zero, mean, nearest, None if norm_window is None else normalized


def format_table(baselines: Sequence[Baseline], recipe: Recipe, stage: PretrainStage, images: int) -> str:
    """Format one line per kind of mask; that of the recipe is marked."""
    height, width = stage.image_size
    window = stage.target.norm_window
    heads = ["mask patch", "ratio", "AvgDist", "zero", "mean of visible", "nearest visible"]
    heads += [f"zero, normalized over {window} px"] if window else []
    lines = [
        f"masked L1 of predictors that learn nothing: {images} images of {recipe.data.path}, {height} x {width} px",
        "  ".join(heads),
    ]
    for baseline in baselines:
        columns = [f"{baseline.mask_patch_size} px", f"{baseline.ratio:g}", f"{baseline.average_distance:.1f} px"]
        columns += [f"{value:.4f}" for value in baseline[3:] if value is not None]
        line = "  ".join(f"{column:>{len(head)}}" for column, head in zip(columns, heads, strict=True))
        is_own = (baseline.mask_patch_size, baseline.ratio) == (stage.mask.patch_size, stage.mask.ratio)
        lines.append(f"{line}  <- {recipe.name}" if is_own else line)
    return "\n".join(lines)
