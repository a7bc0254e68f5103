"""The folder of a stage: where it stands, its log, its export."""

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
from simmim.training.checkpoint import checksum, different_settings, fsync, newest_checkpoint, remove_unfinished
from simmim.training.run_log import RunLog, write_atomically, write_environment
from swin import SwinEncoder, load_description, save_encoder

CHECKSUMS = "checksums.json"


class Position(NamedTuple):
    """Where a stage stands: after ``step``, as saved in ``checkpoint``; why newer ones were passed over, and
    what is not as it was then.
    """

    checkpoint: Path | None
    step: int
    passed_over: list[str]
    changed: str


def starting_point(folder: Path, settings: dict[str, Any], allow_changes: bool = False) -> Position:
    """Own checkpoint or the start: the newest checkpoint of the folder that verifies, or None and step 0.

    Raises:
        ValueError: the folder holds a run with other settings, or only damaged checkpoints.
    """
    checkpoint, state, passed_over = newest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        return Position(None, 0, [], "")
    changed = "; ".join(different_settings(state["settings"], settings))
    if changed and not allow_changes:
        why = ""
        if "num_training_images" in changed:
            why = ". Images that any stage of the recipe is judged by are left out: another stage, another number"
        raise ValueError(
            f"{folder} holds a run with other settings ({changed}): give another name=..., another --out, "
            f"or remove the folder; --allow-changes continues it all the same{why}"
        )
    return Position(checkpoint, state["step"], passed_over, changed)


def common_starting_point(
    folder: Path, settings: dict[str, Any], accelerator: Accelerator, allow_changes: bool
) -> Position:
    """:func:`starting_point` as the first process finds it, for all processes.

    Raises:
        ValueError: in every process.
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
    """Whether the export of a stage was made with these settings, and is as it was written."""
    export = folder / "export"
    try:
        expected = json.loads((export / CHECKSUMS).read_text(encoding="utf-8"))
        if any(checksum(export / name) != digest for name, digest in expected.items()):
            return False
        trained = load_description(export).get("trained", {}).get("settings")
        return trained is not None and not different_settings(trained, settings)
    except (OSError, ValueError):  # it will be made again from the last checkpoint
        return False


def open_folder(folder: Path, recipe: Recipe, accelerator: Accelerator, pictures: str, num_images: int) -> RunLog:
    """Create the run folder with its resolved recipe and environment."""
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
    return RunLog(folder, is_main=main, image_folder=pictures, max_corrupt=max_corrupt, track=track)


def export(
    encoder: SwinEncoder,
    weights: dict[str, Tensor],
    folder: Path,
    recipe: Recipe,
    trained: dict[str, Any],
    **about: Any,
) -> Path:
    """Write the encoder with what a later user must know of its pixels and training; whole or not at all.

    Args:
        weights: of the objective around the encoder.

    Returns:
        A folder beside ``folder``, for whatever else belongs to the export; :func:`publish` names it.
    """
    unfinished = folder.with_name(".writing_export")
    shutil.rmtree(unfinished, ignore_errors=True)
    pixels = {"mean": recipe.data.mean, "std": recipe.data.std, "value_range": recipe.data.value_range}
    save_encoder(
        encoder,
        unfinished,
        about={"pixels": pixels, **about, "trained": trained},
        weights=part_of(weights, "encoder"),
    )
    return unfinished


def part_of(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of one part of an objective."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in weights.items() if key.startswith(f"{name}.")}


def publish(unfinished: Path, folder: Path) -> None:
    """Give a finished export its name, and its files checksums."""
    digests = {file.name: checksum(file) for file in sorted(unfinished.iterdir())}
    (unfinished / CHECKSUMS).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    for path in (*unfinished.iterdir(), unfinished):
        fsync(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
