"""Stages of detection: from annotated pictures to a detector that is judged, exported, opened again and planned."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import swin
from simmim import stages
from simmim.cli.main import main
from simmim.config.loading import load_recipe
from simmim.data import Decoder, Subset, evaluation_batches
from simmim.data.boxes import coco_sources
from simmim.evaluation import detection
from simmim.evaluation.detection import average_precision, detect_objects, load_detector
from simmim.stages.runner import make_job
from simmim.tasks.detection import Detection
from simmim.training.footprint import flops, footprint
from simmim.training.memory import TrackedMemory
from simmim.visualization.report import write_report
from tests.simmim.test_detection_data import annotation, write_coco
from tests.simmim.test_training import comparable_metrics, interrupted, saved_state

LOG = {"metrics_every_steps": 1, "evaluate_every_steps": 8, "checkpoint_every_steps": 3}
DETECT = {
    "image_size": 64,
    "window_size": 8,
    "drop_path": 0.2,
    "batch_size": 4,
    "micro_batch_size": 2,
    "width": 8,
    "hidden": 16,
    "anchor_px": [8, 16, 32],
    "regions_per_image": 32,
    "jitter": {"short_px": [32, 40], "long_px": 60},
    "test": {"short_px": 40, "long_px": 60},
    "schedule": {"epochs": 2, "base_lr": 0.5, "warmup_epochs": 0.2, "milestones_epochs": [1.8]},
    "log": LOG,
}
PRETRAIN = {
    "image_size": 32,
    "window_size": 4,
    "batch_size": 8,
    "micro_batch_size": 8,
    "mask": {"patch_size": 8},
    "schedule": {"epochs": 1, "warmup_epochs": 0.1},
    "log": LOG,
}


def make_recipe(folder, overrides=(), root=None, **some):
    """Of a tiny detector of the pictures in ``root``, by itself or after other stages."""
    some = some or {"detect": DETECT | {"init_from": "scratch"}}
    content = {
        "data": {"path": str(root or folder / "coco"), "num_workers": 0, "validation_images": 2},
        "encoder": {"name": "swinv2_tiny", "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]},
        "stages": some,
    }
    (folder / "mine.yaml").write_text(json.dumps(content))
    return load_recipe(str(folder / "mine.yaml"), list(overrides))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Folder of a run: pretrained at 32 px, then a detector at 64 px, of pictures with some faults."""
    folder = tmp_path_factory.mktemp("chain")
    root = folder / "coco"
    bad = [annotation(90, 12345, 3, (1, 1, 5, 5)), annotation(91, 99, 99, (1, 1, 5, 5))]
    write_coco(root, count=17, extra=bad)
    write_coco(root, "val", count=5, seed=1)
    (root / "train" / "0.png").unlink()
    (root / "train" / "1.png").write_bytes(b"nothing")
    AcceleratorState._reset_state(reset_partial_state=True)
    stages.run(make_recipe(folder, pretrain=PRETRAIN, detect=DETECT), folder, precision="fp32")
    return folder / "mine"


def test_run_folder_of_a_stage_holds_all_files(chain):
    folder = chain / "detect"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in metrics if "loss" in row]
    assert len(losses) == 8 and np.mean(losses[-2:]) < 0.8 * np.mean(losses[:2])
    assert [row["step"] for row in metrics if "validation_loss_mask" in row] == [8]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["validation_images"] == 5 and {"validation_box_ap", "validation_mask_ap50"} <= set(summary)
    assert [file.name for file in (folder / "predictions").iterdir()] == ["step_00000008.png"]
    page = write_report([folder]).read_text()
    assert "validation_mask_ap50" in page and "Predictions of validation images" in page


def test_bad_data_is_counted_and_named(chain):
    events = [json.loads(line) for line in (chain / "detect" / "events.jsonl").read_text().splitlines()]
    (told,) = [event["text"] for event in events if event["event"] == "excluded_data"]
    assert told.startswith("3 problem(s) in the data: annotation 90: image_id 12345 is not listed in images; ")
    assert "annotation 91: category_id 99" in told and "0.png: is missing" in told
    assert any(event["event"] == "corrupt_image" and "1.png" in event["text"] for event in events)


