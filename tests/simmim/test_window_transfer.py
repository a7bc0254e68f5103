"""The window-transfer experiment runs, resumes and rejects invalid settings."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch
from PIL import Image

from simmim.cli.main import main
from simmim.experiments import window_transfer as experiment

TINY = ["--seeds=2", "--image-size=16", "--window-size=2", "--steps=3", "--finetune-steps=2", "--batch-size=4"]
TINY += ["--embed-dim=8"]


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr(experiment, "VALIDATION_IMAGES", 8)


def run(*arguments: str) -> int:
    return main(["experiment", "window-transfer", *TINY, *arguments])


@pytest.mark.slow
def test_the_table_is_complete_and_drawn(tmp_path, capsys):
    assert run("--out", str(tmp_path / "a")) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "a" / "table.json").read_text())
    accuracies = {(each["variant"], each["factor"], each["fine_tuned"]): each["top1"] for each in content["accuracies"]}
    expected = {
        (variant, factor, tuned)
        for variant in experiment.VARIANTS
        for factor in (1.5, 2.0, 3.0)
        for tuned in (False, True)
    }
    assert set(accuracies) == expected | {(variant, 1.0, False) for variant in experiment.VARIANTS}
    assert all(len(top1) == 2 and all(0 <= value <= 1 for value in top1) for top1 in accuracies.values())
    assert (tmp_path / "a" / "table.txt").read_text() in printed
    assert "W3 I24" in printed and "W6 I48" in printed
    with Image.open(tmp_path / "a" / "table.png") as figure:
        assert figure.width > 500
    # Every variant was trained, and fine-tuned at every window.
    for variant in experiment.VARIANTS:
        for factor, steps in (("x1", 3), ("x1.5", 2), ("x3", 2)):
            lines = (tmp_path / "a" / f"{variant}_seed1" / factor / "metrics.jsonl").read_text().splitlines()
            assert json.loads(lines[-1])["step"] == steps


@pytest.mark.slow
def test_an_interrupted_experiment_continues(tmp_path, monkeypatch, capsys):
    assert run("--out", str(tmp_path / "complete")) == 0
    trained = experiment.fit
    calls = []

    def interrupted(*arguments, **settings):
        calls.append(arguments[4].total_steps)
        if len(calls) == 4:
            raise KeyboardInterrupt
        trained(*arguments, **settings)

    monkeypatch.setattr(experiment, "fit", interrupted)
    assert run("--out", str(tmp_path / "parts")) == 130
    assert run("--out", str(tmp_path / "parts")) == 0
    assert len(calls) == 4 + 24 - 3  # finished runs are skipped
    texts = [(tmp_path / name / "table.json").read_text() for name in ("complete", "parts")]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_labelled_folders(tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)
    for name in ("ants", "bees"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(10):
            pixels = torch.randint(0, 256, (20, 30, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / "data" / name / f"{index}.png")
    assert run("--data", str(tmp_path / "data"), "--seeds=1", "--out", str(tmp_path / "out")) == 0
    assert (tmp_path / "out" / "table.png").exists()


def test_variants_differ_in_their_position_bias_only(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        experiment,
        "_train",
        lambda plan, task, factor, seed, folder, accelerator: seen.setdefault(id(task), task) and 0.5,
    )
    plan = experiment.Plan(image_size=16, window_size=2, batch_size=4, embed_dim=8)
    configs = []
    for variant in experiment.VARIANTS:
        seen.clear()
        experiment._evaluate_variant(plan, variant, 0, tmp_path, experiment.Accelerator())
        configs.append([task.encoder.config for task in seen.values()])
    for variants in zip(*configs, strict=True):
        assert [config.position_bias for config in variants] == ["log_cpb", "linear_cpb", "table"]
        assert len({(c.image_size, c.window_size, c.attention, c.norm, c.depths, c.embed_dim) for c in variants}) == 1
    assert [config.window_size for config in configs[0]] == [(2, 2), (3, 3), (4, 4), (6, 6)]
    assert {config.reference_windows for config in configs[0]} == {((2, 2), (2, 2))}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image-size=20"], "multiple of 8"),
        (["--window-size=3"], "window size even"),
        (["--window-size=8"], "larger than an image"),
        (["--seeds=0"], "seeds must be at least 1"),
        (["--data=nowhere"], "nowhere"),
    ],
)
def test_mistakes(arguments, message, tmp_path, capsys):
    assert run("--out", str(tmp_path / "out"), *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "table.json").exists()


@pytest.mark.slow
def test_a_folder_of_another_plan_is_rejected(tmp_path, capsys):
    assert run("--out", str(tmp_path), "--seeds=1") == 0
    assert run("--out", str(tmp_path), "--seeds=1", "--steps=4") == 2
    assert "steps" in capsys.readouterr().err


def test_the_help_shows_the_true_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["experiment", "window-transfer", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(experiment.Plan):
        option = text.split(f" --{field.name.replace('_', '-')} ")[1].split(" --")[0]
        assert f"default: {field.default}" in option, field.name
