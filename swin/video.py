"""Video encoder with windows in time and space (Video Swin, arXiv 2106.13230; Swin V2, arXiv 2111.09883).

Letters: b batch, f h w token grid, c channels, T H W frames and pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from swin.config import Size, SwinConfig
from swin.encoder import SwinEncoder


@dataclass(frozen=True)
class VideoConfig(SwinConfig):
    """All settings needed to build a :class:`VideoEncoder`: those of an image encoder, and three for time.

    The encoder accepts clips of any length; ``frames``, like ``image_size``, only determines the default of
    ``reference_windows``, whose windows have three sizes, time first. The defaults are those of Video Swin; Swin V2
    uses clips of 8 frames in windows of 8 (table 5).

    Raises:
        ValueError: an invalid value or combination.
    """

    frames: int = 32
    temporal_patch: int = 2
    """Number of frames per token."""
    temporal_window: int = 8
    """Size of the attention window in time, in tokens."""

    def _check(self) -> None:
        super()._check()
        for name in ("frames", "temporal_patch", "temporal_window"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")

    @property
    def window(self) -> Size:
        return (self.temporal_window, *self.window_size)

    @property
    def input_size(self) -> Size:
        return (self.frames, *self.image_size)

    def grids(self) -> tuple[Size, ...]:
        """Compute the token grid ``(f, h, w)`` of every stage for clips of ``frames``; merging does not reduce time."""
        f = -(-self.frames // self.temporal_patch)
        return tuple((f, *grid) for grid in super().grids())


class TubeEmbed(nn.Module):
    """Patch embedding of clips: one linear layer on each patch of a few frames, then a norm."""

    def __init__(self, config: VideoConfig) -> None:
        super().__init__()
        self.size = (config.temporal_patch, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_chans, config.embed_dim, kernel_size=self.size, stride=self.size)
        self.norm = nn.LayerNorm(config.embed_dim)

    def forward(self, clips: Tensor) -> Tensor:
        """Embed ``(b, in_chans, T, H, W)`` as ``(b, f, h, w, c)``.

        If needed, space is padded with zeros at the bottom and right, and time by repeating the last frame.
        """
        after, bottom, right = (-length % side for length, side in zip(clips.shape[2:], self.size, strict=True))
        if after:
            clips = torch.cat([clips, clips[:, :, -1:].expand(-1, -1, after, -1, -1)], dim=2)
        if bottom or right:
            clips = F.pad(clips, (0, right, 0, bottom))
        return self.norm(rearrange(self.proj(clips), "b c f h w -> b f h w c"))


class VideoEncoder(SwinEncoder):
    """Swin Transformer for clips: V1, V2 or any combination of their parts.

    It works as :class:`swin.SwinEncoder` with a time axis before the rows: ``embed`` maps clips
    ``(b, in_chans, T, H, W)`` to tokens ``(b, f, h, w, c)``, f = ceil(T / temporal_patch); ``encode`` and ``forward``
    return features ``(b, f, h', w', num_features)`` and ``pyramid`` returns maps ``(b, c, f, h, w)``.
    """

    config: VideoConfig

    def __init__(self, config: VideoConfig) -> None:
        super().__init__(config)
        self.patch_embed = cast(Any, TubeEmbed(config))

    def can_use_kernel(self, device: torch.device) -> bool:
        """Return False, because the kernel does not support windows in time."""
        return False


def build_encoder(config: SwinConfig) -> SwinEncoder:
    """Build the image or video encoder of a configuration, with newly initialized weights."""
    return VideoEncoder(config) if isinstance(config, VideoConfig) else SwinEncoder(config)


def read_config(values: dict[str, Any]) -> SwinConfig:
    """Build a configuration from a plain dict: a :class:`VideoConfig` if it has the key ``frames``.

    Raises:
        ValueError: unknown keys or invalid values.
    """
    return (VideoConfig if "frames" in values else SwinConfig).from_dict(values)
