"""What a run should tell its owner before it is too late."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import mean, median
from typing import Any, NamedTuple

RISE = 0.01
EVALUATIONS = 3

STEPS, FEWEST_STEPS = 64, 16
COLLAPSED_NORM = 0.01
DEVIATIONS = 8


class Stability:
    """Watches loss and gradient norm of every step against those of the steps before.

    Args:
        rows: lines of ``metrics.jsonl``, oldest first: what was usual before a run was interrupted.
    """

    def __init__(self, rows: Sequence[dict[str, Any]] = ()) -> None:
        before = [row for row in rows if "loss" in row and "grad_norm" in row]
        self._losses = deque((row["loss"] for row in before), maxlen=STEPS)
        self._norms = deque((row["grad_norm"] for row in before), maxlen=STEPS)
        self._kind: str | None = None
        self._odd_steps = 0

    def warning(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step; each kind once, until a step is right again.

        The gradient has collapsed when its norm falls below 0.01 and a tenth of the median while the
        loss is above its median: with fp16, the end of the official code's training. The loss has
        spiked when it is above the median by eight median deviations and a tenth. What lasts for
        longer than is remembered becomes usual.
        """
        found = self._compare(loss, grad_norm) if len(self._losses) >= FEWEST_STEPS else None
        self._odd_steps = self._odd_steps + 1 if found else 0
        if found is None or self._odd_steps > STEPS:
            self._losses.append(loss)
            self._norms.append(grad_norm)
        kind, text = found or (None, None)
        is_news = kind != self._kind
        self._kind = kind
        return text if is_news else None

    def _compare(self, loss: float, grad_norm: float) -> tuple[str, str] | None:
        usual_loss, usual_norm = median(self._losses), median(self._norms)
        if grad_norm < min(COLLAPSED_NORM, usual_norm / 10) and loss > usual_loss:
            return "collapse", (
                f"the gradient norm collapsed from {usual_norm:.3g} to {grad_norm:.3g}, the loss is {loss:.4f} "
                f"after {usual_loss:.4f}: nothing is learned any more; a lower base_lr helps"
            )
        deviation = median(abs(value - usual_loss) for value in self._losses)
        if loss > usual_loss + max(DEVIATIONS * deviation, abs(usual_loss) / 10):
            return "spike", f"the loss spiked to {loss:.4f} from {usual_loss:.4f}, gradient norm {grad_norm:.3g}"
        return None


class Smooth(NamedTuple):
    """Means over ``EVALUATIONS`` evaluations, up to one step."""

    step: int
    validation: float
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
        if "validation_loss" in row:
            last = mean(training) if training else last
            points.append((row["step"], row["validation_loss"], last))
            training = []
    windows = [points[end - EVALUATIONS : end] for end in range(EVALUATIONS, len(points) + 1)]
    smooth = [Smooth(w[-1][0], mean(p[1] for p in w), mean(p[2] for p in w)) for w in windows]
    turn = _turning_point(smooth)
    if turn is None or _turning_point(smooth[:-1]) is not None:
        return None
    return (
        f"overfitting: since step {turn.step} the held-out loss rose from {turn.validation:.4f} to "
        f"{smooth[-1].validation:.4f}, while the training loss fell from {turn.training:.4f} to "
        f"{smooth[-1].training:.4f}: more images, a shorter schedule or a smaller encoder would help"
    )


def _turning_point(smooth: Sequence[Smooth]) -> Smooth | None:
    """Where the held-out loss was lowest, if it has risen since while the training loss fell."""
    if not smooth:
        return None
    best, last = min(smooth, key=lambda point: point.validation), smooth[-1]
    return best if last.validation > best.validation * (1 + RISE) and last.training < best.training else None
