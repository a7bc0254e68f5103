"""SimMIM: mask tokens between embed and encode, one linear layer, L1 on the masked pixels; and what it was chosen from.

Letters: b batch, h w token grid, c channels, k masked tokens, p q pixels inside a token, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import gcd
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from simmim.masking import MaskGenerator, expand_mask
from simmim.tasks.reconstruction_heads import make_head
from simmim.tasks.task import Task
from simmim.visualization import drawing
from swin import SwinConfig, SwinEncoder

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}


class Reconstruction(NamedTuple):
    """What a picture needs; all but ``pixel_mask`` are float ``(b, c, H, W)`` in normalised pixels."""

    images: Tensor
    target: Tensor
    prediction: Tensor
    pixel_mask: Tensor
    """bool ``(b, 1, H, W)``, True = masked."""


class SimMIM(Task):
    """Masked image modelling around any encoder with ``embed`` and ``encode`` (arXiv 2111.09886, section 3).

    Args:
        mean, std: channel statistics of pixels in [0, 1], one number per channel.
        loss: ``l1``, ``l2`` or ``smooth_l1``, averaged over pixels and channels.
        norm_target_window: side of the sliding window, in pixels, over which the target is
            normalised; None predicts plain pixels. The published Swin V2 models use 47.
        pixels: ``masked`` or ``all``: of which the loss is.
        downsample: prediction and target are averaged over squares of so many pixels a side.
        head: ``linear``, ``mlp`` or ``inverse_swin``, see :func:`simmim.tasks.reconstruction_heads.make_head`.

    Raises:
        ValueError: statistics that do not match the channels, an even window, cells that do not
            hold whole tokens, or squares that neither cells nor features can be divided into.
    """

    def __init__(
        self,
        encoder: SwinEncoder,
        masks: MaskGenerator,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        loss: str = "l1",
        norm_target_window: int | None = None,
        pixels: str = "masked",
        downsample: int = 1,
        head: str = "linear",
    ) -> None:
        super().__init__(encoder, mean, std)
        self.pixels, self.downsample, self.head_kind = pixels, downsample, head
        self.use_masks(masks)
        if norm_target_window is not None and (norm_target_window % 2 == 0 or norm_target_window < 3):
            raise ValueError(f"the window of a normalised target must be odd, from 3, got {norm_target_window}")
        self.elementwise_loss = LOSSES[loss]
        self.norm_target_window = norm_target_window
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, encoder.config.embed_dim))
        self.head = make_head(head, encoder.config)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch: ``image`` uint8 ``(b, c, H, W)``, ``epoch`` and ``index`` int64 ``(b,)``."""
        return self.loss(*self.inputs(batch))

    def use_masks(self, masks: MaskGenerator) -> None:
        """Hide by other masks from now on.

        Raises:
            ValueError: cells that do not hold whole tokens or whole squares of the target.
        """
        token, stride, cell = self.encoder.config.patch_size, self.encoder.config.stride, masks.mask_patch_size
        if cell % token:
            raise ValueError(f"mask_patch_size {cell} must be a multiple of the token size {token} px")
        if cell % self.downsample or stride % self.downsample:
            raise ValueError(
                f"downsample {self.downsample} must divide mask_patch_size {cell} and the stride {stride} of the "
                f"encoder: {gcd(cell, stride)} is the largest"
            )
        self.masks = masks

    def eval_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What held-out images are judged by: the loss."""
        return {"loss": self(batch)}

    def inputs(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Normalised images ``(b, c, H, W)`` and their ``patch_mask (b, hm, wm)``."""
        return self.normalize(batch["image"]), self.masks(batch["epoch"], batch["index"])

    def loss(self, images: Tensor, patch_mask: Tensor) -> Tensor:
        """Mean error over the pixels; only tokens that hold any of them are predicted."""
        features = self.encode(images, patch_mask)
        counted = self._pixel_mask(patch_mask)
        if self.pixels == "all":
            counted = torch.ones_like(counted)
        mask = self._patchify(counted, features)
        needed = mask.any(dim=-1)
        # A linear layer draws every token alone, so the others need not be drawn.
        is_linear = isinstance(self.head, nn.Linear)
        prediction = self.head(features[needed]) if is_linear else self.head(features)[needed]  # (k, c p q)
        with torch.autocast(images.device.type, enabled=False):
            target = self._patchify(self._target(images), features)[needed]
            prediction = self._downsample_tokens(prediction.to(target.dtype))
            error = self.elementwise_loss(prediction, target, reduction="none")
            error = rearrange(error, "k (c pq) -> k c pq", c=images.shape[1])
            weight = mask[needed].to(error.dtype)[:, None]
            return (error * weight).sum() / (weight.sum() * images.shape[1])

    def loss_on_fake_tensors(self, images: Tensor) -> Tensor:
        """Of as many tokens as masks leave on average."""
        features = self.encode(images, torch.zeros(len(images), *self.masks.grid, dtype=torch.bool))
        share = 1.0 if self.pixels == "all" else masked_token_fraction(self.encoder.config, self.masks)
        rows = max(1, round(share * features[..., 0].numel()))
        is_linear = isinstance(self.head, nn.Linear)
        drawn = self.head(features.flatten(0, 2)[:rows]) if is_linear else self.head(features)
        return F.l1_loss(drawn.float(), torch.zeros_like(drawn, dtype=torch.float32))

    def reconstruct(self, images: Tensor, patch_mask: Tensor) -> Reconstruction:
        """Predict every pixel, masked or not."""
        prediction = self.head(self.encode(images, patch_mask))
        stride = self.encoder.config.stride
        prediction = rearrange(prediction, "b h w (c p q) -> b c (h p) (w q)", p=stride, q=stride)
        prediction = prediction[:, :, : images.shape[2], : images.shape[3]].to(images.dtype)
        prediction = mean_of_squares(prediction, self.downsample)
        return Reconstruction(images, self._target(images), prediction, self._pixel_mask(patch_mask))

    @torch.no_grad()
    def visualize(self, batch: Mapping[str, Tensor]) -> Image.Image:
        """The views of a batch, every image a row."""
        return drawing.panels(self.views(*self.inputs(batch)), across=1)

    @torch.no_grad()
    def views(
        self, images: Tensor, patch_mask: Tensor, bands: Sequence[int] | str | None = None
    ) -> list[tuple[str, Tensor]]:
        """Captions and colours ``(b, 3, H, W)``: original, masked, prediction, pasted into what is visible, error.

        A normalised target says nothing of local brightness: its prediction is shown beside the normalised
        target, at its own scale; and once more with the mean and deviation of the true pixels, which no
        model has seen, and which says so.

        Args:
            images: normalised ``(b, c, H, W)``.
            patch_mask: ``(b, hm, wm)``
            bands: as of :func:`simmim.visualization.drawing.to_rgb`.
        """
        result = self.reconstruct(images, patch_mask)
        mask, pixels = result.pixel_mask, images * self.std + self.mean
        colours = drawing.principal_colours(pixels) if bands == "pca" else partial(drawing.to_rgb, bands=bands)
        original = colours(pixels)
        columns = [("original", original), ("masked", drawing.hide(original, mask))]
        if self.norm_target_window is None:
            predicted = colours(result.prediction * self.std + self.mean)
            columns += [("prediction", predicted), ("prediction, pasted", torch.where(mask, predicted, original))]
            largest = 1.0
        else:
            scaled = [x / 4 + 0.5 for x in (result.target, result.prediction)]
            if bands == "pca":
                colours_of_target = drawing.principal_colours(scaled[0])
            else:
                colours_of_target = partial(drawing.to_rgb, bands=bands)
            target, predicted = map(colours_of_target, scaled)
            mean, deviation, centre = local_statistics(images, self.norm_target_window)
            restored = colours((result.prediction * deviation + mean + centre) * self.std + self.mean)
            columns += [
                ("normalised target", target),
                ("its prediction, pasted", torch.where(mask, predicted, target)),
                ("with TRUE local mean, s.d.", torch.where(mask, restored, original)),
            ]
            largest = 2.0
        return [*columns, ("error", drawing.error_map(result.prediction, result.target, mask, largest=largest))]

    def description(self) -> dict[str, Any]:
        """What must be known to rebuild it around its encoder; plain JSON."""
        return {
            "mask_patch_size": self.masks.mask_patch_size,
            "mask_ratio": self.masks.mask_ratio,
            "mask_strategy": self.masks.strategy,
            "norm_target_window": self.norm_target_window,
            "downsample": self.downsample,
            "head": self.head_kind,
        }

    def no_decay_parameters(self) -> set[nn.Parameter]:
        """As of any objective, and the mask token."""
        return super().no_decay_parameters() | {self.mask_token}

    def encode(self, images: Tensor, patch_mask: Tensor) -> Tensor:
        """Features ``(b, h, w, num_features)`` of normalised images, the tokens under the mask replaced."""
        tokens = self.encoder.embed(images)
        token_mask = expand_mask(patch_mask, self.masks.mask_patch_size // self.encoder.config.patch_size)
        tokens = torch.where(token_mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        return self.encoder.encode(tokens)

    def _target(self, images: Tensor) -> Tensor:
        if self.norm_target_window is not None:
            images = normalize_locally(images, self.norm_target_window)
        return mean_of_squares(images, self.downsample)

    def _downsample_tokens(self, pixels: Tensor) -> Tensor:
        """``(k, c p q)`` -> the same, every pixel the mean of its square."""
        if self.downsample == 1:
            return pixels
        stride = self.encoder.config.stride
        squares = rearrange(pixels, "k (c p q) -> k c p q", p=stride, q=stride)
        return mean_of_squares(squares, self.downsample).flatten(1)

    def _pixel_mask(self, patch_mask: Tensor) -> Tensor:
        return expand_mask(patch_mask, self.masks.mask_patch_size)[:, None]

    def _patchify(self, pixels: Tensor, features: Tensor) -> Tensor:
        """``(b, c, H, W)`` -> ``(b, h, w, c p q)`` on the grid of the features, zeros beyond the image."""
        stride = self.encoder.config.stride
        bottom = features.shape[1] * stride - pixels.shape[2]
        right = features.shape[2] * stride - pixels.shape[3]
        if bottom or right:
            pixels = F.pad(pixels, (0, right, 0, bottom))
        return rearrange(pixels, "b c (h p) (w q) -> b h w (c p q)", p=stride, q=stride)


def masked_token_fraction(config: SwinConfig, masks: MaskGenerator) -> float:
    """Of the tokens of the last stage those that hold masked pixels: exact where cells are no smaller than tokens."""
    cells = max(1, config.stride // masks.mask_patch_size) ** 2
    return 1 - (1 - masks.num_masked / masks.num_mask_patches) ** cells


def mean_of_squares(pixels: Tensor, side: int) -> Tensor:
    """``(b, c, H, W)`` -> the same, every pixel the mean of the square of ``side`` pixels that it lies in.

    H and W are multiples of ``side``.
    """
    if side == 1:
        return pixels
    means = F.avg_pool2d(pixels, side)
    return means.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)


def normalize_locally(images: Tensor, window: int) -> Tensor:
    """Every pixel minus the mean, over the standard deviation, of the window around it, per channel.

    ``images`` is ``(b, c, H, W)``; so is the result.
    """
    mean, deviation, centre = local_statistics(images, window)
    return (images - centre - mean) / deviation


def local_statistics(images: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation of the window around every pixel, ``(b, c, H, W)``, the mean relative to the
    third, the mean of the image ``(b, c, 1, 1)``.

    The window is cut off at the border and the variance is unbiased (official SimMIM code for Swin V2).
    """

    def window_mean(x: Tensor) -> Tensor:
        # Two passes along one axis each: the mean over a rectangle is separable, also at the border.
        for kernel in ((window, 1), (1, window)):
            padding = (kernel[0] // 2, kernel[1] // 2)
            x = F.avg_pool2d(x, kernel, stride=1, padding=padding, count_include_pad=False)
        return x

    # E[x^2] - E[x]^2 cancels where the picture is flat; around the image's own mean it cancels less.
    centre = images.mean(dim=(2, 3), keepdim=True)
    images = images - centre
    mean = window_mean(images)
    ones = torch.ones_like(images[:1, :1])
    count = F.avg_pool2d(ones, window, 1, window // 2, count_include_pad=True) * window**2
    variance = (window_mean(images**2) - mean**2).clamp(min=0) * count / (count - 1)
    return mean, (variance + 1e-6).sqrt(), centre
