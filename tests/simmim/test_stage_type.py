"""A new stage type is one file: this one adds a stage that learns the mean color of images."""

from __future__ import annotations

import json
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import nn

import swin
from simmim.config import KINDS, Recipe, Stage
from simmim.config.sections import Size
from simmim.data import CenterCrop
from simmim.planning.plan import make_fake_task
from simmim.stages import run_stage
from simmim.stages.datasets import builtin_datasets
from simmim.stages.job import Transforms
from simmim.stages.stage_type import STAGE_TYPES, StageType, register, unregister
from simmim.tasks.task import Task
from simmim.training.engine import evaluate


class MeanColorStage(Stage):
    """Regression of the mean color."""

    kind: Literal["color"] = Field("color")
    image_size: Size = Field((32, 32))
    window_size: Size = Field((4, 4))
    hidden: int = Field(8)


class MeanColor(Task):
    def __init__(self, encoder, hidden, mean, std) -> None:
        super().__init__(encoder, mean, std)
        self.head = nn.Sequential(nn.Linear(encoder.config.num_features, hidden), nn.Linear(hidden, 3))

    def forward(self, batch):
        images = self.normalize(batch["image"])
        return F.mse_loss(self.head(self.encoder(images).mean(dim=(1, 2))), images.mean(dim=(2, 3)))

    def eval_step(self, batch):
        return {"loss": self(batch)}

    def visualize(self, batch):
        return Image.new("RGB", (8, 8))


class MeanColorType(StageType[MeanColorStage]):
    settings = MeanColorStage
    has_builtin_data = True

    def open_datasets(self, recipe, stage, path, size):
        return builtin_datasets(recipe, stage, size, recipe.data.validation_images)

    def make_transforms(self, recipe, stage, size) -> Transforms:
        return Transforms(CenterCrop(size), CenterCrop(size))

    def make_task(self, recipe, stage, encoder, classes) -> MeanColor:
        return MeanColor(encoder, stage.hidden, recipe.data.mean, recipe.data.std)

    def evaluate(self, trained, accelerator) -> dict[str, Any]:
        return {
            f"validation_{key}": value for key, value in evaluate(trained.task, trained.validation, accelerator).items()
        }

    def describe(self, stage, task) -> dict[str, Any]:
        return {"mean_color": {"hidden": stage.hidden}}


@pytest.fixture
def registered():
    stage_type = register(MeanColorType())
    yield stage_type
    unregister(stage_type)


RECIPE = {
    "name": "colors",
    "data": {"path": "builtin:shapes", "num_images": 64, "validation_images": 8},
    "encoder": {"name": "swinv2_tiny", "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]},
    "stages": {
        "color_32": {
            "init_from": "scratch",
            "batch_size": 8,
            "micro_batch_size": 8,
            "schedule": {"epochs": 4, "warmup_epochs": 1, "base_lr": 0.2},
            "log": {"metrics_every_steps": 1},
        }
    },
}


def test_a_stage_type_in_one_file_is_trained_from_a_recipe_to_an_export(registered, tmp_path):
    recipe = Recipe.model_validate(RECIPE)
    assert recipe.stages["color_32"] == MeanColorStage(**RECIPE["stages"]["color_32"])
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert isinstance(make_fake_task(recipe, "color_32", 1), MeanColor)
    export = run_stage(recipe, "color_32", tmp_path)
    description = swin.load_description(export)
    assert description["mean_color"] == {"hidden": 8} and description["trained"]["steps"] == 32
    assert swin.load_encoder(export)(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 4, 16)
    assert (export / "head.safetensors").exists()
    rows = [json.loads(line) for line in (export.parent / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 32 and sum(losses[-4:]) < sum(losses[:4]) / 2
    summary = json.loads((export.parent / "summary.json").read_text())
    assert summary["validation_loss"] < losses[0]
    modified = export.stat().st_mtime_ns
    assert run_stage(recipe, "color_32", tmp_path) == export and export.stat().st_mtime_ns == modified


def test_unknown_keys_and_kinds_are_refused(registered):
    stage = RECIPE["stages"]["color_32"]
    with pytest.raises(ValueError, match="hiden"):
        Recipe.model_validate(RECIPE | {"stages": {"color_32": stage | {"hiden": 4}}})
    unregister(registered)
    assert "color" not in KINDS and MeanColorStage not in STAGE_TYPES
    with pytest.raises(ValueError, match="color_32"):
        Recipe.model_validate(RECIPE)


def test_a_kind_belongs_to_one_stage_type():
    class OtherStage(Stage):
        kind: Literal["pretrain"] = Field("pretrain")

    class OtherType(MeanColorType):
        settings = OtherStage

    with pytest.raises(ValueError, match="'pretrain' have the settings PretrainStage already"):
        register(OtherType())
    assert OtherStage not in STAGE_TYPES
