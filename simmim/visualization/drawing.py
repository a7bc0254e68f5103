"""Tensors -> pictures."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MASK_GREY = 0.5
_GAP, _CAPTION_PX, _MIN_PANEL_PX = 6, 22, 128
_LINE_PX, _NAME_LETTERS = 17, 28


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


def ranked(image: Tensor, shares: Sequence[tuple[str, float]]) -> Image.Image:
    """One image ``(3, H, W)`` in [0, 1], and names beside it with bars for their shares."""
    picture, font = captioned(image[None], [""]), ImageFont.load_default(13)
    lines = [f"{share:.1%}  {name[:_NAME_LETTERS]}" for name, share in shares]
    width = int(max((font.getlength(line) for line in lines), default=0)) + 4 * _GAP
    canvas = Image.new("RGB", (picture.width + max(width, _MIN_PANEL_PX), picture.height), "white")
    canvas.paste(picture, (0, 0))
    draw, room = ImageDraw.Draw(canvas), canvas.width - picture.width - _GAP
    for row, (line, (_, share)) in enumerate(zip(lines, shares, strict=True)):
        left, top = picture.width, _CAPTION_PX + row * (_LINE_PX + _GAP)
        draw.rectangle((left, top, left + round(share * room), top + _LINE_PX), fill=(190, 215, 240))
        draw.text((left + 2, top + 1), line, fill="black", font=font)
    return canvas


def with_objects(
    image: Tensor, boxes: Tensor, labels: Tensor, names: Sequence[str], masks: Tensor | None = None
) -> Tensor:
    """An image with boxes, their names and masks drawn on it, in one colour per class: ``(3, H, W)`` in [0, 1].

    Args:
        image: float ``(3, H, W)`` in [0, 1].
        boxes: ``(n, 4)``: left, top, right, bottom, px; drawn last to first, so that the best is on top.
        labels: int ``(n,)``, which decide the colours.
        names: written at the boxes.
        masks: ``(n, h, w)`` of any size, shown as large as the image.
    """
    image = image.float().cpu()
    palette = (255 * class_colours(int(labels.max()) + 1 if len(labels) else 0)).round().int().tolist()
    colours = [tuple(palette[label]) for label in labels.tolist()]
    if masks is not None and len(masks):
        masks = F.interpolate(masks[:, None].float().cpu(), image.shape[-2:], mode="bilinear", antialias=True)
        for mask, colour in reversed(list(zip(masks, colours, strict=True))):
            image = image + 0.45 * mask * (torch.tensor(colour)[:, None, None] / 255 - image)
    pixels = (rearrange(image, "c h w -> h w c").clamp(0, 1) * 255).round().to(torch.uint8)
    canvas = Image.fromarray(pixels.numpy())
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for box, colour, name in reversed(list(zip(boxes.tolist(), colours, names, strict=True))):
        draw.rectangle(tuple(round(side) for side in box), outline=colour, width=2)
        left, top = max(0, min(box[0], canvas.width - font.getlength(name) - 4)), max(0, box[1] - 14)
        draw.rectangle((left, top, left + font.getlength(name) + 4, top + 14), fill=colour)
        draw.text((left + 2, top), name, fill="white" if sum(colour) < 384 else "black", font=font)
    return rearrange(torch.from_numpy(np.array(canvas)), "h w c -> c h w") / 255


def overlay(images: Tensor, maps: Tensor) -> Tensor:
    """A map over each image, grey: where it is high the image keeps its brightness.

    Args:
        images: float ``(b, 3, H, W)`` in [0, 1].
        maps: ``(b, h, w)`` of any range; each is stretched to its own.
    """
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    share = F.interpolate(((maps - low) / (high - low).clamp(min=1e-9))[:, None], images.shape[-2:], mode="bilinear")
    return images * (0.15 + 0.85 * share)


def segmentation(images: Tensor, truth: Tensor | None, predicted: Tensor, classes: Sequence[str]) -> Image.Image:
    """One picture: every image, what it holds and what was found in it, with the classes that the colours mean.

    Beside each class stands its intersection over union in this image. Pixels without a label stay grey in both.
    Where the truth is not known only what was found is shown, and its share of the pixels.

    Args:
        images: float ``(b, 3, H, W)`` in [0, 1].
        truth, predicted: numbers of classes ``(b, H, W)``; in ``truth`` what is not one of them has no label.
    """
    images, predicted, colours = images.float().cpu(), predicted.long().cpu(), class_colours(len(classes))
    if truth is None:
        picture = panels([("original", images), ("prediction", _painted(images, predicted, colours))], across=1)
        lines = [_shares(found, classes) for found in predicted]
    else:
        truth = truth.long().cpu()
        labelled = truth < len(classes)
        painted = [_painted(images, labels.where(labelled, len(classes)), colours) for labels in (truth, predicted)]
        columns = [("original", images), ("truth", painted[0]), ("prediction", painted[1])]
        picture = panels(columns, across=1)
        lines = [
            _overlaps(own[valid], found[valid], classes)
            for own, found, valid in zip(truth, predicted, labelled, strict=True)
        ]
    font, swatch = ImageFont.load_default(13), 12
    longest = max((font.getlength(text) for legend in lines for _, text in legend), default=0)
    canvas = Image.new("RGB", (picture.width + swatch + int(longest) + 4 * _GAP, picture.height), "white")
    canvas.info |= picture.info
    canvas.paste(picture, (0, 0))
    draw, height = ImageDraw.Draw(canvas), (picture.height - _CAPTION_PX - _GAP) // len(images)
    for row, legend in enumerate(lines):
        for line, (number, text) in enumerate(legend[: height // _LINE_PX]):
            left, top = picture.width, _CAPTION_PX + row * height + line * _LINE_PX
            colour = tuple((colours[number] * 255).round().int().tolist())
            draw.rectangle((left, top + 2, left + swatch, top + 2 + swatch), fill=colour)
            draw.text((left + swatch + _GAP, top), text, fill="black", font=font)
    return canvas


def class_colours(count: int) -> Tensor:
    """Float ``(count, 3)`` in [0, 1]: hues far apart for numbers that are close, the same for ever."""
    hues = [(0.03 + 0.618034 * number) % 1 for number in range(count)]
    tones = [((0.75, 1.0), (1.0, 0.7), (0.5, 0.85))[number % 3] for number in range(count)]
    return torch.tensor([colorsys.hsv_to_rgb(hue, *tone) for hue, tone in zip(hues, tones, strict=True)])


def _painted(images: Tensor, labels: Tensor, colours: Tensor) -> Tensor:
    """Images in the colours of their classes, with light borders; grey where the label is ``len(colours)``."""
    grey = images.mean(dim=1, keepdim=True)
    mixed = 0.35 * grey + 0.65 * rearrange(torch.cat([colours, torch.zeros(1, 3)])[labels], "b h w c -> b c h w")
    mixed = torch.where((labels == len(colours))[:, None], 0.5 * grey, mixed)
    borders = torch.zeros_like(labels, dtype=torch.bool)
    borders[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    borders[:, :, 1:] |= labels[:, :, 1:] != labels[:, :, :-1]
    return torch.where(borders[:, None], torch.ones(()), mixed)


def _overlaps(truth: Tensor, predicted: Tensor, classes: Sequence[str]) -> list[tuple[int, str]]:
    """Classes of an image, largest first, and how well each was found."""
    counts = torch.bincount(torch.cat([truth, predicted]), minlength=len(classes))
    both = torch.bincount(truth[truth == predicted], minlength=len(classes))
    return _legend(counts, both / (counts - both), classes)


def _shares(found: Tensor, classes: Sequence[str]) -> list[tuple[int, str]]:
    """Classes of an image, largest first, and their share of it."""
    counts = torch.bincount(found.flatten(), minlength=len(classes))
    return _legend(counts, counts / found.numel(), classes)


def _legend(counts: Tensor, numbers: Tensor, classes: Sequence[str]) -> list[tuple[int, str]]:
    order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())].tolist()
    return [(label, f"{float(numbers[label]):.2f}  {classes[label][:_NAME_LETTERS]}") for label in order]


def label_map(labels: Tensor, count: int, *, first: int = 0) -> Image.Image:
    """Numbers of ``count`` classes ``(H, W)`` -> a palette image that holds them, to be saved as PNG.

    Args:
        first: the number of the first class in the file; 1 where 0 is no class (ADE20K).
    """
    colours = torch.cat([torch.zeros(first, 3), class_colours(count)])
    image = Image.fromarray((labels + first).to(torch.uint8).cpu().numpy())
    image.putpalette((colours * 255).round().int().flatten().tolist())
    return image


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
