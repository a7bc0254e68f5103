"""Classification of images and clips: mean of the final features, one linear layer, cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from PIL import Image
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from simmim.tasks.task import Task
from simmim.visualization import drawing
from swin import SwinEncoder
from swin.linear import Linear


class Classification(Task):
    """The classifier of the Swin papers around any encoder that gives features ``(b, h, w, c)`` or ``(b, f, h, w, c)``.

    ``image`` is ``(b, c, H, W)``, or ``(b, c, T, H, W)`` where the encoder is one of videos.

    Args:
        classes: their names; how many decides the size of the head.
        mean, std: channel statistics of pixels in [0, 1], one number per channel.
        label_smoothing, mixup, cutmix, erasing: in training only; alphas of mixup (arXiv 1710.09412) and
            CutMix (arXiv 1905.04899), which need even batches, and the probability of random erasing
            (arXiv 1708.04896); all by timm. They draw from the global generators. What is cut out of a clip
            is the same in all frames (VideoMix, arXiv 2012.03457).

    Raises:
        ValueError: statistics that do not match the channels.
    """

    def __init__(
        self,
        encoder: SwinEncoder,
        classes: Sequence[str],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        erasing: float = 0.0,
    ) -> None:
        super().__init__(encoder, mean, std)
        self.classes = list(classes)
        self.label_smoothing = label_smoothing
        self.mix: Mixup | None = None
        if mixup or cutmix:
            self.mix = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=len(self.classes))
        self.erasing = erasing
        self.head = Linear(encoder.config.num_features, len(self.classes))

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch: ``image`` uint8 ``(b, c, H, W)``, ``label`` int64 ``(b,)``."""
        images, target = self.normalize(batch["image"]), batch["label"]
        shape = images.shape
        images = images.flatten(1, -3)  # frames as channels
        if self.training and self.mix is not None:
            images, target = self.mix(images, target)
        if self.training and self.erasing:
            images = RandomErasing(self.erasing, mode="pixel", device=str(images.device))(images)
        smoothing = self.label_smoothing if target.ndim == 1 else 0.0  # mixup has smoothed already
        logits = self.logits(images.view(shape))
        return F.cross_entropy(logits.float(), target, label_smoothing=smoothing)

    def logits(self, images: Tensor) -> Tensor:
        """Normalised ``(b, c, H, W)`` -> ``(b, classes)``."""
        return self.head(reduce(self.encoder(images), "b ... c -> b c", "mean"))

    def loss_on_fake_tensors(self, images: Tensor) -> Tensor:
        target = torch.zeros(len(images), dtype=torch.int64)
        return F.cross_entropy(self.logits(images).float(), target)

    def predict(self, images: Tensor) -> Tensor:
        """uint8 ``(b, c, H, W)`` -> logits ``(b, classes)``; of several views of each clip, ``(b, v, c, T, H, W)``,
        the logarithm of the mean of their probabilities."""
        if images.ndim < 6:
            return self.logits(self.normalize(images)).float()
        probabilities = [self.predict(view).softmax(dim=1) for view in images.unbind(dim=1)]
        return torch.stack(probabilities).mean(dim=0).log()

    @torch.no_grad()
    def eval_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loss without smoothing; the share of images with the right class first, or among the first five;
        and the share given to another class with 90 % certainty, which rises with the share of wrong labels.
        """
        logits = self.predict(batch["image"])
        right = logits.topk(min(5, len(self.classes))).indices == batch["label"][:, None]
        certain = logits.softmax(dim=1).amax(dim=1) > 0.9
        return {
            "loss": F.cross_entropy(logits, batch["label"]),
            "top1": right[:, 0].float().mean(),
            "top5": right.any(dim=1).float().mean(),
            "certain_of_another": (certain & ~right[:, 0]).float().mean(),
        }

    @torch.no_grad()
    def visualize(self, batch: Mapping[str, Tensor]) -> Image.Image:
        """Every image, or some frames of every clip, with what it is and what it was taken for."""
        chosen = self.predict(batch["image"]).argmax(dim=1).tolist()
        captions = [
            f"{self.classes[label]}" if label == guess else f"{self.classes[label]}, not {self.classes[guess]}"
            for label, guess in zip(batch["label"].tolist(), chosen, strict=True)
        ]
        return drawing.captioned(drawing.to_rgb(drawing.film(batch["image"] / 255)), captions)

    @torch.no_grad()
    def class_activation(self, images: Tensor) -> Tensor:
        """Where each class is seen: normalised ``(b, c, H, W)`` -> ``(b, classes, h, w)``, whose mean is the logit;
        of a clip ``(b, classes, f, h, w)``.

        The head is linear on the mean over the grid, so the map is exact (CAM, arXiv 1512.04150).
        """
        return rearrange(self.head(self.encoder(images)), "b ... k -> b k ...")
