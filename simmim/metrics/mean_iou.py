"""How good label maps are: mean intersection over union of a data set, by torchmetrics."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simmim.data.segments import IGNORED


class MeanIoU:
    """Scores over the pixels of all images that were added; a mean over images is another number.

    Args:
        classes: how many.

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
        """Images, each once.

        Args:
            predicted: int64 numbers of classes ``(b, H, W)``.
            segments: uint8 ``(b, H, W)``, 255 = ignored.
        """
        self.metric.to(predicted.device).update(predicted, segments)

    def gather(self, gather_object: Callable[[list], list]) -> None:
        """Add what other processes have added; ``gather_object`` makes one list of the lists of all."""
        self.metric.to("cpu").confmat = torch.stack(gather_object([self.confusion()])).sum(dim=0)

    def confusion(self) -> Tensor:
        """int64 ``(classes, classes)``: how many pixels of the class of the row were taken for that of the column."""
        return self.metric.confmat.cpu()

    def compute(self) -> dict[str, float]:
        """The usual numbers; NaN where no pixel has a label.

        - ``mean_iou``: intersection over union, mean over the classes; a class that is neither in the labels nor
          in any prediction is not counted.
        - ``mean_accuracy``: share of the pixels of a class that were found, mean over the classes in the labels.
        - ``pixel_accuracy``: share of all pixels that have a label.
        """
        matrix = self.confusion().double()
        right, labelled = matrix.diagonal(), matrix.sum(dim=1)
        return {
            "mean_iou": float(self.metric.compute()),
            "mean_accuracy": float((right / labelled)[labelled > 0].mean()),
            "pixel_accuracy": float(right.sum() / labelled.sum()),
        }

    def of_classes(self) -> list[float | None]:
        """Intersection over union of each class; None of those that ``mean_iou`` does not count."""
        matrix = self.confusion().double()
        union = matrix.sum(dim=0) + matrix.sum(dim=1) - matrix.diagonal()
        return [float(r / u) if u else None for r, u in zip(matrix.diagonal(), union, strict=True)]
