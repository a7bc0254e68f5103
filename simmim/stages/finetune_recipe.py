"""A recipe for the usual case: an encoder, and a folder with labels."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from simmim.config import Recipe
from simmim.config.loading import dump_recipe, load_recipe
from simmim.data.sources import is_name
from simmim.export.export import open_export
from simmim.stages.initialization import ARCHITECTURE
from swin import SIZES, VideoConfig

SIZES_OF_A_STAGE = ("image_size", "window_size")


def make_recipe(
    encoder: Path, data: str | None, out: Path, *, image_size: Any = None, window_size: Any = None, name: str | None
) -> Path:
    """Write the recipe of one fine-tuning stage, with every setting, and give its place.

    A recipe that is there already is left as it is: it may have been edited.

    Raises:
        ValueError: no data, an encoder that cannot be read, or a recipe of that name for another task.
    """
    if not data:
        raise ValueError("--encoder needs --data FOLDER, with one subfolder per class")
    place = Path(data).expanduser().resolve()
    last = re.split("[:/]", data.rstrip("/"))[-1] if is_name(data) else place.stem if place.is_file() else place.name
    name = name or "finetune_" + re.sub(r"[^\w.+-]+", "_", last)
    path = out / name / "recipe.yaml"
    export = open_export(encoder)
    config = export.encoder().config  # reading the weights checks them
    if isinstance(config, VideoConfig):
        raise ValueError(f"{encoder} encodes clips: write a recipe whose stage has a video block (recipes/README.md)")
    size = next(size for size in SIZES if size.startswith("swinv2" if config.norm == "res-post" else "swin_"))
    stage: dict[str, Any] = {
        "init_from": str(encoder.resolve()),
        "batch_size": 64,
        "micro_batch_size": 32,
        # For small data: the papers' recipe on one GPU, its rate for 512 images per step.
        "schedule": {"base_lr": 1.25e-3, "epochs": 50, "warmup_epochs": 5, "warmup_lr": 2.5e-7, "min_lr": 2.5e-7},
        "log": {"evaluate_every_steps": 500, "checkpoint_every_steps": 500},
    }
    given = dict(zip(SIZES_OF_A_STAGE, (image_size, window_size), strict=True))
    stage |= {key: value for key, value in given.items() if value is not None}
    if config.in_chans != 3:
        stage["augment"] = {"rand_augment": None}
    recipe = Recipe.model_validate(
        {
            "name": name,
            "data": {
                "path": data if is_name(data) else str(place),
                **export.pixels,
            },
            "encoder": {"name": size, **{field: getattr(config, field) for field in ARCHITECTURE}},
            "stages": {"finetune": stage},
        }
    )
    if path.exists():
        _same_task(path, recipe, stage)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".recipe_{os.getpid()}.yaml")  # several processes may write it at the same time
    unfinished.write_text(f"# simmim finetune {path}\n{dump_recipe(recipe)}", encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _same_task(path: Path, wanted: Recipe, given: dict[str, Any]) -> None:
    there = load_recipe(str(path))
    old, new = (recipe.stages.get("finetune") for recipe in (there, wanted))
    pairs: dict[str, Any] = {"data": (there.data.path, wanted.data.path)}
    pairs |= {
        key: (getattr(old, key, None), getattr(new, key)) for key in ("init_from", *SIZES_OF_A_STAGE) if key in given
    }
    for key, (before, now) in pairs.items():
        if before != now:
            raise ValueError(f"{path} was written for {key} {before}, not {now}: give another --name, or edit it")
