"""Masked image modelling, from a recipe to an exported encoder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from simmim.config import PretrainStage, Recipe
from simmim.data import CenterCrop, RandomCrop
from simmim.data.views import about_video, transforms_of
from simmim.export.heads import save_head
from simmim.masking import MaskGenerator, expand_mask
from simmim.metrics.baselines import copy_nearest_visible, masked_l1, mean_of_visible
from simmim.rng import derive_seed
from simmim.stages.datasets import make_sources
from simmim.stages.initialization import make_start, resume_fingerprint
from simmim.stages.runner import Job, Trained
from simmim.tasks.simmim import Reconstruction, SimMIM, mean_of_squares
from simmim.tasks.task import Task
from simmim.tasks.video import VideoSimMIM
from simmim.training.engine import evaluate, mean_over_images, synchronized_batches, to_device
from simmim.training.run_log import write_atomically
from simmim.visualization.reconstructions import DECODER
from swin import SwinEncoder, VideoEncoder


def make_job(recipe: Recipe, out: Path, name: str, precision: str) -> Job:
    """What the stage trains, on which images, and from where; weights and settings do not depend on the launch.

    Raises:
        ValueError: settings, data or a start that cannot work.
    """
    stage = recipe.stages[name]
    assert isinstance(stage, PretrainStage)
    video, crop = stage.video, stage.crop
    sources = make_sources(recipe, name)
    view = CenterCrop(stage.image_size, crop.interpolation)
    transform, view_of_clips = transforms_of(RandomCrop(stage.image_size, **crop.model_dump()), view, video)
    torch.manual_seed(derive_seed("step", recipe.seed, 0))
    start = make_start(recipe, name, out)
    task = make_task(recipe, stage, start.encoder)
    return Job(
        task=task,
        training=sources.training,
        validation=sources.validation,
        transform=transform,
        view=view_of_clips,
        settings=resume_fingerprint(
            recipe, name, start, num_training_images=len(sources.training), precision=precision
        ),
        start=str(start.path or "scratch"),
        pictures="reconstructions",
        about={"reconstruction": task.description(), **about_video(video)},
        save=lambda folder, weights: save_head(folder / DECODER, weights),
        problems=sources.problems,
    )


def make_task(recipe: Recipe, stage: PretrainStage, encoder: SwinEncoder) -> SimMIM | VideoSimMIM:
    """Masks and a head with fresh weights around the encoder."""
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


def make_fake_task(recipe: Recipe, stage: PretrainStage, encoder: SwinEncoder, classes: int) -> Task:
    """As the stage makes it."""
    return make_task(recipe, stage, encoder)


@torch.no_grad()
def evaluate_trained(trained: Trained, accelerator: Accelerator) -> None:
    """Held-out loss beside predictors without learning, on the screen and in ``summary.json``.

    Trivial predictors know nothing of a normalised target but its mean, which is zero. They predict every frame of a
    clip from what is visible of it: behind a tube no other frame shows more.
    """
    task, log = trained.task, trained.log
    assert isinstance(task, SimMIM | VideoSimMIM)
    measured = evaluate(task, trained.views, accelerator, trained.preview)
    numbers = {f"validation_{key}": value for key, value in measured.items()}
    if not numbers:
        return
    sums: dict[str, float] = {}
    for batch, images in synchronized_batches(trained.views, accelerator, trained.preview):
        log.log_corrupt_images(batch["corrupt"])
        shown = reconstruction_of(task, to_device(batch, accelerator.device))
        predictions = {"predict zero": torch.zeros_like(shown.target)}
        if task.norm_target_window is None:
            predictions["mean of the visible pixels"] = mean_of_visible(shown.images, shown.pixel_mask)
            predictions["copy the nearest visible pixel"] = copy_nearest_visible(shown.images, shown.pixel_mask)
        predictions["model"] = shown.prediction.to(shown.target.dtype)
        for name, prediction in predictions.items():
            prediction = mean_of_squares(prediction, task.downsample)
            l1 = masked_l1(prediction, shown.target, shown.pixel_mask).item()
            sums[name] = sums.get(name, 0.0) + l1 * images
        sums["images"] = sums.get("images", 0.0) + images
    table = mean_over_images(sums)
    log.info("held-out masked L1 (lower is better):")
    for name, value in table.items():
        log.info(f"  {value:.4f}  {name}")
    if log.is_main:
        summary = json.dumps({**numbers, "validation_masked_l1": table}, indent=2) + "\n"
        write_atomically(log.folder / "summary.json", summary)


def reconstruction_of(task: SimMIM | VideoSimMIM, batch: dict[str, Tensor]) -> Reconstruction:
    """What is drawn of a batch; of clips with frames as channels, ``(b, c T, H, W)``."""
    if isinstance(task, SimMIM):
        return task.reconstruct(*task.inputs(batch))
    clips, patch_mask = task.inputs(batch)
    drawn = task.reconstruct(clips, patch_mask).flatten(1, 2)
    mask = expand_mask(patch_mask, task.masks.mask_patch_size)[:, None]
    return Reconstruction(clips.flatten(1, 2), clips.flatten(1, 2), drawn, mask)
