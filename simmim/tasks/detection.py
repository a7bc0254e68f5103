"""Object detection and instance segmentation: boxes, classes and masks on the encoder's pyramid."""

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

_PICTURE_PX = 448


class Detection(Task):
    """Mask R-CNN around any encoder; the norm of its last map is the encoder's own.

    Batches hold ``image`` uint8 ``(b, c, H, W)``, each image at the upper left, ``image_size`` int64 ``(b, 2)``, and
    the objects of all images one after the other: ``boxes`` float32 ``(n, 4)`` (left, top, right, bottom, px),
    ``box_labels`` int64 ``(n,)`` from 1, ``box_counts`` int64 ``(b,)``, and ``masks`` uint8 ``(n, H, W)``.

    Losses are means over sampled anchors and regions, as many per image, so accumulation is exact but for two things:
    what is sampled comes from the global generator, and the mask loss is a mean over the objects of a micro-batch.

    Args:
        classes: their names, without the background; label 1 is the first.
        mean, std: channel statistics of pixels in [0, 1], one number per channel.
        masks: False for boxes only (Faster R-CNN).
        cascade, width, hidden, anchor_px, regions_per_image: of
            :class:`simmim.tasks.detection_head.DetectionHead`.
        soft_nms: instead of dropping detections that overlap a better one, see
            :func:`simmim.tasks.nms.soft_nms`; detections count from a score of 0.001 on, not 0.05.
        scales, flip: of :meth:`detections`, when :meth:`predict` looks.

    Raises:
        ValueError: statistics that do not match the channels, anchors that do not match the maps.
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
        """The sum of the losses."""
        return torch.stack(list(self.losses(batch).values())).sum()

    def losses(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of objects against background and of boxes, in the proposals (``objectness``, ``rpn_box_reg``) and in the
        head (``classifier``, ``box_reg``), and of ``mask``.
        """
        counts = batch["box_counts"].tolist()
        fields = {"boxes": batch["boxes"], "labels": batch["box_labels"]}
        if self.masks:
            fields["masks"] = batch["masks"]
        parts = {name: values.split(counts) for name, values in fields.items()}
        targets = [{name: part[number] for name, part in parts.items()} for number in range(len(counts))]
        return self._run(self.normalize(batch["image"]), batch["image_size"], targets)[1]

    def _run(
        self, images: Tensor, sizes: Tensor, targets: list[Objects] | None = None
    ) -> tuple[list[Objects], dict[str, Tensor]]:
        """Of normalised images ``(b, c, H, W)`` of such sizes ``(b, 2)``: what the head gives.

        What was padded becomes the mean colour, and the canvas a multiple of the largest stride.
        """
        height, width = images.shape[-2:]
        images = F.pad(
            images * self._inside(images, sizes), (0, -width % self.strides[-1], 0, -height % self.strides[-1])
        )
        return self.head(images, self._maps(images), [(h, w) for h, w in sizes.tolist()], targets)

    def _maps(self, images: Tensor) -> list[Tensor]:
        maps = self.encoder.pyramid(images)
        last = self.encoder.norm(rearrange(maps[-1], "b c h w -> b h w c"))
        return [*maps[:-1], rearrange(last, "b h w c -> b c h w")]

    def loss_on_fake_tensors(self, images: Tensor) -> Tensor:
        """With as many regions as are drawn at most; cutting them out of the maps is left out."""
        return self.head.loss_on_fake_tensors(self._maps(images))

    @staticmethod
    def _inside(images: Tensor, sizes: Tensor) -> Tensor:
        """What of ``(b, c, H, W)`` is image: bool ``(b, 1, H, W)``."""
        rows = torch.arange(images.shape[-2], device=images.device) < sizes[:, :1]
        columns = torch.arange(images.shape[-1], device=images.device) < sizes[:, 1:]
        return rows[:, None, :, None] & columns[:, None, None, :]

    @torch.no_grad()
    def eval_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The losses of held-out images, and their sum as ``loss``.

        The model stays in evaluation mode, so no path is dropped; what is sampled is the same every time, and the
        global generator is left as it was.
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
        """What is found in each image, best first, in its own pixels.

        Args:
            images: uint8 ``(b, c, H, W)``.
            sizes: int64 ``(b, 2)``, without what was padded.
            scales: looked at in each of these sizes; detections of all of them are merged by suppression. Enlarging
                cannot bring back what was lost: load images at the largest size.
            flip: looked at mirrored too.

        Returns:
            ``boxes (n, 4)``, ``scores (n,)``, ``labels (n,)``, and ``masks (n, 1, 28, 28)`` inside the boxes.
        """
        pixels, looks = self.normalize(images), []
        for zoom in scales:
            height, width = (max(1, round(side * zoom)) for side in images.shape[-2:])
            scale = pixels.new_tensor([height / images.shape[-2], width / images.shape[-1]])
            own_sizes = (sizes * scale).round().long().clamp(min=1)
            seen = pixels if zoom == 1 else F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)
            for flipped in (False, True)[: 1 + flip]:
                found, _ = self._run(_mirrored(seen, own_sizes) if flipped else seen, own_sizes)
                looks.append([_back(o, s, scale, flipped) for o, s in zip(found, own_sizes.tolist(), strict=True)])
        return looks[0] if len(looks) == 1 else [self._merged(own) for own in zip(*looks, strict=True)]

    def predict(self, batch: Mapping[str, Tensor]) -> list[Objects]:
        """:meth:`detections` in pixels of the original images, whose size is ``original_size`` int64 ``(b, 2)``.

        Returns:
            For each image ``boxes`` float32 ``(n, 4)``, ``scores``, ``labels``, and ``masks`` bool ``(n, H, W)``.
        """
        found = self.detections(batch["image"], batch["image_size"], scales=self.scales, flip=self.flip)
        results = []
        for own, seen, size in zip(found, batch["image_size"], batch["original_size"], strict=True):
            zoom = (size / seen).flip(0).repeat(2)
            results.append(_pasted({**own, "boxes": own["boxes"] * zoom}, size.tolist()))
        return results

    def _merged(self, looks: Sequence[Objects]) -> Objects:
        """The detections of one image that was looked at several times."""
        every = {key: torch.cat([look[key] for look in looks]) for key in looks[0]}
        regions = self.head.regions
        kept, scores = suppress(
            every["boxes"],
            every["scores"],
            every["labels"],
            iou=regions.iou,
            limit=regions.limit,
            soft=regions.soft_nms,
        )
        return {key: value[kept] for key, value in every.items()} | {"scores": scores}

    @torch.no_grad()
    def visualize(self, batch: Mapping[str, Tensor], *, least_score: float = 0.5) -> Image.Image:
        """Every image with its objects, and with what was found: from such a score on, or else the best."""
        images, sizes = batch["image"], batch["image_size"]
        zoom = _PICTURE_PX / max(images.shape[-2:])
        size = [max(1, round(side * zoom)) for side in images.shape[-2:]]
        shown = torch.where(self._inside(images, sizes), drawing.to_rgb(images / 255), 1.0)
        shown = F.interpolate(shown, size, mode="bilinear", antialias=True).clamp(0, 1)
        counts = batch["box_counts"].tolist()
        truths = zip(batch["boxes"].split(counts), batch["box_labels"].split(counts), strict=True)
        masks = batch["masks"].split(counts) if self.masks else [None] * len(counts)
        columns: dict[str, list[Tensor]] = {"objects": [], f"found: {least_score:g} and above, or the best": []}
        for image, (boxes, labels), mask, found in zip(
            shown, truths, masks, self.detections(images, sizes), strict=True
        ):
            shown_from = found["scores"][:1].clamp(max=least_score)
            found = {key: value[found["scores"] >= shown_from] for key, value in found.items()}
            found = _pasted(found, list(images.shape[-2:]))
            objects = {"boxes": boxes, "labels": labels} | ({} if mask is None else {"masks": mask})
            for column, own in zip(columns.values(), (objects, found), strict=True):
                names = [self.classes[label - 1] for label in own["labels"].tolist()]
                if "scores" in own:
                    names = [f"{name} {score:.2f}" for name, score in zip(names, own["scores"].tolist(), strict=True)]
                column.append(drawing.with_objects(image, own["boxes"] * zoom, own["labels"], names, own.get("masks")))
        return drawing.panels([(caption, torch.stack(column)) for caption, column in columns.items()])


