"""What a run should tell its owner before it is too late. Pure functions of ``metrics.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean
from typing import Any, NamedTuple

RISE = 0.01
EVALUATIONS = 3


class Smooth(NamedTuple):
    """Means over ``EVALUATIONS`` evaluations, up to one step."""

    step: int
    held_out: float
    training: float


def overfitting(rows: Sequence[dict[str, Any]]) -> str | None:
    """Say so when the held-out loss begins to rise while the training loss falls; once at each turn.

    Held-out images and masks never change, so their loss moves with the weights alone. It rises when its
    mean over the last three evaluations is more than 1 % above its lowest such mean; the training loss
    falls when its mean since the evaluation before is lower than at the turning point.

    Args:
        rows: lines of ``metrics.jsonl``, oldest first, with ``step`` and ``loss`` or ``holdout_loss``,
            up to an evaluation.
    """
    training: list[float] = []
    last = math.nan
    points: list[tuple[int, float, float]] = []  # step, held-out loss, training loss since the point before
    for row in rows:
        if "loss" in row:
            training.append(row["loss"])
        if "holdout_loss" in row:
            last = mean(training) if training else last
            points.append((row["step"], row["holdout_loss"], last))
            training = []
    windows = [points[end - EVALUATIONS : end] for end in range(EVALUATIONS, len(points) + 1)]
    smooth = [Smooth(w[-1][0], mean(p[1] for p in w), mean(p[2] for p in w)) for w in windows]
    turn = _turning_point(smooth)
    if turn is None or _turning_point(smooth[:-1]) is not None:
        return None
    return (
        f"overfitting: since step {turn.step} the held-out loss rose from {turn.held_out:.4f} to "
        f"{smooth[-1].held_out:.4f}, while the training loss fell from {turn.training:.4f} to "
        f"{smooth[-1].training:.4f}: more images, a shorter schedule or a smaller encoder would help"
    )


def _turning_point(smooth: Sequence[Smooth]) -> Smooth | None:
    """Where the held-out loss was lowest, if it has risen since while the training loss fell."""
    if not smooth:
        return None
    best, last = min(smooth, key=lambda point: point.held_out), smooth[-1]
    return best if last.held_out > best.held_out * (1 + RISE) and last.training < best.training else None
