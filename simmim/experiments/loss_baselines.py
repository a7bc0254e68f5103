"""How low is a masked loss that needs no learning? Trivial predictors on the images of a recipe.

Losses of different mask patches, ratios and targets cannot be compared with each other; each has its
own anchors. A trained model that does not beat them has learned nothing useful.
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


class Anchor(NamedTuple):
    """Losses of one kind of mask: L1 over masked pixels, in units of ``data.std``."""

    mask_patch_size: int
    ratio: float
    average_distance: float
    """AvgDist, px; SimMIM found 10 to 20 best at 192 px."""
    zero: float
    mean_of_visible: float
    nearest_visible: float
    zero_normalized: float | None
    """Predicting 0 where the target is normalised over ``target.norm_window``."""


def loss_baselines(
    recipe: Recipe,
    out: Path,
    mask_patch_sizes: Sequence[int] | None = None,
    ratios: Sequence[float] | None = None,
    *,
    images: int = 120,
    say: Callable[[str], None] = print,
) -> list[Anchor]:
    """Judge predictors that learn nothing on held-out images; write ``loss_baselines.txt`` and ``.json``.

    Args:
        out: the files go into ``out / recipe.name``.
        mask_patch_sizes, ratios: every mixture of the two; None for that of the recipe alone.
        images: at most so many are looked at.

    Raises:
        ValueError: no stage of pretraining, no images, or masks that do not fit the image.
    """
    pretraining = [(name, stage) for name, stage in recipe.stages.items() if isinstance(stage, PretrainStage)]
    name, stage = next(((name, stage) for name, stage in pretraining if stage.video is None), ("", None))
    if images < 1:
        raise ValueError(f"--images must be at least 1, got {images}")
    if stage is None:
        raise ValueError(f"{recipe.name} has no stage of pretraining on images: it has {', '.join(recipe.stages)}")
    wanted = [
        (size, ratio, MaskGenerator(stage.image_size, size, ratio, seed=recipe.seed, strategy=stage.mask.strategy))
        for size in mask_patch_sizes or [stage.mask.patch_size]
        for ratio in ratios or [stage.mask.ratio]
    ]
    batches = load_batches(recipe, name, images)
    anchors = [
        Anchor(size, ratio, *measure(batches, generator, stage.target.norm_window, stage.target.downsample))
        for size, ratio, generator in tqdm(wanted, unit="mask", disable=None)
    ]
    table = format_table(anchors, recipe, stage, sum(len(pixels) for pixels, _ in batches))
    say(table)
    folder = out / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "loss_baselines.txt").write_text(table + "\n", encoding="utf-8")
    content = json.dumps([anchor._asdict() for anchor in anchors], indent=2)
    (folder / "loss_baselines.json").write_text(content + "\n", encoding="utf-8")
    say(f"table  {folder / 'loss_baselines.txt'}")
    return anchors


def load_batches(recipe: Recipe, name: str, images: int) -> list[tuple[Tensor, Tensor]]:
    """Normalised images ``(b, c, H, W)`` and their numbers ``(b,)``: held out, or of training where none are."""
    stage, sources = recipe.stages[name], make_datasets(recipe, name)
    assert isinstance(stage, PretrainStage)
    source = sources.validation or sources.training
    some = Subset(source, list(range(min(images, len(source)))))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (recipe.data.mean, recipe.data.std))
    views = evaluation_batches(some, CenterCrop(stage.image_size, stage.crop.interpolation), batch_size=BATCH)
    return [((batch["image"] / 255 - mean) / std, batch["index"]) for batch in views]


def measure(
    batches: Sequence[tuple[Tensor, Tensor]], generator: MaskGenerator, norm_window: int | None, downsample: int = 1
) -> tuple[float, float, float, float, float | None]:
    """AvgDist, and the losses in the order of :class:`Anchor`; every image weighs the same."""
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
        numbers = [sum(average_distance(one[0]) for one in mask) / len(mask)]
        for pair in pairs:
            predicted, target = (mean_of_squares(x, downsample) for x in pair)
            numbers.append(masked_l1(predicted, target, mask).item())
        sums = [total + number * len(images) for total, number in zip(sums, numbers, strict=True)]
        count += len(images)
    distance, zero, mean, nearest, normalized = (total / count for total in sums)
    return distance, zero, mean, nearest, None if norm_window is None else normalized


def format_table(anchors: Sequence[Anchor], recipe: Recipe, stage: PretrainStage, images: int) -> str:
    """One line for each kind of mask; that of the recipe is marked."""
    height, width = stage.image_size
    window = stage.target.norm_window
    heads = ["mask patch", "ratio", "AvgDist", "zero", "mean of visible", "nearest visible"]
    heads += [f"zero, normalised over {window} px"] if window else []
    lines = [
        f"L1 on masked pixels without learning: {images} images of {recipe.data.path}, {height} x {width} px",
        "  ".join(heads),
    ]
    for anchor in anchors:
        cells = [f"{anchor.mask_patch_size} px", f"{anchor.ratio:g}", f"{anchor.average_distance:.1f} px"]
        cells += [f"{value:.4f}" for value in anchor[3:] if value is not None]
        line = "  ".join(f"{cell:>{len(head)}}" for cell, head in zip(cells, heads, strict=True))
        is_own = (anchor.mask_patch_size, anchor.ratio) == (stage.mask.patch_size, stage.mask.ratio)
        lines.append(f"{line}  <- {recipe.name}" if is_own else line)
    return "\n".join(lines)
