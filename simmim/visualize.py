"""Tensors -> pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MASK_GREY = 0.5
_GAP, _CAPTION_PX, _MIN_PANEL_PX = 6, 22, 128


def to_rgb(pixels: Tensor, bands: Sequence[int] | str | None = None) -> Tensor:
    """Float ``(b, c, H, W)`` in [0, 1] -> ``(b, 3, H, W)``.

    Args:
        bands: three channels to show; ``"pca"`` for :func:`principal_colours` of all; None: one channel
            as grey, two as red and green, of more the first three.

    Raises:
        ValueError: bands that the images do not have.
    """
    channels = pixels.shape[1]
    if bands == "pca":
        return principal_colours(pixels)(pixels)
    if bands is not None:
        wanted = [int(band) for band in bands]
        if len(wanted) != 3 or not all(0 <= band < channels for band in wanted):
            raise ValueError(f"bands {list(bands)}: expected three of the channels 0 to {channels - 1}, or pca")
        return pixels[:, wanted]
    if channels == 1:
        return repeat(pixels, "b 1 h w -> b 3 h w")
    if channels == 2:
        return torch.cat([pixels, torch.zeros_like(pixels[:, :1])], dim=1)
    return pixels[:, :3]


def principal_colours(pixels: Tensor) -> Callable[[Tensor], Tensor]:
    """A map from c channels to colours, fitted on ``pixels (b, c, H, W)``: their three principal components.

    Each is stretched so that two standard deviations fill the range. To compare pictures, use one map for all.
    """
    samples = rearrange(pixels, "b c h w -> (b h w) c").double()
    mean = samples.mean(dim=0)
    _, values, vectors = torch.linalg.svd(samples - mean, full_matrices=False)
    count = min(3, pixels.shape[1])
    scale = (values[:count] / math.sqrt(len(samples))).clamp(min=1e-9)
    axes = vectors[:count] / (4 * scale[:, None])
    signs = torch.where(axes.sum(dim=1) < 0, -1.0, 1.0)  # brighter where there is more
    axes = axes * signs[:, None]

    def colours(x: Tensor) -> Tensor:
        shown = torch.einsum("kc,bchw->bkhw", axes, x.double() - mean[:, None, None]) + 0.5
        return to_rgb(shown.clamp(0, 1).to(x.dtype))

    return colours


def film(pixels: Tensor, most: int = 4) -> Tensor:
    """Frames of each clip side by side, from the first to the last, with white between them.

    ``(b, c, T, H, W)`` in [0, 1] -> ``(b, c, H, W')``; images ``(b, c, H, W)`` stay as they are.
    """
    if pixels.ndim == 4:
        return pixels
    numbers = torch.linspace(0, pixels.shape[2] - 1, min(most, pixels.shape[2])).round().long()
    gap = max(1, pixels.shape[-1] // 32)
    frames = F.pad(pixels[:, :, numbers.to(pixels.device)], (0, gap), value=1.0)
    return rearrange(frames, "b c k h w -> b c h (k w)")[..., :-gap]


def error_map(prediction: Tensor, target: Tensor, pixel_mask: Tensor, *, largest: float) -> Tensor:
    """Mean absolute error over channels under the mask, as colours ``(b, 3, H, W)``; grey where nothing is predicted.

    Black is no error, then red and yellow; white is ``largest`` or more.
    """
    error = ((prediction - target).abs().mean(dim=1, keepdim=True) / largest).clamp(0, 1) * 3
    colours = torch.cat([(error - channel).clamp(0, 1) for channel in range(3)], dim=1)
    return torch.where(pixel_mask, colours, torch.full_like(colours, MASK_GREY))


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
    canvas.info["rows"] = str(rows)
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


def overlay(images: Tensor, maps: Tensor) -> Tensor:
    """A map over each image, grey: where it is high the image keeps its brightness.

    Args:
        images: float ``(b, 3, H, W)`` in [0, 1].
        maps: ``(b, h, w)`` of any range; each is stretched to its own.
    """
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    share = F.interpolate(((maps - low) / (high - low).clamp(min=1e-9))[:, None], images.shape[-2:], mode="bilinear")
    return images * (0.15 + 0.85 * share)


def grid(rows: Sequence[Sequence[Tensor]], row_names: Sequence[str], column_names: Sequence[str]) -> Image.Image:
    """Images ``(3, H, W)`` in [0, 1] in rows and columns, each with a name."""
    columns = [(name, torch.stack([row[k] for row in rows])) for k, name in enumerate(column_names)]
    picture = panels(columns, across=1)
    font, margin = ImageFont.load_default(13), 8
    margin += max(int(font.getlength(name)) for name in row_names)
    canvas = Image.new("RGB", (picture.width + margin, picture.height), "white")
    canvas.paste(picture, (margin, 0))
    height = (picture.height - _CAPTION_PX - _GAP) // len(rows)
    draw = ImageDraw.Draw(canvas)
    for number, name in enumerate(row_names):
        draw.text((4, _CAPTION_PX + number * height + height // 2 - 8), name, fill="black", font=font)
    return canvas


def folded(picture: Image.Image) -> Image.Image:
    """A picture of :func:`panels` with the second half of its rows beside the first."""
    rows = int(picture.info.get("rows", 1))
    if rows < 2:
        return picture
    height = (picture.height - _CAPTION_PX - _GAP) // rows
    kept = _CAPTION_PX + -(-rows // 2) * height
    canvas = Image.new("RGB", (2 * picture.width, kept), "white")
    canvas.paste(picture.crop((0, 0, picture.width, kept)), (0, 0))
    canvas.paste(picture.crop((0, 0, picture.width, _CAPTION_PX)), (picture.width, 0))
    canvas.paste(picture.crop((0, kept, picture.width, _CAPTION_PX + rows * height)), (picture.width, _CAPTION_PX))
    return canvas


def filmstrip(pictures: Sequence[tuple[str, Image.Image]], *, row: int = 0, rows: int = 1) -> Image.Image:
    """The same row of several pictures under each other: one image through training.

    Args:
        pictures: caption and picture, all of one size.
        row: which of the ``rows`` of images that a picture of :func:`panels` holds.
    """
    font = ImageFont.load_default(13)
    margin = 8 + max(int(font.getlength(caption)) for caption, _ in pictures)
    height = (pictures[0][1].height - _CAPTION_PX - _GAP) // rows
    width = max(picture.width for _, picture in pictures)
    canvas = Image.new("RGB", (margin + width, len(pictures) * height + _CAPTION_PX), "white")
    canvas.paste(pictures[0][1].crop((0, 0, width, _CAPTION_PX)), (margin, 0))
    draw = ImageDraw.Draw(canvas)
    for number, (caption, picture) in enumerate(pictures):
        top = _CAPTION_PX + number * height
        strip = picture.crop((0, _CAPTION_PX + row * height, width, _CAPTION_PX + (row + 1) * height))
        canvas.paste(strip, (margin, top))
        draw.text((4, top + height // 2 - 8), caption, fill="black", font=font)
    return canvas
