"""SimMIM: mask tokens between embed and encode, predict pixels with one linear layer, L1 loss on the masked pixels.

The alternatives that the paper compares (losses, targets, heads) are options of the same class.

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
    """Images, target and prediction, float ``(b, c, H, W)`` in normalized pixels, and the pixel mask."""

    images: Tensor
    target: Tensor
    prediction: Tensor
    pixel_mask: Tensor
    """bool ``(b, 1, H, W)``, True = masked."""


class SimMIM(Task):
    """Masked image modeling (SimMIM, arXiv 2111.09886, section 3) around any encoder with ``embed`` and ``encode``.

    The methods are the components of the paper's framework: :meth:`embed` and :meth:`mask` (section 3.2, masking
    strategy), :meth:`encode` (section 3.1), :meth:`predict` (section 3.3, prediction head) and :meth:`loss`
    (section 3.4, prediction targets).

    Args:
        mask_generator: generates the mask of every sample.
        mean, std: channel statistics of pixels in [0, 1], one value per channel.
        loss: ``l1``, ``l2`` or ``smooth_l1``, averaged over pixels and channels.
        norm_target_window: side in pixels of the sliding window over which the target is normalized;
            None predicts plain pixels. The published Swin V2 models use 47.
        pixels: ``masked`` or ``all``: the pixels over which the loss is averaged.
        downsample: side in pixels of the squares over which prediction and target are averaged.
        head: ``linear``, ``mlp`` or ``inverse_swin``, see :func:`simmim.tasks.reconstruction_heads.make_head`.

    Raises:
        ValueError: the statistics do not match the channels, the window is even, the mask patch size is not a
            multiple of the token size, or ``downsample`` does not divide the mask patch size and the stride.
    """

    def __init__(
        self,
        encoder: SwinEncoder,
        mask_generator: MaskGenerator,
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
        self.set_mask_generator(mask_generator)
        if norm_target_window is not None and (norm_target_window % 2 == 0 or norm_target_window < 3):
            raise ValueError(f"norm_target_window must be an odd number from 3 on, got {norm_target_window}")
        self.elementwise_loss = LOSSES[loss]
        self.norm_target_window = norm_target_window
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, encoder.config.embed_dim))
        self.head = make_head(head, encoder.config)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def set_mask_generator(self, mask_generator: MaskGenerator) -> None:
        """Replace the mask generator.

        Raises:
            ValueError: the mask patch size is not a multiple of the token size or of ``downsample``.
        """
        token, stride = self.encoder.config.patch_size, self.encoder.config.stride
        patch = mask_generator.mask_patch_size
        if patch % token:
            raise ValueError(f"mask_patch_size {patch} must be a multiple of the token size {token} px")
        if patch % self.downsample or stride % self.downsample:
            raise ValueError(
                f"downsample {self.downsample} must divide mask_patch_size {patch} and the stride {stride} of the "
                f"encoder: {gcd(patch, stride)} is the largest"
            )
        self.mask_generator = mask_generator

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a batch: ``image`` uint8 ``(b, c, H, W)``, ``epoch`` and ``index`` int64 ``(b,)``."""
        return self.loss(*self.inputs(batch))

    def inputs(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the normalized images ``(b, c, H, W)`` of a batch and their ``patch_mask (b, hm, wm)``."""
        return self.normalize(batch["image"]), self.mask_generator(batch["epoch"], batch["index"])

    def embed(self, images: Tensor) -> Tensor:
        """Embed normalized images ``(b, c, H, W)`` as tokens ``(b, h, w, embed_dim)``."""
        return self.encoder.embed(images)

    def mask(self, tokens: Tensor, patch_mask: Tensor) -> Tensor:
        """Replace the tokens ``(b, h, w, embed_dim)`` under ``patch_mask (b, hm, wm)`` by the mask token."""
        token_mask = expand_mask(patch_mask, self.mask_generator.mask_patch_size // self.encoder.config.patch_size)
        return torch.where(token_mask[..., None], self.mask_token.to(tokens.dtype), tokens)

    def encode(self, tokens: Tensor) -> Tensor:
        """Encode tokens as features ``(b, h, w, num_features)``, on the grid of the last stage."""
        return self.encoder.encode(tokens)

    def masked_features(self, images: Tensor, patch_mask: Tensor) -> Tensor:
        """Embed, mask and encode normalized images ``(b, c, H, W)``; returns ``(b, h, w, num_features)``."""
        return self.encode(self.mask(self.embed(images), patch_mask))

    def predict(self, features: Tensor, needed: Tensor) -> Tensor:
        """Predict the pixels ``(k, c p q)`` of the ``k`` tokens where ``needed (b, h, w)`` is True."""
        # A linear layer predicts each token from its own features, so only the needed ones are computed.
        if isinstance(self.head, nn.Linear):
            return self.head(features[needed])
        return self.head(features)[needed]

    def loss(self, images: Tensor, patch_mask: Tensor) -> Tensor:
        """Return the mean error over the masked pixels, or over all pixels with ``pixels="all"``.

        Args:
            images: normalized ``(b, c, H, W)``.
            patch_mask: bool ``(b, hm, wm)``, True = masked.
        """
        features = self.masked_features(images, patch_mask)
        pixel_mask = self._pixel_mask(patch_mask)
        if self.pixels == "all":
            pixel_mask = torch.ones_like(pixel_mask)
        mask = self._patchify(pixel_mask, features)
        needed = mask.any(dim=-1)
        prediction = self.predict(features, needed)
        with torch.autocast(images.device.type, enabled=False):
            target = self._patchify(self._target(images), features)[needed]
            prediction = self._downsample_tokens(prediction.to(target.dtype))
            error = self.elementwise_loss(prediction, target, reduction="none")
            error = rearrange(error, "k (c pq) -> k c pq", c=images.shape[1])
            weight = mask[needed].to(error.dtype)[:, None]
            return (error * weight).sum() / (weight.sum() * images.shape[1])

    def eval_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss of a validation batch."""
        return {"loss": self(batch)}

    def loss_on_fake_tensors(self, images: Tensor) -> Tensor:
        """Return the loss of fake images, with as many predicted tokens as masks select on average."""
        features = self.masked_features(images, torch.zeros(len(images), *self.mask_generator.grid, dtype=torch.bool))
        fraction = 1.0 if self.pixels == "all" else masked_token_fraction(self.encoder.config, self.mask_generator)
        rows = max(1, round(fraction * features[..., 0].numel()))
        is_linear = isinstance(self.head, nn.Linear)
        prediction = self.head(features.flatten(0, 2)[:rows]) if is_linear else self.head(features)
        return F.l1_loss(prediction.float(), torch.zeros_like(prediction, dtype=torch.float32))

    def reconstruct(self, images: Tensor, patch_mask: Tensor) -> Reconstruction:
        """Predict every pixel of normalized images, masked or not."""
        prediction = self.head(self.masked_features(images, patch_mask))
        stride = self.encoder.config.stride
        prediction = rearrange(prediction, "b h w (c p q) -> b c (h p) (w q)", p=stride, q=stride)
        prediction = prediction[:, :, : images.shape[2], : images.shape[3]].to(images.dtype)
        prediction = mean_of_squares(prediction, self.downsample)
        return Reconstruction(images, self._target(images), prediction, self._pixel_mask(patch_mask))

    @torch.no_grad()
    def visualize(self, batch: Mapping[str, Tensor]) -> Image.Image:
        """Render the panels of every image of a batch, one row per image."""
        return drawing.draw_panels(self.panels(*self.inputs(batch)), across=1)

    @torch.no_grad()
    def panels(
        self, images: Tensor, patch_mask: Tensor, bands: Sequence[int] | str | None = None
    ) -> list[tuple[str, Tensor]]:
        """Return captions and RGB panels ``(b, 3, H, W)``: original, masked, prediction, pasted prediction, error.

        A normalized target carries no local brightness. Its prediction is shown beside the normalized target, on
        the same scale, and once more with the mean and standard deviation of the true pixels, which the model has
        not seen; the caption states this.

        Args:
            images: normalized ``(b, c, H, W)``.
            patch_mask: ``(b, hm, wm)``
            bands: see :func:`simmim.visualization.drawing.to_rgb`.
        """
        result = self.reconstruct(images, patch_mask)
        mask, pixels = result.pixel_mask, images * self.std + self.mean
        colors = drawing.principal_colors(pixels) if bands == "pca" else partial(drawing.to_rgb, bands=bands)
        original = colors(pixels)
        columns = [("original", original), ("masked", drawing.gray_out(original, mask))]
        if self.norm_target_window is None:
            predicted = colors(result.prediction * self.std + self.mean)
            columns += [("prediction", predicted), ("prediction, pasted", torch.where(mask, predicted, original))]
            largest = 1.0
        else:
            scaled = [x / 4 + 0.5 for x in (result.target, result.prediction)]
            if bands == "pca":
                colors_of_target = drawing.principal_colors(scaled[0])
            else:
                colors_of_target = partial(drawing.to_rgb, bands=bands)
            target, predicted = map(colors_of_target, scaled)
            mean, deviation, center = local_statistics(images, self.norm_target_window)
            restored = colors((result.prediction * deviation + mean + center) * self.std + self.mean)
            columns += [
                ("normalized target", target),
                ("its prediction, pasted", torch.where(mask, predicted, target)),
                ("with TRUE local mean, s.d.", torch.where(mask, restored, original)),
            ]
            largest = 2.0
        return [*columns, ("error", drawing.error_map(result.prediction, result.target, mask, largest=largest))]

    def description(self) -> dict[str, Any]:
        """Return the settings that rebuild the task for reconstruction, as plain JSON, without those of the loss."""
        return {
            "mask_patch_size": self.mask_generator.mask_patch_size,
            "mask_ratio": self.mask_generator.mask_ratio,
            "mask_strategy": self.mask_generator.strategy,
            "norm_target_window": self.norm_target_window,
            "downsample": self.downsample,
            "head": self.head_kind,
        }

    def no_decay_parameters(self) -> set[nn.Parameter]:
        """Return the parameters without weight decay: those of every task, and the mask token."""
        return super().no_decay_parameters() | {self.mask_token}

    def _target(self, images: Tensor) -> Tensor:
        if self.norm_target_window is not None:
            images = normalize_locally(images, self.norm_target_window)
        return mean_of_squares(images, self.downsample)

    def _downsample_tokens(self, pixels: Tensor) -> Tensor:
        """Replace every pixel of tokens ``(k, c p q)`` by the mean of its square."""
        if self.downsample == 1:
            return pixels
        stride = self.encoder.config.stride
        squares = rearrange(pixels, "k (c p q) -> k c p q", p=stride, q=stride)
        return mean_of_squares(squares, self.downsample).flatten(1)

    def _pixel_mask(self, patch_mask: Tensor) -> Tensor:
        """Expand ``patch_mask (b, hm, wm)`` to pixels, bool ``(b, 1, H, W)``."""
        return expand_mask(patch_mask, self.mask_generator.mask_patch_size)[:, None]

    def _patchify(self, pixels: Tensor, features: Tensor) -> Tensor:
        """Split ``(b, c, H, W)`` into the tokens of the features, ``(b, h, w, c p q)``, zero-padded to their grid."""
        stride = self.encoder.config.stride
        bottom = features.shape[1] * stride - pixels.shape[2]
        right = features.shape[2] * stride - pixels.shape[3]
        if bottom or right:
            pixels = F.pad(pixels, (0, right, 0, bottom))
        return rearrange(pixels, "b c (h p) (w q) -> b h w (c p q)", p=stride, q=stride)


def masked_token_fraction(config: SwinConfig, mask_generator: MaskGenerator) -> float:
    """Return the expected fraction of last-stage tokens that hold masked pixels.

    It is exact if mask patches are at least as large as these tokens.
    """
    patches = max(1, config.stride // mask_generator.mask_patch_size) ** 2
    return 1 - (1 - mask_generator.num_masked / mask_generator.num_mask_patches) ** patches


def mean_of_squares(pixels: Tensor, side: int) -> Tensor:
    """Replace every pixel of ``(b, c, H, W)`` by the mean of the square of ``side`` pixels that contains it.

    H and W are multiples of ``side``.
    """
    if side == 1:
        return pixels
    means = F.avg_pool2d(pixels, side)
    return means.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)


def normalize_locally(images: Tensor, window: int) -> Tensor:
    """Normalize every pixel of ``(b, c, H, W)`` with mean and deviation of the window around it, per channel."""
    mean, deviation, center = local_statistics(images, window)
    return (images - center - mean) / deviation


def local_statistics(images: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute mean and standard deviation of the window around every pixel, per channel.

    The window is cut off at the border and the variance is unbiased (official SimMIM code for Swin V2).

    Returns:
        Local means, relative to the mean of the image, and local standard deviations, both ``(b, c, H, W)``, and
        the means of the images ``(b, c, 1, 1)``.
    """

    def window_mean(x: Tensor) -> Tensor:
        # The mean over a rectangle is separable, also at the border, so two passes along one axis each suffice.
        for kernel in ((window, 1), (1, window)):
            padding = (kernel[0] // 2, kernel[1] // 2)
            x = F.avg_pool2d(x, kernel, stride=1, padding=padding, count_include_pad=False)
        return x

    # E[x^2] - E[x]^2 loses digits in flat regions; subtracting the mean of the image first reduces the loss.
    center = images.mean(dim=(2, 3), keepdim=True)
    images = images - center
    mean = window_mean(images)
    ones = torch.ones_like(images[:1, :1])
    count = F.avg_pool2d(ones, window, 1, window // 2, count_include_pad=True) * window**2
    variance = (window_mean(images**2) - mean**2).clamp(min=0) * count / (count - 1)
    return mean, (variance + 1e-6).sqrt(), center
