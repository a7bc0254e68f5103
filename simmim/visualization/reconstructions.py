"""Loads a pretrained SimMIM model from its export and renders reconstructions.

Besides the encoder, the export of a pretraining stage contains ``decoder.safetensors``: the mask token and the head.
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
    """Load the pretraining task of an export on the CPU, in evaluation mode.

    Args:
        mask_patch_size, mask_ratio, image_size: None: the values of pretraining.
        seed: seed of the masks.

    Raises:
        ValueError: the export is not of a pretraining stage on images, or the masks do not fit the image size.
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
    """Load the pretraining task of an export on clips, on the CPU, in evaluation mode.

    Raises:
        ValueError: the export is not of a pretraining stage on clips.
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
    """Read the first images of a path, normalized ``(b, c, H, W)``, as central crops of the size of the task.

    Args:
        paths: any value of ``data.path`` in a recipe.
        count: number of images.
        value_range: see :class:`simmim.data.Decoder`.

    Raises:
        ValueError: there are no images, or none of them can be read.
    """
    channels, (rows, columns) = task.encoder.config.in_chans, task.mask_generator.grid
    size = (rows * task.mask_generator.mask_patch_size, columns * task.mask_generator.mask_patch_size)
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


def make_masks(task: SimMIM, count: int) -> Tensor:
    """Return the masks of the first ``count`` samples in epoch 0, bool ``(count, hm, wm)``."""
    index = torch.arange(count)
    return task.mask_generator(torch.zeros_like(index), index)


@torch.no_grad()
def reconstruct(task: SimMIM, images: Tensor, bands: Bands = None) -> Image.Image:
    """Render a row of panels for each normalized image ``(b, c, H, W)``."""
    return drawing.draw_panels(task.panels(images, make_masks(task, len(images)), bands), across=1)


@torch.no_grad()
def gallery(
    export: Export | Path | str,
    image: Tensor,
    mask_patch_sizes: Sequence[int],
    ratios: Sequence[float],
    bands: Bands = None,
    seed: int = 0,
) -> Image.Image:
    """Render one normalized image ``(c, H, W)``, masked and pasted, per mask patch size (rows) and ratio (columns)."""
    size = (image.shape[-2], image.shape[-1])
    task = load_simmim(export, mask_patch_size=mask_patch_sizes[0], mask_ratio=ratios[0], image_size=size)
    rows, names = [], []
    for mask_patch_size in mask_patch_sizes:
        row = []
        for ratio in ratios:
            strategy = task.mask_generator.strategy
            task.set_mask_generator(MaskGenerator(size, mask_patch_size, ratio, seed=seed, strategy=strategy))
            panels = dict(task.panels(image[None], make_masks(task, 1), bands))
            pasted = panels.get("prediction, pasted", panels.get("its prediction, pasted"))
            assert pasted is not None
            row += [panels["masked"][0], pasted[0]]
        rows.append(row)
        names.append(f"{mask_patch_size} px")
    columns = [name for ratio in ratios for name in (f"{ratio:.0%} masked", "pasted")]
    return drawing.draw_grid(rows, names, columns)


def through_training(folder: Path, *, image: int = 0, at_most: int = 8) -> Image.Image:
    """Render one validation image from the first preview of a run to the last.

    Args:
        folder: folder of a pretraining stage.
        image: index of the row of the previews.
        at_most: largest number of previews to show.

    Raises:
        ValueError: there are no previews, or they have fewer rows.
    """
    files = sorted((folder / "reconstructions").glob("step_*.png"))
    if not files:
        raise ValueError(
            f"{folder} has no previews yet: a run writes them every stages.NAME.log.evaluate_every_steps steps"
        )
    chosen = [files[round(index * (len(files) - 1) / max(1, at_most - 1))] for index in range(at_most)]
    previews, rows = [], 1
    for file in dict.fromkeys(chosen):
        with Image.open(file) as preview:
            rows = int(preview.info.get("rows", 1))
            previews.append((f"step {int(file.stem.removeprefix('step_'))}", preview.convert("RGB")))
    if not 0 <= image < rows:
        raise ValueError(f"image {image}: the previews in {folder} show images 0 to {rows - 1}")
    return drawing.draw_filmstrip(previews, row=image, rows=rows)
