"""Tensors -> pictures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MASK_GREY = 0.5
_GAP, _CAPTION_PX, _MIN_PANEL_PX = 6, 22, 128


def to_rgb(pixels: Tensor) -> Tensor:
    """Float ``(b, c, H, W)`` in [0, 1] -> ``(b, 3, H, W)``: one channel as grey, of many the first three.

    Two channels show as red and green.
    """
    if pixels.shape[1] == 1:
        return repeat(pixels, "b 1 h w -> b 3 h w")
    if pixels.shape[1] == 2:
        return torch.cat([pixels, torch.zeros_like(pixels[:, :1])], dim=1)
    return pixels[:, :3]


def hide(pixels: Tensor, pixel_mask: Tensor) -> Tensor:
    """Grey where ``pixel_mask (b, 1, H, W)`` is True: nothing of the hidden pixels remains."""
    return torch.where(pixel_mask, torch.full_like(pixels, MASK_GREY), pixels)


def panels(columns: Sequence[tuple[str, Tensor]], *, across: int = 2) -> Image.Image:
    """One picture: every sample is a row of captioned panels, ``across`` samples side by side.

    Args:
        columns: caption and float ``(b, 3, H, W)`` in [0, 1], the same shape in all.
    """
    images = torch.stack([images for _, images in columns], dim=1).detach().float().cpu()  # (b, k, 3, H, W)
    zoom = max(1, _MIN_PANEL_PX // min(images.shape[-2:]))
    height, width = images.shape[-2] * zoom, images.shape[-1] * zoom
    across = min(across, len(images))
    rows = -(-len(images) // across)
    group = len(columns) * (width + _GAP) + 2 * _GAP
    canvas = Image.new("RGB", (across * group, rows * (height + _GAP) + _CAPTION_PX + _GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    pixels = rearrange((images.clamp(0, 1) * 255).round().to(torch.uint8), "b k c h w -> b k h w c").numpy()
    for number, sample in enumerate(pixels):
        row, column = divmod(number, across)
        for k, panel in enumerate(sample):
            left = column * group + _GAP + k * (width + _GAP)
            tile = Image.fromarray(panel).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (left, _CAPTION_PX + row * (height + _GAP)))
            if row == 0:
                draw.text((left, 3), columns[k][0], fill="black", font=font)
    return canvas


def captioned(images: Tensor, captions: Sequence[str], *, across: int = 4) -> Image.Image:
    """One picture: every image under its caption. ``images`` is float ``(b, 3, H, W)`` in [0, 1]."""
    zoom = max(1, _MIN_PANEL_PX // min(images.shape[-2:]))
    height, width = images.shape[-2] * zoom, images.shape[-1] * zoom
    across = min(across, len(images))
    cell = height + _CAPTION_PX + _GAP
    canvas = Image.new("RGB", (across * (width + _GAP) + _GAP, -(-len(images) // across) * cell), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    pixels = rearrange((images.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8), "b k h w -> b h w k").numpy()
    for number, (image, caption) in enumerate(zip(pixels, captions, strict=True)):
        row, column = divmod(number, across)
        left, top = _GAP + column * (width + _GAP), row * cell
        draw.text((left, top + 3), caption, fill="black", font=font)
        canvas.paste(
            Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (left, top + _CAPTION_PX)
        )
    return canvas