def _mirrored(images: Tensor, sizes: Tensor) -> Tensor:
    """Each image left to right, still at the upper left of its canvas."""
    result = images.clone()
    for image, (height, width) in zip(result, sizes.tolist(), strict=True):
        image[:, :height, :width] = image[:, :height, :width].flip(-1)
    return result


def _back(found: Objects, size: Sequence[int], scale: Tensor, flipped: bool) -> Objects:
    """Detections of an image that was zoomed by ``scale`` (y, x), and then perhaps mirrored, on the image itself."""
    boxes, masks = found["boxes"], found.get("masks")
    if flipped:
        left, top, right, bottom = boxes.unbind(dim=1)
        boxes = torch.stack([size[1] - right, top, size[1] - left, bottom], dim=1)
        masks = None if masks is None else masks.flip(-1)
    return found | {"boxes": boxes / scale.flip(0).repeat(2)} | ({} if masks is None else {"masks": masks})


def _pasted(found: Objects, size: Sequence[int]) -> Objects:
    """With masks of the whole image, bool ``(n, H, W)``, in place of those inside the boxes."""
    if "masks" not in found:
        return found
    masks = torch.zeros(len(found["boxes"]), *size, dtype=torch.bool, device=found["boxes"].device)
    for whole, mask, box in zip(masks, found["masks"], found["boxes"], strict=True):  # one float map at a time
        whole.copy_(paste_masks_in_image(mask[None], box[None], (size[0], size[1]))[0, 0] > 0.5)
    return found | {"masks": masks}
