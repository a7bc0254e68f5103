"""What experiments with variations of a recipe share: an arm, its outcome, and what may be claimed of several seeds."""

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
"""Quantile .975 of Student's t for 1, 2, ... 9 degrees of freedom; the last is wide enough for more."""

Interval = tuple[float, float]


class Outcome(NamedTuple):
    """Of one arm and seed."""

    top1: float
    """Held out, after fine-tuning."""
    masked_l1: float
    """Held out, after pretraining; in units of ``data.std``, of the arm's own target."""
    images_per_s: float
    """Of pretraining."""


def find_stages(recipe: Recipe) -> tuple[str, str]:
    """The first stage of pretraining, and the first with labels that starts from it.

    Raises:
        ValueError: there are none.
    """
    for name, stage in recipe.stages.items():
        start = recipe.start_of(name)
        if isinstance(stage, FinetuneStage) and isinstance(recipe.stages.get(start), PretrainStage):
            return start, name
    raise ValueError(f"{recipe.name} has no stage with labels that starts from a stage of pretraining: add one")


def pretraining_of(recipe: Recipe) -> tuple[str, PretrainStage]:
    """The first of :func:`find_stages`, with its name."""
    name, _ = find_stages(recipe)
    stage = recipe.stages[name]
    assert isinstance(stage, PretrainStage)
    return name, stage


def make_variant(recipe: Recipe, overrides: list[str]) -> Recipe:
    """The two stages of :func:`find_stages` and those that they start from, with some values replaced.

    Raises:
        ValueError: no such stages, or values that are refused.
    """
    if not recipe.data.validation_images:
        raise ValueError("arms are compared by images held out of pretraining: set data.validation_images")
    place, finetune = find_stages(recipe)
    needed = {finetune}
    while place in recipe.stages:
        needed.add(place)
        place = recipe.start_of(place)
    stages = {name: stage for name, stage in recipe.stages.items() if name in needed}
    return override(recipe.model_copy(update={"stages": stages}), overrides)


def run_variant(variant: Recipe, seed: int, folder: Path, precision: str | None) -> Outcome:
    """Pretrain and fine-tune; what is finished is not done again.

    Args:
        arm: of :func:`make_variant`.
        folder: the stages get their folders in it.

    Raises:
        ValueError: stages that cannot run, or too few images to hold any out.
    """
    pretrain, finetune = find_stages(variant)
    run(variant.model_copy(update={"name": folder.name, "seed": seed}), folder.parent, precision=precision)
    first, second = (folder / name / "summary.json" for name in (pretrain, finetune))
    if not first.exists():
        raise ValueError("no image was held out of pretraining: raise data.validation_images, or give more images")
    masked_l1 = json.loads(first.read_text(encoding="utf-8"))["validation_masked_l1"]["model"]
    top1 = json.loads(second.read_text(encoding="utf-8"))["validation_top1"]
    rates = [
        line["images_per_s"] for line in read_json_lines(folder / pretrain / "metrics.jsonl") if "images_per_s" in line
    ]
    return Outcome(top1, masked_l1, median(rates))


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Where the mean lies with 95 % confidence, if the values are normal; None for less than three, or equal ones: so
    few agree by chance, where accuracy is counted in images."""
    if len(values) < 3 or stdev(values) == 0:
        return None
    half = STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * stdev(values) / sqrt(len(values))
    return mean(values) - half, mean(values) + half


def pearson(first: Sequence[float], second: Sequence[float]) -> tuple[float, Interval | None] | None:
    """The correlation of pairs, and where it lies with 95 % confidence (Fisher's z; None for less than four).

    None where there are less than three pairs, or one side is constant.
    """
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    r = correlation(first, second)
    if len(first) < 4 or abs(r) >= 1:
        return r, None
    half = 1.96 / sqrt(len(first) - 3)
    return r, (tanh(atanh(r) - half), tanh(atanh(r) + half))


def verdict(interval: Interval | None) -> str:
    """``higher``, ``lower``, or that it cannot be told, for an interval of differences."""
    if interval is None:
        return "needs more seeds"
    if interval[0] > 0:
        return "higher"
    return "lower" if interval[1] < 0 else "not told apart"


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises ValueError: a seed given twice, or a negative one."""
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be different and not negative, got {', '.join(map(str, seeds))}")
