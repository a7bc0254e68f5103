"""Non-maximum suppression of overlapping detections, hard and soft."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

SoftNMS = Literal["linear", "gaussian"]


def suppress(
    boxes: Tensor, scores: Tensor, labels: Tensor, *, iou: float, limit: int, soft: SoftNMS | None = None
) -> tuple[Tensor, Tensor]:
    """Suppress overlapping boxes, separately for each class.

    Args:
        boxes, scores, labels: ``(n, 4)``, ``(n,)``, ``(n,)``.
        iou: overlap (intersection over union) above which a box is dropped, or loses score in linear :func:`soft_nms`.
        limit: largest number of detections to keep.
        soft: method of :func:`soft_nms`; None: drop overlapping boxes.

    Returns:
        Indices int64 ``(k,)`` and scores float ``(k,)`` of the kept detections, best first.
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
    """Lower the score of detections for each better one that they overlap (Soft-NMS, arXiv 1704.04503, figure 2).

    Scores never rise, so the first ``limit`` selected detections are the best ``limit`` of all.

    Args:
        boxes, scores, labels, iou, limit: see :func:`suppress`.
        method: ``gaussian`` multiplies scores by ``exp(-overlap^2 / sigma)`` (equation 4); ``linear`` multiplies
            them by ``1 - overlap`` if the overlap is above ``iou`` (equation 3).
        least_score: lowest score of detections to keep.

    Returns:
        See :func:`suppress`.
    """
    device = boxes.device
    # On the CPU, because detections are selected one at a time.
    boxes, remaining, labels = boxes.float().cpu(), scores.float().cpu().clone(), labels.cpu()
    kept, final = [], []
    for _ in range(min(limit, len(boxes))):
        best = int(remaining.argmax())
        if remaining[best] < least_score:
            break
        kept.append(best)
        final.append(float(remaining[best]))
        overlap = box_iou(boxes[best : best + 1], boxes)[0] * (labels == labels[best])
        remaining *= torch.exp(-overlap.square() / sigma) if method == "gaussian" else 1 - overlap * (overlap > iou)
        remaining[best] = -1.0
    return torch.tensor(kept, dtype=torch.int64, device=device), torch.tensor(final, device=device)
