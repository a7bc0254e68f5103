"""Pretraining stages: masked image modeling of images or clips."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from simmim.config import PretrainStage, Recipe
from simmim.data import CenterCrop, RandomCrop, Source, training_images
from simmim.data.sources import Subset
from simmim.data.views import describe_video, transforms_of
from simmim.export.heads import DECODER, save_head
from simmim.masking import MaskGenerator, expand_mask
from simmim.metrics.baselines import copy_nearest_visible, masked_l1, mean_of_visible
from simmim.rng import permutation
from simmim.stages.datasets import BUILTIN, builtin_datasets, decoder_of
from simmim.stages.job import Datasets, TrainedStage, Transforms
from simmim.stages.stage_type import StageType, register
from simmim.tasks.simmim import Reconstruction, SimMIM, mean_of_squares
from simmim.tasks.video import VideoSimMIM
from simmim.training.engine import evaluate, mean_over_images, synchronized_batches, to_device
from swin import SwinEncoder, VideoEncoder
from swin.config import Pair

SimMIMTask = SimMIM | VideoSimMIM


class PretrainType(StageType[PretrainStage]):
    """Masked image modeling."""

    settings = PretrainStage
    data_keys = "data.path=FOLDER_OF_IMAGES (or builtin:shapes)"
    preview_folder = "reconstructions"
    has_builtin_data = True

    def open_datasets(self, recipe: Recipe, stage: PretrainStage, path: str, size: Pair | None) -> Datasets:
        count = recipe.data.validation_images
        if path == BUILTIN:
            return builtin_datasets(recipe, stage, size, count)._replace(classes=[])
        decoder = decoder_of(recipe.data, recipe.encoder.in_chans, stage.video)
        return Datasets(*training_images(path, decoder, count), [])

    def select_training(self, source: Source, recipe: Recipe, stage: PretrainStage) -> Source:
        count, fraction = len(source), recipe.data.fraction
        if fraction == 1:
            return source
        # The order is the same for all seeds and fractions. The first images of a stream are stored together.
        in_blocks = source.blocks is not None
        order = torch.arange(count) if in_blocks else permutation(0, 0, count)
        return Subset(source, order[: images_of_fraction(fraction, count)].sort().values)

    def make_transforms(self, recipe: Recipe, stage: PretrainStage, size: Pair) -> Transforms:
        crop = RandomCrop(size, **stage.crop.model_dump())
        return Transforms(*transforms_of(crop, CenterCrop(size, stage.crop.interpolation), stage.video))

    def make_task(
        self, recipe: Recipe, stage: PretrainStage, encoder: SwinEncoder, classes: list[str] | None = None
    ) -> SimMIMTask:
        masks = MaskGenerator(
            stage.image_size, stage.mask.patch_size, stage.mask.ratio, seed=recipe.seed, strategy=stage.mask.strategy
        )
        if isinstance(encoder, VideoEncoder):
            return VideoSimMIM(encoder, masks, mean=recipe.data.mean, std=recipe.data.std)
        return SimMIM(
            encoder,
            masks,
            mean=recipe.data.mean,
            std=recipe.data.std,
            loss=stage.target.loss,
            norm_target_window=stage.target.norm_window,
            pixels=stage.target.pixels,
            downsample=stage.target.downsample,
            head=stage.target.head,
        )

    @torch.no_grad()
    def evaluate(self, trained: TrainedStage, accelerator: Accelerator) -> dict[str, Any]:
        """Evaluate the validation loss, and the masked L1 of the model beside predictors without learning."""
        task, log = trained.task, trained.log
        assert isinstance(task, SimMIMTask)
        measured = evaluate(task, trained.validation, accelerator, trained.preview)
        if not measured:
            return {}
        sums: dict[str, float] = {}
        for batch, images in synchronized_batches(trained.validation, accelerator, trained.preview):
            log.log_corrupt_images(batch["corrupt"])
            for name, l1 in masked_l1_of_predictors(task, to_device(batch, accelerator.device)).items():
                sums[name] = sums.get(name, 0.0) + l1 * images
            sums["images"] = sums.get("images", 0.0) + images
        table = mean_over_images(sums)
        log.info("validation masked L1 (lower is better):")
        for name, value in table.items():
            log.info(f"  {value:.4f}  {name}")
        return {**{f"validation_{key}": value for key, value in measured.items()}, "validation_masked_l1": table}

    def describe(self, stage: PretrainStage, task: SimMIMTask) -> dict[str, Any]:
        return {"reconstruction": task.description(), **describe_video(stage.video)}

    def save_head(self, folder: Path, weights: dict[str, Tensor]) -> None:
        save_head(folder / DECODER, weights)

    def plan(self, task: SimMIMTask) -> Mapping[str, str]:
        masks = task.mask_generator
        rows, columns = masks.grid
        return {"masks": f"{masks.num_masked} of {rows} x {columns} mask patches of {masks.mask_patch_size} px"}


PRETRAIN = register(PretrainType())


def images_of_fraction(fraction: float, num_images: int) -> int:
    """Return the number of training images that ``data.fraction`` keeps."""
    return max(1, round(fraction * num_images))


def masked_l1_of_predictors(task: SimMIMTask, batch: dict[str, Tensor]) -> dict[str, float]:
    """Compute the masked L1 loss of the model and of baselines that learn nothing.

    For a normalized target the only baseline is zero, its mean. The baselines predict every frame of a clip from its
    own visible pixels: the mask is the same in all frames, so other frames reveal no additional positions.
    """
    result = reconstruction_of(task, batch)
    predictions = {"predict zero": torch.zeros_like(result.target)}
    if task.norm_target_window is None:
        predictions["mean of the visible pixels"] = mean_of_visible(result.images, result.pixel_mask)
        predictions["copy the nearest visible pixel"] = copy_nearest_visible(result.images, result.pixel_mask)
    predictions["model"] = result.prediction.to(result.target.dtype)
    return {
        name: masked_l1(mean_of_squares(prediction, task.downsample), result.target, result.pixel_mask).item()
        for name, prediction in predictions.items()
    }


def reconstruction_of(task: SimMIMTask, batch: dict[str, Tensor]) -> Reconstruction:
    """Reconstruct a batch; clips have their frames as channels, ``(b, c T, H, W)``."""
    if isinstance(task, SimMIM):
        return task.reconstruct(*task.inputs(batch))
    clips, patch_mask = task.inputs(batch)
    prediction = task.reconstruct(clips, patch_mask).flatten(1, 2)
    mask = expand_mask(patch_mask, task.mask_generator.mask_patch_size)[:, None]
    return Reconstruction(clips.flatten(1, 2), clips.flatten(1, 2), prediction, mask)
