"""Which of many overlapping detections are kept."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

SoftNMS = Literal["linear", "gaussian"]


def suppress(
    boxes: Tensor, scores: Tensor, labels: Tensor, *, iou: float, limit: int, soft: SoftNMS | None = None
) -> tuple[Tensor, Tensor]:
    """The best detections, best first, and their scores; boxes of other classes do not matter to each other.

    Args:
        boxes, scores, labels: ``(n, 4)``, ``(n,)``, ``(n,)``.
        iou: overlap from which on a box is dropped, or with linear :func:`soft_nms` loses.
        limit: how many are kept at most.

    Returns:
        int64 and float ``(k,)``.
    """
    if soft is not None:
        return soft_nms(boxes, scores, labels, method=soft, iou=iou, limit=limit)
    kept = batched_nms(boxes, scores, labels, iou)[:limit]
    return kept, scores[kept]


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    method: SoftNMS,
    iou: float = 0.3,
    sigma: float = 0.5,
    least_score: float = 1e-3,
    limit: int = 100,
) -> tuple[Tensor, Tensor]:
    """Detections lose score for each better one that they overlap, instead of being dropped (arXiv 1704.04503, fig. 2).

    Scores only fall, so the first ``limit`` that are chosen are the best ``limit`` of all.

    Args:
        method: ``gaussian``: times ``exp(-overlap^2 / sigma)``, eq. 4; ``linear``: times ``1 - overlap`` where the
            overlap is above ``iou``, eq. 3.
        least_score: of which detections are left out.

    Returns:
        As :func:`suppress`.
    """
    device = boxes.device
    boxes, left, labels = (
        boxes.float().cpu(),
        scores.float().cpu().clone(),
        labels.cpu(),
    )  # one at a time: no work for a GPU
    kept, final = [], []
    for _ in range(min(limit, len(boxes))):
        best = int(left.argmax())
        if left[best] < least_score:
            break
        kept.append(best)
        final.append(float(left[best]))
        overlap = box_iou(boxes[best : best + 1], boxes)[0] * (labels == labels[best])
        left *= torch.exp(-overlap.square() / sigma) if method == "gaussian" else 1 - overlap * (overlap > iou)
        left[best] = -1.0
    return torch.tensor(kept, dtype=torch.int64, device=device), torch.tensor(final, device=device)