def test_an_encoder_of_another_size_needs_no_flag(chain):
    before, after = (swin.load_encoder(chain / name / "export").config for name in ("pretrain", "detect"))
    assert (before.image_size, before.window_size) == ((32, 32), (4, 4))
    assert (after.image_size, after.window_size) == ((64, 64), (8, 8))
    assert after.reference_windows == before.reference_windows
    description = swin.load_description(chain / "detect" / "export")
    assert description["trained"]["settings"]["starts_from"] != "scratch"


def test_evaluating_an_export_repeats_the_result_of_its_stage(chain, tmp_path):
    root, export = chain.parent / "coco", chain / "detect" / "export"
    summary = json.loads((chain / "detect" / "summary.json").read_text())
    found = detection.evaluate_detector(export, str(root), batch_size=2, num_workers=0, precision="fp32")
    assert {f"validation_{name}": value for name, value in found.items()} == summary
    task, view = load_detector(export)
    trained = saved_state(chain / "detect" / "checkpoints" / "step_00000008")
    assert all(torch.equal(value, trained[f"model/{name}"]) for name, value in task.state_dict().items())
    assert (view.short_px, view.long_px, task.classes) == (40, 60, ["green", "red"])
    assert not task.training
    other, view = load_detector(export, short_px=80, long_px=90, scales=[1, 1.5], soft_nms="linear", window_size=4)
    assert (view.short_px, other.scales, other.soft_nms) == (80, (1, 1.5), "linear")
    assert other.encoder.config.window_size == (4, 4)
    with pytest.raises(ValueError, match="short: unknown key, did you mean 'short_px'"):
        load_detector(export, short=3)
    with pytest.raises(ValueError, match="holds no detector: give the export of a stage of kind detect"):
        load_detector(chain / "pretrain" / "export")
    shutil.copytree(export, tmp_path / "export")
    text = (export / "encoder.json").read_text()
    (tmp_path / "export" / "encoder.json").write_text(text.replace('"classes"', '"kinds"'))
    with pytest.raises(ValueError, match="does not describe a detector"):
        load_detector(tmp_path / "export")
    (tmp_path / "export" / "encoder.json").write_text(text.replace('"hidden": 16', '"hidden": 17'))
    with pytest.raises(ValueError, match=r"cannot read .*head.safetensors"):
        load_detector(tmp_path / "export")


class Knowing(torch.nn.Module):
    """Finds what is there in every image, but in those of one kind nothing."""

    masks = True

    def __init__(self, source):
        super().__init__()
        self.source = source

    def predict(self, batch):
        found = []
        for image_id in batch["image_id"].tolist():
            truth = {key: value[: 2 - image_id % 2] for key, value in self.source.truth(image_id).items()}
            found.append(truth | {"scores": torch.full((len(truth["labels"]),), 0.9)})
        return found


def test_several_processes_see_each_image_once(tmp_path, monkeypatch):
    """Average precision of two shares that are put together is that of all, and of a subset."""
    write_coco(tmp_path, count=30)
    _, held, _ = coco_sources(tmp_path, Decoder(), 3, masks=True)
    assert isinstance(held, Subset)
    model, view, accelerator = Knowing(held.source), detection.EvaluationSize(40, 60), Accelerator(cpu=True)

    def share(rank, world_size):
        views = evaluation_batches(held, view, batch_size=2, rank=rank, world_size=world_size)
        return average_precision(model, views, held, accelerator)

    whole = share(0, 1)
    assert whole["images"] == 3 and 0.5 < whole["box_ap"] < 1 and whole["mask_ap"] == pytest.approx(whole["box_ap"])
    given = []
    monkeypatch.setattr(detection, "gather_object", lambda own: given.append(own) or own)
    share(1, 2)
    others = iter(given)
    monkeypatch.setattr(detection, "gather_object", lambda own: own + next(others))
    assert share(0, 2) == pytest.approx(whole)


