"""The parts of a detector above the encoder: torchvision's feature pyramid, proposals, box and mask heads.

No module mixes images: there is no batch norm, and the only norms are LayerNorms over the channels of the encoder's
feature maps. The proposals and regions used for training are sampled with the global random generator.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, clip_boxes_to_image, remove_small_boxes
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from simmim.tasks.nms import SoftNMS, suppress

Objects = dict[str, Tensor]
"""Objects of one image: ``boxes (n, 4)``, ``labels (n,)``, for detections ``scores (n,)``, and ``masks``."""

POSITIVE = 0.25  # fraction of objects among the sampled regions
# For each box head: the lowest overlap of a proposal with an object, the weights of the box coordinates, and the
# weight of the losses. The values of the cascade are those of arXiv 1712.00726.
PLAIN = ((0.5, (10.0, 10.0, 5.0, 5.0), 1.0),)
CASCADE = (
    (0.5, (10.0, 10.0, 5.0, 5.0), 1.0),
    (0.6, (20.0, 20.0, 10.0, 10.0), 0.5),
    (0.7, (30.0, 30.0, 15.0, 15.0), 0.25),
)


class DetectionHead(nn.Module):
    """Mask R-CNN (arXiv 1703.06870) or Faster R-CNN on a feature pyramid (arXiv 1612.03144), optionally as a cascade.

    Args:
        widths: channels of the encoder's feature maps; the last map is already normalized.
        strides: strides of the maps in px.
        num_classes: number of classes without the background.
        masks: predict a mask for every box.
        cascade: use three box heads, each refining the boxes of the previous one (arXiv 1712.00726).
        width: channels of the feature pyramid.
        hidden: width of the box heads.
        anchor_px: side of the anchors in px, for each map and one coarser level; None: 8 times the stride.
        regions_per_image: largest number of regions per image on which a box head is trained.

    Raises:
        ValueError: the number of anchors does not match the number of levels.
    """

    def __init__(
        self,
        widths: Sequence[int],
        strides: Sequence[int],
        num_classes: int,
        *,
        masks: bool = True,
        cascade: bool = False,
        width: int = 256,
        hidden: int = 1024,
        anchor_px: Sequence[int] | None = None,
        regions_per_image: int = 512,
    ) -> None:
        super().__init__()
        strides = [*strides, 2 * strides[-1]]
        anchor_px = anchor_px or [8 * stride for stride in strides]
        if len(anchor_px) != len(strides):
            raise ValueError(f"anchor_px {list(anchor_px)}: expected one side in px for each of the strides {strides}")
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in widths[:-1])
        self.fpn = FeaturePyramidNetwork(list(widths), width, LastLevelMaxPool())
        anchors = Anchors([(side,) for side in anchor_px], strides)
        self.rpn = RegionProposalNetwork(
            anchors,
            ProposalHead(width, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2000, "testing": 1000},
            post_nms_top_n={"training": 1000, "testing": 1000},
            nms_thresh=0.7,
        )
        maps = [str(level) for level in range(len(widths))]
        self.regions = RegionHeads(maps, num_classes, width, hidden, regions_per_image, masks=masks, cascade=cascade)

    def forward(
        self, images: Tensor, maps: Sequence[Tensor], sizes: list[tuple[int, int]], targets: list[Objects] | None = None
    ) -> tuple[list[Objects], dict[str, Tensor]]:
        """Detect objects, or compute losses if there are targets, in training and in evaluation mode.

        Args:
            images: ``(b, c, H, W)``; only the shape is used.
            maps: feature maps ``(b, c, h, w)`` of the encoder; the last one is normalized.
            sizes: height and width of each image without padding, in px.
            targets: the objects of each image; None: detect.

        Returns:
            The detections of each image, empty with targets, and the losses by name, empty without targets.
        """
        features = self._pyramid(maps)
        self.rpn.train(targets is not None)  # in this module the mode only switches the losses
        proposals, losses = self.rpn(ImageList(images, sizes), features, targets)
        detections, more = self.regions(features, proposals, sizes, tuple(images.shape[-2:]), targets)
        return detections, losses | more

    def loss_on_fake_tensors(self, maps: Sequence[Tensor]) -> Tensor:
        """Return a loss of fake maps through all layers, without the operations that depend on values."""
        features = self._pyramid(maps)
        logits, deltas = self.rpn.head(list(features.values()))
        losses = [x.mean() for x in (*logits, *deltas)]
        finest = next(iter(features.values()))
        return torch.stack([*losses, *self.regions.losses_on_fake_tensors(finest)]).sum()

    def _pyramid(self, maps: Sequence[Tensor]) -> OrderedDict[str, Tensor]:
        """Normalize all maps except the last and compute the feature pyramid, by level name."""
        normed = [
            rearrange(norm(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")
            for norm, x in zip(self.norms, maps, strict=False)
        ]
        return self.fpn(OrderedDict((str(level), x) for level, x in enumerate([*normed, maps[-1]])))


class Anchors(AnchorGenerator):
    """torchvision's anchors with exact strides, always in float32.

    torchvision derives the stride by dividing the size of the image by that of the map, which gives 61 px instead
    of 64 px for the coarsest map of an 800 px image. It also uses the dtype of the map, and bfloat16 has a
    resolution of 4 px from 512 px on.
    """

    def __init__(self, sizes: Sequence[tuple[int]], strides: Sequence[int]) -> None:
        super().__init__(tuple(sizes), ((0.5, 1.0, 2.0),) * len(sizes))
        self.strides = list(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        device = feature_maps[0].device
        self.cell_anchors = [
            self.generate_anchors(sizes, ratios, torch.float32, device)
            for sizes, ratios in zip(self.sizes, self.aspect_ratios, strict=True)
        ]
        grids = [list(x.shape[-2:]) for x in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [[stride, stride] for stride in self.strides]))
        return [anchors] * len(image_list.image_sizes)


class ProposalHead(RPNHead):
    """torchvision's proposal head with float32 outputs, because boxes are computed from them."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return [level.float() for level in logits], [level.float() for level in deltas]


