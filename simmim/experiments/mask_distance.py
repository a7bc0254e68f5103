"""How far must a hidden pixel look? AvgDist of masks by strategy, cell and ratio (SimMIM, section 4.1.2, figure 3)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from simmim.masking import MaskGenerator, Strategy, expand_mask
from simmim.metrics.baselines import average_distance
from swin.config import Pair

SWEET_SPOT, AT_PX = (10.0, 20.0), 192
CELLS, RATIOS = (4, 8, 16, 32, 64), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Row(NamedTuple):
    """AvgDist of one kind of mask, px; with its standard error over masks."""

    strategy: Strategy
    cell: int
    ratio: float
    average_distance: float
    standard_error: float


def masking(
    out: Path,
    *,
    image_size: Pair = (192, 192),
    cells: Sequence[int] = CELLS,
    ratios: Sequence[float] = RATIOS,
    strategies: Sequence[Strategy] = ("random",),
    masks: int = 100,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Measure, and write ``masking.txt``, ``.json`` and ``.png`` into ``out``.

    The paper's best masks had an AvgDist of 10 to 20 px at 192 px; for other sizes the band is scaled with the side.
    Masks that would hide everything are left out.

    Raises:
        ValueError: cells that do not divide the image, or fewer than two masks.
    """
    if masks < 2:
        raise ValueError(f"--masks must be at least 2, for a standard error, got {masks}")
    if min(cells) < 1 or not all(0 < ratio < 1 for ratio in ratios):
        raise ValueError(
            f"--mask-patch-sizes are at least 1 px and --ratios between 0 and 1, got {list(cells)} and {list(ratios)}"
        )
    rows = []
    kinds = [(strategy, cell, ratio) for strategy in strategies for cell in cells for ratio in ratios]
    for strategy, cell, ratio in tqdm(kinds, unit="mask", disable=None):
        generator = make_masks(image_size, cell, ratio, strategy, seed)
        if generator is None:
            continue
        distances = distances_of(generator, masks)
        rows.append(Row(strategy, cell, ratio, mean(distances), stdev(distances) / masks**0.5))
    if not rows:
        raise ValueError(
            f"no mask of {list(ratios)} of cells of {list(cells)} px hides a part: give other ratios or cells"
        )
    table = format_table(rows, image_size, masks)
    say(table)
    out.mkdir(parents=True, exist_ok=True)
    (out / "masking.txt").write_text(table + "\n", encoding="utf-8")
    (out / "masking.json").write_text(json.dumps([row._asdict() for row in rows], indent=2) + "\n", encoding="utf-8")
    draw(rows, image_size, seed).savefig(out / "masking.png", dpi=100)
    say(f"table  {out / 'masking.txt'}\nfigure  {out / 'masking.png'}")
    return rows


def make_masks(image_size: Pair, cell: int, ratio: float, strategy: Strategy, seed: int) -> MaskGenerator | None:
    """None where so large a share of so few cells is all of them, or none.

    Raises:
        ValueError: cells that do not divide the image.
    """
    try:
        return MaskGenerator(image_size, cell, ratio, seed=seed, strategy=strategy)
    except ValueError:
        if image_size[0] % cell or image_size[1] % cell:
            raise
        return None


def distances_of(generator: MaskGenerator, masks: int) -> list[float]:
    """AvgDist of the first masks, px."""
    index = torch.arange(masks)
    drawn = expand_mask(generator(torch.zeros_like(index), index), generator.mask_patch_size)
    return [average_distance(mask) for mask in drawn]


def band(image_size: Pair) -> tuple[float, float]:
    """Where the paper found the best masks, px."""
    scale = (image_size[0] * image_size[1]) ** 0.5 / AT_PX
    return SWEET_SPOT[0] * scale, SWEET_SPOT[1] * scale


def format_table(rows: Sequence[Row], image_size: Pair, masks: int) -> str:
    """One line for each strategy and cell, one column for each ratio; those in the band are marked."""
    low, high = band(image_size)
    ratios = sorted({row.ratio for row in rows})
    lines = [
        f"AvgDist, px, of {masks} masks at {image_size[0]} x {image_size[1]} px; * between {low:.3g} and {high:.3g}",
        f"{'':16}" + "".join(f"{ratio:>10g}" for ratio in ratios),
    ]
    for strategy, cell in dict.fromkeys((row.strategy, row.cell) for row in rows):
        found = {row.ratio: row for row in rows if (row.strategy, row.cell) == (strategy, cell)}
        line = f"{f'{strategy} {cell} px':16}"
        for ratio in ratios:
            row = found.get(ratio)
            mark = "*" if row and low <= row.average_distance <= high else " "
            line += f"{f'{row.average_distance:.2f}{mark}' if row else '-':>10}"
        lines.append(line)
    return "\n".join(lines)


def draw(rows: Sequence[Row], image_size: Pair, seed: int) -> Figure:
    """The curves with the band, and one mask of each strategy and cell, as near to 60 % as there is."""
    kinds = list(dict.fromkeys((row.strategy, row.cell) for row in rows))
    figure = Figure(figsize=(13, 5), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.2, 1))
    left, right = halves
    axis = left.subplots()
    colours = {cell: f"C{number % 10}" for number, cell in enumerate(dict.fromkeys(cell for _, cell in kinds))}
    styles = dict(zip(dict.fromkeys(strategy for strategy, _ in kinds), ("o-", "s--", "^:"), strict=False))
    for strategy, cell in kinds:
        some = [row for row in rows if (row.strategy, row.cell) == (strategy, cell)]
        x, y, error = zip(*((row.ratio, row.average_distance, 2 * row.standard_error) for row in some), strict=True)
        label = f"{strategy}, {cell} px"
        axis.errorbar(x, y, error, fmt=styles[strategy], color=colours[cell], markersize=3, label=label)
    low, high = band(image_size)
    axis.axhspan(low, high, color="C2", alpha=0.15, label="best in the paper")
    axis.set(title="AvgDist of masks, two standard errors", xlabel="masked", ylabel="px", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)
    across = min(4, len(kinds))
    axes = right.subplots(-(-len(kinds) // across), across, squeeze=False)
    for place in axes.flat:
        place.axis("off")
    for place, (strategy, cell) in zip(axes.flat, kinds, strict=False):
        ratios = [row.ratio for row in rows if (row.strategy, row.cell) == (strategy, cell)]
        ratio = min(ratios, key=lambda ratio: abs(ratio - 0.6))
        generator = MaskGenerator(image_size, cell, ratio, seed=seed, strategy=strategy)
        mask = expand_mask(generator(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)), cell)[0]
        place.imshow(mask, cmap="Greys", vmin=-0.2, vmax=1.4)
        place.set_title(f"{strategy} {cell} px, {ratio:.0%}", fontsize=8)
    return figure
