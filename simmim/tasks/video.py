"""SimMIM for clips: the same mask patches are masked in every frame (tube masking).

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
    """Masked video modeling: SimMIM (arXiv 2111.09886, section 3) with tube masks (VideoMAE, arXiv 2203.12602).

    A mask covers the same pixels in all frames, so that no frame reveals what is masked in another. The methods are
    the same steps as those of :class:`simmim.tasks.simmim.SimMIM`.

    Args:
        mask_generator: generates the mask of every clip, over the pixels of a frame.
        mean, std: channel statistics of pixels in [0, 1], one value per channel.

    Raises:
        ValueError: the statistics do not match the channels, or the mask patch size is not a multiple of the
            token size.
    """

    encoder: VideoEncoder
    norm_target_window: int | None = None  # normalized targets and downsampling exist for images only
    downsample = 1

    def __init__(
        self, encoder: VideoEncoder, mask_generator: MaskGenerator, *, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__(encoder, mean, std)
        config = encoder.config
        if mask_generator.mask_patch_size % config.patch_size:
            raise ValueError(
                f"mask_patch_size {mask_generator.mask_patch_size} must be a multiple of the token size "
                f"{config.patch_size} px"
            )
        self.mask_generator = mask_generator
        self.token_shape = {"k": config.temporal_patch, "p": config.stride, "q": config.stride}
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, 1, config.embed_dim))
        self.head = Linear(config.num_features, config.in_chans * config.temporal_patch * config.stride**2)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a batch: ``image`` uint8 ``(b, c, T, H, W)``, ``epoch`` and ``index`` int64 ``(b,)``."""
        return self.loss(*self.inputs(batch))

    def inputs(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the normalized clips ``(b, c, T, H, W)`` of a batch and their ``patch_mask (b, hm, wm)``."""
        return self.normalize(batch["image"]), self.mask_generator(batch["epoch"], batch["index"])

    def embed(self, clips: Tensor) -> Tensor:
        """Embed normalized clips ``(b, c, T, H, W)`` as tokens ``(b, f, h, w, embed_dim)``."""
        return self.encoder.embed(clips)

    def mask(self, tokens: Tensor, patch_mask: Tensor) -> Tensor:
        """Replace the tokens under ``patch_mask (b, hm, wm)`` by the mask token, in all frames."""
        token_mask = expand_mask(patch_mask, self.mask_generator.mask_patch_size // self.encoder.config.patch_size)
        return torch.where(token_mask[:, None, ..., None], self.mask_token.to(tokens.dtype), tokens)

    def encode(self, tokens: Tensor) -> Tensor:
        """Encode tokens as features ``(b, f, h, w, num_features)``, on the grid of the last stage."""
        return self.encoder.encode(tokens)

    def masked_features(self, clips: Tensor, patch_mask: Tensor) -> Tensor:
        """Embed, mask and encode normalized clips; returns ``(b, f, h, w, num_features)``."""
        return self.encode(self.mask(self.embed(clips), patch_mask))

    def predict(self, features: Tensor, needed: Tensor) -> Tensor:
        """Predict the pixels ``(n, c k p q)`` of the ``n`` tokens where ``needed (b, f, h, w)`` is True."""
        return self.head(features[needed])

    def loss(self, clips: Tensor, patch_mask: Tensor) -> Tensor:
        """Return the mean absolute error over the masked pixels of all frames.

        Args:
            clips: normalized ``(b, c, T, H, W)``.
            patch_mask: bool ``(b, hm, wm)``, True = masked.
        """
        features = self.masked_features(clips, patch_mask)
        mask = self._patchify(self._pixel_mask(patch_mask, clips), features)
        needed = mask.any(dim=-1)
        prediction = self.predict(features, needed)
        with torch.autocast(clips.device.type, enabled=False):
            target = self._patchify(clips, features)[needed]
            error = F.l1_loss(prediction.to(target.dtype), target, reduction="none")
            error = rearrange(error, "n (c kpq) -> n c kpq", c=clips.shape[1])
            weight = mask[needed].to(error.dtype)[:, None]
            return (error * weight).sum() / (weight.sum() * clips.shape[1])

    def eval_step(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss of a validation batch."""
        return {"loss": self(batch)}

    def loss_on_fake_tensors(self, images: Tensor) -> Tensor:
        """Return the loss of fake clips, with as many predicted tokens as masks select on average."""
        features = self.masked_features(images, torch.zeros(len(images), *self.mask_generator.grid, dtype=torch.bool))
        fraction = masked_token_fraction(self.encoder.config, self.mask_generator)
        rows = max(1, round(fraction * features[..., 0].numel()))
        prediction = self.head(features.flatten(0, 3)[:rows])
        return F.l1_loss(prediction.float(), torch.zeros_like(prediction, dtype=torch.float32))

    def reconstruct(self, clips: Tensor, patch_mask: Tensor) -> Tensor:
        """Predict every pixel of normalized clips, masked or not; returns normalized ``(b, c, T, H, W)``."""
        prediction = self.head(self.masked_features(clips, patch_mask))
        prediction = rearrange(prediction, "b f h w (c k p q) -> b c (f k) (h p) (w q)", **self.token_shape)
        return prediction[:, :, *(slice(length) for length in clips.shape[2:])].to(clips.dtype)

    @torch.no_grad()
    def visualize(self, batch: Mapping[str, Tensor]) -> Image.Image:
        """Render one row per clip: some of its frames, the masked frames, and the prediction pasted into them."""
        clips, patch_mask = self.inputs(batch)
        mask = self._pixel_mask(patch_mask, clips)
        original = batch["image"] / 255
        predicted = self.reconstruct(clips, patch_mask) * self.std[:, None] + self.mean[:, None]
        panels = {
            "original": original,
            "masked": drawing.gray_out(original, mask),
            "prediction, pasted": torch.where(mask, predicted, original),
        }
        columns = [(caption, drawing.to_rgb(drawing.frames_side_by_side(panel))) for caption, panel in panels.items()]
        return drawing.draw_panels(columns, across=1)

    def description(self) -> dict[str, Any]:
        """Return the settings needed to rebuild the task around its encoder, as plain JSON."""
        return {
            "mask_patch_size": self.mask_generator.mask_patch_size,
            "mask_ratio": self.mask_generator.mask_ratio,
            "mask_strategy": self.mask_generator.strategy,
        }

    def no_decay_parameters(self) -> set[nn.Parameter]:
        """Return the parameters without weight decay: those of every task, and the mask token."""
        return super().no_decay_parameters() | {self.mask_token}

    def _pixel_mask(self, patch_mask: Tensor, clips: Tensor) -> Tensor:
        """Expand ``patch_mask (b, hm, wm)`` to the pixels of all frames, bool ``(b, 1, T, H, W)``."""
        pixel_mask = expand_mask(patch_mask, self.mask_generator.mask_patch_size)
        return pixel_mask[:, None, None].expand(-1, -1, clips.shape[2], -1, -1)

    def _patchify(self, pixels: Tensor, features: Tensor) -> Tensor:
        """Split ``(b, c, T, H, W)`` into the tokens of the features, ``(b, f, h, w, c k p q)``, zero-padded."""
        sides = zip(features.shape[1:4], self.token_shape.values(), pixels.shape[2:], strict=True)
        after, bottom, right = (count * side - length for count, side, length in sides)
        pixels = F.pad(pixels, (0, right, 0, bottom, 0, after))
        return rearrange(pixels, "b c (f k) (h p) (w q) -> b f h w (c k p q)", **self.token_shape)
