"""How good detections are: COCO's average precision, by torchmetrics."""

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
    """Average precision of boxes, and of masks, over all images that were added.

    Args:
        masks: of masks too.
        backend: what counts; both give the same numbers, ``faster_coco_eval`` sooner.

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
        """Images, each once.

        Args:
            found: of each image, as :meth:`simmim.tasks.detection.Detect.predict` gives it.
            truths: as :meth:`simmim.data.boxes.CocoImages.truth` gives it.
        """
        self.metric.update([{key: own[key].cpu() for key in self.fields} for own in found], [dict(t) for t in truths])

    def gather(self, gather_object: Callable[[list], list]) -> None:
        """Add what other processes have added; ``gather_object`` makes one list of the lists of all."""
        for name in self.metric.metric_state:
            setattr(self.metric, name, gather_object(list(getattr(self.metric, name))))

    def compute(self) -> dict[str, float]:
        """``box_ap`` and ``mask_ap``, at an overlap of 50 and 75 % (``ap50``, ``ap75``), of small, medium and large
        objects, and the mean recall of a hundred detections (``ar``). What no object is there for is left out.
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
    """Detections as COCO wants them, for its servers and tools.

    Args:
        found: as of :meth:`AveragePrecision.add`.
        image_ids, category_ids: of the data set; ``category_ids`` by class.
    """
    results = []
    for own, image_id in zip(found, image_ids, strict=True):
        boxes = torch.cat([own["boxes"][:, :2], own["boxes"][:, 2:] - own["boxes"][:, :2]], dim=1).tolist()
        for number, (box, score, label) in enumerate(
            zip(boxes, own["scores"].tolist(), own["labels"].tolist(), strict=True)
        ):
            result = {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
            if "masks" in own:
                mask = np.asfortranarray(own["masks"][number].cpu().numpy().astype(np.uint8))
                packed = _packing().encode(mask)
                result["segmentation"] = {"size": packed["size"], "counts": packed["counts"].decode()}
            results.append(result)
    return results


def _packing() -> Any:
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise ValueError(f"masks are told as COCO packs them ({error}): pip install 'simmim[detection]'") from None
    return coco_mask
