"""Object detection and instance segmentation: boxes, classes and masks from the encoder's feature pyramid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from simmim.tasks.detection_head import DetectionHead, Objects
from simmim.tasks.nms import SoftNMS, suppress
from simmim.tasks.task import Task
from simmim.visualization import drawing
from swin import SwinEncoder

_PREVIEW_PX = 448


class Detection(Task):
    """Mask R-CNN (arXiv 1703.06870) on an image encoder, as in the Swin papers (arXiv 2103.14030, section 4.2).

    The last feature map is normalized by the encoder's own norm.

    Batches hold ``image`` uint8 ``(b, c, H, W)``, each image at the upper left of its canvas, ``image_size`` int64
    ``(b, 2)``, and the concatenated objects of all images: ``boxes`` float32 ``(n, 4)`` (left, top, right, bottom,
    px), ``box_labels`` int64 ``(n,)`` from 1, ``box_counts`` int64 ``(b,)``, and ``masks`` uint8 ``(n, H, W)``.

    Losses are means over a fixed number of sampled anchors and regions per image, so gradient accumulation is exact
    with two exceptions: samples are drawn from the global random generator, and the mask loss is a mean over the
    objects of a micro-batch.

    Args:
        classes: class names without the background; label 1 is the first.
        mean, std: channel statistics of pixels in [0, 1], one value per channel.
        masks: predict masks; False predicts boxes only (Faster R-CNN).
        cascade, width, hidden, anchor_px, regions_per_image: see
            :class:`simmim.tasks.detection_head.DetectionHead`.
        soft_nms: lower the scores of detections that overlap a better one instead of dropping them, see
            :func:`simmim.tasks.nms.soft_nms`; detections then need a score of 0.001 instead of 0.05.
        scales, flip: test-time augmentation of :meth:`predict`, see :meth:`detections`.

    Raises:
        ValueError: the statistics do not match the channels, or the anchors do not match the feature maps.
    """

    def __init__(
        self,
        encoder: SwinEncoder,
        classes: Sequence[str],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        masks: bool = True,
        cascade: bool = False,
        width: int = 256,
        hidden: int = 1024,
        anchor_px: Sequence[int] | None = None,
        regions_per_image: int = 512,
        soft_nms: SoftNMS | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
    ) -> None:
        super().__init__(encoder, mean, std)
        self.scales, self.flip = tuple(scales), flip
        config = encoder.config
        self.classes, self.masks = list(classes), masks
        stages = range(len(config.depths))
        self.strides = [config.patch_size * 2**stage for stage in stages]
        self.head = DetectionHead(
            [config.embed_dim * 2**stage for stage in stages],
            self.strides,
            len(self.classes),
            masks=masks,
            cascade=cascade,
            width=width,
            hidden=hidden,
            anchor_px=anchor_px,
            regions_per_image=regions_per_image,
        )
        self.soft_nms = self.head.regions.soft_nms = soft_nms
        if soft_nms is not None:
            self.head.regions.least_score = 1e-3

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of the losses of a batch."""
        return torch.stack(list(self.losses(batch).values())).sum()

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses of a batch by name.

        ``loss_objectness`` and ``loss_rpn_box_reg`` are those of the proposals, ``loss_classifier`` and
        ``loss_box_reg`` those of the box heads, ``loss_mask`` that of the mask head.
        """
        counts = batch["box_counts"].tolist()
        fields = {"boxes": batch["boxes"], "labels": batch["box_labels"]}
        if self.masks:
            fields["masks"] = batch["masks"]
        parts = {name: values.split(counts) for name, values in fields.items()}
        targets = [{name: part[index] for name, part in parts.items()} for index in range(len(counts))]
        return self._run(self.normalize(batch["image"]), batch["image_size"], targets)[1]

    def _run(
        self, images: Tensor, sizes: Tensor, targets: list[Objects] | None = None
    ) -> tuple[list[Objects], dict[str, Tensor]]:
        """Run encoder and head on normalized images ``(b, c, H, W)`` of ``sizes (b, 2)``.

        Padding is set to zero, the mean color, and the canvas is extended to a multiple of the largest stride.

        Returns:
            Detections and losses, see :meth:`simmim.tasks.detection_head.DetectionHead.forward`.
        """
        height, width = images.shape[-2:]
        images = F.pad(
            images * self._image_mask(images, sizes), (0, -width % self.strides[-1], 0, -height % self.strides[-1])
        )
        return self.head(images, self._maps(images), [(h, w) for h, w in sizes.tolist()], targets)

    def _maps(self, images: Tensor) -> list[Tensor]:
        """Return the feature maps ``(b, c, h, w)`` of normalized images, finest first, the last one normalized."""
        maps = self.encoder.pyramid(images)
        last = self.encoder.norm(rearrange(maps[-1], "b c h w -> b h w c"))
        return [*maps[:-1], rearrange(last, "b h w c -> b c h w")]

    def loss_on_fake_tensors(self, images: Tensor) -> Tensor:
        """Return the loss of fake images with the largest number of regions, without cropping them from the maps."""
        return self.head.loss_on_fake_tensors(self._maps(images))

    @staticmethod
    def _image_mask(images: Tensor, sizes: Tensor) -> Tensor:
        """Return bool ``(b, 1, H, W)``, False where the canvas ``(b, c, H, W)`` is padding."""
        rows = torch.arange(images.shape[-2], device=images.device) < sizes[:, :1]
        columns = torch.arange(images.shape[-1], device=images.device) < sizes[:, 1:]
        return rows[:, None, :, None] & columns[:, None, None, :]

    @torch.no_grad()
    def eval_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses of a validation batch, and their sum as ``loss``.

        The model stays in evaluation mode, so drop path is off. Anchors and regions are sampled with a fixed seed,
        and the state of the global random generator is restored.
        """
        device = batch["image"].device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            losses = self.losses(batch)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}

    @torch.no_grad()
    def detections(
        self, images: Tensor, sizes: Tensor, *, scales: Sequence[float] = (1.0,), flip: bool = False
    ) -> list[Objects]:
        """Detect objects; boxes are in pixels of the given images, best first.

        Args:
            images: uint8 ``(b, c, H, W)``.
            sizes: int64 ``(b, 2)``, height and width without padding.
            scales: factors by which the images are resized; detections at all scales are merged by suppression.
                Upscaling adds no detail, so load images at the largest size.
            flip: detect in a horizontally mirrored copy at every scale too.

        Returns:
            For each image ``boxes (n, 4)``, ``scores (n,)``, ``labels (n,)``, and ``masks (n, 1, 28, 28)`` inside
            the boxes.
        """
        pixels, views = self.normalize(images), []
        for factor in scales:
            height, width = (max(1, round(side * factor)) for side in images.shape[-2:])
            scale = pixels.new_tensor([height / images.shape[-2], width / images.shape[-1]])
            view_sizes = (sizes * scale).round().long().clamp(min=1)
            resized = pixels if factor == 1 else F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
            for flipped in (False, True)[: 1 + flip]:
                found, _ = self._run(_mirror(resized, view_sizes) if flipped else resized, view_sizes)
                sides = zip(found, view_sizes.tolist(), strict=True)
                views.append([_undo_view(own, size, scale, flipped) for own, size in sides])
        return views[0] if len(views) == 1 else [self._merge(own) for own in zip(*views, strict=True)]

    def predict(self, batch: Mapping[str, Tensor]) -> list[Objects]:
        """Detect objects in pixels of the original images, whose size is ``original_size`` int64 ``(b, 2)``.

        Returns:
            For each image ``boxes`` float32 ``(n, 4)``, ``scores``, ``labels``, and ``masks`` bool ``(n, H, W)``.
        """
        found = self.detections(batch["image"], batch["image_size"], scales=self.scales, flip=self.flip)
        results = []
        for own, view_size, size in zip(found, batch["image_size"], batch["original_size"], strict=True):
            factors = (size / view_size).flip(0).repeat(2)
            results.append(_paste_masks({**own, "boxes": own["boxes"] * factors}, size.tolist()))
        return results

    def _merge(self, views: Sequence[Objects]) -> Objects:
        """Merge the detections of several views of one image by suppression."""
        merged = {key: torch.cat([view[key] for view in views]) for key in views[0]}
        regions = self.head.regions
        kept, scores = suppress(
            merged["boxes"],
            merged["scores"],
            merged["labels"],
            iou=regions.iou,
            limit=regions.limit,
            soft=regions.soft_nms,
        )
        return {key: value[kept] for key, value in merged.items()} | {"scores": scores}

    @torch.no_grad()
    def visualize(self, batch: Mapping[str, Tensor], *, least_score: float = 0.5) -> Image.Image:
        """Render every image with its true objects and with the detected ones.

        Args:
            least_score: lowest score of detections that are drawn; the best one of each image is always drawn.
        """
        images, sizes = batch["image"], batch["image_size"]
        factor = _PREVIEW_PX / max(images.shape[-2:])
        size = [max(1, round(side * factor)) for side in images.shape[-2:]]
        previews = torch.where(self._image_mask(images, sizes), drawing.to_rgb(images / 255), 1.0)
        previews = F.interpolate(previews, size, mode="bilinear", antialias=True).clamp(0, 1)
        counts = batch["box_counts"].tolist()
        truths = zip(batch["boxes"].split(counts), batch["box_labels"].split(counts), strict=True)
        masks = batch["masks"].split(counts) if self.masks else [None] * len(counts)
        columns: dict[str, list[Tensor]] = {
            "objects": [],
            f"detections: score {least_score:g} or more, or the best": [],
        }
        for image, (boxes, labels), mask, found in zip(
            previews, truths, masks, self.detections(images, sizes), strict=True
        ):
            lowest = found["scores"][:1].clamp(max=least_score)
            found = {key: value[found["scores"] >= lowest] for key, value in found.items()}
            found = _paste_masks(found, list(images.shape[-2:]))
            objects = {"boxes": boxes, "labels": labels} | ({} if mask is None else {"masks": mask})
            for column, own in zip(columns.values(), (objects, found), strict=True):
                names = [self.classes[label - 1] for label in own["labels"].tolist()]
                if "scores" in own:
                    names = [f"{name} {score:.2f}" for name, score in zip(names, own["scores"].tolist(), strict=True)]
                boxes = own["boxes"] * factor
                column.append(drawing.draw_objects(image, boxes, own["labels"], names, own.get("masks")))
        return drawing.draw_panels([(caption, torch.stack(column)) for caption, column in columns.items()])


