"""Classification: mean of the final features, one linear layer, cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import reduce
from PIL import Image
from torch import Tensor, nn

from simmim import visualize
from swin import SwinEncoder


class Classify(nn.Module):
    """The classifier of the Swin papers around any encoder that gives features ``(b, h, w, c)``.

    Args:
        classes: their names; how many decides the size of the head.
        mean, std: channel statistics of pixels in [0, 1], one number per channel.

    Raises:
        ValueError: statistics that do not match the channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: SwinEncoder,
        classes: Sequence[str],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        channels = encoder.config.in_chans
        if len(mean) != channels or len(std) != channels:
            raise ValueError(
                f"mean and std have {len(mean)} and {len(std)} numbers for {channels} channels: "
                "give one number per channel"
            )
        self.encoder = encoder
        self.classes = list(classes)
        self.label_smoothing = label_smoothing
        self.head = nn.Linear(encoder.config.num_features, len(self.classes))
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch: ``image`` uint8 ``(b, c, H, W)``, ``label`` int64 ``(b,)``."""
        logits = self.logits(batch["image"])
        return F.cross_entropy(logits.float(), batch["label"], label_smoothing=self.label_smoothing)

    def logits(self, images: Tensor) -> Tensor:
        """uint8 ``(b, c, H, W)`` -> ``(b, classes)``."""
        images = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        return self.head(reduce(self.encoder(images), "b h w c -> b c", "mean"))

    @torch.no_grad()
    def measure(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loss without smoothing, and the share of images with the right class first, or among the first five."""
        logits = self.logits(batch["image"]).float()
        right = logits.topk(min(5, len(self.classes))).indices == batch["label"][:, None]
        return {
            "loss": F.cross_entropy(logits, batch["label"]),
            "top1": right[:, 0].float().mean(),
            "top5": right.any(dim=1).float().mean(),
        }

    @torch.no_grad()
    def picture(self, batch: Mapping[str, Tensor]) -> Image.Image:
        """Every image with what it is and what it was taken for."""
        chosen = self.logits(batch["image"]).argmax(dim=1).tolist()
        captions = [
            f"{self.classes[label]}" if label == guess else f"{self.classes[label]}, not {self.classes[guess]}"
            for label, guess in zip(batch["label"].tolist(), chosen, strict=True)
        ]
        return visualize.captioned(visualize.to_rgb(batch["image"] / 255), captions)

    def no_decay_parameters(self) -> set[nn.Parameter]:
        """The encoder's and the bias of the head."""
        return self.encoder.no_decay_parameters() | {self.head.bias}
