"""Looking at what was learned: a pretraining objective from its export, and pictures of what it draws.

An export of pretraining holds, beside the encoder, ``decoder.safetensors``: the mask token and the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from simmim.data import CenterCrop, Decoder, Images, Shapes, Source, evaluation_batches, open_files
from simmim.export.export import Export, open_export
from simmim.masking import MaskGenerator
from simmim.tasks.simmim import SimMIM
from simmim.tasks.video import VideoSimMIM
from simmim.visualization import drawing
from swin import VideoConfig, VideoEncoder
from swin.config import Pair, as_pair

Bands = Sequence[int] | str | None


def load_simmim(
    export: Export | Path | str,
    *,
    mask_patch_size: int | None = None,
    mask_ratio: float | None = None,
    image_size: int | Pair | None = None,
    seed: int = 0,
) -> SimMIM:
    """The pretraining objective of an export, on the CPU, ready to be looked at.

    Args:
        mask_patch_size, mask_ratio, image_size: None for those of pretraining.
        seed: of the masks.

    Raises:
        ValueError: an export that is not of pretraining, or masks that do not fit.
    """
    export = open_export(export)
    trained = export.head_settings("reconstruction")
    if isinstance(export.config, VideoConfig):
        raise ValueError(
            f"{export.path} was pretrained on clips: its images are in {export.path.parent / 'reconstructions'}"
        )
    encoder = export.encoder() if image_size is None else export.encoder(image_size=image_size)
    size = encoder.config.image_size if image_size is None else as_pair(image_size, "image_size")
    masks = MaskGenerator(
        size,
        trained["mask_patch_size"] if mask_patch_size is None else mask_patch_size,
        trained["mask_ratio"] if mask_ratio is None else mask_ratio,
        seed=seed,
        strategy=trained.get("mask_strategy", "random"),
    )
    task = SimMIM(
        encoder,
        masks,
        mean=export.mean,
        std=export.std,
        norm_target_window=trained["norm_target_window"],
        downsample=trained.get("downsample", 1),
        head=trained.get("head", "linear"),
    )
    export.load_head(task)
    return task.eval()


def load_video_simmim(export: Export | Path | str, *, seed: int = 0) -> VideoSimMIM:
    """As :func:`load_simmim`, of clips, as they were pretrained on.

    Raises:
        ValueError: an export that is not of pretraining on clips.
    """
    export = open_export(export)
    trained, encoder = export.head_settings("reconstruction"), export.encoder()
    if not isinstance(encoder, VideoEncoder):
        raise ValueError(f"{export.path} was pretrained on images: load_simmim is for it")
    masks = MaskGenerator(
        encoder.config.image_size,
        trained["mask_patch_size"],
        trained["mask_ratio"],
        seed=seed,
        strategy=trained["mask_strategy"],
    )
    task = VideoSimMIM(encoder, masks, mean=export.mean, std=export.std)
    export.load_head(task)
    return task.eval()


def read_images(paths: str, task: SimMIM, count: int = 4, value_range: tuple[float, float] | None = None) -> Tensor:
    """The first images of a path as the objective sees them: normalised ``(b, c, H, W)``, central crops.

    Args:
        paths: anything that ``data.path`` of a recipe takes.

    Raises:
        ValueError: no images, or none of them can be read.
    """
    channels, (rows, columns) = task.encoder.config.in_chans, task.masks.grid
    size = (rows * task.masks.mask_patch_size, columns * task.masks.mask_patch_size)
    images: Source
    if paths == "builtin:shapes":
        images = Shapes(count, size, channels, validation=True)
    else:
        images = Images(open_files(paths), Decoder(channels, value_range))
    batches = evaluation_batches(images, CenterCrop(size), batch_size=count)
    for batch in batches:
        return (batch["image"] / 255 - task.mean) / task.std
    corrupt = "; ".join(f"{name}: {reason}" for name, reason in list(batches.corrupt.items())[:3])
    raise ValueError(f"no image of {paths} could be read: {corrupt}")


def draw_masks(task: SimMIM, count: int) -> Tensor:
    """bool ``(count, hm, wm)``: the masks of the first samples."""
    index = torch.arange(count)
    return task.masks(torch.zeros_like(index), index)


@torch.no_grad()
def reconstruct(task: SimMIM, images: Tensor, bands: Bands = None) -> Image.Image:
    """One row of views for every image ``(b, c, H, W)``, normalised."""
    return drawing.panels(task.views(images, draw_masks(task, len(images)), bands), across=1)


@torch.no_grad()
def gallery(
    export: Export | Path | str,
    image: Tensor,
    mask_patch_sizes: Sequence[int],
    ratios: Sequence[float],
    bands: Bands = None,
    seed: int = 0,
) -> Image.Image:
    """One image ``(c, H, W)``, normalised: masked and pasted, for every cell size (rows) and ratio (columns)."""
    size = (image.shape[-2], image.shape[-1])
    task = load_simmim(export, mask_patch_size=mask_patch_sizes[0], mask_ratio=ratios[0], image_size=size)
    rows, names = [], []
    for cell in mask_patch_sizes:
        row = []
        for ratio in ratios:
            task.use_masks(MaskGenerator(size, cell, ratio, seed=seed, strategy=task.masks.strategy))
            shown = dict(task.views(image[None], draw_masks(task, 1), bands))
            pasted = shown.get("prediction, pasted", shown.get("its prediction, pasted"))
            assert pasted is not None
            row += [shown["masked"][0], pasted[0]]
        rows.append(row)
        names.append(f"{cell} px")
    columns = [name for ratio in ratios for name in (f"{ratio:.0%} masked", "pasted")]
    return drawing.grid(rows, names, columns)


def through_training(folder: Path, *, image: int = 0, at_most: int = 8) -> Image.Image:
    """One held-out image as a run saw it, from the first picture to the last.

    Args:
        folder: of a pretraining stage.

    Raises:
        ValueError: there are no pictures.
    """
    files = sorted((folder / "reconstructions").glob("step_*.png"))
    if not files:
        raise ValueError(f"{folder} has no pictures yet: they come every stages.NAME.log.evaluate_every_steps")
    chosen = [files[round(place * (len(files) - 1) / max(1, at_most - 1))] for place in range(at_most)]
    pictures, rows = [], 1
    for file in dict.fromkeys(chosen):
        with Image.open(file) as picture:
            rows = int(picture.info.get("rows", 1))
            pictures.append((f"step {int(file.stem.removeprefix('step_'))}", picture.convert("RGB")))
    if not 0 <= image < rows:
        raise ValueError(f"image {image}: the pictures of {folder} show images 0 to {rows - 1}")
    return drawing.filmstrip(pictures, row=image, rows=rows)
