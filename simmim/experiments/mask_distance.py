"""AvgDist, the mean distance from masked to visible pixels, of masks (SimMIM, section 4.1.2, figure 3)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from simmim.masking import MaskGenerator, Strategy, expand_mask
from simmim.metrics.baselines import average_distance
from swin.config import Pair

BEST_RANGE, AT_PX = (10.0, 20.0), 192
MASK_PATCH_SIZES, RATIOS = (4, 8, 16, 32, 64), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Row(NamedTuple):
    """AvgDist of one kind of mask and its standard error over masks, px."""

    strategy: Strategy
    mask_patch_size: int
    ratio: float
    average_distance: float
    standard_error: float


def mask_distance(
    out: Path,
    *,
    image_size: Pair = (192, 192),
    mask_patch_sizes: Sequence[int] = MASK_PATCH_SIZES,
    ratios: Sequence[float] = RATIOS,
    strategies: Sequence[Strategy] = ("random",),
    masks: int = 100,
    seed: int = 0,
    echo: Callable[[str], None] = print,
) -> list[Row]:
    """Measure AvgDist for every combination; write ``mask_distance.txt``, ``.json`` and ``.png`` to ``out``.

    The paper's best masks had an AvgDist of 10 to 20 px at 192 px; for other sizes this range is scaled with the side.
    Combinations that would mask all patches or none are skipped.

    Args:
        out: output folder.
        image_size: height and width, px.
        mask_patch_sizes: sides of a mask patch, px.
        ratios: fractions of masked patches, between 0 and 1.
        strategies: how masked patches are chosen.
        masks: masks per combination.
        seed: seed of the masks.
        echo: called with every line of output.

    Raises:
        ValueError: a mask patch size does not divide the image, or there are fewer than two masks.
    """
    if masks < 2:
        raise ValueError(f"--masks must be at least 2 to compute a standard error, got {masks}")
    if min(mask_patch_sizes) < 1 or not all(0 < ratio < 1 for ratio in ratios):
        raise ValueError(
            f"--mask-patch-sizes must be at least 1 px and --ratios between 0 and 1, got {list(mask_patch_sizes)} and "
            f"{list(ratios)}"
        )
    rows = []
    kinds = list(product(strategies, mask_patch_sizes, ratios))
    for strategy, size, ratio in tqdm(kinds, unit="mask", disable=None):
        generator = make_masks(image_size, size, ratio, strategy, seed)
        if generator is None:
            continue
        distances = distances_of(generator, masks)
        rows.append(Row(strategy, size, ratio, mean(distances), stdev(distances) / masks**0.5))
    if not rows:
        raise ValueError(
            f"ratios {list(ratios)} of mask patches of {list(mask_patch_sizes)} px mask all patches or none: "
            "give other ratios or smaller mask patches"
        )
    table = format_table(rows, image_size, masks)
    echo(table)
    out.mkdir(parents=True, exist_ok=True)
    (out / "mask_distance.txt").write_text(table + "\n", encoding="utf-8")
    (out / "mask_distance.json").write_text(
        json.dumps([row._asdict() for row in rows], indent=2) + "\n", encoding="utf-8"
    )
    draw(rows, image_size, seed).savefig(out / "mask_distance.png", dpi=100)
    echo(f"table  {out / 'mask_distance.txt'}\nfigure  {out / 'mask_distance.png'}")
    return rows


def make_masks(
    image_size: Pair, mask_patch_size: int, ratio: float, strategy: Strategy, seed: int
) -> MaskGenerator | None:
    """Build a mask generator; None if the ratio would mask all patches or none.

    Raises:
        ValueError: the mask patch size does not divide the image.
    """
    try:
        return MaskGenerator(image_size, mask_patch_size, ratio, seed=seed, strategy=strategy)
    except ValueError:
        if image_size[0] % mask_patch_size or image_size[1] % mask_patch_size:
            raise
        return None


def distances_of(generator: MaskGenerator, masks: int) -> list[float]:
    """Return AvgDist of the first ``masks`` masks, px."""
    index = torch.arange(masks)
    drawn = expand_mask(generator(torch.zeros_like(index), index), generator.mask_patch_size)
    return [average_distance(mask) for mask in drawn]


def band(image_size: Pair) -> tuple[float, float]:
    """Return the range of AvgDist in which the paper found the best masks, px."""
    scale = (image_size[0] * image_size[1]) ** 0.5 / AT_PX
    return BEST_RANGE[0] * scale, BEST_RANGE[1] * scale


def format_table(rows: Sequence[Row], image_size: Pair, masks: int) -> str:
    """Format one line per strategy and mask patch size, one column per ratio; values in the best range are marked."""
    low, high = band(image_size)
    ratios = sorted({row.ratio for row in rows})
    lines = [
        f"AvgDist, px, of {masks} masks at {image_size[0]} x {image_size[1]} px; * between {low:.3g} and {high:.3g}",
        f"{'':16}" + "".join(f"{ratio:>10g}" for ratio in ratios),
    ]
    for strategy, size in dict.fromkeys((row.strategy, row.mask_patch_size) for row in rows):
        found = {row.ratio: row for row in rows if (row.strategy, row.mask_patch_size) == (strategy, size)}
        line = f"{f'{strategy} {size} px':16}"
        for ratio in ratios:
            row = found.get(ratio)
            mark = "*" if row and low <= row.average_distance <= high else " "
            line += f"{f'{row.average_distance:.2f}{mark}' if row else '-':>10}"
        lines.append(line)
    return "\n".join(lines)


def draw(rows: Sequence[Row], image_size: Pair, seed: int) -> Figure:
    """Plot the curves with the best range, and one mask per strategy and size with a ratio closest to 60 %."""
    kinds = list(dict.fromkeys((row.strategy, row.mask_patch_size) for row in rows))
    figure = Figure(figsize=(13, 5), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.2, 1))
    left, right = halves
    axis = left.subplots()
    colors = {size: f"C{color % 10}" for color, size in enumerate(dict.fromkeys(size for _, size in kinds))}
    styles = dict(zip(dict.fromkeys(strategy for strategy, _ in kinds), ("o-", "s--", "^:"), strict=False))
    for strategy, size in kinds:
        curve = [row for row in rows if (row.strategy, row.mask_patch_size) == (strategy, size)]
        x, y, error = zip(*((row.ratio, row.average_distance, 2 * row.standard_error) for row in curve), strict=True)
        label = f"{strategy}, {size} px"
        axis.errorbar(x, y, error, fmt=styles[strategy], color=colors[size], markersize=3, label=label)
    low, high = band(image_size)
    axis.axhspan(low, high, color="C2", alpha=0.15, label="best in the paper")
    axis.set(title="AvgDist of masks, two standard errors", xlabel="mask ratio", ylabel="px", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)
    across = min(4, len(kinds))
    axes = right.subplots(-(-len(kinds) // across), across, squeeze=False)
    for example in axes.flat:
        example.axis("off")
    for example, (strategy, size) in zip(axes.flat, kinds, strict=False):
        ratios = [row.ratio for row in rows if (row.strategy, row.mask_patch_size) == (strategy, size)]
        ratio = min(ratios, key=lambda ratio: abs(ratio - 0.6))
        generator = MaskGenerator(image_size, size, ratio, seed=seed, strategy=strategy)
        mask = expand_mask(generator(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)), size)[0]
        example.imshow(mask, cmap="Greys", vmin=-0.2, vmax=1.4)
        example.set_title(f"{strategy} {size} px, {ratio:.0%}", fontsize=8)
    return figure
