"""Training of recipe variants and statistics over their seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import atanh, sqrt, tanh
from pathlib import Path
from statistics import correlation, mean, median, stdev
from typing import NamedTuple

from simmim.config import FinetuneStage, PretrainStage, Recipe
from simmim.config.loading import override
from simmim.stages import run
from simmim.training.run_log import read_json_lines

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""0.975 quantiles of Student's t for 1 to 9 degrees of freedom; the last is also used, conservatively, for more."""

Interval = tuple[float, float]


class Outcome(NamedTuple):
    """Results of one variant and seed."""

    top1: float
    """Validation accuracy after fine-tuning."""
    masked_l1: float
    """Validation loss after pretraining, in units of ``data.std``, on the variant's own target."""
    images_per_s: float
    """Median speed of pretraining."""


def find_stages(recipe: Recipe) -> tuple[str, str]:
    """Return the names of the first pretraining stage with a classifier stage that starts from it, and of the latter.

    Raises:
        ValueError: the recipe has no such stages.
    """
    for name, stage in recipe.stages.items():
        start = recipe.start_of(name)
        if isinstance(stage, FinetuneStage) and isinstance(recipe.stages.get(start), PretrainStage):
            return start, name
    raise ValueError(f"{recipe.name} has no classifier stage that starts from a pretraining stage: add one")


def pretraining_of(recipe: Recipe) -> tuple[str, PretrainStage]:
    """Return the name and settings of the pretraining stage of :func:`find_stages`."""
    name, _ = find_stages(recipe)
    stage = recipe.stages[name]
    assert isinstance(stage, PretrainStage)
    return name, stage


def make_variant(recipe: Recipe, overrides: list[str]) -> Recipe:
    """Return a recipe of the two stages of :func:`find_stages` and their predecessors, with overrides applied.

    Raises:
        ValueError: the recipe lacks these stages or validation images, or an override is invalid.
    """
    if not recipe.data.validation_images:
        raise ValueError(
            "variants are compared on validation images, of which there are none: set data.validation_images"
        )
    start, finetune = find_stages(recipe)
    needed = {finetune}
    while start in recipe.stages:
        needed.add(start)
        start = recipe.start_of(start)
    stages = {name: stage for name, stage in recipe.stages.items() if name in needed}
    return override(recipe.model_copy(update={"stages": stages}), overrides)


def run_variant(variant: Recipe, seed: int, folder: Path, precision: str | None) -> Outcome:
    """Pretrain and fine-tune a variant, skipping finished stages, and return its outcome.

    Args:
        variant: a recipe from :func:`make_variant`.
        seed: seed of the run.
        folder: parent of the stage folders.
        precision: ``fp32``, ``bf16`` or None for the default.

    Raises:
        ValueError: a stage cannot run, or there are too few images for a validation part.
    """
    pretrain, finetune = find_stages(variant)
    run(variant.model_copy(update={"name": folder.name, "seed": seed}), folder.parent, precision=precision)
    first, second = (folder / name / "summary.json" for name in (pretrain, finetune))
    if not first.exists():
        raise ValueError("pretraining had no validation images: raise data.validation_images, or give more images")
    masked_l1 = json.loads(first.read_text(encoding="utf-8"))["validation_masked_l1"]["model"]
    top1 = json.loads(second.read_text(encoding="utf-8"))["validation_top1"]
    rates = [
        line["images_per_s"] for line in read_json_lines(folder / pretrain / "metrics.jsonl") if "images_per_s" in line
    ]
    return Outcome(top1, masked_l1, median(rates))


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Return the 95 % confidence interval of the mean of normally distributed values.

    None for fewer than three values, or equal ones: accuracies of few images often agree by chance.
    """
    if len(values) < 3 or stdev(values) == 0:
        return None
    half = STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * stdev(values) / sqrt(len(values))
    return mean(values) - half, mean(values) + half


def pearson(first: Sequence[float], second: Sequence[float]) -> tuple[float, Interval | None] | None:
    """Return the Pearson correlation of pairs and its 95 % interval (Fisher's z; None for fewer than four pairs).

    None for fewer than three pairs, or if one side is constant.
    """
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    r = correlation(first, second)
    if len(first) < 4 or abs(r) >= 1:
        return r, None
    half = 1.96 / sqrt(len(first) - 3)
    return r, (tanh(atanh(r) - half), tanh(atanh(r) + half))


def verdict(interval: Interval | None) -> str:
    """Return ``higher``, ``lower``, ``inconclusive`` or ``needs more seeds`` for an interval of differences."""
    if interval is None:
        return "needs more seeds"
    if interval[0] > 0:
        return "higher"
    return "lower" if interval[1] < 0 else "inconclusive"


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ValueError if a seed is repeated or negative, or there is none."""
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be different and at least 0, got {', '.join(map(str, seeds))}")
