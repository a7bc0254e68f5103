"""Semantic segmentation: UPerNet on the feature maps of all encoder stages, cross-entropy over pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from simmim.data.segments import IGNORED
from simmim.tasks.sliding_window import averaged_log_probabilities, resize_maps, sliding_window_logits
from simmim.tasks.task import Task
from simmim.tasks.upernet import ChannelNorm, FCNHead, UPerHead, upsample
from simmim.visualization import drawing
from swin import SwinEncoder
from swin.config import Pair


class Segmentation(Task):
    """The segmentation model of the Swin papers (arXiv 2103.14030, section 4.3): UPerNet and an auxiliary FCN head.

    The FCN head, on the second-coarsest map, is used in training only. Each feature map is normalized; the last one
    by the encoder's own norm, so that it equals the output of the encoder. Heads use LayerNorm, see
    :mod:`simmim.tasks.upernet`.

    Args:
        classes: class names; their count is the number of output channels of the heads.
        mean, std: channel statistics of pixels in [0, 1], one value per channel.
        channels, auxiliary_channels: width of the heads.
        auxiliary_weight: weight of the auxiliary loss.
        dropout: probability of dropping a channel before the last layer of each head.
        window, stride: (height, width) in px for sliding-window prediction
            (:func:`simmim.tasks.sliding_window.sliding_window_logits`); without a window, the image is predicted in
            one piece; without a stride, it is two thirds of the window.
        scales, flip: test-time augmentation, see :func:`simmim.tasks.sliding_window.averaged_log_probabilities`.
        short_px: short side to which images are resized for prediction; None: short side of the encoder's image size.
        first_label: value of the first class in label maps; 1 if 0 means "no class" (ADE20K).

    Raises:
        ValueError: the statistics do not match the channels, the encoder has one stage, the stride has no window or
            is longer than it, or a scale is not positive.
    """

    def __init__(
        self,
        encoder: SwinEncoder,
        classes: Sequence[str],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        channels: int = 512,
        auxiliary_channels: int = 256,
        auxiliary_weight: float = 0.4,
        dropout: float = 0.1,
        window: Pair | None = None,
        stride: Pair | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        short_px: int | None = None,
        first_label: int = 0,
    ) -> None:
        super().__init__(encoder, mean, std)
        stages = len(encoder.config.depths)
        if stages < 2:
            raise ValueError("an encoder with one stage has no feature pyramid: segmentation needs two stages or more")
        if window is None and stride is not None:
            raise ValueError(f"stride {list(stride)} without a window: give the window too, or neither")
        if window is not None:
            stride = stride or (max(1, window[0] * 2 // 3), max(1, window[1] * 2 // 3))
            if not all(0 < step <= side for step, side in zip(stride, window, strict=True)):
                raise ValueError(
                    f"windows of {list(window)} px every {list(stride)} px leave gaps: expected strides from 1 to the "
                    "sides of the window"
                )
        if not scales or min(scales) <= 0:
            raise ValueError(f"scales {list(scales)}: expected numbers above 0, 1 is the image as it is")
        self.classes, self.first_label = list(classes), first_label
        self.short_px = short_px or min(encoder.config.image_size)
        self.auxiliary_weight = auxiliary_weight
        self.window, self.stride, self.scales, self.flip = window, stride, tuple(scales), flip
        widths = [encoder.config.embed_dim * 2**index for index in range(stages)]
        self.norms = nn.ModuleList(ChannelNorm(width) for width in widths[:-1])
        self.head = UPerHead(widths, len(self.classes), channels, dropout)
        self.auxiliary_head = FCNHead(widths[-2], len(self.classes), auxiliary_channels, dropout)

    def description(self) -> dict[str, Any]:
        """Return the settings needed to rebuild the task around its encoder, as plain JSON."""
        return {
            "classes": self.classes,
            "channels": self.head.classifier.linear.in_features,
            "auxiliary_channels": self.auxiliary_head.classifier.linear.in_features,
            "auxiliary_weight": self.auxiliary_weight,
            "dropout": self.head.classifier.dropout.p,
            "window": self.window and list(self.window),
            "stride": self.stride and list(self.stride),
            "scales": list(self.scales),
            "flip": self.flip,
            "short_px": self.short_px,
            "first_label": self.first_label,
        }

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a batch: ``image`` uint8 ``(b, c, H, W)``, ``segments`` ``(b, H, W)``, 255 = ignored."""
        return self.loss(self.normalize(batch["image"]), batch["segments"])

    def loss(self, images: Tensor, segments: Tensor) -> Tensor:
        """Return the loss of both heads for normalized images."""
        maps = self.maps(images)
        loss = pixel_loss(self.upsample_logits(self.head(maps), 0, images), segments)
        logits = self.upsample_logits(self.auxiliary_head(maps[-2]), len(maps) - 2, images)
        return loss + self.auxiliary_weight * pixel_loss(logits, segments)

    def loss_on_fake_tensors(self, images: Tensor) -> Tensor:
        """Return the loss of fake images, with one class everywhere."""
        return self.loss(images, torch.zeros(len(images), *images.shape[-2:], dtype=torch.uint8))

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the normalized feature maps ``(b, c, h, w)`` of normalized images ``(b, c, H, W)``, finest first."""
        *fine, coarsest = self.encoder.pyramid(images)
        last = self.encoder.norm(coarsest.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return [norm(x) for norm, x in zip(self.norms, fine, strict=True)] + [last]

    def upsample_logits(self, logits: Tensor, level: int, images: Tensor) -> Tensor:
        """Upsample logits from the grid of map ``level`` (0 = finest) to the pixels of the images, in float32."""
        with torch.autocast(images.device.type, enabled=False):
            return upsample(logits.float(), self.encoder.config.patch_size * 2**level, images.shape[-2:])

    def logits(self, images: Tensor) -> Tensor:
        """Return float32 logits ``(b, classes, H, W)`` of normalized images ``(b, c, H, W)``, without windows."""
        return self.upsample_logits(self.head(self.maps(images)), 0, images)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Return logits ``(b, classes, H, W)`` of uint8 images ``(b, c, H, W)`` of any size.

        Windows, scales and flip are those of the constructor. With several scales or flip the result is the
        log-probability, which differs from logits by a constant at every pixel.
        """
        images = self.normalize(images)
        if self.scales == (1.0,) and not self.flip:
            return self._windowed_logits(images)
        return averaged_log_probabilities(self._windowed_logits, images, self.scales, self.flip)

    def _windowed_logits(self, images: Tensor) -> Tensor:
        if self.window is None or self.stride is None:
            return self.logits(images)
        return sliding_window_logits(self.logits, images, self.window, self.stride)

    @torch.no_grad()
    def eval_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss of the main head and the pixel accuracy, averaged over the images of a validation batch.

        Predictions are resized to ``segments``, which may differ in size from ``image``. The mean intersection over
        union is not a mean over images and is computed by :class:`simmim.metrics.mean_iou.MeanIoU`.
        """
        scores, segments = self.scores(batch), batch["segments"]
        correct = (scores.argmax(dim=1) == segments) & (segments != IGNORED)
        accuracy = correct.sum(dim=(1, 2)) / num_valid(segments)
        return {"loss": pixel_loss(scores, segments), "pixel_accuracy": accuracy.mean()}

    @torch.no_grad()
    def scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the predictions ``(b, classes, H, W)`` of a batch, resized to its ``segments``."""
        return resize_maps(self.predict(batch["image"]), batch["segments"].shape[-2:])

    @torch.no_grad()
    def visualize(self, batch: Mapping[str, Tensor]) -> Image.Image:
        """Render one row per image: image, true classes, predicted classes, and a legend."""
        images = resize_maps(drawing.to_rgb(batch["image"] / 255), batch["segments"].shape[-2:])
        return drawing.draw_segmentation(images, batch["segments"], self.scores(batch).argmax(dim=1), self.classes)


def pixel_loss(logits: Tensor, segments: Tensor) -> Tensor:
    """Compute the cross-entropy, averaged over the labeled pixels of each image and then over the images.

    Each image therefore has the same weight in any batch, and splitting a batch does not change its loss. An image
    without labels has loss 0 and no gradient.

    Args:
        logits: ``(b, classes, H, W)``, converted to float32.
        segments: uint8 ``(b, H, W)``, 255 = ignored.
    """
    losses = F.cross_entropy(logits.float(), segments.long(), ignore_index=IGNORED, reduction="none")
    return (losses.sum(dim=(1, 2)) / num_valid(segments)).mean()


def num_valid(segments: Tensor) -> Tensor:
    """Count the labeled pixels of each image, int64 ``(b,)``, at least 1 so that the result can be a divisor."""
    return (segments != IGNORED).sum(dim=(1, 2)).clamp(min=1)