def _mirror(images: Tensor, sizes: Tensor) -> Tensor:
    """Mirror each image horizontally, inside its own size, so that it stays at the upper left of its canvas."""
    result = images.clone()
    for image, (height, width) in zip(result, sizes.tolist(), strict=True):
        image[:, :height, :width] = image[:, :height, :width].flip(-1)
    return result


def _undo_view(found: Objects, size: Sequence[int], scale: Tensor, flipped: bool) -> Objects:
    """Map the detections of a view, resized by ``scale`` (y, x) and perhaps mirrored, back to its image."""
    boxes, masks = found["boxes"], found.get("masks")
    if flipped:
        left, top, right, bottom = boxes.unbind(dim=1)
        boxes = torch.stack([size[1] - right, top, size[1] - left, bottom], dim=1)
        masks = None if masks is None else masks.flip(-1)
    return found | {"boxes": boxes / scale.flip(0).repeat(2)} | ({} if masks is None else {"masks": masks})


def _paste_masks(found: Objects, size: Sequence[int]) -> Objects:
    """Replace masks inside the boxes by masks of the whole image, bool ``(n, H, W)``."""
    if "masks" not in found:
        return found
    masks = torch.zeros(len(found["boxes"]), *size, dtype=torch.bool, device=found["boxes"].device)
    # One mask at a time: the float masks of all objects together may not fit in memory.
    for pasted, mask, box in zip(masks, found["masks"], found["boxes"], strict=True):
        pasted.copy_(paste_masks_in_image(mask[None], box[None], (size[0], size[1]))[0, 0] > 0.5)
    return found | {"masks": masks}
