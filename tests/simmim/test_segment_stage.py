"""A stage of segmentation: from a recipe to whole images that are judged, shown and planned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import swin
from simmim import stages
from simmim.cli.main import main
from simmim.config.loading import load_recipe
from simmim.data import Decoder, Shapes
from simmim.data.segments import read_label_map, segmented_sources, validation_segments
from simmim.evaluation.segmentation import evaluate_segmenter, load_segmenter, segment_image
from simmim.stages.datasets import make_datasets
from simmim.training.optim import make_lr
from simmim.visualization.report import write_report
from tests.simmim.test_training import comparable_metrics, interrupted
from tools import paint_shapes

ROOT = Path(__file__).parents[2]
COLOURS = np.array([[60, 60, 60], [230, 40, 40], [40, 200, 60]], np.uint8)
STATISTICS = {"mean": [0.3, 0.3, 0.3], "std": [0.25, 0.25, 0.25]}
STAGE = {
    "image_size": 32,
    "window_size": 4,
    "drop_path": 0.2,
    "layer_decay": 1,
    "batch_size": 4,
    "micro_batch_size": 2,
    "labels": {"ignore_zero": True},
    "augment": {"scale": [1, 1.5]},
    "head": {"channels": 16, "auxiliary_channels": 8},
    "test": {"short_px": 32, "window": True},
    "schedule": {"epochs": 5, "warmup_epochs": 0.5, "base_lr": 1.28},
    "log": {"metrics_every_steps": 1, "evaluate_every_steps": 12, "checkpoint_every_steps": 7},
}


def write_data(folder: Path, part: str, count: int, seed: int) -> None:
    """A square and a disc of their own colours in front of grey; label maps are those of ADE20K, 0 says nothing."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        height, width = generator.integers(36, 52, 2)
        labels = np.ones((height, width), np.uint8)
        y, x = np.mgrid[:height, :width]
        top, left = generator.integers(0, 16, 2)
        labels[top : top + 18, left : left + 18] = 2
        labels[(y - generator.integers(14, 34)) ** 2 + (x - generator.integers(14, 34)) ** 2 < 100] = 3
        image = COLOURS[labels - 1] + generator.integers(0, 20, (height, width, 3), dtype=np.uint8)
        labels[:2] = 0
        for kind, content in (("images", image), ("annotations", labels)):
            place = folder / kind / part
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(place / f"{number:03d}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ade")
    write_data(folder, "training", 20, seed=1)
    write_data(folder, "validation", 7, seed=2)
    (folder / "classes.txt").write_text("wall\nsquare\ndisc\n")
    return folder


