"""Semantic segmentation: UPerNet on all maps of the encoder, cross-entropy over pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from simmim.data.segments import IGNORED
from simmim.tasks.sliding_window import averaged_log_probabilities, resized, sliding_logits
from simmim.tasks.task import Task
from simmim.tasks.upernet import ChannelNorm, FCNHead, UPerHead, enlarge
from simmim.visualization import drawing
from swin import SwinEncoder
from swin.config import Pair


class Segmentation(Task):
    """The segmenter of the Swin papers (UPerNet, and an FCN head on the last map but one while training).

    Each map of the encoder has a norm; of the last map it is the encoder's own, so that features are those that
    everything else sees. Heads have LayerNorm, see :mod:`simmim.tasks.upernet`.

    Args:
        classes: their names; how many decides the size of the heads.
        mean, std: channel statistics of pixels in [0, 1], one number per channel.
        channels, auxiliary_channels: inside the heads.
        auxiliary_weight: of the loss of the auxiliary head.
        dropout: of channels before the last layer of either head.
        window, stride: px, for predictions in windows (:func:`simmim.tasks.sliding_window.sliding_logits`); None:
            the whole image at once. A window alone has two thirds of itself for a stride.
        scales, flip: see :func:`simmim.tasks.sliding_window.averaged_log_probabilities`; for predictions.
        short_px: the short side at which whole images are looked at; None: that of the encoder's image size.
        first_label: the number of the first class in label maps; 1 where 0 is no class (ADE20K).

    Raises:
        ValueError: statistics that do not match the channels, an encoder of one stage, a stride without a window or
            longer than it, scales that are not positive.
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
            raise ValueError("an encoder of one stage has no pyramid to segment with: expected two stages or more")
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
        """What must be known to rebuild it around its encoder; plain JSON."""
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
        """The loss of a batch: ``image`` uint8 ``(b, c, H, W)``, ``segments`` uint8 ``(b, H, W)``, 255 = ignored."""
        return self.loss(self.normalize(batch["image"]), batch["segments"])

    def loss(self, images: Tensor, segments: Tensor) -> Tensor:
        """Of both heads; images are normalised."""
        maps = self.maps(images)
        loss = pixel_loss(self.at_pixels(self.head(maps), 0, images), segments)
        auxiliary = self.auxiliary_head(maps[-2])
        return loss + self.auxiliary_weight * pixel_loss(self.at_pixels(auxiliary, len(maps) - 2, images), segments)

    def loss_on_fake_tensors(self, images: Tensor) -> Tensor:
        return self.loss(images, torch.zeros(len(images), *images.shape[-2:], dtype=torch.uint8))

    def maps(self, images: Tensor) -> list[Tensor]:
        """Normalised images ``(b, c, H, W)`` -> normalised maps ``(b, c, h, w)``, finest first."""
        *fine, coarsest = self.encoder.pyramid(images)
        last = self.encoder.norm(coarsest.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return [norm(x) for norm, x in zip(self.norms, fine, strict=True)] + [last]

    def at_pixels(self, logits: Tensor, level: int, images: Tensor) -> Tensor:
        """Logits on the grid of a map -> float32 at every pixel of the images."""
        with torch.autocast(images.device.type, enabled=False):
            return enlarge(logits.float(), self.encoder.config.patch_size * 2**level, images.shape[-2:])

    def logits(self, images: Tensor) -> Tensor:
        """Normalised ``(b, c, H, W)`` -> float32 ``(b, classes, H, W)``, the whole image at once."""
        return self.at_pixels(self.head(self.maps(images)), 0, images)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """uint8 ``(b, c, H, W)`` of any size -> logits ``(b, classes, H, W)`` up to a constant at every pixel.

        In windows, at several scales and mirrored, as the constructor was told.
        """
        images = self.normalize(images)
        if self.scales == (1.0,) and not self.flip:
            return self._seen(images)
        return averaged_log_probabilities(self._seen, images, self.scales, self.flip)

    def _seen(self, images: Tensor) -> Tensor:
        if self.window is None or self.stride is None:
            return self.logits(images)
        return sliding_logits(self.logits, images, self.window, self.stride)

    @torch.no_grad()
    def eval_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loss of the main head and share of pixels with the right class, of each image, and then their means.

        ``segments`` may have another size than ``image``: predictions are resized to it. The mean
        intersection over union is no mean over images: see :class:`simmim.metrics.mean_iou.MeanIoU`.
        """
        scores, segments = self.scores(batch), batch["segments"]
        right = (scores.argmax(dim=1) == segments) & (segments != IGNORED)
        share = right.sum(dim=(1, 2)) / num_valid(segments)
        return {"loss": pixel_loss(scores, segments), "pixel_accuracy": share.mean()}

    @torch.no_grad()
    def scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Predictions ``(b, classes, H, W)`` at the size of ``segments``; the highest is the class."""
        return resized(self.predict(batch["image"]), batch["segments"].shape[-2:])

    @torch.no_grad()
    def visualize(self, batch: Mapping[str, Tensor]) -> Image.Image:
        """Every image, what it holds, what was found, and the classes that are meant by the colours."""
        images = resized(drawing.to_rgb(batch["image"] / 255), batch["segments"].shape[-2:])
        return drawing.segmentation(images, batch["segments"], self.scores(batch).argmax(dim=1), self.classes)


def pixel_loss(logits: Tensor, segments: Tensor) -> Tensor:
    """Cross-entropy: the mean over the pixels of an image that have a label, then over images.

    So an image counts the same in whatever batch, and a batch in one piece and in several has the same loss. An
    image without any label has loss 0, and gives no gradient.

    Args:
        logits: ``(b, classes, H, W)``, taken in float32.
        segments: uint8 ``(b, H, W)``, 255 = ignored.
    """
    losses = F.cross_entropy(logits.float(), segments.long(), ignore_index=IGNORED, reduction="none")
    return (losses.sum(dim=(1, 2)) / num_valid(segments)).mean()


def num_valid(segments: Tensor) -> Tensor:
    """Of each image the pixels that have a label, int64 ``(b,)``; 1 where there are none, for a divisor."""
    return (segments != IGNORED).sum(dim=(1, 2)).clamp(min=1)
