"""Mean intersection over union of a data set, computed by torchmetrics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simmim.data.segments import IGNORED


class MeanIoU:
    """Segmentation scores over the pixels of all added images, which differ from means over images.

    Args:
        classes: number of classes.

    Raises:
        ValueError: torchmetrics is not installed.
    """

    def __init__(self, classes: int) -> None:
        try:
            from torchmetrics.classification import MulticlassJaccardIndex
        except ImportError as error:
            raise ValueError(
                f"mean intersection over union needs torchmetrics ({error}): pip install 'simmim[segmentation]'"
            ) from None
        self.metric = MulticlassJaccardIndex(
            classes, ignore_index=IGNORED, validate_args=False, sync_on_compute=False, compute_with_cache=False
        )

    def add(self, predicted: Tensor, segments: Tensor) -> None:
        """Add images; each image must be added once.

        Args:
            predicted: class indices, int64 ``(b, H, W)``.
            segments: uint8 ``(b, H, W)``, 255 = ignored.
        """
        self.metric.to(predicted.device).update(predicted, segments)

    def gather(self, gather_object: Callable[[list], list]) -> None:
        """Add the images of the other processes; ``gather_object`` concatenates the lists of all processes."""
        self.metric.to("cpu").confmat = torch.stack(gather_object([self.confusion_matrix()])).sum(dim=0)

    def confusion_matrix(self) -> Tensor:
        """Return pixel counts, int64 ``(classes, classes)``: rows are true classes, columns predicted ones."""
        return self.metric.confmat.cpu()

    def compute(self) -> dict[str, float]:
        """Return the scores by name; they are NaN if no pixel has a label.

        - ``mean_iou``: intersection over union, averaged over the classes that occur in the labels or in a prediction.
        - ``mean_accuracy``: fraction of the pixels of a class that are classified correctly, averaged over the
          classes in the labels.
        - ``pixel_accuracy``: fraction of all labeled pixels that are classified correctly.
        """
        matrix = self.confusion_matrix().double()
        correct, labeled = matrix.diagonal(), matrix.sum(dim=1)
        return {
            "mean_iou": float(self.metric.compute()),
            "mean_accuracy": float((correct / labeled)[labeled > 0].mean()),
            "pixel_accuracy": float(correct.sum() / labeled.sum()),
        }

    def iou_per_class(self) -> list[float | None]:
        """Return the intersection over union of each class; None for classes that ``mean_iou`` leaves out."""
        matrix = self.confusion_matrix().double()
        union = matrix.sum(dim=0) + matrix.sum(dim=1) - matrix.diagonal()
        return [float(i / u) if u else None for i, u in zip(matrix.diagonal(), union, strict=True)]