class BoxPredictor(nn.Module):
    """Predicts float32 class logits ``(n, k)`` and box deltas ``(n, 4 k)``; the ``k`` outputs include the background.

    Args:
        shared: use the same deltas for all classes, as in a cascade.
    """

    def __init__(self, hidden: int, num_outputs: int, *, shared: bool) -> None:
        super().__init__()
        self.copies = num_outputs if shared else 1
        self.cls_score = nn.Linear(hidden, num_outputs)
        self.bbox_pred = nn.Linear(hidden, 4 if shared else 4 * num_outputs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the layers as in Fast R-CNN (arXiv 1504.08083, section 2.3)."""
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        deltas = repeat(self.bbox_pred(x).float(), "n c -> n (k c)", k=self.copies)
        return self.cls_score(x).float(), deltas


class RegionHeads(nn.Module):
    """One box head or a cascade of three, and a mask head.

    Each box head is a ``RoIHeads`` of torchvision. With one head, losses and detections equal those of torchvision.
    In a cascade, each head starts from the boxes of the previous one and samples its own training regions, and
    scores are the mean over all heads. The mask head is trained on the regions of the first box head and applied to
    the final boxes.
    """

    iou, limit, least_score = 0.5, 100, 0.05
    soft_nms: SoftNMS | None = None

    def __init__(
        self,
        maps: list[str],
        num_classes: int,
        width: int,
        hidden: int,
        regions_per_image: int,
        *,
        masks: bool,
        cascade: bool,
    ) -> None:
        super().__init__()
        kinds = CASCADE if cascade else PLAIN
        self.regions_per_image = regions_per_image
        self.weights = [weight for _, _, weight in kinds]
        self.stages = nn.ModuleList(
            RoIHeads(
                MultiScaleRoIAlign(maps, output_size=7, sampling_ratio=2),
                TwoMLPHead(width * 7**2, hidden),
                BoxPredictor(hidden, num_classes + 1, shared=cascade),
                fg_iou_thresh=iou,
                bg_iou_thresh=iou,
                batch_size_per_image=regions_per_image,
                positive_fraction=POSITIVE,
                bbox_reg_weights=weights,
                score_thresh=self.least_score,
                nms_thresh=self.iou,
                detections_per_img=self.limit,
            )
            for iou, weights, _ in kinds
        )
        self.masks: nn.Sequential | None = None
        if masks:
            self.mask_pool = MultiScaleRoIAlign(maps, output_size=14, sampling_ratio=2)
            self.masks = nn.Sequential(
                MaskRCNNHeads(width, (width,) * 4, 1), MaskRCNNPredictor(width, width, num_classes + 1)
            )

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        sizes: list[tuple[int, int]],
        canvas: tuple[int, int],
        targets: list[Objects] | None = None,
    ) -> tuple[list[Objects], dict[str, Tensor]]:
        """Detect objects, or compute losses if there are targets.

        Args:
            features: the feature pyramid, by level name.
            proposals: boxes ``(n, 4)`` of each image.
            sizes: height and width of each image without padding, in px.
            canvas: padded height and width of all images. torchvision derives the strides from it, once; from
                ``sizes`` it would derive wrong strides for small images and keep them.
            targets: the objects of each image; None: detect.
        """
        losses: dict[str, Tensor] = {}
        probabilities: list[Tensor] = []
        chosen: tuple[list[Tensor], list[Tensor], list[Tensor]] | None = None
        for index, stage in enumerate(cast(Iterable[RoIHeads], self.stages)):
            if targets is not None:
                proposals, matched, labels, wanted = stage.select_training_samples(list(proposals), targets)
                chosen = chosen or (proposals, matched, labels)
            pooled = stage.box_roi_pool(features, proposals, [canvas])
            logits, deltas = stage.box_predictor(stage.box_head(pooled))
            if targets is not None:
                class_loss, box_loss = fastrcnn_loss(logits, deltas, labels, wanted)
                suffix, weight = f"_{index + 1}" if index else "", self.weights[index]
                losses |= {f"loss_classifier{suffix}": weight * class_loss, f"loss_box_reg{suffix}": weight * box_loss}
            else:
                probabilities.append(logits.softmax(dim=1))
            boxes = stage.box_coder.decode(deltas.detach(), proposals)  # (n, k, 4)
            if index + 1 < len(self.stages):
                proposals = self._clip(boxes[:, 1], [len(own) for own in proposals], sizes, targets is not None)
        if targets is not None:
            assert chosen is not None
            return [], losses | self._mask_loss(features, *chosen, canvas, targets)
        scores = torch.stack(probabilities).mean(dim=0)
        counts = [len(own) for own in proposals]
        found = [self._select(*own) for own in zip(boxes.split(counts), scores.split(counts), sizes, strict=True)]
        return self._with_masks(features, found, canvas), losses

    def losses_on_fake_tensors(self, features: Tensor) -> list[Tensor]:
        """Return losses of one fake map ``(b, c, h, w)``, with the largest number of regions per image."""
        images, width = features.shape[:2]
        losses: list[Tensor] = []
        for stage in cast(Iterable[RoIHeads], self.stages):
            pooled = features.mean() + features.new_zeros(images * self.regions_per_image, width, 7, 7)
            losses += [x.mean() for x in stage.box_predictor(stage.box_head(pooled))]
        if self.masks is not None:
            objects = round(images * self.regions_per_image * POSITIVE)
            pooled = features.mean() + features.new_zeros(objects, width, 14, 14)
            losses.append(self.masks(pooled).float().mean())
        return losses

    def _clip(self, boxes: Tensor, counts: list[int], sizes: list[tuple[int, int]], drop_empty: bool) -> list[Tensor]:
        """Clip the boxes of each image to it; with ``drop_empty`` (training), remove boxes that become empty."""
        clipped = [clip_boxes_to_image(own, size) for own, size in zip(boxes.split(counts), sizes, strict=True)]
        return [own[remove_small_boxes(own, 1e-2)] for own in clipped] if drop_empty else clipped

    def _select(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Objects:
        """Select the detections of an image from boxes ``(n, k, 4)`` and scores ``(n, k)``, the background first."""
        boxes, scores = clip_boxes_to_image(boxes, size)[:, 1:], scores[:, 1:]
        labels = torch.arange(1, scores.shape[1] + 1, device=boxes.device).expand_as(scores)
        likely = scores > self.least_score
        boxes, scores, labels = boxes[likely], scores[likely], labels[likely]
        large = remove_small_boxes(boxes, 1e-2)
        boxes, scores, labels = boxes[large], scores[large], labels[large]
        kept, scores = suppress(boxes, scores, labels, iou=self.iou, limit=self.limit, soft=self.soft_nms)
        return {"boxes": boxes[kept], "scores": scores, "labels": labels[kept]}

    def _mask_loss(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
        canvas: tuple[int, int],
        targets: list[Objects],
    ) -> dict[str, Tensor]:
        """Return the mask loss of the regions that contain an object, or nothing without a mask head."""
        if self.masks is None:
            return {}
        positive = [own > 0 for own in labels]
        boxes = [own[kept] for own, kept in zip(proposals, positive, strict=True)]
        indices = [own[kept] for own, kept in zip(matched, positive, strict=True)]
        logits = self.masks(self.mask_pool(features, boxes, [canvas]))
        truth, classes = [own["masks"] for own in targets], [own["labels"] for own in targets]
        return {"loss_mask": maskrcnn_loss(logits.float(), boxes, truth, classes, indices)}

    def _with_masks(self, features: dict[str, Tensor], found: list[Objects], canvas: tuple[int, int]) -> list[Objects]:
        """Add ``masks (n, 1, 28, 28)``, probabilities inside each box, to the detections."""
        if self.masks is None:
            return found
        logits = self.masks(self.mask_pool(features, [own["boxes"] for own in found], [canvas]))
        masks = maskrcnn_inference(logits.float(), [own["labels"] for own in found])
        return [own | {"masks": mask} for own, mask in zip(found, masks, strict=True)]
