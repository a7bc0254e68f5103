"""COCO average precision of detections, computed by torchmetrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

_NAMES = {
    "map": "ap",
    "map_50": "ap50",
    "map_75": "ap75",
    "map_small": "ap_small",
    "map_medium": "ap_medium",
    "map_large": "ap_large",
    "mar_100": "ar",
}


class AveragePrecision:
    """Average precision of boxes and, optionally, masks over all added images.

    Args:
        masks: compute the average precision of masks too.
        backend: COCO implementation; both give the same numbers, ``faster_coco_eval`` is faster.

    Raises:
        ValueError: torchmetrics or the backend is not installed.
    """

    def __init__(self, *, masks: bool, backend: Literal["pycocotools", "faster_coco_eval"] = "pycocotools") -> None:
        try:
            from torchmetrics.detection import MeanAveragePrecision

            kinds: Any = ("bbox", "segm") if masks else ("bbox",)
            self.metric = MeanAveragePrecision(iou_type=kinds, backend=backend)
        except ImportError as error:
            raise ValueError(
                f"average precision needs torchmetrics and {backend} ({error}): pip install 'simmim[detection]'"
            ) from None
        self.metric.sync_on_compute = False
        self.prefixes = {"bbox_": "box_", "segm_": "mask_"} if masks else {"": "box_"}
        self.fields = ("boxes", "scores", "labels", "masks") if masks else ("boxes", "scores", "labels")

    def add(self, found: Sequence[Mapping[str, Tensor]], truths: Sequence[Mapping[str, Tensor]]) -> None:
        """Add images; each image must be added once.

        Args:
            found: detections of each image, see :meth:`simmim.tasks.detection.Detection.predict`.
            truths: true objects of each image, see :meth:`simmim.data.boxes.CocoImages.truth`.
        """
        self.metric.update([{key: own[key].cpu() for key in self.fields} for own in found], [dict(t) for t in truths])

    def gather(self, gather_object: Callable[[list], list]) -> None:
        """Add the images of the other processes; ``gather_object`` concatenates the lists of all processes."""
        for name in self.metric.metric_state:
            setattr(self.metric, name, gather_object(list(getattr(self.metric, name))))

    def compute(self) -> dict[str, float]:
        """Return the average precision by name, with the prefixes ``box_`` and ``mask_``.

        ``ap`` is the mean over overlaps from 50 to 95 %, ``ap50`` and ``ap75`` are at 50 and 75 %, ``ap_small``,
        ``ap_medium`` and ``ap_large`` are by object size, and ``ar`` is the mean recall with 100 detections per image.
        Numbers for which there are no objects are left out.
        """
        numbers = self.metric.compute()
        result = {
            f"{ours}{name}": float(numbers[f"{theirs}{key}"])
            for theirs, ours in self.prefixes.items()
            for key, name in _NAMES.items()
        }
        return {name: value for name, value in result.items() if value >= 0}


def coco_results(
    found: Sequence[Mapping[str, Tensor]], image_ids: Sequence[int], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Convert detections to the COCO result format, for its servers and tools.

    Args:
        found: detections of each image, see :meth:`AveragePrecision.add`.
        image_ids: COCO ids of the images.
        category_ids: COCO ids of the classes, in the order of the labels.

    Raises:
        ValueError: there are masks and pycocotools is not installed.
    """
    results = []
    for own, image_id in zip(found, image_ids, strict=True):
        boxes = torch.cat([own["boxes"][:, :2], own["boxes"][:, 2:] - own["boxes"][:, :2]], dim=1).tolist()
        for index, (box, score, label) in enumerate(
            zip(boxes, own["scores"].tolist(), own["labels"].tolist(), strict=True)
        ):
            result = {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
            if "masks" in own:
                mask = np.asfortranarray(own["masks"][index].cpu().numpy().astype(np.uint8))
                packed = _mask_encoder().encode(mask)
                result["segmentation"] = {"size": packed["size"], "counts": packed["counts"].decode()}
            results.append(result)
    return results


def _mask_encoder() -> Any:
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise ValueError(
            f"writing masks as COCO results needs pycocotools ({error}): pip install 'simmim[detection]'"
        ) from None
    return coco_mask
