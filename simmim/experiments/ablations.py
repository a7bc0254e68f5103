"""Ablations of SimMIM: losses, predicted pixels, heads and target resolutions (arXiv 2111.09886, section 4).

Every variant is the recipe with one setting of ``target`` replaced. It is pretrained and fine-tuned with several seeds
and compared with the unchanged recipe. A difference is reported only if its confidence interval excludes zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import gcd
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from simmim.config import Recipe, encoder_config
from simmim.experiments.results import percent, write_results
from simmim.experiments.trials import (
    Outcome,
    check_seeds,
    make_variant,
    mean_interval,
    pretraining_of,
    run_variant,
    verdict,
)
from simmim.training.distributed import make_accelerator

BASELINE = "recipe"
COLORS = {"higher": "tab:green", "lower": "tab:red"}


def default_variants(recipe: Recipe) -> list[str]:
    """Return the settings that the paper compares and the recipe does not use; target resolutions in powers of 2."""
    _, stage = pretraining_of(recipe)
    variants = {
        "loss": ["l1", "l2", "smooth_l1"],
        "pixels": ["masked", "all"],
        "head": ["linear", "mlp", "inverse_swin"],
    }
    chosen = [
        f"{key}={value}" for key, values in variants.items() for value in values if value != getattr(stage.target, key)
    ]
    largest, side = gcd(encoder_config(recipe.encoder, stage).stride, stage.mask.patch_size), 1
    while largest % side == 0:
        if side != stage.target.downsample:
            chosen.append(f"downsample={side}")
        side *= 2
    return chosen


def ablations(
    recipe: Recipe,
    out: Path,
    variants: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    precision: str | None = None,
    echo: Callable[[str], None] = print,
) -> dict[str, list[Outcome]]:
    """Pretrain and fine-tune every variant; write ``ablations.txt``, ``ablations.json`` and ``ablations.png``.

    Finished runs are skipped, so the same call resumes an interrupted one.

    Args:
        recipe: a recipe with a pretraining stage and a classifier stage that starts from it.
        out: everything is written to ``out / recipe.name / ablations``.
        variants: each a ``key=value`` of ``target``; None for those of the paper.
        seeds: every variant is trained once per seed.
        precision: ``fp32``, ``bf16`` or None for the default.
        echo: called with every line of output.

    Returns:
        The outcomes of all seeds by variant; the unchanged recipe comes first.

    Raises:
        ValueError: the recipe lacks these stages, or a setting or a seed is invalid.
    """
    check_seeds(seeds)
    name, _ = pretraining_of(recipe)
    folder = out / recipe.name / "ablations"
    recipes = {BASELINE: make_variant(recipe, [])}
    for variant in default_variants(recipe) if variants is None else variants:
        recipes[variant] = make_variant(recipe, [f"stages.{name}.target.{variant}"])
    outcomes: dict[str, list[Outcome]] = {variant: [] for variant in recipes}
    for run, (seed, variant) in enumerate(product(seeds, recipes), start=1):
        echo(f"{variant}, seed {seed} ({run} of {len(seeds) * len(recipes)})")
        run_folder = folder / f"{variant.replace('=', '_')}_seed_{seed}"
        outcomes[variant].append(run_variant(recipes[variant], seed, run_folder, precision))
    if make_accelerator(precision).is_main_process:
        content = {
            "seeds": list(seeds),
            "variants": {variant: [o._asdict() for o in each] for variant, each in outcomes.items()},
        }
        write_results(folder, "ablations", format_table(outcomes, seeds), content, draw(outcomes), echo)
    return outcomes


def differences(outcomes: dict[str, list[Outcome]], variant: str) -> list[float]:
    """Return the top-1 of a variant minus that of the recipe, per seed."""
    return [own.top1 - base.top1 for own, base in zip(outcomes[variant], outcomes[BASELINE], strict=True)]


def format_table(outcomes: dict[str, list[Outcome]], seeds: Sequence[int]) -> str:
    """Format one line per variant: accuracy, difference to the recipe with its interval, pretraining loss and speed."""
    width = max(map(len, outcomes)) + 2
    lines = [
        f"validation top-1 after fine-tuning, %, mean ± s.d. of seeds {', '.join(map(str, seeds))}; difference to the "
        "recipe, paired by seed",
        f"{'':<{width}}{'top-1':>14}{'difference':>12}{'95 % interval':>18}  {'verdict':<18}"
        f"{'masked L1':>10}{'images/s':>10}",
    ]
    for variant, each in outcomes.items():
        line = f"{variant:<{width}}{percent([o.top1 for o in each]):>14}"
        gains = differences(outcomes, variant)
        interval = mean_interval(gains)
        if variant == BASELINE:
            line += f"{'':>12}{'':>18}  {'':<18}"
        else:
            span = f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}" if interval else "-"
            line += f"{100 * mean(gains):>+12.1f}{span:>18}  {verdict(interval):<18}"
        rate = mean(o.images_per_s for o in each)
        lines.append(f"{line}{mean(o.masked_l1 for o in each):>10.4f}{rate:>10.0f}")
    lines.append(
        "masked L1 is measured on each variant's own target: compare it only for equal downsample and norm_window"
    )
    return "\n".join(lines)


def draw(outcomes: dict[str, list[Outcome]]) -> Figure:
    """Plot the differences to the recipe: a dot per seed, a bar for the interval, gray if it contains zero."""
    variants = [variant for variant in outcomes if variant != BASELINE]
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(variants)), layout="constrained")
    axis = figure.subplots()
    for row, variant in enumerate(variants):
        gains = [100 * gain for gain in differences(outcomes, variant)]
        interval = mean_interval(gains)
        color = COLORS.get(verdict(interval), "gray")
        if interval:
            axis.plot(interval, [row, row], color=color, linewidth=3, alpha=0.5, solid_capstyle="butt")
        axis.plot(gains, [row] * len(gains), ".", color=color)
        axis.plot(mean(gains), row, "|", color=color, markersize=16)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(variants)), variants)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    base = mean(o.top1 for o in outcomes[BASELINE])
    axis.set_xlabel(f"validation top-1 after fine-tuning, points above the recipe ({100 * base:.1f} %)")
    axis.set_title("dots: seeds; bars: 95 % interval of the mean, gray if it contains zero")
    return figure
