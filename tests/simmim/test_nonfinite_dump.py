"""A step that is not finite is not taken, and can be done again from what it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simmim import stages
from simmim.cli.main import main
from simmim.config.loading import load_recipe
from simmim.stages import replay, runner
from simmim.training import engine
from simmim.training.nonfinite_dump import MicroBatch, write_nonfinite_dump
from tests.simmim.test_training import TINY, saved_state, train_in_float64

BLACK = ["data.mean=[0, 0, 0]", "data.std=[1e-44, 1e-44, 1e-44]", "data.validation_images=0"]
PLANTED = "image_13.png"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Black images, and one that is not: divided by such a standard deviation, it overflows."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(16):
        pixels = np.zeros((32, 32, 3), dtype=np.uint8)
        name = f"image_{number:02}.png"
        pixels[:] = 200 if name == PLANTED else 0
        Image.fromarray(pixels).save(photos / name)
    return photos


def command(photos: Path, out: Path) -> list[str]:
    return ["pretrain", "demo", "name=tiny", *TINY, *BLACK, f"data.path={photos}", "--out", str(out)]


def test_a_planted_batch_is_caught_before_the_optimizer_moves_and_done_again(folder, tmp_path, monkeypatch, capsys):
    assert main([*command(folder, tmp_path), "stages.pretrain.log.checkpoint_every_steps=1"]) == 1
    error = capsys.readouterr().err
    stage = tmp_path / "tiny/pretrain"
    (report,) = (stage / "nonfinite").glob("*.json")
    about = json.loads(report.read_text())
    step = about["step"]
    assert error.startswith(f"error: step {step}: loss nan, gradient norm nan; the step was not taken. `simmim replay")
    assert (
        "resume with it and --allow-changes" in error
        and str(report) in error
        and report.name == f"step_{step:08d}.json"
    )
    assert [len(micro["index"]) for micro in about["processes"][0]] == [4, 4]

    # The weights beside it are those of the step before, bit for bit.
    weights = saved_state(stage / "nonfinite" / about["weights"])
    if step > 1:
        before = saved_state(stage / f"checkpoints/step_{step - 1:08d}")
        assert all(torch.equal(weights[key], before[key]) for key in before)
    assert all(bool(value.isfinite().all()) for value in weights.values())
    events = [json.loads(line) for line in (stage / "events.jsonl").read_text().splitlines()]
    happened = [(event["step"], event["event"]) for event in events]
    assert happened == [(0, "excluded_data"), (step, "nonfinite")]  # the photographs have no classes to be held out by

    elsewhere = [(stage.parent, stage.name), (stage, "."), (report.parent, report.name)]
    for where, given in [(tmp_path, stage), (tmp_path, report), *elsewhere]:
        monkeypatch.chdir(where)
        assert main(["replay", str(given)]) == 0
        printed = capsys.readouterr().out
        assert "reproduced\n" in printed and "not reproduced" not in printed
        assert "first module with a non-finite output: encoder.patch_embed.proj (Conv2d)" in printed
        assert "images with a non-finite loss: " in printed and PLANTED in printed.splitlines()[-1]
        assert "non-finite gradients: " in printed and "none" not in printed

    # Mended, the step can be done again and is finite.
    Image.fromarray(np.zeros((32, 32, 3), dtype=np.uint8)).save(folder / PLANTED)
    assert main(["replay", str(report)]) == 1
    assert "not reproduced" in capsys.readouterr().out
    # The event stays when the run continues.
    assert main([*command(folder, tmp_path), "stages.pretrain.log.checkpoint_every_steps=1"]) == 0
    events = [json.loads(line) for line in (stage / "events.jsonl").read_text().splitlines()]
    assert "nonfinite" in [event["event"] for event in events]


@pytest.mark.slow
def test_two_processes_leave_one_box_that_one_process_opens(folder, tmp_path, capsys):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    launch += ["--main_process_port", "0", str(Path(__file__).parents[2] / "tools/pretrain.py")]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [*launch, *command(folder, tmp_path)[1:]], env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 1
    assert "error (process 0): step" in result.stderr and "the step was not taken" in result.stderr
    (report,) = (tmp_path / "tiny/pretrain/nonfinite").glob("*.json")
    about = json.loads(report.read_text())
    assert [[len(micro["index"]) for micro in process] for process in about["processes"]] == [[4], [4]]
    assert main(["replay", str(report)]) == 0
    assert PLANTED in capsys.readouterr().out


def test_a_gradient_that_overflows_is_enough(tmp_path, monkeypatch):
    def overflowing(accelerator, loss):
        loss.backward()
        gradient = next(iter(model for model in accelerator._models)).head.weight.grad
        gradient[0, 0] = float("inf")

    monkeypatch.setattr(engine.Accelerator, "backward", overflowing)
    with pytest.raises(engine.NonFiniteLoss, match=r"step 1: loss 0\.\d+, gradient norm inf; the step was not taken"):
        train_in_float64(tmp_path, 8)


def test_fine_tuning_is_done_again_with_its_mixup(tmp_path, monkeypatch, capsys):
    """Augmentation draws from global generators: the same losses, micro-batch by micro-batch."""
    stage = {"kind": "finetune", "init_from": "scratch", "image_size": 32, "window_size": 4, "batch_size": 8}
    overrides = [f"stages={json.dumps({'finetune': stage})}", "data.validation_images=4"]
    tiny = [word for word in TINY if not word.startswith("stages.")]
    few = ["micro_batch_size=4", "schedule.epochs=1", "schedule.warmup_epochs=0", "augment.rand_augment=null"]
    recipe = load_recipe("demo", ["name=tiny", *tiny, *overrides, *(f"stages.finetune.{word}" for word in few)])
    losses = []
    original = runner.fit

    def poisoned(accelerator, model, *arguments, **options):
        backward = accelerator.backward

        def poison(loss):
            losses.append(loss.item() * 2)
            backward(loss)
            if len(losses) == 6:
                model.head.bias.grad[0] = float("nan")

        accelerator.backward = poison
        original(accelerator, model, *arguments, **options)

    monkeypatch.setattr(runner, "fit", poisoned)
    with pytest.raises(engine.NonFiniteLoss):
        stages.run_stage(recipe, "finetune", tmp_path)
    again = replay.replay(tmp_path / "tiny/finetune")
    about = json.loads(next((tmp_path / "tiny/finetune/nonfinite").glob("*.json")).read_text())
    assert about["step"] == 3
    recorded = [micro["loss"] for micro in about["processes"][0]]
    assert recorded == pytest.approx(losses[4:6], rel=1e-6)
    assert again.loss == pytest.approx(sum(recorded) / 2, rel=1e-6)
    assert not again.is_reproduced and "not reproduced" in again.text  # the gradient was poisoned by hand


def test_each_box_has_the_weights_of_its_own(tmp_path):
    accelerator = engine.Accelerator(cpu=True)
    number = torch.zeros(2, dtype=torch.int64)
    taken = [MicroBatch(number, number, torch.tensor(float("nan")))]
    for step in (5, 2):
        state = {"model/weight": torch.full((3,), float(step))}
        write_nonfinite_dump(tmp_path, step, state, taken, accelerator, seed=0)
    for step in (5, 2):
        about = json.loads((tmp_path / f"nonfinite/step_{step:08d}.json").read_text())
        weights = saved_state(tmp_path / "nonfinite" / about["weights"])
        assert weights["model/weight"].tolist() == [float(step)] * 3


def test_a_full_disk_does_not_hide_what_was_wrong(folder, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine, "write_nonfinite_dump", full)
    assert main(command(folder, tmp_path)) == 1
    error = capsys.readouterr().err
    assert (
        "the step was not taken. The non-finite dump could not be written: [Errno 28] No space left on device." in error
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "has no nonfinite/step_"),
        (lambda path: None, "is not the dump of a step"),
        (lambda path: path.write_text("{"), "is not the dump of a step"),
        (lambda path: path.write_text("{}"), "is not the dump of a step"),
        (lambda path: path.write_text("[]"), "is not the dump of a step"),
    ],
)
def test_replay_refuses_files_that_are_not_a_nonfinite_dump(make, message, tmp_path, capsys):
    make(tmp_path / "there")
    assert main(["replay", str(tmp_path / "there")]) == 2
    assert message in capsys.readouterr().err
