"""Image and clip classification: mean of the final features, one linear layer, cross-entropy."""

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
    """The classifier of the Swin papers (arXiv 2103.14030, appendix A2.1) on an image or video encoder.

    Features are ``(b, h, w, c)`` or ``(b, f, h, w, c)``; ``image`` is ``(b, c, H, W)``, or ``(b, c, T, H, W)`` with a
    video encoder.

    Args:
        classes: class names; their count is the size of the head.
        mean, std: channel statistics of pixels in [0, 1], one value per channel.
        label_smoothing, mixup, cutmix, erasing: used in training only: label smoothing, the alphas of mixup
            (arXiv 1710.09412) and CutMix (arXiv 1905.04899), which need even batches, and the probability of
            random erasing (arXiv 1708.04896), all by timm. They draw from the global random generators. The same
            region of a clip is replaced in all frames (VideoMix, arXiv 2012.03457).

    Raises:
        ValueError: the statistics do not match the channels.
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
        """Return the loss of a batch: ``image`` uint8 ``(b, c, H, W)``, ``label`` int64 ``(b,)``."""
        images, target = self.normalize(batch["image"]), batch["label"]
        shape = images.shape
        images = images.flatten(1, -3)  # frames become channels
        if self.training and self.mix is not None:
            images, target = self.mix(images, target)
        if self.training and self.erasing:
            images = RandomErasing(self.erasing, mode="pixel", device=str(images.device))(images)
        smoothing = self.label_smoothing if target.ndim == 1 else 0.0  # mixup has already smoothed the targets
        logits = self.logits(images.view(shape))
        return F.cross_entropy(logits.float(), target, label_smoothing=smoothing)

    def logits(self, images: Tensor) -> Tensor:
        """Return the class logits ``(b, classes)`` of normalized images ``(b, c, H, W)``."""
        return self.head(reduce(self.encoder(images), "b ... c -> b c", "mean"))

    def loss_on_fake_tensors(self, images: Tensor) -> Tensor:
        """Return the cross-entropy of fake images."""
        target = torch.zeros(len(images), dtype=torch.int64)
        return F.cross_entropy(self.logits(images).float(), target)

    def predict(self, images: Tensor) -> Tensor:
        """Return the logits ``(b, classes)`` of uint8 images ``(b, c, H, W)``.

        For several views of each clip, ``(b, v, c, T, H, W)``, return the logarithm of their mean probabilities.
        """
        if images.ndim < 6:
            return self.logits(self.normalize(images)).float()
        probabilities = [self.predict(view).softmax(dim=1) for view in images.unbind(dim=1)]
        return torch.stack(probabilities).mean(dim=0).log()

    @torch.no_grad()
    def eval_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return loss, top-1 and top-5 accuracy, and the fraction of confident errors of a validation batch.

        The loss is without label smoothing. ``certain_of_another`` is the fraction of images assigned to a wrong
        class with a probability above 90 %; it rises with the fraction of wrong labels.
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
        """Render every image, or some frames of every clip, with its label and, if different, the predicted class."""
        predicted = self.predict(batch["image"]).argmax(dim=1).tolist()
        captions = [
            f"{self.classes[label]}" if label == guess else f"{self.classes[label]}, not {self.classes[guess]}"
            for label, guess in zip(batch["label"].tolist(), predicted, strict=True)
        ]
        return drawing.draw_captioned(drawing.to_rgb(drawing.frames_side_by_side(batch["image"] / 255)), captions)

    @torch.no_grad()
    def class_activation(self, images: Tensor) -> Tensor:
        """Return class activation maps ``(b, classes, h, w)`` of normalized images, ``(b, classes, f, h, w)`` of clips.

        The head is linear on the mean over the grid, so the mean of a map is exactly the logit (CAM, arXiv 1512.04150).
        """
        return rearrange(self.head(self.encoder(images)), "b ... k -> b k ...")
