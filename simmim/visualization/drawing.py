"""Figures drawn from tensors: panels with captions, objects, segmentations, heat maps and film strips."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

MASK_GRAY = 0.5
_GAP, _CAPTION_PX, _MIN_PANEL_PX = 6, 22, 128
_LINE_PX, _NAME_LETTERS = 17, 28


def to_rgb(pixels: Tensor, bands: Sequence[int] | str | None = None) -> Tensor:
    """Convert float pixels ``(b, c, H, W)`` in [0, 1] to RGB ``(b, 3, H, W)``.

    Args:
        bands: three channels to show, or ``"pca"`` for the :func:`principal_colors` of all channels. None shows one
            channel as gray, two as red and green, and the first three of more.

    Raises:
        ValueError: the images do not have these bands.
    """
    channels = pixels.shape[1]
    if bands == "pca":
        return principal_colors(pixels)(pixels)
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


def principal_colors(pixels: Tensor) -> Callable[[Tensor], Tensor]:
    """Fit a map from c channels to RGB on ``pixels (b, c, H, W)``: their first three principal components.

    Two standard deviations of a component fill its color range. Use one map for all images that are compared.
    """
    samples = rearrange(pixels, "b c h w -> (b h w) c").double()
    mean = samples.mean(dim=0)
    _, values, vectors = torch.linalg.svd(samples - mean, full_matrices=False)
    count = min(3, pixels.shape[1])
    scale = (values[:count] / math.sqrt(len(samples))).clamp(min=1e-9)
    axes = vectors[:count] / (4 * scale[:, None])
    # The sign of a component is arbitrary: choose the one for which larger pixels are brighter.
    signs = torch.where(axes.sum(dim=1) < 0, -1.0, 1.0)
    axes = axes * signs[:, None]

    def colors(x: Tensor) -> Tensor:
        projected = torch.einsum("kc,bchw->bkhw", axes, x.double() - mean[:, None, None]) + 0.5
        return to_rgb(projected.clamp(0, 1).to(x.dtype))

    return colors


def frames_side_by_side(pixels: Tensor, most: int = 4) -> Tensor:
    """Join up to ``most`` evenly spaced frames of each clip horizontally, with white gaps.

    Args:
        pixels: clips ``(b, c, T, H, W)`` in [0, 1]; images ``(b, c, H, W)`` are returned unchanged.

    Returns:
        ``(b, c, H, W')``
    """
    if pixels.ndim == 4:
        return pixels
    indices = torch.linspace(0, pixels.shape[2] - 1, min(most, pixels.shape[2])).round().long()
    gap = max(1, pixels.shape[-1] // 32)
    frames = F.pad(pixels[:, :, indices.to(pixels.device)], (0, gap), value=1.0)
    return rearrange(frames, "b c k h w -> b c h (k w)")[..., :-gap]


def error_map(prediction: Tensor, target: Tensor, pixel_mask: Tensor, *, largest: float) -> Tensor:
    """Color the absolute error under the mask, averaged over channels, ``(b, 3, H, W)``; unmasked pixels are gray.

    Colors go from black (no error) over red and yellow to white (an error of ``largest`` or more).
    """
    error = ((prediction - target).abs().mean(dim=1, keepdim=True) / largest).clamp(0, 1) * 3
    colors = torch.cat([(error - channel).clamp(0, 1) for channel in range(3)], dim=1)
    return torch.where(pixel_mask, colors, torch.full_like(colors, MASK_GRAY))


def gray_out(pixels: Tensor, pixel_mask: Tensor) -> Tensor:
    """Replace all pixels where ``pixel_mask (b, 1, H, W)`` is True by gray."""
    return torch.where(pixel_mask, torch.full_like(pixels, MASK_GRAY), pixels)


def draw_panels(columns: Sequence[tuple[str, Tensor]], *, across: int = 2) -> Image.Image:
    """Draw a row of captioned panels for every sample, with ``across`` samples side by side.

    Args:
        columns: captions and float panels ``(b, 3, H, W)`` in [0, 1], of one shape.

    Returns:
        The figure; ``info["rows"]`` holds its number of rows.
    """
    images = torch.stack([images for _, images in columns], dim=1).detach().float().cpu()  # (b, k, 3, H, W)
    factor = max(1, _MIN_PANEL_PX // min(images.shape[-2:]))
    height, width = images.shape[-2] * factor, images.shape[-1] * factor
    across = min(across, len(images))
    rows = -(-len(images) // across)
    group = len(columns) * (width + _GAP) + 2 * _GAP
    canvas = Image.new("RGB", (across * group, rows * (height + _GAP) + _CAPTION_PX + _GAP), "white")
    canvas.info["rows"] = str(rows)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    pixels = rearrange((images.clamp(0, 1) * 255).round().to(torch.uint8), "b k c h w -> b k h w c").numpy()
    for index, sample in enumerate(pixels):
        row, column = divmod(index, across)
        for k, panel in enumerate(sample):
            left = column * group + _GAP + k * (width + _GAP)
            tile = Image.fromarray(panel).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (left, _CAPTION_PX + row * (height + _GAP)))
            if row == 0:
                draw.text((left, 3), columns[k][0], fill="black", font=font)
    return canvas


def draw_captioned(images: Tensor, captions: Sequence[str], *, across: int = 4) -> Image.Image:
    """Draw float images ``(b, 3, H, W)`` in [0, 1] in a grid, each below its caption."""
    factor = max(1, _MIN_PANEL_PX // min(images.shape[-2:]))
    height, width = images.shape[-2] * factor, images.shape[-1] * factor
    across = min(across, len(images))
    row_px = height + _CAPTION_PX + _GAP
    canvas = Image.new("RGB", (across * (width + _GAP) + _GAP, -(-len(images) // across) * row_px), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    pixels = rearrange((images.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8), "b k h w -> b h w k").numpy()
    for index, (image, caption) in enumerate(zip(pixels, captions, strict=True)):
        row, column = divmod(index, across)
        left, top = _GAP + column * (width + _GAP), row * row_px
        draw.text((left, top + 3), caption, fill="black", font=font)
        canvas.paste(
            Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (left, top + _CAPTION_PX)
        )
    return canvas


def draw_ranked(image: Tensor, probabilities: Sequence[tuple[str, float]]) -> Image.Image:
    """Draw one image ``(3, H, W)`` in [0, 1], and beside it class names with bars for their probabilities."""
    preview, font = draw_captioned(image[None], [""]), ImageFont.load_default(13)
    lines = [f"{probability:.1%}  {name[:_NAME_LETTERS]}" for name, probability in probabilities]
    width = int(max((font.getlength(line) for line in lines), default=0)) + 4 * _GAP
    canvas = Image.new("RGB", (preview.width + max(width, _MIN_PANEL_PX), preview.height), "white")
    canvas.paste(preview, (0, 0))
    draw, longest = ImageDraw.Draw(canvas), canvas.width - preview.width - _GAP
    for row, (line, (_, probability)) in enumerate(zip(lines, probabilities, strict=True)):
        left, top = preview.width, _CAPTION_PX + row * (_LINE_PX + _GAP)
        draw.rectangle((left, top, left + round(probability * longest), top + _LINE_PX), fill=(190, 215, 240))
        draw.text((left + 2, top + 1), line, fill="black", font=font)
    return canvas


def draw_objects(
    image: Tensor, boxes: Tensor, labels: Tensor, names: Sequence[str], masks: Tensor | None = None
) -> Tensor:
    """Draw boxes, names and masks on an image, in one color per class; returns float ``(3, H, W)`` in [0, 1].

    Args:
        image: float ``(3, H, W)`` in [0, 1].
        boxes: ``(n, 4)``: left, top, right, bottom in px, best first; better objects are drawn over others.
        labels: int ``(n,)``, which select the colors.
        names: texts to write at the boxes.
        masks: ``(n, h, w)`` of any size, resized to the image.
    """
    pixels = (image.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    if not len(boxes):
        return pixels / 255
    palette = (255 * class_colors(int(labels.max()) + 1)).round().int().tolist()
    colors = [tuple(palette[label]) for label in labels.tolist()]
    if masks is not None:
        masks = F.interpolate(masks[:, None].float().cpu(), pixels.shape[-2:], mode="bilinear", antialias=True)
        covers = masks[:, 0] >= 0.5
        # torchvision paints overlaps black, so each pixel is left to the best object that covers it.
        first = covers & (covers.cumsum(dim=0) == 1)
        pixels = draw_segmentation_masks(pixels, first, alpha=0.45, colors=colors)
    pixels = draw_bounding_boxes(pixels, boxes.cpu().round().flip(0), colors=colors[::-1], width=2)
    canvas = to_pil_image(pixels)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    # torchvision writes names inside of boxes, where the border of the image may cut them off.
    for box, color, name in reversed(list(zip(boxes.tolist(), colors, names, strict=True))):
        left, top = max(0, min(box[0], canvas.width - font.getlength(name) - 4)), max(0, box[1] - 14)
        draw.rectangle((left, top, left + font.getlength(name) + 4, top + 14), fill=color)
        draw.text((left + 2, top), name, fill="white" if sum(color) < 384 else "black", font=font)
    return pil_to_tensor(canvas) / 255


def overlay_heatmap(images: Tensor, maps: Tensor) -> Tensor:
    """Darken each image where its map is low; returns ``(b, 3, H, W)``.

    Args:
        images: float ``(b, 3, H, W)`` in [0, 1].
        maps: ``(b, h, w)`` of any range; each is scaled from its minimum to its maximum.
    """
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    scaled = F.interpolate(((maps - low) / (high - low).clamp(min=1e-9))[:, None], images.shape[-2:], mode="bilinear")
    return images * (0.15 + 0.85 * scaled)


def draw_segmentation(images: Tensor, truth: Tensor | None, predicted: Tensor, classes: Sequence[str]) -> Image.Image:
    """Draw one row per image: image, true classes, predicted classes, and a legend of the colors.

    The legend gives the intersection over union of each class in this image. Unlabeled pixels are gray in both maps.
    Without ``truth`` only the prediction is drawn, and the legend gives the fraction of pixels of each class.

    Args:
        images: float ``(b, 3, H, W)`` in [0, 1].
        truth, predicted: class indices ``(b, H, W)``; other values in ``truth`` mean that a pixel has no label.
    """
    images, predicted, colors = images.float().cpu(), predicted.long().cpu(), class_colors(len(classes))
    if truth is None:
        panels = draw_panels([("original", images), ("prediction", _paint(images, predicted, colors))], across=1)
        lines = [_class_fractions(labels, classes) for labels in predicted]
    else:
        truth = truth.long().cpu()
        labeled = truth < len(classes)
        painted = [_paint(images, labels.where(labeled, len(classes)), colors) for labels in (truth, predicted)]
        columns = [("original", images), ("truth", painted[0]), ("prediction", painted[1])]
        panels = draw_panels(columns, across=1)
        lines = [
            _class_ious(own[valid], found[valid], classes)
            for own, found, valid in zip(truth, predicted, labeled, strict=True)
        ]
    font, swatch = ImageFont.load_default(13), 12
    longest = max((font.getlength(text) for legend in lines for _, text in legend), default=0)
    canvas = Image.new("RGB", (panels.width + swatch + int(longest) + 4 * _GAP, panels.height), "white")
    canvas.info |= panels.info
    canvas.paste(panels, (0, 0))
    draw, height = ImageDraw.Draw(canvas), (panels.height - _CAPTION_PX - _GAP) // len(images)
    for row, legend in enumerate(lines):
        for line, (label, text) in enumerate(legend[: height // _LINE_PX]):
            left, top = panels.width, _CAPTION_PX + row * height + line * _LINE_PX
            color = tuple((colors[label] * 255).round().int().tolist())
            draw.rectangle((left, top + 2, left + swatch, top + 2 + swatch), fill=color)
            draw.text((left + swatch + _GAP, top), text, fill="black", font=font)
    return canvas


def class_colors(count: int) -> Tensor:
    """Return ``count`` colors, float ``(count, 3)`` in [0, 1], with distant hues for consecutive classes.

    The color of a class does not depend on ``count``.
    """
    hues = [(0.03 + 0.618034 * index) % 1 for index in range(count)]
    tones = [((0.75, 1.0), (1.0, 0.7), (0.5, 0.85))[index % 3] for index in range(count)]
    return torch.tensor([colorsys.hsv_to_rgb(hue, *tone) for hue, tone in zip(hues, tones, strict=True)])


def _paint(images: Tensor, labels: Tensor, colors: Tensor) -> Tensor:
    """Paint images in the colors of their classes, with white borders; gray where the label is ``len(colors)``."""
    gray = images.mean(dim=1, keepdim=True)
    mixed = 0.35 * gray + 0.65 * rearrange(torch.cat([colors, torch.zeros(1, 3)])[labels], "b h w c -> b c h w")
    mixed = torch.where((labels == len(colors))[:, None], 0.5 * gray, mixed)
    borders = torch.zeros_like(labels, dtype=torch.bool)
    borders[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    borders[:, :, 1:] |= labels[:, :, 1:] != labels[:, :, :-1]
    return torch.where(borders[:, None], torch.ones(()), mixed)


def _class_ious(truth: Tensor, predicted: Tensor, classes: Sequence[str]) -> list[tuple[int, str]]:
    """List the classes of an image, largest first, with their intersection over union."""
    counts = torch.bincount(torch.cat([truth, predicted]), minlength=len(classes))
    both = torch.bincount(truth[truth == predicted], minlength=len(classes))
    return _legend(counts, both / (counts - both), classes)


def _class_fractions(labels: Tensor, classes: Sequence[str]) -> list[tuple[int, str]]:
    """List the classes of an image, largest first, with their fraction of the pixels."""
    counts = torch.bincount(labels.flatten(), minlength=len(classes))
    return _legend(counts, counts / labels.numel(), classes)


def _legend(counts: Tensor, values: Tensor, classes: Sequence[str]) -> list[tuple[int, str]]:
    order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())].tolist()
    return [(label, f"{float(values[label]):.2f}  {classes[label][:_NAME_LETTERS]}") for label in order]


def label_map_image(labels: Tensor, count: int, *, first: int = 0) -> Image.Image:
    """Convert class indices ``(H, W)`` of ``count`` classes to a palette image, to be saved as PNG.

    Args:
        first: value of the first class in the file; 1 if 0 means "no class" (ADE20K).
    """
    colors = torch.cat([torch.zeros(first, 3), class_colors(count)])
    image = Image.fromarray((labels + first).to(torch.uint8).cpu().numpy())
    image.putpalette((colors * 255).round().int().flatten().tolist())
    return image


def draw_grid(rows: Sequence[Sequence[Tensor]], row_names: Sequence[str], column_names: Sequence[str]) -> Image.Image:
    """Draw images ``(3, H, W)`` in [0, 1] in a grid with named rows and columns."""
    columns = [(name, torch.stack([row[k] for row in rows])) for k, name in enumerate(column_names)]
    panels = draw_panels(columns, across=1)
    font, margin = ImageFont.load_default(13), 8
    margin += max(int(font.getlength(name)) for name in row_names)
    canvas = Image.new("RGB", (panels.width + margin, panels.height), "white")
    canvas.paste(panels, (margin, 0))
    height = (panels.height - _CAPTION_PX - _GAP) // len(rows)
    draw = ImageDraw.Draw(canvas)
    for index, name in enumerate(row_names):
        draw.text((4, _CAPTION_PX + index * height + height // 2 - 8), name, fill="black", font=font)
    return canvas


def fold_rows(figure: Image.Image) -> Image.Image:
    """Move the second half of the rows of a figure of :func:`draw_panels` beside the first half."""
    rows = int(figure.info.get("rows", 1))
    if rows < 2:
        return figure
    height = (figure.height - _CAPTION_PX - _GAP) // rows
    kept = _CAPTION_PX + -(-rows // 2) * height
    canvas = Image.new("RGB", (2 * figure.width, kept), "white")
    canvas.paste(figure.crop((0, 0, figure.width, kept)), (0, 0))
    canvas.paste(figure.crop((0, 0, figure.width, _CAPTION_PX)), (figure.width, 0))
    canvas.paste(figure.crop((0, kept, figure.width, _CAPTION_PX + rows * height)), (figure.width, _CAPTION_PX))
    return canvas


def draw_filmstrip(figures: Sequence[tuple[str, Image.Image]], *, row: int = 0, rows: int = 1) -> Image.Image:
    """Draw one row of several figures below each other, for instance one image at several training steps.

    Args:
        figures: captions and figures of :func:`draw_panels`, of one size.
        row: index of the row to draw.
        rows: number of rows of each figure.
    """
    font = ImageFont.load_default(13)
    margin = 8 + max(int(font.getlength(caption)) for caption, _ in figures)
    height = (figures[0][1].height - _CAPTION_PX - _GAP) // rows
    width = max(figure.width for _, figure in figures)
    canvas = Image.new("RGB", (margin + width, len(figures) * height + _CAPTION_PX), "white")
    canvas.paste(figures[0][1].crop((0, 0, width, _CAPTION_PX)), (margin, 0))
    draw = ImageDraw.Draw(canvas)
    for index, (caption, figure) in enumerate(figures):
        top = _CAPTION_PX + index * height
        strip = figure.crop((0, _CAPTION_PX + row * height, width, _CAPTION_PX + (row + 1) * height))
        canvas.paste(strip, (margin, top))
        draw.text((4, top + height // 2 - 8), caption, fill="black", font=font)
    return canvas
