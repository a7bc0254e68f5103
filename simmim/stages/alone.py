"""A recipe for the usual case: an encoder, and a folder with labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from simmim.recipe import dump_recipe
from simmim.schema import Recipe
from simmim.stages.assembly import FIXED
from swin import SIZES, import_encoder, load_description, load_encoder
from swin.weights import DESCRIPTION

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def make_recipe(
    encoder: Path, data: str | None, out: Path, *, image_size: Any = None, window_size: Any = None, name: str | None
) -> Path:
    """Write the recipe of one fine-tuning stage, with every setting, and give its place.

    A recipe that is there already is left as it is: it may have been edited.

    Raises:
        ValueError: no data, or an encoder that cannot be read.
    """
    if not data:
        raise ValueError("--encoder needs --data FOLDER, with one subfolder per class")
    name = name or f"finetune_{Path(data).expanduser().resolve().name.removeprefix('builtin:')}"
    path = out / name / "recipe.yaml"
    if path.exists():
        return path
    if (encoder / DESCRIPTION).exists():
        config, pixels = load_encoder(encoder).config, load_description(encoder).get("pixels", IMAGENET)
    else:
        config, pixels = import_encoder(encoder)[0].config, IMAGENET
    size = next(size for size in SIZES if size.startswith("swinv2" if config.norm == "res-post" else "swin_"))
    stage: dict[str, Any] = {
        "init_from": str(encoder.resolve()),
        "batch_size": 64,
        "micro_batch_size": 32,
        # For small data: the papers' recipe on one GPU, its rate for 512 images per step.
        "schedule": {"base_lr": 1.25e-3, "epochs": 50, "warmup_epochs": 5, "warmup_lr": 2.5e-7, "min_lr": 2.5e-7},
        "log": {"pictures_every_steps": 500, "checkpoint_every_steps": 500},
    }
    given = {"image_size": image_size, "window_size": window_size}
    stage |= {key: value for key, value in given.items() if value is not None}
    if config.in_chans != 3:
        stage["augment"] = {"rand_augment": None}
    recipe = Recipe.model_validate(
        {
            "name": name,
            "data": {
                "path": data if data.startswith(("hf:", "builtin:")) else str(Path(data).expanduser().resolve()),
                **pixels,
            },
            "encoder": {"name": size, **{field: getattr(config, field) for field in FIXED}},
            "stages": {"finetune": stage},
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# simmim finetune {path}\n{dump_recipe(recipe)}", encoding="utf-8")
    return path
