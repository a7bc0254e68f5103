"""The run folder of a stage: checkpoints to resume from, log, and export."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from simmim.config import Recipe
from simmim.config.loading import dump_recipe
from simmim.export.export import open_export
from simmim.stages.job import Job
from simmim.training.checkpoint import checksum, different_settings, fsync, newest_checkpoint, remove_unfinished
from simmim.training.run_log import RunLog, write_atomically, write_environment
from swin import save_encoder

CHECKSUMS = "checksums.json"


class Position(NamedTuple):
    """Position at which a stage starts or resumes."""

    checkpoint: Path | None
    """None: at the start."""
    step: int
    """Number of optimizer steps taken."""
    skipped: list[str]
    """Damaged newer checkpoints, with the reason."""
    changed: str
    """Settings that differ from those of the checkpoint."""


def starting_point(folder: Path, settings: dict[str, Any], allow_changes: bool = False) -> Position:
    """Find the newest valid checkpoint of a run folder; without checkpoints, the start.

    Args:
        settings: resume fingerprint.
        allow_changes: accept a checkpoint with other settings.

    Raises:
        ValueError: the folder holds a run with other settings, or damaged checkpoints only.
    """
    checkpoint, state, skipped = newest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        return Position(None, 0, [], "")
    changed = "; ".join(different_settings(state["settings"], settings))
    if changed and not allow_changes:
        reason = ""
        if "num_training_images" in changed:
            reason = (
                ". Evaluation data of all stages of the recipe are excluded from training, so adding or removing a "
                "stage may change the number of training images"
            )
        raise ValueError(
            f"{folder} holds a run with other settings ({changed}): give another name=..., another --out, "
            f"or remove the folder; --allow-changes resumes anyway{reason}"
        )
    return Position(checkpoint, state["step"], skipped, changed)


def common_starting_point(
    folder: Path, settings: dict[str, Any], accelerator: Accelerator, allow_changes: bool
) -> Position:
    """Find the :func:`starting_point` in the main process, and send it to all processes.

    Raises:
        ValueError: as :func:`starting_point`, in every process.
    """
    found: list[Any] = [None, None]
    if accelerator.is_main_process:
        remove_unfinished(folder / "checkpoints")
        try:
            found[0] = starting_point(folder, settings, allow_changes)
        except (ValueError, OSError) as error:
            found[1] = str(error)
    position, problem = broadcast_object_list(found)
    if problem is not None:
        raise ValueError(problem)
    return position


def is_done(folder: Path, settings: dict[str, Any]) -> bool:
    """Return whether the folder holds a complete export that was made with these settings."""
    export = folder / "export"
    try:
        expected = json.loads((export / CHECKSUMS).read_text(encoding="utf-8"))
        if any(checksum(export / name) != digest for name, digest in expected.items()):
            return False
        trained = open_export(export).training_settings
        return trained is not None and not different_settings(trained, settings)
    except (OSError, ValueError):  # a damaged export is written again from the last checkpoint
        return False


def open_folder(folder: Path, recipe: Recipe, accelerator: Accelerator, preview_folder: str, num_images: int) -> RunLog:
    """Create the run folder with its resolved recipe and environment, and open its log.

    Args:
        preview_folder: name of the folder of preview images.
        num_images: number of training images, of which a fraction may be corrupt.
    """
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "recipe.yaml", dump_recipe(recipe))
        write_environment(
            folder,
            processes=accelerator.num_processes,
            distribution=accelerator.distributed_type.value,
            precision=accelerator.mixed_precision,
        )
    track = None
    if accelerator.log_with:
        accelerator.init_trackers(recipe.name)
        track = accelerator.log
    accelerator.wait_for_everyone()
    max_corrupt = max(10.0, recipe.data.max_corrupt_fraction * num_images)
    main = accelerator.is_main_process
    return RunLog(folder, is_main=main, image_folder=preview_folder, max_corrupt=max_corrupt, track=track)


def write_export(job: Job, folder: Path, weights: dict[str, Tensor]) -> Path:
    """Write encoder, head and description into a temporary folder, which :func:`publish` renames.

    Args:
        folder: run folder of the stage.
        weights: full state dict of the task.

    Returns:
        The temporary folder.
    """
    recipe, unfinished = job.recipe, folder / ".writing_export"
    shutil.rmtree(unfinished, ignore_errors=True)
    description = {
        "pixels": recipe.data.model_dump(mode="json", include={"mean", "std", "value_range"}),
        **job.stage_type.describe(job.stage, job.task),
        "trained": {
            "recipe": recipe.name,
            "stage": job.name,
            "steps": job.num_steps,
            "seed": recipe.seed,
            "settings": job.fingerprint,
        },
    }
    save_encoder(job.task.encoder, unfinished, about=description, weights=part_of(weights, "encoder"))
    job.stage_type.save_head(unfinished, weights)
    return unfinished


def part_of(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the weights of a submodule, without its name as prefix."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in weights.items() if key.startswith(f"{name}.")}


def publish(unfinished: Path, folder: Path) -> None:
    """Add checksums to a finished export, and rename it to its final name."""
    digests = {file.name: checksum(file) for file in sorted(unfinished.iterdir())}
    (unfinished / CHECKSUMS).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    for path in (*unfinished.iterdir(), unfinished):
        fsync(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