def make_recipe(data: Path, *overrides: str, pretrained: bool = False, **changes):
    """From scratch, or from pretraining on the same images at 32 px and windows of 4."""
    pretrain = {
        "image_size": 32,
        "window_size": 4,
        "batch_size": 8,
        "micro_batch_size": 8,
        "mask": {"patch_size": 8},
        "schedule": {"epochs": 1, "warmup_epochs": 0, "base_lr": 0.05},
    }
    segment = {**STAGE, "labels": {**STAGE["labels"], "path": str(data)}, **changes}
    values = {
        "name": "tiny",
        "data": {"path": str(data / "images"), "num_workers": 0, "validation_images": 0, **STATISTICS},
        "encoder": {"name": "swinv2_tiny", "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]},
        "stages": {"pretrain": pretrain, "segment": segment}
        if pretrained
        else {"segment": {**segment, "init_from": "scratch"}},
    }
    path = data.parent / f"{data.name}_recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return load_recipe(str(path), list(overrides))


@pytest.fixture(scope="module")
def done(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("done")
    AcceleratorState._reset_state(reset_partial_state=True)
    stages.run(make_recipe(data), out)
    return out / "tiny/segment"


def test_linear_decay_by_hand():
    arguments = {"batch_size": 16, "steps_per_epoch": 10, "total_steps": 100, "warmup_lr": 0, "min_lr": 3.2e-5}
    lr_at = make_lr("linear", base_lr=1.28e-3, warmup_epochs=2, **arguments)
    assert [lr_at(step) for step in (0, 10, 20, 60, 100)] == pytest.approx([0, 2e-5, 4e-5, (4e-5 + 1e-6) / 2, 1e-6])
    assert lr_at(40) - lr_at(39) == pytest.approx(lr_at(80) - lr_at(79))  # along a line


def test_a_stage_learns_and_says_how_well(done):
    lines = comparable_metrics(done)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 25 and sum(losses[-5:]) < 0.65 * sum(losses[:5])
    assert {"validation_loss", "validation_pixel_accuracy"} <= lines[-1].keys() | lines[-2].keys()
    summary = json.loads((done / "summary.json").read_text())
    assert summary["validation_images"] == 7 and summary["validation_mean_iou"] > 0.4
    assert summary["validation_iou"].keys() == {"wall", "square", "disc"}
    assert np.mean(list(summary["validation_iou"].values())) == pytest.approx(summary["validation_mean_iou"])
    assert (done / "predictions/step_00000025.png").exists()


def test_the_number_is_that_of_every_whole_image_once(done, data):
    """Predicted image by image and counted with numpy, at the size of the label maps."""
    task = load_segmenter(done / "export")
    assert (task.short_px, task.window, task.stride) == (32, (32, 32), (21, 21))
    both, either = np.zeros(3), np.zeros(3)
    files = sorted((data / "images/validation").iterdir())
    for file in files:
        shown = segment_image(task, torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
        truth = read_label_map((data / "annotations/validation" / file.name).read_bytes())
        buffer = done / "map.png"
        shown.label_map.save(buffer)
        found = read_label_map(buffer.read_bytes())
        assert found.shape == truth.shape and found.min() >= 1  # numbered as in the annotations
        for label in (1, 2, 3):
            both[label - 1] += ((found == label) & (truth == label)).sum()
            either[label - 1] += (((found == label) & (truth != 0)) | (truth == label)).sum()
        assert sum(shown.facts["classes"].values()) == pytest.approx(1) and shown.overlay.width > 100
        json.dumps(shown.facts)
    summary = json.loads((done / "summary.json").read_text())
    assert (both / either).mean() == pytest.approx(summary["validation_mean_iou"], rel=1e-6)


def test_evaluating_an_export_repeats_the_result_of_its_stage(done, data):
    summary = json.loads((done / "summary.json").read_text())
    AcceleratorState._reset_state(reset_partial_state=True)
    numbers = evaluate_segmenter(done / "export", str(data), num_workers=0)
    assert numbers == {key: pytest.approx(summary[f"validation_{key}"]) for key in numbers} and numbers["images"] == 7
    halves = {"annotations": str(data / "annotations/validation"), "num_workers": 0}
    again = evaluate_segmenter(done / "export", str(data / "images/validation"), **halves)
    assert again == pytest.approx(numbers)
    other = evaluate_segmenter(done / "export", str(data), num_workers=0, window=None, scales=[1, 1.5], flip=True)
    assert other["images"] == 7 and other["mean_iou"] != numbers["mean_iou"]
    larger = load_segmenter(done / "export", image_size=64, window_size=8)
    assert larger.encoder.config.window_size == (8, 8)
    assert (larger.short_px, larger.window, larger.stride) == (64, (64, 64), (42, 42))


@pytest.mark.slow
def test_processes_count_every_image_once(done, data, tmp_path):
    script = tmp_path / "judge.py"
    script.write_text(
        "import json, os, sys\nfrom pathlib import Path\n"
        "from simmim.evaluation.segmentation import evaluate_segmenter\n"
        "numbers = evaluate_segmenter(Path(sys.argv[1]), sys.argv[2], num_workers=0)\n"
        "Path(f'numbers_{os.environ[\"RANK\"]}.json').write_text(json.dumps(numbers))\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu"]
    launch += ["--main_process_port", "0", str(script), str(done / "export"), str(data)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(launch, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr[-2000:]
    summary = json.loads((done / "summary.json").read_text())
    for rank in range(2):
        numbers = json.loads((tmp_path / f"numbers_{rank}.json").read_text())
        assert numbers == {key: pytest.approx(summary[f"validation_{key}"]) for key in numbers}


def test_interrupt_and_resume_equals_a_straight_run_bit_for_bit(done, data, tmp_path):
    with interrupted(16):
        stages.run(make_recipe(data), tmp_path)
    stages.run(make_recipe(data, "stages.segment.test.flip=true"), tmp_path)  # how it is tested may change
    folder = tmp_path / "tiny/segment"
    one, two = (load_file(next((f / "checkpoints/step_00000025").glob("*.safetensors"))) for f in (done, folder))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    trained = [[line for line in comparable_metrics(f) if "loss" in line] for f in (done, folder)]
    assert trained[0] == trained[1]
    with pytest.raises(ValueError, match=r"other settings \(stage.head.channels: 16 -> 24"):
        stages.run(make_recipe(data, "stages.segment.head.channels=24"), tmp_path)


def test_an_encoder_of_pretraining_grows_without_a_flag(data, tmp_path):
    """Pretrained at 32 px and windows of 4: at 64 px windows of 8, whose biases are those of the old reference."""
    changes = {"image_size": 64, "window_size": None, "schedule": {**STAGE["schedule"], "epochs": 0.6}, "test": {}}
    export = stages.run(make_recipe(data, pretrained=True, **changes), tmp_path)
    config = swin.load_encoder(export).config
    assert (config.image_size, config.window_size) == ((64, 64), (8, 8))
    assert config.reference_windows == ((4, 4), (4, 4))
    task = load_segmenter(export)
    assert task.window is None and task.short_px == 64
    pretrained, trained = (load_file(p / "encoder.safetensors") for p in (tmp_path / "tiny/pretrain/export", export))
    assert pretrained.keys() == trained.keys()
    around = load_file(export / "head.safetensors")
    state = {key: value for key, value in task.state_dict().items() if not key.startswith("encoder.")}
    assert around.keys() == state.keys() and all(torch.equal(around[key], state[key]) for key in state)


def test_ema_is_evaluated_and_exported(data, tmp_path):
    recipe = make_recipe(data, "stages.segment.ema_decay=0.5", "stages.segment.schedule.epochs=1")
    export = stages.run(recipe, tmp_path)
    saved = load_file(next((export.parent / "checkpoints/step_00000005").glob("*.safetensors")))
    key = "head.classifier.linear.weight"
    exported = load_file(export / "head.safetensors")[key]
    assert torch.equal(exported, saved[f"ema/{key}"]) and not torch.equal(exported, saved[f"model/{key}"])


def test_bad_data_is_counted_and_named(tmp_path, capsys):
    write_data(tmp_path / "bad", "training", 12, seed=3)
    write_data(tmp_path / "bad", "validation", 3, seed=4)
    annotations = tmp_path / "bad/annotations"
    for number in (1, 4, 6, 7):
        (annotations / f"training/{number:03d}.png").unlink()
    (annotations / "validation/002.png").write_bytes(b"no map")
    (tmp_path / "bad/images/training/003.png").write_bytes(b"")
    recipe = make_recipe(tmp_path / "bad", "stages.segment.schedule.epochs=1.5", "stages.segment.labels.classes=3")
    folder = stages.run(recipe, tmp_path / "out").parent
    printed = capsys.readouterr().out
    assert "warning: 4 problem(s) in the data: " in printed and printed.count("has no annotation") == 3
    assert "training/001.png: has no annotation; " in printed and "006.png: has no annotation; ..." in printed
    assert "8 images at 32 x 32 px" in printed
    assert "training/003.png (the file is empty)" in printed and "validation/002.png" in printed
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events].count("excluded_data") == 1
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["validation_images"] == 2
    corrupt = [line.split(",")[0][-18:] for line in (folder / "corrupt_images.csv").read_text().splitlines()]
    assert sorted(corrupt) == ["s/training/003.png", "validation/002.png"]
    for file in annotations.glob("validation/*"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of 3 images could be read with its label map"):
        stages.run(make_recipe(tmp_path / "bad"), tmp_path / "other")


def test_validation_images_are_excluded_from_pretraining(tmp_path):
    """One folder of images, not all of them with label maps: those to be judged by are seen by no stage."""
    write_data(tmp_path / "one", "", 60, seed=5)
    for number in range(0, 60, 3):
        (tmp_path / f"one/annotations/{number:03d}.png").unlink()
    recipe = make_recipe(tmp_path / "one", "data.validation_images=2", pretrained=True)
    (training, own, *_), sources = make_datasets(recipe, "pretrain"), make_datasets(recipe, "segment")
    validation = {sources.validation.name(n) for n in range(len(sources.validation))}
    assert len(training) == 60 - len(validation | {own.name(n) for n in range(len(own))}) and validation
    assert len(sources.training) + len(validation) <= 40
    assert not validation & {training.name(n) for n in range(len(training))}
    assert not validation & {sources.training.name(n) for n in range(len(sources.training))}


def test_parts_are_found_below_images(data):
    """ADE20K calls them training and validation; pretraining on all of its images leaves the second alone."""
    training = make_datasets(make_recipe(data, pretrained=True), "pretrain").training
    assert len(training) == 20 and "/training/" in training.name(0)
    assert len(validation_segments(data, Decoder(), classes=3, ignore_zero=True)) == 7


def test_some_of_the_labels(data):
    names = []
    for seed in (0, 0, 1):
        recipe = make_recipe(data, "stages.segment.labels.images=6", f"seed={seed}")
        sources = make_datasets(recipe, "segment")
        names.append({sources.training.name(n) for n in range(len(sources.training))})
        assert len(sources.validation) == 7
    assert len(names[0]) == 6 and names[0] == names[1] != names[2]
    recipe = make_recipe(data, "stages.segment.labels.images=21")
    with pytest.raises(ValueError, match=r"has 20 training images, but labels.images is 21: lower it"):
        make_datasets(recipe, "segment")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.segment.test.stride=40", r"test.stride \[40, 40\] must not exceed image_size \[32, 32\]"),
        ("stages.segment.augment.scale=[2, 1]", r"scale must be \[low, high\] with low not above high"),
        ("encoder={in_chans: 1, name: swinv2_tiny}", r"data.mean has 3 values"),
        ("encoder.depths=[2]", r"segment needs a feature pyramid"),
        ("stages.segment.head.chanels=4", r"did you mean 'channels'"),
    ],
)
def test_recipes_that_cannot_work(override, message, data):
    with pytest.raises(ValueError, match=message):
        make_recipe(data, override, *(["encoder.num_heads=[1]"] if "depths" in override else []))


def test_recipes_that_do_not_agree(data):
    with pytest.raises(ValueError, match=r"test.stride \[16, 16\] needs sliding windows: set test"):
        make_recipe(data, "stages.segment.test={stride: 16}")
    grey = ["encoder.in_chans=1", "data.mean=[0.5]", "data.std=[0.2]"]
    with pytest.raises(ValueError, match="distort needs 3 channels: set it to false"):
        make_recipe(data, *grey)
    recipe = make_recipe(data, *grey, "stages.segment.augment.distort=false")
    assert recipe.stages["segment"].kind == "segment"
    with pytest.raises(ValueError, match="holds no segmenter: give the export of a stage of kind segment"):
        load_segmenter(swin_export(data))
    with pytest.raises(ValueError, match="names no images with label maps"):
        recipe = make_recipe(data, "data.path=builtin:shapes", "stages.segment.labels.path=''")
        make_datasets(recipe, "segment")


def swin_export(folder: Path) -> Path:
    encoder = swin.make_encoder("swinv2_tiny", embed_dim=8, depths=(1, 1), num_heads=(1, 2), image_size=32)
    swin.save_encoder(encoder, folder / "encoder", about={})
    return folder / "encoder"


def test_other_classes_are_refused(done, tmp_path):
    write_data(tmp_path, "validation", 2, seed=6)
    (tmp_path / "classes.txt").write_text("wall\ndisc\nsquare\n")
    with pytest.raises(ValueError, match="evaluate on data with the classes of the segmenter"):
        evaluate_segmenter(done / "export", str(tmp_path), num_workers=0)
    (tmp_path / "classes.txt").unlink()
    for file in (tmp_path / "annotations/validation").iterdir():
        Image.fromarray(np.zeros_like(np.array(Image.open(file)))).save(file)
    with pytest.raises(ValueError, match="no pixel of 2 images has a label"):
        evaluate_segmenter(done / "export", str(tmp_path), num_workers=0)


def test_missing_library_is_an_error_before_training(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.classification", None)
    with pytest.raises(ValueError, match="needs torchmetrics"):
        stages.run(make_recipe(data), tmp_path)
    assert not (tmp_path / "tiny/segment/metrics.jsonl").exists()


@pytest.mark.slow
def test_the_page_and_the_plan(done, capsys):
    page = write_report([done]).read_text()
    for part in (
        "validation_mean_iou",
        "validation_iou square",
        "validation pixel accuracy",
        "Predictions of validation images",
    ):
        assert part in page, part
    assert main(["plan", str(done / "recipe.yaml"), "--memory", "8G", "--tflops", "1", "--images", "20"]) == 0
    printed = capsys.readouterr().out
    assert "segment" in printed and "8x8" in printed and "does not work" not in printed


def test_the_data_of_the_recipe_is_that_of_the_sources(data):
    sources = segmented_sources(data, Decoder(), 5000, ignore_zero=True)
    assert sources.classes == ["wall", "square", "disc"] and len(sources.validation) == 7


@pytest.mark.parametrize("in_front_of", ["leaves", "photos"])
def test_painted_shapes_have_known_maps(in_front_of, tmp_path):
    photos = []
    if in_front_of == "photos":
        write_data(tmp_path, "photos", 12, seed=7)
        photos = ["--photos", str(tmp_path / "images/photos")]
    out = tmp_path / "painted"
    assert paint_shapes.main([str(out), "--training", "6", "--validation", "3", "--size", "24", *photos]) == 0
    sources = segmented_sources(out, Decoder(), 1)
    assert sources.classes == ["background", "plain", "stripes", "checks", "rings"] and not sources.problems
    assert (len(sources.training), len(sources.validation)) == (6, 3)
    for number in range(6):
        picture = sources.training.decode(sources.training.fetch(number))
        label = 1 + Shapes(6).label(number)
        assert picture.segments.unique().tolist() == [0, label]
        assert 0.2 < (picture.segments == label).float().mean() < 0.9


def test_too_few_photographs_to_paint_on(tmp_path, capsys):
    write_data(tmp_path, "photos", 4, seed=7)
    assert paint_shapes.main([str(tmp_path / "out"), "--photos", str(tmp_path / "images/photos")]) == 2
    assert "holds 4 images, too few for a validation part" in capsys.readouterr().err