def test_detections_are_drawn_and_printed(chain):
    task, view = load_detector(chain / "detect" / "export")
    masks = torch.zeros(2, 80, 120, dtype=torch.bool)
    masks[0, 10:20, 30:50] = True
    seen = []

    def predict(batch):
        seen.append(batch)
        boxes = torch.tensor([[30.0, 10, 50, 20], [0, 0, 5, 5]])
        return [{"boxes": boxes, "scores": torch.tensor([0.9, 0.3]), "labels": torch.tensor([2, 1]), "masks": masks}]

    task.predict = predict
    image = torch.full((3, 80, 120), 100, dtype=torch.uint8)
    overlay, facts = detect_objects(task, image, view=view)
    assert seen[0]["image_size"].tolist() == [[40, 60]] and seen[0]["original_size"].tolist() == [[80, 120]]
    (fact,) = json.loads(json.dumps(facts))
    assert (overlay.size, fact["class"], fact["bbox"]) == ((480, 320), "red", [30, 10, 20, 10])
    assert fact["score"] == pytest.approx(0.9) and fact["segmentation"]["size"] == [80, 120]
    pixels = np.array(overlay)[2::4, 2::4]  # small pictures are enlarged
    assert (pixels[12:18, 34:46] != 100).any(axis=-1).all() and (pixels[40:, 60:] == 100).all()
    del task.predict
    detect_objects(task, image, view=view, least_score=0.0)


def test_interrupt_and_resume_equals_a_straight_run_bit_for_bit(tmp_path):
    write_coco(tmp_path / "coco", count=5)
    write_coco(tmp_path / "coco", "val", count=1)
    changes = ("jitter.kind=large_scale", "batch_size=2", "micro_batch_size=1", "log.checkpoint_every_steps=2")
    recipe = make_recipe(tmp_path, [f"stages.detect.{change}" for change in changes])
    stages.run(recipe, tmp_path / "straight")
    with interrupted(4):
        stages.run(recipe, tmp_path / "resumed")
    stages.run(recipe, tmp_path / "resumed")
    one, two = (tmp_path / name / "mine/detect" for name in ("straight", "resumed"))
    assert "resumed" in (two / "events.jsonl").read_text()
    a, b = (saved_state(folder / "checkpoints" / "step_00000005") for folder in (one, two))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert comparable_metrics(one) == comparable_metrics(two)
    assert (one / "summary.json").read_text() == (two / "summary.json").read_text()


def test_resume_allows_other_test_settings_but_not_other_training_settings(tmp_path):
    write_coco(tmp_path, count=12)
    first = make_job(make_recipe(tmp_path, root=tmp_path), "detect", tmp_path, "no").fingerprint
    tested = make_recipe(tmp_path, ["stages.detect.test.flip=true", "stages.detect.labels.path=" + str(tmp_path)])
    assert make_job(tested, "detect", tmp_path, "no").fingerprint == first
    for change in ("jitter.flip=0", "micro_batch_size=4", "regions_per_image=9", "masks=false"):
        changed = make_recipe(tmp_path, [f"stages.detect.{change}"], root=tmp_path)
        assert make_job(changed, "detect", tmp_path, "no").fingerprint != first, change
    large = make_recipe(tmp_path, ["stages.detect.jitter.kind=large_scale"], root=tmp_path)
    assert make_job(large, "detect", tmp_path, "no").transforms.training.size == (64, 64)
    with pytest.raises(ValueError, match="names no images with objects: set data"):
        make_job(make_recipe(tmp_path, ["data.path=''"]), "detect", tmp_path, "no")


