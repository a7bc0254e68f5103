"""Training-health warnings: spikes of the loss, collapsed gradients, overfitting."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import mean, median
from typing import Any, NamedTuple

RISE = 0.01
"""Relative rise of the validation loss that counts as overfitting."""
EVALUATIONS = 3
"""Evaluations in a moving average."""

STEPS, FEWEST_STEPS = 64, 16
"""Steps that are remembered, and steps needed before the first warning."""
COLLAPSED_NORM = 0.01
DEVIATIONS = 8
"""Median deviations above the median that count as a spike."""


class Stability:
    """Compares loss and gradient norm of every step with the medians of the steps before.

    Args:
        rows: lines of ``metrics.jsonl``, oldest first: the steps before a resumed run.
    """

    def __init__(self, rows: Sequence[dict[str, Any]] = ()) -> None:
        before = [row for row in rows if "loss" in row and "grad_norm" in row]
        self._losses = deque((row["loss"] for row in before), maxlen=STEPS)
        self._norms = deque((row["grad_norm"] for row in before), maxlen=STEPS)
        self._kind: str | None = None
        self._odd_steps = 0

    def warning(self, loss: float, grad_norm: float) -> str | None:
        """Return a warning if a step is abnormal; each kind once, until a step is normal again.

        The gradient has collapsed when its norm falls below 0.01 and below a tenth of the median while the
        loss is above its median; this ended training with the official code in fp16. The loss has
        spiked when it exceeds the median by eight median deviations and by a tenth. An abnormal state
        that lasts longer than 64 steps becomes the new normal.
        """
        found = self._compare(loss, grad_norm) if len(self._losses) >= FEWEST_STEPS else None
        self._odd_steps = self._odd_steps + 1 if found else 0
        if found is None or self._odd_steps > STEPS:
            self._losses.append(loss)
            self._norms.append(grad_norm)
        kind, text = found or (None, None)
        is_new = kind != self._kind
        self._kind = kind
        return text if is_new else None

    def _compare(self, loss: float, grad_norm: float) -> tuple[str, str] | None:
        usual_loss, usual_norm = median(self._losses), median(self._norms)
        if grad_norm < min(COLLAPSED_NORM, usual_norm / 10) and loss > usual_loss:
            return "collapse", (
                f"the gradient norm collapsed from {usual_norm:.3g} to {grad_norm:.3g}, the loss is {loss:.4f} "
                f"after {usual_loss:.4f}: the model has stopped learning; restart with a lower base_lr"
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
    """Return a warning when the validation loss starts to rise while the training loss falls; once per turning point.

    Validation images and masks never change, so their loss changes with the weights alone. It rises when its
    mean over the last three evaluations is more than 1 % above its lowest such mean; the training loss
    falls when its mean since the previous evaluation is lower than at the turning point.

    Args:
        rows: lines of ``metrics.jsonl``, oldest first, with ``step`` and ``loss`` or ``validation_loss``,
            up to an evaluation.
    """
    training: list[float] = []
    last = math.nan
    points: list[tuple[int, float, float]] = []  # step, validation loss, training loss since the previous point
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
        f"overfitting: since step {turn.step} the validation loss rose from {turn.validation:.4f} to "
        f"{smooth[-1].validation:.4f}, while the training loss fell from {turn.training:.4f} to "
        f"{smooth[-1].training:.4f}: more images, a shorter schedule or a smaller encoder would help"
    )


def _turning_point(smooth: Sequence[Smooth]) -> Smooth | None:
    """Return the point of the lowest validation loss if it has risen since while the training loss fell."""
    if not smooth:
        return None
    best, last = min(smooth, key=lambda point: point.validation), smooth[-1]
    return best if last.validation > best.validation * (1 + RISE) and last.training < best.training else None
