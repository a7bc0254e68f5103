"""SimMIM of clips: the same cells are masked in every frame, as tubes.

Letters: b batch, f h w token grid, c channels, n masked tokens, k p q frames and pixels inside a token, T H W frames
and pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from simmim.masking import MaskGenerator, expand_mask
from simmim.tasks.simmim import masked_token_fraction
from simmim.tasks.task import Task
from simmim.visualization import drawing
from swin.linear import Linear
from swin.video import VideoEncoder


class VideoSimMIM(Task):
    """Masked video modelling: mask tokens between embed and encode, one linear layer, L1 on the masked pixels (SimMIM,
    arXiv 2111.09886, section 3), with tubes for masks, so that no other frame tells what is behind them (VideoMAE,
    arXiv 2203.12602).

    Args:
        masks: of the frames.
        mean, std: channel statistics of pixels in [0, 1], one number per channel.

    Raises:
        ValueError: statistics that do not match the channels, or cells that do not hold whole tokens.
    """

    encoder: VideoEncoder
    norm_target_window: int | None = None  # of images only
    downsample = 1

    def __init__(
        self, encoder: VideoEncoder, masks: MaskGenerator, *, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__(encoder, mean, std)
        config = encoder.config
        if masks.mask_patch_size % config.patch_size:
            raise ValueError(
                f"mask_patch_size {masks.mask_patch_size} must be a multiple of the token size {config.patch_size} px"
            )
        self.masks = masks
        self.token = {"k": config.temporal_patch, "p": config.stride, "q": config.stride}
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, 1, config.embed_dim))
        self.head = Linear(config.num_features, config.in_chans * config.temporal_patch * config.stride**2)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch: ``image`` uint8 ``(b, c, T, H, W)``, ``epoch`` and ``index`` int64 ``(b,)``."""
        return self.loss(*self.inputs(batch))

    def eval_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What held-out clips are judged by: the loss."""
        return {"loss": self(batch)}

    def inputs(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Normalised clips ``(b, c, T, H, W)`` and their ``patch_mask (b, hm, wm)``, of every frame."""
        return self.normalize(batch["image"]), self.masks(batch["epoch"], batch["index"])

    def loss(self, clips: Tensor, patch_mask: Tensor) -> Tensor:
        """Mean absolute error over the masked pixels of all frames; only tokens that hold any of them are predicted."""
        features = self.encode(clips, patch_mask)
        mask = self._patchify(self._pixel_mask(patch_mask, clips), features)
        needed = mask.any(dim=-1)
        prediction = self.head(features[needed])
        with torch.autocast(clips.device.type, enabled=False):
            target = self._patchify(clips, features)[needed]
            error = F.l1_loss(prediction.to(target.dtype), target, reduction="none")
            error = rearrange(error, "n (c kpq) -> n c kpq", c=clips.shape[1])
            weight = mask[needed].to(error.dtype)[:, None]
            return (error * weight).sum() / (weight.sum() * clips.shape[1])

    def loss_on_fake_tensors(self, images: Tensor) -> Tensor:
        """Of as many tokens as masks leave on average."""
        features = self.encode(images, torch.zeros(len(images), *self.masks.grid, dtype=torch.bool))
        rows = max(1, round(masked_token_fraction(self.encoder.config, self.masks) * features[..., 0].numel()))
        drawn = self.head(features.flatten(0, 3)[:rows])
        return F.l1_loss(drawn.float(), torch.zeros_like(drawn, dtype=torch.float32))

    def reconstruct(self, clips: Tensor, patch_mask: Tensor) -> Tensor:
        """Every pixel predicted, masked or not: normalised ``(b, c, T, H, W)``."""
        drawn = self.head(self.encode(clips, patch_mask))
        drawn = rearrange(drawn, "b f h w (c k p q) -> b c (f k) (h p) (w q)", **self.token)
        return drawn[:, :, *(slice(length) for length in clips.shape[2:])].to(clips.dtype)

    @torch.no_grad()
    def visualize(self, batch: Mapping[str, Tensor]) -> Image.Image:
        """Every clip a row: some of its frames, what is seen of them, and the prediction pasted in."""
        clips, patch_mask = self.inputs(batch)
        mask = self._pixel_mask(patch_mask, clips)
        original = batch["image"] / 255
        predicted = self.reconstruct(clips, patch_mask) * self.std[:, None] + self.mean[:, None]
        panels = {
            "original": original,
            "masked": drawing.hide(original, mask),
            "prediction, pasted": torch.where(mask, predicted, original),
        }
        rows = [(caption, drawing.to_rgb(drawing.film(panel))) for caption, panel in panels.items()]
        return drawing.panels(rows, across=1)

    def description(self) -> dict[str, Any]:
        """What must be known to rebuild it around its encoder; plain JSON."""
        return {
            "mask_patch_size": self.masks.mask_patch_size,
            "mask_ratio": self.masks.mask_ratio,
            "mask_strategy": self.masks.strategy,
        }

    def no_decay_parameters(self) -> set[nn.Parameter]:
        """As of any objective, and the mask token."""
        return super().no_decay_parameters() | {self.mask_token}

    def encode(self, clips: Tensor, patch_mask: Tensor) -> Tensor:
        """Features ``(b, f, h, w, num_features)`` of normalised clips, the tokens of the tubes replaced."""
        tokens = self.encoder.embed(clips)
        token_mask = expand_mask(patch_mask, self.masks.mask_patch_size // self.encoder.config.patch_size)
        tokens = torch.where(token_mask[:, None, ..., None], self.mask_token.to(tokens.dtype), tokens)
        return self.encoder.encode(tokens)

    def _pixel_mask(self, patch_mask: Tensor, clips: Tensor) -> Tensor:
        """bool ``(b, 1, T, H, W)``"""
        pixel_mask = expand_mask(patch_mask, self.masks.mask_patch_size)
        return pixel_mask[:, None, None].expand(-1, -1, clips.shape[2], -1, -1)

    def _patchify(self, pixels: Tensor, features: Tensor) -> Tensor:
        """``(b, c, T, H, W)`` -> ``(b, f, h, w, c k p q)`` on the grid of the features, zeros beyond the clip."""
        sides = zip(features.shape[1:4], self.token.values(), pixels.shape[2:], strict=True)
        after, bottom, right = (count * side - length for count, side, length in sides)
        pixels = F.pad(pixels, (0, right, 0, bottom, 0, after))
        return rearrange(pixels, "b c (f k) (h p) (w q) -> b f h w (c k p q)", **self.token)
