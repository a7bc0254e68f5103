"""The chain from the command line: stage after stage, broken off and continued, judged and refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import swin
from simmim.cli.main import main
from simmim.data import Decoder, Shapes, labelled_sources
from simmim.stages import initialization, runner
from simmim.training import engine
from tests.simmim.test_training import saved_state

ROOT = Path(__file__).parents[2]
LABELS = {"labels_per_class": 4, "val_images": 10}
SMALL = {
    "batch_size": 8,
    "micro_batch_size": 4,
    "labels": LABELS,
    "schedule": {"epochs": 2, "warmup_epochs": 0.5, "base_lr": 0.05},
    "log": {"metrics_every_steps": 1, "checkpoint_every_steps": 1, "evaluate_every_steps": 3},
}
CHAIN = {
    "data": {"path": "builtin:shapes", "num_images": 60, "validation_images": 4, "num_workers": 0},
    "encoder": {"name": "swinv2_tiny", "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2]},
    "stages": {
        "pretrain": {
            **{key: SMALL[key] for key in ("batch_size", "micro_batch_size", "log")},
            "image_size": 32,
            "window_size": 4,
            "mask": {"patch_size": 8},
            "schedule": {"epochs": 0.6, "warmup_epochs": 0.1, "base_lr": 0.05},
        },
        "supervised": {**SMALL, "layer_decay": 1.0},
        "finetune_32": {**SMALL, "ema_decay": 0.5, "drop_path": 0.2},
        "transfer_48": {**SMALL, "image_size": 48},
    },
}


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump(CHAIN, sort_keys=False))
    return path


def command(*arguments: object) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    return main([str(argument) for argument in arguments])


def exported(out: Path, stage: str) -> dict[str, torch.Tensor]:
    folder = out / "chain" / stage / "export"
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """All stages in one go."""
    out = tmp_path_factory.mktemp("straight")
    (out / "chain.yaml").write_text(yaml.safe_dump(CHAIN, sort_keys=False))
    assert command("run", out / "chain.yaml", "--out", out) == 0
    return out


def test_run_folders_of_a_chain_hold_all_files(straight):
    for stage in ("supervised", "finetune_32", "transfer_48"):
        folder = straight / "chain" / stage
        summary = json.loads((folder / "summary.json").read_text())
        assert set(summary) == {
            "validation_loss",
            "validation_top1",
            "validation_top5",
            "validation_certain_of_another",
        }
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3, 4]
        assert any("validation_top1" in line for line in steps)
        with Image.open(folder / "predictions" / "step_00000004.png") as picture:
            assert picture.width > 100
        description = swin.load_description(folder / "export")
        assert description["classes"] == ["plain", "stripes", "checks", "rings"]
        assert description["trained"]["stage"] == stage
    config = swin.load_encoder(straight / "chain/transfer_48/export").config
    assert (config.image_size, config.window_size) == ((48, 48), (6, 6))  # the window grew with the image
    assert config.reference_windows == ((4, 4), (4, 4))  # and the reference stayed
    weights = [exported(straight, stage) for stage in ("supervised", "finetune_32", "transfer_48")]
    key = "layers.1.blocks.0.mlp.fc1.weight"
    assert not torch.equal(weights[0][key], weights[1][key]) and not torch.equal(weights[1][key], weights[2][key])


@pytest.mark.slow
def test_finished_stages_are_skipped(straight, monkeypatch, capsys):
    monkeypatch.setattr(runner, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert command("run", straight / "chain.yaml", "--out", straight) == 0
    assert capsys.readouterr().out.count("finished before") == 4


@pytest.mark.slow
@pytest.mark.parametrize("corrupt", ["pretrain", "supervised", "finetune_32", "transfer_48"])
def test_chain_interrupted_in_a_stage_is_bitwise_equal(corrupt, recipe, straight, tmp_path, monkeypatch):
    original = initialization.make_lr
    stages = list(CHAIN["stages"])
    started = []

    def interrupting(*arguments, **settings):
        lr_at = original(*arguments, **settings)
        started.append(1)

        def lr(step):
            if len(started) == stages.index(corrupt) + 1 and step == 2:
                raise KeyboardInterrupt
            return lr_at(step)

        return lr

    with monkeypatch.context() as patch:
        patch.setattr(initialization, "make_lr", interrupting)
        assert command("run", recipe, "--out", tmp_path) == 130
    assert not (tmp_path / "chain" / corrupt / "export").exists()
    assert command("run", recipe, "--out", tmp_path) == 0
    for stage in stages:
        for name, tensor in exported(straight, stage).items():
            assert torch.equal(tensor, exported(tmp_path, stage)[name]), (stage, name)
        summaries = [(out / "chain" / stage / "summary.json").read_text() for out in (straight, tmp_path)]
        assert summaries[0] == summaries[1]


@pytest.mark.slow
def test_a_run_killed_between_checkpoint_and_export(recipe, straight, tmp_path, monkeypatch):
    publish = runner.publish

    def killed(unfinished, folder):
        if folder.parent.name == "finetune_32":
            raise RuntimeError("killed")
        publish(unfinished, folder)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(runner, "publish", killed)
        command("run", recipe, "--out", tmp_path)
    assert command("run", recipe, "--out", tmp_path) == 0
    assert torch.equal(exported(tmp_path, "transfer_48")["bias"], exported(straight, "transfer_48")["bias"])


@pytest.mark.slow
def test_one_loop_trains_every_stage(recipe, tmp_path, monkeypatch):
    tasks = []

    def spy(accelerator, model, *arguments, **settings):
        tasks.append(type(accelerator.unwrap_model(model)).__name__)
        engine.fit(accelerator, model, *arguments, **settings)

    monkeypatch.setattr(runner, "fit", spy)
    assert command("run", recipe, "--out", tmp_path) == 0
    assert tasks == ["SimMIM", "Classification", "Classification", "Classification"]
    assert "kind" not in Path(engine.__file__).read_text()


def test_the_average_is_what_is_exported(straight):
    checkpoint = straight / "chain/finetune_32/checkpoints/step_00000004"
    state = saved_state(checkpoint)
    result = exported(straight, "finetune_32")
    key = "encoder.layers.0.blocks.0.attn.qkv.weight"
    assert torch.equal(result[key.removeprefix("encoder.")], state[f"ema/{key}"])
    assert not torch.equal(state[f"ema/{key}"], state[f"model/{key}"])


def test_other_weights_at_the_start_are_another_stage(recipe, straight, tmp_path, capsys):
    start = straight / "chain/pretrain/export"
    arguments = ["finetune", recipe, "--stage", "finetune_32", "--out", tmp_path]
    assert command(*arguments, f"stages.finetune_32.init_from={start}") == 0
    assert command(*arguments, f"stages.finetune_32.init_from={straight}/chain/supervised/export") == 2
    assert "other settings (starts_from:" in capsys.readouterr().err


@pytest.mark.slow
def test_pretraining_goes_on_from_any_encoder(recipe, straight, tmp_path):
    """Fresh head, and the reference windows of the first pretraining."""
    out = ["--out", tmp_path, "stages.pretrain.image_size=64", "stages.pretrain.window_size=8"]
    assert command("convert", straight / "chain/transfer_48/export", tmp_path / "timm", "--to", "timm") == 0
    for init in (straight / "chain/transfer_48/export", tmp_path / "timm"):
        name = f"name=from_{init.name}"
        assert command("pretrain", recipe, *out, name, f"stages.pretrain.init_from={init}") == 0
        config = swin.load_encoder(tmp_path / f"from_{init.name}/pretrain/export").config
        assert (config.image_size, config.window_size) == ((64, 64), (8, 8))
        assert config.reference_windows == ((4, 4), (4, 4))


def test_stages_from_scratch_and_from_the_named_one(recipe, straight, tmp_path, capsys):
    scratch = ["stages.finetune_32.init_from=scratch", "stages.finetune_32.image_size=32"]
    arguments = ["finetune", recipe, "--stage", "finetune_32", "--out", tmp_path]
    assert command(*arguments, *scratch, "stages.finetune_32.window_size=4") == 0
    assert "starts from scratch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage=finetune_32"], "finetune_32 starts from supervised, which has not been run: use `simmim run`"),
        (["--stage=nothing"], "chain has no stage 'nothing': it has pretrain, supervised"),
        (["--stage=finetune_32", "stages.finetune_32.init_from=nowhere"], "nowhere does not exist"),
        (
            ["--stage=finetune_32", "stages.finetune_32.init_from={export}", "encoder.embed_dim=16"],
            "whose embed_dim is 8",
        ),
        (
            ["--stage=finetune_32", "stages.finetune_32.init_from={export}", "stages.finetune_32.image_size=0"],
            "positive",
        ),
        (
            ["--stage=finetune_32", "stages.finetune_32.init_from={export}", "stages.finetune_32.window_size=64"],
            "larger than the",
        ),
        (["--stage=transfer_48", "stages.transfer_48.init_from={export}"], "holds no classifier"),
        (["--stage=finetune_32", "stages.finetune_32.init_from={export}", "data.path={loose}"], "have no class"),
        (["--stage=finetune_32", "stages.finetune_32.init_from={export}", "data.path={one}"], "only one class"),
        (
            ["--stage=finetune_32", "stages.finetune_32.init_from={export}", "stages.finetune_32.head=x.txt"],
            "no classifier",
        ),
        (
            [
                "--stage=finetune_32",
                "stages.finetune_32.init_from={export}",
                "stages.finetune_32.labels.labels_per_class=50",
            ],
            "lower it",
        ),
    ],
)
def test_mistakes(arguments, message, recipe, straight, tmp_path, capsys):
    picture = Image.new("RGB", (20, 20), "red")
    for name in ("loose", "one/only"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(12):
            picture.save(tmp_path / name / f"{number}.png")
    places = {"export": straight / "chain/pretrain/export", "loose": tmp_path / "loose", "one": tmp_path / "one"}
    assert command("finetune", recipe, "--out", tmp_path, *(word.format(**places) for word in arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def write_images(folder: Path, classes: list[str], count: int, size: int = 32) -> None:
    """Class k is drawn with texture k of builtin:shapes."""
    source = Shapes(1000, (size, size))
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        numbers = [number for number in range(200) if source.label(number) == label % 4][:count]
        for number in numbers:
            Image.fromarray(source.read(number).permute(1, 2, 0).numpy()).save(folder / name / f"{number}.png")


def test_an_encoder_and_a_folder_are_enough(straight, tmp_path, capsys):
    write_images(tmp_path / "textures", ["a", "b", "c"], 20)
    arguments = ["finetune", "--encoder", straight / "chain/pretrain/export", "--data", tmp_path / "textures"]
    arguments += ["--image-size", "48", "--out", tmp_path / "runs", "stages.finetune.schedule.epochs=6"]
    assert command(*arguments) == 0
    folder = tmp_path / "runs/finetune_textures"
    config = swin.load_encoder(folder / "finetune/export").config
    assert (config.image_size, config.window_size, config.in_chans) == ((48, 48), (6, 6), 3)
    assert swin.load_description(folder / "finetune/export")["classes"] == ["a", "b", "c"]
    capsys.readouterr()
    assert command(*arguments) == 0
    assert "finished before" in capsys.readouterr().out
    assert command("run", folder / "recipe.yaml", "--out", tmp_path / "runs", "stages.finetune.schedule.epochs=6") == 0
    assert "finished before" in capsys.readouterr().out
    for wrong in (["--encoder", "x"], [], [folder / "recipe.yaml", "--encoder", "x"]):
        assert command("finetune", *wrong) == 2


@pytest.mark.slow
def test_accuracy_over_three_processes_counts_every_image_once(straight, tmp_path, capsys):
    write_images(tmp_path / "val", ["plain", "stripes", "checks", "rings"], 3)
    for extra in list((tmp_path / "val").glob("*/*.png"))[:2]:
        extra.unlink()
    export = straight / "chain/finetune_32/export"
    task = [str(export), str(tmp_path), "--batch-size", "2", "--num-workers", "0"]
    assert command("evaluate", *task, "--json", tmp_path / "one.json") == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "3", "--multi_gpu"]
    launch += [
        "--main_process_port",
        "0",
        str(ROOT / "tools/evaluate.py"),
        *task,
        "--json",
        str(tmp_path / "three.json"),
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr[-2000:]
    one, three = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "three"))
    assert one["images"] == three["images"] == 10
    assert three == pytest.approx(one, rel=1e-5)
    assert three["top1"] * 10 == pytest.approx(round(three["top1"] * 10), abs=1e-4)


def test_folders_of_numbers_are_class_numbers(straight, tmp_path, capsys):
    """ImageNet-V2: folders 0 to 999, which sort as text into another order."""
    export = straight / "chain/finetune_32/export"
    write_images(tmp_path / "named", ["plain", "stripes", "checks", "rings"], 5)
    write_images(tmp_path / "numbered", ["0", "1", "2", "3"], 5)
    results = []
    for name in ("named", "numbered"):
        assert command("evaluate", export, tmp_path / name, "--json", tmp_path / "x.json", "--num-workers", 0) == 0
        results.append(json.loads((tmp_path / "x.json").read_text()))
    assert results[0] == pytest.approx(results[1], rel=1e-6)  # the order of the images is another
    write_images(tmp_path / "wrong", ["0", "17"], 5)
    write_images(tmp_path / "others", ["cat", "dog"], 5)
    capsys.readouterr()
    assert command("evaluate", export, tmp_path / "wrong") == 2
    assert "class 17, but the classifier has classes 0 to 3" in capsys.readouterr().err
    assert command("evaluate", export, tmp_path / "others") == 2
    assert "cat, dog" in capsys.readouterr().err
    assert command("evaluate", straight / "chain/pretrain/export", tmp_path / "named") == 2
    assert "holds no classifier" in capsys.readouterr().err


def test_a_data_set_of_datasets(straight, tmp_path, capsys):
    source = Shapes(100, (32, 32))
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(source.classes))})

    def rows(numbers):
        images = [Image.fromarray(source.read(number).permute(1, 2, 0).numpy()) for number in numbers]
        content = {"img": images, "label": [source.label(number) for number in numbers]}
        return datasets.Dataset.from_dict(content, features=features)

    datasets.DatasetDict({"train": rows(range(60)), "test": rows(range(60, 80))}).save_to_disk(tmp_path / "saved")
    export, data = straight / "chain/finetune_32/export", f"hf:{tmp_path / 'saved'}"
    assert command("evaluate", export, data, "--num-workers", 0) == 0
    assert "images 20 " in capsys.readouterr().out
    out = ["--out", tmp_path / "runs", "--image-size", 32, "stages.finetune.schedule.epochs=6"]
    assert command("finetune", "--encoder", export, "--data", data, *out, "--name", "hub") == 0
    assert (tmp_path / "runs/hub/finetune/export/classifier.safetensors").exists()
    assert command("evaluate", export, f"hf:{tmp_path / 'nothing'}") == 2
    assert "cannot be opened by datasets" in capsys.readouterr().err


def test_probe_of_every_stage(straight, tmp_path, capsys):
    write_images(tmp_path / "data" / "train", ["a", "b"], 12)
    write_images(tmp_path / "data" / "val", ["a", "b"], 6)
    json_file = tmp_path / "probe.json"
    task = ["probe", straight / "chain/pretrain/export", tmp_path / "data", "--num-workers", 0, "--json", json_file]
    assert command(*task) == 0
    rows = json.loads(json_file.read_text())
    assert [(row["stage"], row["features"]) for row in rows] == [("stage 1", 8), ("stage 2", 16), ("final norm", 16)]
    assert set(rows[0]["knn"]) == {"10", "20"} and set(rows[0]["few_shot"]) == {"1", "5", "10"}
    assert "10-shot" in capsys.readouterr().out
    assert all(0 <= row["linear"] <= 1 and row["effective_rank"] > 1 for row in rows)


@pytest.mark.slow
def test_no_stage_trains_on_evaluation_data_of_a_later_one(straight, tmp_path, monkeypatch):
    """A folder without a split: pretraining leaves out what the stages with labels hold out."""
    write_images(tmp_path / "all", ["a", "b"], 40)
    seen: dict[str, set[str]] = {}

    def spy(job, *rest):
        name, (training, unseen, *_) = job.name, job.datasets
        seen[name] = {training.name(index) for index in range(len(training))}
        validation.setdefault(name, set()).update(unseen.name(index) for index in range(len(unseen)))
        return train(job, *rest)

    validation: dict[str, set[str]] = {}
    train = runner.train
    monkeypatch.setattr(runner, "train", spy)
    (tmp_path / "folder.yaml").write_text(yaml.safe_dump(CHAIN, sort_keys=False))
    overrides = [f"data.path={tmp_path / 'all'}", "stages.finetune_32.labels.val_images=3"]
    overrides += [
        f"stages.{name}.labels.labels_per_class=null" for name in ("supervised", "finetune_32", "transfer_48")
    ]
    assert command("run", tmp_path / "folder.yaml", "--out", tmp_path, *overrides) == 0
    judged = set.union(*(validation[name] for name in ("supervised", "finetune_32", "transfer_48")))
    assert len(judged) == 7 and len(validation["finetune_32"]) == 3 and len(validation["pretrain"]) == 4
    for names in seen.values():
        assert len(names) == 70 and not names & judged


def test_corrupt_image_is_not_counted(straight, tmp_path, capsys):
    export = straight / "chain/finetune_32/export"
    write_images(tmp_path / "val", ["plain", "stripes", "checks", "rings"], 3)
    assert command("evaluate", export, tmp_path / "val", "--json", tmp_path / "whole.json", "--num-workers", 0) == 0
    corrupt = sorted((tmp_path / "val").glob("*/*.png"))[0]
    good = corrupt.read_bytes()
    corrupt.write_bytes(good[:60])
    assert command("evaluate", export, tmp_path / "val", "--json", tmp_path / "less.json", "--num-workers", 0) == 0
    assert corrupt.name in capsys.readouterr().out
    corrupt.unlink()
    assert command("evaluate", export, tmp_path / "val", "--json", tmp_path / "gone.json", "--num-workers", 0) == 0
    whole, less, gone = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "less", "gone"))
    assert (whole["images"], less["images"], gone["images"]) == (12, 11, 11)
    assert less == pytest.approx(gone)
    for image in (tmp_path / "val").glob("*/*.png"):
        image.write_bytes(good[:60])
    assert command("evaluate", export, tmp_path / "val", "--num-workers", 0) == 2
    assert "none of 11 images" in capsys.readouterr().err


def test_another_size_or_head_is_another_stage(recipe, straight, tmp_path, capsys):
    """The weights of a continuous bias do not tell the size, and those of the encoder not the classifier."""
    start, larger = straight / "chain/finetune_32/export", tmp_path / "larger"
    assert command("convert", start, larger, "--image-size", 48, "--window-size", 6) == 0
    arguments = ["finetune", recipe, "--stage", "supervised", "--out", tmp_path]
    assert command(*arguments, f"stages.supervised.init_from={start}") == 0
    assert command(*arguments, f"stages.supervised.init_from={larger}") == 2
    assert "image_size" in capsys.readouterr().err
    mapping = tmp_path / "classes.txt"
    mapping.write_text("0 1 2 3")
    arguments += ["name=mapped", f"stages.supervised.init_from={start}", f"stages.supervised.head={mapping}"]
    assert command(*arguments) == 0
    assert command(*arguments) == 0
    assert "finished before" in capsys.readouterr().out
    mapping.write_text("3 2 1 0")
    assert command(*arguments) == 2
    assert "head" in capsys.readouterr().err


def test_the_recipe_of_another_encoder_is_not_taken_for_this_one(straight, tmp_path, capsys):
    write_images(tmp_path / "my textures (2)", ["a", "b"], 12)
    arguments = [
        "--data",
        tmp_path / "my textures (2)",
        "--out",
        tmp_path / "runs",
        "stages.finetune.schedule.epochs=6",
    ]
    first, second = straight / "chain/pretrain/export", straight / "chain/supervised/export"
    assert command("finetune", "--encoder", first, *arguments) == 0
    assert (tmp_path / "runs/finetune_my_textures_2_/recipe.yaml").exists()
    capsys.readouterr()
    assert command("finetune", "--encoder", second, *arguments) == 2
    assert "was written for init_from" in capsys.readouterr().err
    assert command("finetune", "--encoder", first, "--image-size", 48, *arguments) == 2
    assert "was written for image_size None" in capsys.readouterr().err
    assert command("finetune", "--encoder", second, "--name", "second", *arguments) == 0


def test_a_validation_folder_elsewhere(straight, tmp_path):
    write_images(tmp_path / "data/train", ["a", "b"], 6)
    write_images(tmp_path / "data/val", ["a", "b"], 3)
    write_images(tmp_path / "elsewhere", ["a", "b"], 5)
    training_images, validation = labelled_sources(tmp_path / "data", Decoder(3), 10, tmp_path / "elsewhere")
    assert list(training_images.classes) == ["a", "b"]
    assert (len(training_images), len(validation)) == (12, 10)
