"""Pretrained against scratch, from a recipe to its table and page."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import swin
from simmim.cli.main import main
from simmim.config.loading import load_recipe
from simmim.data import Shapes
from simmim.experiments import label_efficiency as experiment
from simmim.stages import runner

FINETUNE = {
    "kind": "finetune",
    "init_from": "pretrain",
    "image_size": 32,
    "window_size": 4,
    "batch_size": 8,
    "micro_batch_size": 4,
    "labels": {"labels_per_class": 4, "val_images": 20},
    "augment": {"rand_augment": None},
    "schedule": {"epochs": 2, "warmup_epochs": 0.5, "base_lr": 0.05},
    "log": {"metrics_every_steps": 3, "checkpoint_every_steps": 2, "evaluate_every_steps": 2},
}
RECIPE = {
    "data": {"path": "builtin:shapes", "num_images": 60, "validation_images": 4, "num_workers": 0},
    "encoder": {"name": "swinv2_tiny", "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2]},
    "stages": {
        "pretrain": {
            "image_size": 32,
            "window_size": 4,
            "batch_size": 8,
            "micro_batch_size": 8,
            "mask": {"patch_size": 8},
            "schedule": {"epochs": 0.6, "warmup_epochs": 0.1, "base_lr": 0.05},
            "log": {"metrics_every_steps": 1, "evaluate_every_steps": 2},
        },
        "finetune_32": FINETUNE,
        "scratch_32": {**FINETUNE, "init_from": "scratch", "layer_decay": 1.0},
        "transfer_48": {**FINETUNE, "kind": "transfer", "init_from": "finetune_32", "image_size": 48, "window_size": 6},
    },
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "proof.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return path


def command(*arguments: object) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    return main(["experiment", "label-efficiency", *map(str, arguments)])


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("done")
    assert command(recipe, "--out", out, "--seeds", 0, 3) == 0
    return out / "proof"


def test_results_are_those_of_the_stages(done):
    content = json.loads((done / "label_efficiency.json").read_text())
    assert content["seeds"] == [0, 3]
    assert content["pairs"] == [{"pretrained": "finetune_32", "scratch": "scratch_32"}]
    for name in ("finetune_32", "scratch_32", "transfer_48"):
        summaries = [json.loads((done / f"seeds/seed_{seed}/{name}/summary.json").read_text()) for seed in (0, 3)]
        assert content["accuracy"][name] == [summary["validation_top1"] for summary in summaries]
    ways = content["transfers"]["transfer_48"]
    assert list(ways) == [experiment.CONTINUOUS, experiment.BICUBIC, experiment.TUNED]
    assert ways[experiment.TUNED] == content["accuracy"]["transfer_48"]


def test_both_stages_of_a_seed_see_the_same_labels(done):
    """Other seeds use other labels, and all fine-tuning starts from the same pretraining."""
    for seed in (0, 3):
        recipes = [
            load_recipe(str(done / f"seeds/seed_{seed}/{name}/recipe.yaml")) for name in ("finetune_32", "scratch_32")
        ]
        assert {recipe.seed for recipe in recipes} == {seed}
    stage = recipes[0].stages["finetune_32"]
    assert Path(stage.init_from) == done / "pretrain/export"
    assert not (done / "seeds/seed_0/pretrain").exists()


def test_the_untrained_transfer_is_that_of_the_enlarged_classifier(done):
    """Recomputed by hand, with the continuous bias and with the frozen one, which give different encoders."""
    content = json.loads((done / "label_efficiency.json").read_text())["transfers"]["transfer_48"]
    export = done / "seeds/seed_0/finetune_32/export"
    head = load_file(export / "classifier.safetensors")
    validation = Shapes(20, (48, 48), validation=True)
    labels = torch.tensor([validation.label(index) for index in range(20)])
    pixels = swin.load_description(export)["pixels"]
    mean_, std = (torch.tensor(pixels[name]).view(-1, 1, 1) for name in ("mean", "std"))
    images = (torch.stack([validation.read(index) for index in range(20)]) / 255 - mean_) / std
    logits = {}
    for way, bias in ((experiment.CONTINUOUS, "log_cpb"), (experiment.BICUBIC, "table")):
        encoder = swin.load_encoder(export, image_size=48, window_size=6, position_bias=bias).eval()
        with torch.no_grad():
            logits[way] = encoder(images).mean((1, 2)) @ head["weight"].T + head["bias"]
        top1 = (logits[way].argmax(1) == labels).float().mean().item()
        assert content[way][0] == pytest.approx(top1, abs=1e-6)
    assert not torch.equal(logits[experiment.CONTINUOUS], logits[experiment.BICUBIC])


def test_the_table_and_the_page(done):
    text = (done / "label_efficiency.txt").read_text()
    content = json.loads((done / "label_efficiency.json").read_text())
    assert "validation top-1, %, mean ± s.d. of seeds 0, 3" in text
    assert f"{100 * mean(content['accuracy']['finetune_32']):.1f} ± " in text
    gains = [a - b for a, b in zip(content["accuracy"]["finetune_32"], content["accuracy"]["scratch_32"], strict=True)]
    assert experiment.percent(gains) in text
    for way in (experiment.CONTINUOUS, experiment.BICUBIC, experiment.TUNED):
        assert way in text
    with Image.open(done / "page.png") as page:
        assert page.width > 1000 and len(page.convert("L").getcolors(256)) > 100


def test_finished_stages_are_skipped(recipe, done, monkeypatch, capsys):
    before = (done / "label_efficiency.json").read_text()
    monkeypatch.setattr(runner, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert command(recipe, "--out", done.parent, "--seeds", 0, 3) == 0
    assert (done / "label_efficiency.json").read_text() == before


def test_percent():
    assert experiment.percent([0.5]) == "50.0"
    assert experiment.percent([0.5, 0.6, 0.7]) == "60.0 ± 10.0"


@pytest.mark.parametrize(
    "change", [{"schedule": {"epochs": 30}}, {"labels": {"labels_per_class": 5}}, {"batch_size": 4}]
)
def test_only_equal_budgets_are_compared(change, recipe, tmp_path, capsys):
    content = yaml.safe_load(recipe.read_text())
    content["stages"]["scratch_32"].update(change)
    path = tmp_path / "unequal.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    assert command(path, "--out", tmp_path) == 2
    assert "nothing to compare" in capsys.readouterr().err


def test_several_pairs_find_their_own_controls():
    recipe = load_recipe("cifar_swinv2_nano")
    assert [tuple(pair) for pair in experiment.find_pairs(recipe)] == [
        (f"finetune_{fraction}", f"scratch_{fraction}") for fraction in (1, 10, 100)
    ]


@pytest.mark.parametrize("seeds", [[0, 0], [-1]])
def test_seeds_that_repeat(seeds, recipe, tmp_path, capsys):
    assert command(recipe, "--out", tmp_path, "--seeds", *seeds) == 2
    assert "seeds must be different" in capsys.readouterr().err