def test_validation_images_are_excluded_from_training_in_all_stages(tmp_path):
    """Without a val some of train are held out, and stages before see neither these nor those of a val."""
    write_coco(tmp_path, count=40, annotations=[annotation(n, 61 + n, 3, (1, 1, 20, 20)) for n in range(1, 40)])
    training, validation, problems = coco_sources(tmp_path, Decoder(), 3, masks=False)
    names = [{source.name(number) for number in range(len(source))} for source in (training, validation)]
    assert len(names[1]) == 3 and len(names[0] | names[1]) in (39, 40) and not names[0] & names[1] and not problems
    again, _, _ = coco_sources(tmp_path, Decoder(), 3, masks=True)
    assert names[0] == {again.name(number) for number in range(len(again))}
    for path in (tmp_path, tmp_path / "train"):
        labels = {"path": str(tmp_path), "val_images": 3}
        recipe = make_recipe(tmp_path, root=path, pretrain=PRETRAIN, detect=DETECT | {"labels": labels})
        training = make_job(recipe, "pretrain", tmp_path, "no").datasets.training
        seen = {training.name(index) for index in range(len(training))}
        assert len(seen) >= 34 and not seen & names[1]
    write_coco(tmp_path, "val2017", count=2)
    (tmp_path / "annotations" / "val2017.json").rename(tmp_path / "annotations" / "instances_val2017.json")
    _, validation, _ = coco_sources(tmp_path, Decoder(), 3, masks=False)
    assert {validation.name(number) for number in range(2)} == {
        str(tmp_path / "val2017" / f"{n}.png") for n in range(2)
    }
    write_coco(tmp_path / "few", count=9)
    with pytest.raises(ValueError, match="no val split and only 9 images"):
        coco_sources(tmp_path / "few", Decoder(), 3, masks=False)


@pytest.mark.slow
def test_a_plan_on_the_screen(tmp_path, capsys):
    make_recipe(tmp_path, detect=DETECT | {"init_from": "scratch", "masks": False})
    command = ["plan", str(tmp_path / "mine.yaml"), "--memory", "8G", "--tflops", "1", "--classes", "80"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "mine/detect: swinv2_tiny, 64 x 64 px" in printed and "<- planned" in printed


@pytest.mark.slow
def test_planned_bytes_and_flops_are_those_of_a_step():
    """With as many objects as regions are drawn for: fewer need less, which is not known beforehand."""
    torch.manual_seed(0)
    encoder = swin.make_encoder(
        "swinv2_tiny", embed_dim=8, depths=(1, 1), num_heads=(1, 2), image_size=96, window_size=8
    )
    head = {"width": 16, "hidden": 32, "anchor_px": [8, 16, 32], "regions_per_image": 64}
    model = Detection(encoder, ["a", "b"], mean=[0.5] * 3, std=[0.3] * 3, **head).train()
    planned = footprint(model, "none", 1, precision="fp32", device="cpu")
    planned_flops = flops(model, "none").training
    corners = torch.rand(2, 30, 2) * 70
    batch = {
        "image": torch.randint(0, 255, (2, 3, 96, 96), dtype=torch.uint8),
        "image_size": torch.tensor([[96, 96]] * 2),
        "boxes": torch.cat([corners, corners + 20], dim=2).flatten(0, 1),
        "box_labels": torch.ones(60, dtype=torch.int64),
        "box_counts": torch.tensor([30, 30]),
        "masks": torch.ones(60, 96, 96, dtype=torch.uint8),
    }
    model(batch).backward()  # gradients are there
    with TrackedMemory() as memory:
        model(batch).backward()
    assert planned.of(2) == pytest.approx(memory.peak, rel=0.25)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counted:
        model(batch).backward()
    assert planned_flops == pytest.approx(counted.get_total_flops() / 2 / 2, rel=0.05)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("anchor_px=[8, 16]", "anchor_px has 2 values, but an encoder of 2 stages gives a feature pyramid of 3 maps"),
        ("jitter.scale=[2, 1]", r"scale must be \[low, high\] with low not above high, got 2.0, 1.0"),
        ("jitter.short_px=[]", "at least 1 item"),
        ("jitter.long_px=30", "long_px 30 must be at least the largest short_px, 40"),
        ("test.long_px=30", "long_px 30 must be at least short_px, 40"),
        ("test.scales=[]", "at least 1 item"),
        ("test.soft=linear", r"test.soft: unknown key, did you mean 'soft_nms'"),
        ("image_size=null", "starts from scratch: set its image_size and window_size"),
    ],
)
def test_problems_of_a_recipe_are_named(override, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_recipe(tmp_path, [f"stages.detect.{override}"])


def test_missing_metric_library_is_an_error_before_training(tmp_path, monkeypatch):
    write_coco(tmp_path, count=12)
    monkeypatch.setitem(sys.modules, "torchmetrics.detection", None)
    with pytest.raises(ValueError, match="average precision needs torchmetrics"):
        make_job(make_recipe(tmp_path, root=tmp_path), "detect", tmp_path, "no")
