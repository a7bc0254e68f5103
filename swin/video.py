"""The encoder of clips: windows in time and space (Video Swin, arXiv 2106.13230; Swin V2, arXiv 2111.09883).

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
    """Everything that is needed to build a :class:`VideoEncoder`: that of an image encoder, and time.

    ``frames`` is to ``temporal_window`` what ``image_size`` is to ``window_size``: clips of any length are accepted.
    A window in ``reference_windows`` is three numbers, time first. The defaults are those of Video Swin; Swin V2 has
    clips of 8 frames in windows of 8 (table 5).

    Raises:
        ValueError: a value or a combination that cannot be built.
    """

    frames: int = 32
    temporal_patch: int = 2
    """Frames of one token."""
    temporal_window: int = 8
    """Tokens."""

    def _check(self) -> None:
        super()._check()
        for name in ("frames", "temporal_patch", "temporal_window"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer from 1, got {getattr(self, name)!r}")

    @property
    def window(self) -> Size:
        return (self.temporal_window, *self.window_size)

    @property
    def input_size(self) -> Size:
        return (self.frames, *self.image_size)

    def grids(self) -> tuple[Size, ...]:
        """Token grid ``(f, h, w)`` of every stage for clips of ``frames``: merging leaves time alone."""
        f = -(-self.frames // self.temporal_patch)
        return tuple((f, *grid) for grid in super().grids())


class TubeEmbed(nn.Module):
    """Pixels -> tokens: patches of a few frames through one linear map, then a norm."""

    def __init__(self, config: VideoConfig) -> None:
        super().__init__()
        self.size = (config.temporal_patch, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_chans, config.embed_dim, kernel_size=self.size, stride=self.size)
        self.norm = nn.LayerNorm(config.embed_dim)

    def forward(self, clips: Tensor) -> Tensor:
        """``(b, in_chans, T, H, W)`` -> ``(b, f, h, w, c)``.

        A remainder is padded with zeros at bottom and right; in time the last frame is repeated, as a still.
        """
        after, bottom, right = (-length % side for length, side in zip(clips.shape[2:], self.size, strict=True))
        if after:
            clips = torch.cat([clips, clips[:, :, -1:].expand(-1, -1, after, -1, -1)], dim=2)
        if bottom or right:
            clips = F.pad(clips, (0, right, 0, bottom))
        return self.norm(rearrange(self.proj(clips), "b c f h w -> b f h w c"))


class VideoEncoder(SwinEncoder):
    """A Swin Transformer, V1, V2 or anything between, over clips.

    All is as in :class:`swin.SwinEncoder`, with one more axis before the rows: ``embed`` maps clips
    ``(b, in_chans, T, H, W)`` to tokens ``(b, f, h, w, c)``, f = ceil(T / temporal_patch); ``encode`` and ``forward``
    give features ``(b, f, h', w', num_features)``, ``pyramid`` maps ``(b, c, f, h, w)``.
    """

    config: VideoConfig

    def __init__(self, config: VideoConfig) -> None:
        super().__init__(config)
        self.patch_embed = cast(Any, TubeEmbed(config))

    def can_use_kernel(self, device: torch.device) -> bool:
        """It knows of no windows in time."""
        return False


def build(config: SwinConfig) -> SwinEncoder:
    """The encoder that a configuration describes, with fresh weights."""
    return VideoEncoder(config) if isinstance(config, VideoConfig) else SwinEncoder(config)


def read_config(values: dict[str, Any]) -> SwinConfig:
    """The configuration of a plain dict: of clips if it says how many frames they have.

    Raises:
        ValueError: unknown keys, or values that cannot be built.
    """
    return (VideoConfig if "frames" in values else SwinConfig).from_dict(values)
