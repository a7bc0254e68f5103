"""Which parts of SimMIM matter? Losses, pixels, heads and target resolutions, end to end (arXiv 2111.09886, section 4).

Every arm is the recipe with one value of ``target`` replaced: pretrained and fine-tuned under several seeds, and
compared with the recipe as it is. A difference is claimed only where its interval leaves zero out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
COLOURS = {"higher": "tab:green", "lower": "tab:red"}


def default_variants(recipe: Recipe) -> list[str]:
    """The values that the paper compares and the recipe does not have; resolutions of the target by halves."""
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


def tasks(
    recipe: Recipe,
    out: Path,
    variants: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    precision: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, list[Outcome]]:
    """Pretrain and fine-tune every arm; write ``objectives.txt``, ``.json`` and ``.png``.

    What is finished is not done again: the same call continues an interrupted one.

    Args:
        out: everything goes into ``out / recipe.name / objectives``.
        arms: each a ``key=value`` of ``target``; None for those of the paper.

    Returns:
        The outcome of every seed, by arm; the recipe as it is comes first.

    Raises:
        ValueError: a recipe without the stages, values that are refused, or seeds that are.
    """
    check_seeds(seeds)
    name, _ = pretraining_of(recipe)
    folder = out / recipe.name / "objectives"
    recipes = {BASELINE: make_variant(recipe, [])}
    for variant in default_variants(recipe) if variants is None else variants:
        recipes[variant] = make_variant(recipe, [f"stages.{name}.target.{variant}"])
    outcomes: dict[str, list[Outcome]] = {variant: [] for variant in recipes}
    for number, seed in enumerate(seeds):
        for place, variant in enumerate(outcomes, start=number * len(outcomes) + 1):
            say(f"{variant}, seed {seed} ({place} of {len(seeds) * len(outcomes)})")
            index_of_variant = folder / f"{variant.replace('=', '_')}_seed_{seed}"
            outcomes[variant].append(run_variant(recipes[variant], seed, index_of_variant, precision))
    if make_accelerator(precision).is_main_process:
        content = {
            "seeds": list(seeds),
            "arms": {variant: [o._asdict() for o in each] for variant, each in outcomes.items()},
        }
        write_results(folder, "objectives", format_table(outcomes, seeds), content, draw(outcomes), say)
    return outcomes


def differences(outcomes: dict[str, list[Outcome]], variant: str) -> list[float]:
    """Top-1 of an arm less that of the recipe, seed by seed."""
    return [ours.top1 - base.top1 for ours, base in zip(outcomes[variant], outcomes[BASELINE], strict=True)]


def format_table(outcomes: dict[str, list[Outcome]], seeds: Sequence[int]) -> str:
    """One line an arm: accuracy, its difference to the recipe with an interval, loss and speed of pretraining."""
    width = max(map(len, outcomes)) + 2
    lines = [
        f"held-out top-1 after fine-tuning, %, mean ± s.d. of seeds {', '.join(map(str, seeds))}; difference to the "
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
    lines.append("masked L1 is of each arm's own target: compare it only where downsample and norm_window are equal")
    return "\n".join(lines)


def draw(outcomes: dict[str, list[Outcome]]) -> Figure:
    """Differences to the recipe: a dot each seed, a bar for the interval; grey where it holds zero."""
    variants = [variant for variant in outcomes if variant != BASELINE]
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(variants)), layout="constrained")
    axis = figure.subplots()
    for row, variant in enumerate(variants):
        gains = [100 * gain for gain in differences(outcomes, variant)]
        interval = mean_interval(gains)
        colour = COLOURS.get(verdict(interval), "grey")
        if interval:
            axis.plot(interval, [row, row], color=colour, linewidth=3, alpha=0.5, solid_capstyle="butt")
        axis.plot(gains, [row] * len(gains), ".", color=colour)
        axis.plot(mean(gains), row, "|", color=colour, markersize=16)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(variants)), variants)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    base = mean(o.top1 for o in outcomes[BASELINE])
    axis.set_xlabel(f"held-out top-1 after fine-tuning, points above the recipe ({100 * base:.1f} %)")
    axis.set_title("dots: seeds; bars: 95 % interval of the mean, grey where it holds zero")
    return figure
