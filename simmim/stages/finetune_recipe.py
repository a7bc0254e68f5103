"""Generates a fine-tuning recipe from an encoder and a labelled folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from simmim.config import Recipe
from simmim.config.loading import dump_recipe, load_recipe
from simmim.data.sources import is_data_set_name
from simmim.export.export import open_export
from simmim.stages.initialization import ARCHITECTURE
from swin import SIZES, VideoConfig

STAGE_SIZES = ("image_size", "window_size")


def make_recipe(
    encoder: Path, data: str | None, out: Path, *, image_size: Any = None, window_size: Any = None, name: str | None
) -> Path:
    """Write a recipe with one fine-tuning stage and all its settings.

    An existing recipe is kept, because it may have been edited.

    Args:
        encoder: an export, or a checkpoint of another project.
        data: a folder with one subfolder per class, or the name of a data set.
        out: folder of the runs.
        image_size, window_size: None: as the encoder was trained.
        name: of the run; None: made from the name of the data.

    Returns:
        Path of the recipe.

    Raises:
        ValueError: no data, an encoder that cannot be read, or an existing recipe of that name with other settings.
    """
    if not data:
        raise ValueError("--encoder needs --data FOLDER, with one subfolder per class")
    path = Path(data).expanduser().resolve()
    last = (
        re.split("[:/]", data.rstrip("/"))[-1] if is_data_set_name(data) else path.stem if path.is_file() else path.name
    )
    name = name or "finetune_" + re.sub(r"[^\w.+-]+", "_", last)
    file = out / name / "recipe.yaml"
    export = open_export(encoder)
    config = export.encoder().config  # reading the weights checks them
    if isinstance(config, VideoConfig):
        raise ValueError(f"{encoder} encodes clips: write a recipe with a video block in its stage (recipes/README.md)")
    size = next(size for size in SIZES if size.startswith("swinv2" if config.norm == "res-post" else "swin_"))
    stage: dict[str, Any] = {
        "init_from": str(encoder.resolve()),
        "batch_size": 64,
        "micro_batch_size": 32,
        # For small data: the papers' recipe on one GPU; the learning rate is for 512 images per step.
        "schedule": {"base_lr": 1.25e-3, "epochs": 50, "warmup_epochs": 5, "warmup_lr": 2.5e-7, "min_lr": 2.5e-7},
        "log": {"evaluate_every_steps": 500, "checkpoint_every_steps": 500},
    }
    given = dict(zip(STAGE_SIZES, (image_size, window_size), strict=True))
    stage |= {key: value for key, value in given.items() if value is not None}
    if config.in_chans != 3:
        stage["augment"] = {"rand_augment": None}
    recipe = Recipe.model_validate(
        {
            "name": name,
            "data": {
                "path": data if is_data_set_name(data) else str(path),
                **export.pixels,
            },
            "encoder": {"name": size, **{field: getattr(config, field) for field in ARCHITECTURE}},
            "stages": {"finetune": stage},
        }
    )
    if file.exists():
        _check_same_task(file, recipe, stage)
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".recipe_{os.getpid()}.yaml")  # several processes may write the file at the same time
    unfinished.write_text(f"# simmim finetune {file}\n{dump_recipe(recipe)}", encoding="utf-8")
    os.replace(unfinished, file)
    return file


def _check_same_task(file: Path, wanted: Recipe, given: dict[str, Any]) -> None:
    existing = load_recipe(str(file))
    old, new = (recipe.stages.get("finetune") for recipe in (existing, wanted))
    pairs: dict[str, Any] = {"data": (existing.data.path, wanted.data.path)}
    pairs |= {key: (getattr(old, key, None), getattr(new, key)) for key in ("init_from", *STAGE_SIZES) if key in given}
    for key, (before, now) in pairs.items():
        if before != now:
            raise ValueError(f"{file} was written for {key} {before}, not {now}: give another --name, or edit it")
