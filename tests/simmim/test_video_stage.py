"""Stages of clips: where they start, what they are trained and judged by, what is broken, and what is refused."""

from __future__ import annotations

import csv
import json
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from torch.utils.flop_counter import FlopCounterMode

import swin
from simmim.benchmarks.memory import measured_bytes
from simmim.cli.main import main
from simmim.config.loading import load_recipe
from simmim.config.reference import document
from simmim.data import CenterCrop, MiddleClip, MovingShapes, Video
from simmim.evaluation.classification import evaluate_classifier
from simmim.evaluation.probe import format_probe, probe
from simmim.export.convert import convert
from simmim.masking import expand_mask
from simmim.metrics.baselines import nearest_visible
from simmim.planning.plan import config_of, make_fake_task
from simmim.stages import run_stage
from simmim.stages.initialization import make_start
from simmim.stages.pretrain import PRETRAIN as PRETRAIN_TYPE
from simmim.training.distributed import allocate_parameters, initialize_parameters
from simmim.training.footprint import footprint, sizes
from simmim.training.memory import choose_chunks
from simmim.visualization import reconstructions
from simmim.visualization.report import write_report
from swin import VideoConfig, VideoEncoder
from tests.simmim.test_clips import write_video
from tests.simmim.test_training import interrupted, saved_state

pytest.importorskip("av")

CLIP = {"frames": 4, "stride": 2, "temporal_patch": 2, "temporal_window": 2, "views": 2, "crops": 3}
LOG = {"metrics_every_steps": 1, "evaluate_every_steps": 10, "checkpoint_every_steps": 100}
PRETRAIN = {
    "image_size": 32,
    "window_size": 4,
    "batch_size": 8,
    "micro_batch_size": 4,
    "mask": {"patch_size": 8},
    "schedule": {"epochs": 2, "warmup_epochs": 0.1, "base_lr": 0.3, "warmup_lr": 0, "min_lr": 0},
    "log": LOG,
}
FINETUNE = {
    "init_from": "pretrain",
    "video": CLIP,
    "batch_size": 8,
    "micro_batch_size": 4,
    "drop_path": 0.1,
    "layer_decay": 1.0,
    "augment": {"rand_augment": None, "mixup": 0, "cutmix": 0, "erasing": 0},
    "labels": {"val_images": 6},
    "schedule": {"epochs": 16, "warmup_epochs": 1, "base_lr": 0.3, "warmup_lr": 0, "min_lr": 0},
    "log": LOG,
}
SHORT = {"schedule": {"epochs": 2, "warmup_epochs": 0.1, "base_lr": 0.05}}
CHAIN = {
    "data": {"path": "builtin:shapes", "num_images": 32, "validation_images": 4, "num_workers": 0},
    "encoder": {"name": "swinv2_tiny", "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]},
    "stages": {
        "pretrain": PRETRAIN,
        "pretrain_clips": {**PRETRAIN, "video": CLIP},
        "finetune_48": {**FINETUNE, "image_size": 48},
        "transfer_64": {
            **{**FINETUNE, **SHORT},
            "init_from": "finetune_48",
            "augment": {"rand_augment": None},
            "image_size": 64,
            "video": {**CLIP, "frames": 8, "stride": 1, "temporal_window": 4},
        },
        "finetune_scratch": {**{**FINETUNE, **SHORT}, "init_from": "scratch", "image_size": 32, "window_size": 4},
    },
}


def square(number: int, *, start: int, way: int) -> np.ndarray:
    """A bright square that goes left or right."""
    frame = np.full((24, 32, 3), 60, np.uint8)
    frame[6:18, [(start + way * number + x) % 32 for x in range(12)]] = (240, 200, 40) if way > 0 else (40, 90, 240)
    return frame


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Sixteen to train on and six to be judged by, of two classes, 9 to 12 frames long."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(22):
        part, label = "val" if number >= 16 else "train", ("left", "right")[number % 2]
        draw = partial(square, start=3 * number, way=(-2, 2)[number % 2])
        write_video(folder / part / label / f"{number}.mp4", count=9 + number % 4, draw=draw)
    return folder


def written(folder: Path, **stages: dict) -> Path:
    """The chain with these stages changed, in a file."""
    content = {**CHAIN, "stages": {name: {**stage, **stages.get(name, {})} for name, stage in CHAIN["stages"].items()}}
    path = folder / "clips.yaml"
    path.write_text(yaml.dump(content, sort_keys=False, Dumper=Plain))
    return path


class Plain(yaml.SafeDumper):
    """Without anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def command(*arguments: object) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def chain(videos, tmp_path_factory) -> Path:
    """All stages in one go; those from the second on with labels are of files, and so are theirs."""
    out = tmp_path_factory.mktemp("chain")
    labels = {"labels": {"path": str(videos)}}
    recipe = written(out, finetune_48=labels, transfer_64=labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        patch.setenv("SIMMIM_CACHE", str(out / "cache"))
        assert command("run", recipe, "--out", out) == 0
    return out / "clips"


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def is_learning(folder: Path) -> bool:
    losses = [row["loss"] for row in metrics(folder) if "loss" in row]
    return sum(losses[-3:]) < 0.85 * sum(losses[:3])


def test_chain_from_images_to_longer_and_larger_clips_writes_all_files(chain):
    for name, size, frames, window in (
        ("pretrain_clips", (32, 32), 4, (2, 4, 4)),
        ("finetune_48", (48, 48), 4, (2, 6, 6)),
        ("transfer_64", (64, 64), 8, (4, 8, 8)),
        ("finetune_scratch", (32, 32), 4, (2, 4, 4)),
    ):
        encoder = swin.load_encoder(chain / name / "export")
        assert isinstance(encoder, VideoEncoder)
        config = encoder.config
        assert (config.input_size, config.window) == ((frames, *size), window)
        assert config.reference_windows == ((2, 4, 4), (2, 4, 4))  # of pretraining, and of the first stage of clips
        about = swin.load_description(chain / name / "export")
        assert about["video"] == {"stride": 1 if name == "transfer_64" else 2, "views": 2, "crops": 3}
        assert list((chain / name).glob("*/step_*.png"))
    assert about["classes"][:3] == ["plain, sinking", "plain, rising", "stripes, sinking"]
    assert is_learning(chain / "finetune_48")
    assert json.loads((chain / "finetune_48" / "summary.json").read_text())["validation_top1"] > 0.8
    page = write_report([chain]).read_text()
    assert page.count("data:image/png") > 8 and "clips/transfer_64" in page


def test_stage_evaluation_and_evaluate_command_agree(chain, videos, capsys):
    export = chain / "transfer_64" / "export"
    summary = json.loads((chain / "transfer_64" / "summary.json").read_text())
    numbers = evaluate_classifier(export, str(videos), batch_size=5, num_workers=0)
    assert numbers.pop("images") == 6
    assert {f"validation_{key}": value for key, value in numbers.items()} == pytest.approx(summary, rel=1e-4)
    last = [row for row in metrics(chain / "transfer_64") if "validation_loss" in row][-1]
    one = ("views=1", "crops=1", "--num-workers", 0, "--json", chain / "one.json")
    assert command("evaluate", export, videos, *one) == 0
    single = json.loads((chain / "one.json").read_text())
    assert single["loss"] == pytest.approx(last["validation_loss"], rel=1e-4)
    assert single["loss"] != pytest.approx(numbers["loss"], rel=1e-4)
    capsys.readouterr()
    assert command("evaluate", export, videos, "views=0") == 2
    assert "views: Input should be greater than 0 (got 0)" in capsys.readouterr().err
    assert command("evaluate", chain / "pretrain" / "export", videos, "crops=3") == 2
    assert "holds no classifier, segmenter or detector" in capsys.readouterr().err


def test_probes_see_the_middle_clip(chain, videos, monkeypatch):
    seen, embed = set(), VideoEncoder.embed
    monkeypatch.setattr(VideoEncoder, "embed", lambda self, clips: seen.add(clips.shape[1:]) or embed(self, clips))
    rows = probe(chain / "finetune_48" / "export", str(videos), num_workers=0, batch_size=8)
    assert [row["features"] for row in rows] == [8, 16, 16] and "final norm" in format_probe(rows)
    assert rows[-1]["linear"] > 0.8 and seen == {(3, 4, 48, 48)}


def test_pretraining_on_clips_is_compared_with_baselines(chain):
    task = reconstructions.load_video_simmim(chain / "pretrain_clips" / "export")
    source = MovingShapes(4, (32, 32), validation=True)
    view = MiddleClip(CenterCrop((32, 32)), 4, 2)
    clips = torch.stack([view(source.decode(number), []) for number in range(4)])
    batch = {"image": clips, "epoch": torch.zeros(4, dtype=torch.int64), "index": torch.arange(4)}
    summary = json.loads((chain / "pretrain_clips" / "summary.json").read_text())
    found = summary["validation_masked_l1"]
    with torch.no_grad():
        assert float(task(batch)) == pytest.approx(summary["validation_loss"], rel=1e-4)
    assert found["model"] == pytest.approx(summary["validation_loss"], rel=1e-4)
    pixels, patch_mask = task.inputs(batch)
    sums = {"predict zero": 0.0, "mean of the visible pixels": 0.0, "copy the nearest visible pixel": 0.0}
    for clip, mask in zip(pixels, expand_mask(patch_mask, 8), strict=True):
        rows, columns = nearest_visible(mask)
        for frame in clip.unbind(dim=1):
            visible = frame[:, ~mask].mean(dim=1)[:, None, None].expand_as(frame)
            drawn = (torch.zeros_like(frame), visible, frame[:, rows, columns])
            for name, prediction in zip(sums, drawn, strict=True):
                sums[name] += float((prediction - frame)[:, mask].abs().mean()) / 16
    assert {name: found[name] for name in sums} == pytest.approx(sums, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "epochs"), [("pretrain_clips", 1.5), ("finetune_48", 3)])
def test_resume_after_interruption_is_bitwise_equal(stage, epochs, videos, tmp_path):
    labels = {"labels": {"path": str(videos)}, "ema_decay": 0.5}
    path = written(tmp_path, pretrain_clips={"init_from": "scratch"}, finetune_48=labels)
    changes = [f"stages.{stage}.schedule.epochs={epochs}", f"stages.{stage}.init_from=scratch"]
    changes += [f"stages.{stage}.log.checkpoint_every_steps=2", "stages.finetune_48.window_size=6"]
    recipe = load_recipe(str(path), changes)
    run_stage(recipe, stage, tmp_path / "straight")
    AcceleratorState._reset_state(reset_partial_state=True)
    with_worker = load_recipe(str(path), [*changes, "data.num_workers=1"])
    resumed = partial(run_stage, with_worker, stage, tmp_path / "resumed")
    with interrupted(3):  # after the checkpoint of step 2
        resumed()
    AcceleratorState._reset_state(reset_partial_state=True)
    resumed()
    found = [
        saved_state(tmp_path / out / "clips" / stage / "checkpoints/step_00000006") for out in ("straight", "resumed")
    ]
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    summaries = [(tmp_path / out / "clips" / stage / "summary.json").read_text() for out in ("straight", "resumed")]
    assert summaries[0] == summaries[1]
    judged = load_recipe(
        str(path), [*changes, f"stages.{stage}.video.views=1"]
    )  # which does not change what is trained
    AcceleratorState._reset_state(reset_partial_state=True)
    run_stage(judged, stage, tmp_path / "straight")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match=r"other settings \(stage.video.stride: 2 -> 1\)"):
        run_stage(load_recipe(str(path), [*changes, f"stages.{stage}.video.stride=1"]), stage, tmp_path / "straight")


def test_a_start_from_images_gives_a_still_clip_the_features_of_its_image(chain):
    recipe = load_recipe(str(chain.parent / "clips.yaml"))
    start = make_start(recipe, "finetune_48", chain.parent)
    images = torch.randn(2, 3, 48, 48)
    image_encoder = swin.load_encoder(chain / "pretrain" / "export", image_size=48, window_size=6)
    with torch.no_grad():
        features = start.encoder.eval()(images[:, :, None].expand(-1, -1, 4, -1, -1))
        expected = image_encoder.eval()(images)[:, None].expand_as(features)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert start.encoder.history[-1]["step"] == "inflate to videos"
    scratch = [make_start(recipe, "finetune_scratch", chain.parent).encoder for _ in range(2)]
    for encoder in scratch:
        assert isinstance(encoder, VideoEncoder) and next(encoder.parameters()).is_meta
        torch.manual_seed(0)
        initialize_parameters(allocate_parameters(encoder, torch.device("cpu")))
    assert all(torch.equal(*pair) for pair in zip(scratch[0].parameters(), scratch[1].parameters(), strict=True))


@pytest.mark.slow
def test_the_planner_knows_what_a_stage_will_start_from(chain, capsys):
    recipe = load_recipe(str(chain.parent / "clips.yaml"))
    for name in recipe.stages:
        assert config_of(recipe, name) == swin.load_encoder(chain / name / "export").config, name
    assert command("plan", chain.parent / "clips.yaml", "--tflops", 1, "--stage", "transfer_64") == 0
    printed = capsys.readouterr().out
    assert "transfer_64: swinv2_tiny, clips of 8 frames of 64 x 64 px" in printed
    assert "      4x16x16      4x8x8    0x4x4     0x0x0      2x4x4       1\n" in printed
    assert "FLOPs       per clip, in 10^9 multiply-adds: " in printed and "official count" not in printed


VIDEO_SWIN = """
encoder: {name: swin_tiny}
stages: {finetune: {init_from: scratch, image_size: 224, window_size: 7, video: {}, augment: {rand_augment: null}}}
"""


def test_flops_and_parameters_of_video_swin(tmp_path):
    """Table 1 of arXiv 2106.13230: 88 x 10^9, and 28.2, 49.8 and 88.1 million with 400 classes."""
    (tmp_path / "k.yaml").write_text(VIDEO_SWIN)
    for name, millions in (("swin_base", 88.1), ("swin_small", 49.8), ("swin_tiny", 28.2)):
        planned = make_fake_task(load_recipe(str(tmp_path / "k.yaml"), [f"encoder.name={name}"]), "finetune", 400)
        assert sizes(planned).all / 1e6 == pytest.approx(millions, abs=0.06)
    with FlopCounterMode(display=False) as counted:
        planned.logits(torch.zeros(1, 3, 32, 224, 224, device="meta"))
    assert counted.get_total_flops() / 2e9 == pytest.approx(88, abs=0.5)


def test_planned_bytes_are_those_of_a_step_on_clips(tmp_path):
    recipe = load_recipe(str(written(tmp_path)), ["stages.pretrain_clips.init_from=scratch"])
    stage = recipe.stages["pretrain_clips"]
    planned = footprint(make_fake_task(recipe, "pretrain_clips", 1), "none", 1, precision="fp32", device="cpu")
    task = PRETRAIN_TYPE.make_task(recipe, stage, VideoEncoder(config_of(recipe, "pretrain_clips")))
    assert planned.of(3) == pytest.approx(measured_bytes(task.train(), 3, "fp32"), rel=0.1)


def test_attention_of_clips_is_cut_where_its_memory_asks_for_it():
    """Of windows that are as long as the clip there are as many times more logits as there are pairs of frames."""
    image = swin.make_config("swinv2_tiny", image_size=64, window_size=4)
    clip = VideoConfig(**{**image.to_dict(), "reference_windows": None}, frames=12, temporal_patch=2, temporal_window=6)
    for budget in (1 << 16, 1 << 18, 1 << 22):
        assert choose_chunks(clip, 2, 36 * budget) == choose_chunks(image, 2, budget)
    assert choose_chunks(image, 2, 1 << 16)[0] > 1
    assert prod(clip.window) == 6 * prod(image.window)


def damage(folder: Path) -> dict[str, str]:
    """Put broken files among the videos; their names and reasons."""
    good = sorted(folder.glob("train/left/*.mp4"))[0].read_bytes()
    write_video(folder / "train/left/cut.mp4", count=30)
    cut = (folder / "train/left/cut.mp4").read_bytes()
    (folder / "train/left/cut.mp4").write_bytes(cut[: len(cut) // 2])
    (folder / "train/right/empty.mp4").write_bytes(b"")
    (folder / "train/right/text.mp4").write_text("not a video")
    write_video(folder / "val/left/torn.mkv", count=12, codec="ffv1")
    torn = (folder / "val/left/torn.mkv").read_bytes()
    (folder / "val/left/torn.mkv").write_bytes(torn[:600])
    (folder / "val/right/noise.mp4").write_bytes(bytes(reversed(good)))
    return {"cut": "Invalid data", "empty": "the file is empty", "text": "Invalid data", "torn": "", "noise": ""}


@pytest.mark.slow
def test_corrupt_videos_are_listed_and_counted_in_a_run(videos, tmp_path, capsys):
    folder = tmp_path / "data"
    for file in sorted(videos.glob("*/*/*.mp4")):
        place = folder / file.relative_to(videos)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
    reasons = damage(folder)
    path = written(tmp_path)
    changes = [f"data.path={folder}", "data.validation_images=1", "stages.pretrain_clips.init_from=scratch"]
    changes += ["stages.finetune_48.init_from=pretrain_clips", "stages.pretrain_clips.schedule.epochs=12"]
    for name in ("pretrain_clips", "finetune_48"):
        AcceleratorState._reset_state(reset_partial_state=True)
        export = run_stage(load_recipe(str(path), changes), name, tmp_path)
        with (export.parent / "corrupt_images.csv").open() as file:
            found = {Path(row[0]).stem: row[1] for row in csv.reader(file)}
        wanted = {"cut", "empty", "text"} | ({"torn", "noise"} if name == "finetune_48" else set())
        assert set(found) == wanted and is_learning(export.parent)
        assert all(reasons[key] in reason for key, reason in found.items())
    assert "skipped a corrupt image" in capsys.readouterr().out
    numbers = evaluate_classifier(export, str(folder), num_workers=0)
    assert numbers["images"] == 6 and "noise.mp4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("stages.transfer_64.video=null", r"transfer_64 starts from finetune_48, an encoder of clips: add a video"),
        ("stages.transfer_64.video.temporal_patch=1", r"whose tokens have 2 frames: set video.temporal_patch to 2"),
        ("stages.finetune_48.augment.rand_augment=rand-m9", r"is for images, not for clips: set it to null"),
        ("stages.pretrain_clips.target.norm_window=9", r"target cannot be changed for clips"),
        ("data.value_range=[0, 9]", r"value_range is for image files, but stages.pretrain_clips reads videos"),
        ("stages.finetune_48.speed.fused_attention=true", r"the kernel does not support clips, use auto"),
        ("stages.finetune_48.video.temporal_window=8", r"temporal_window 8 is longer than the 2 tokens of 4 frames"),
        (
            "stages.finetune_48.video.frame=8",
            r"video.frame: unknown key, did you mean 'frames'\? \(known here: frames,",
        ),
        ("stages.finetune_48.video.views=0", r"video.views: Input should be greater than 0"),
    ],
)
def test_recipes_that_cannot_be_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(str(written(tmp_path)), [changes])


def test_the_block_is_documented():
    text = document()
    assert "## stages.pretrain.video" in text and "## stages.finetune.video" in text
    assert "| `temporal_window` | integer | 8 | temporal size of the attention window, tokens |" in text


def test_exports_of_clips_are_refused_where_images_are_meant(chain, videos, tmp_path, capsys):
    export = chain / "finetune_48" / "export"
    path = written(tmp_path)
    for change, message in (
        ("video=null", "an encoder of clips: add a video block to stages.finetune_scratch"),
        ("video.temporal_patch=1", "video.temporal_patch to it, not to 1"),
    ):
        recipe = load_recipe(
            str(path), [f"stages.finetune_scratch.init_from={export}", f"stages.finetune_scratch.{change}"]
        )
        with pytest.raises(ValueError, match=message):
            make_start(recipe, "finetune_scratch", tmp_path)
        with pytest.raises(ValueError, match=message):
            config_of(recipe, "finetune_scratch")
    assert command("finetune", "--encoder", export, "--data", videos, "--out", tmp_path) == 2
    assert "encodes clips: write a recipe with a video block in its stage" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"was pretrained on clips: its images are in .*/reconstructions"):
        reconstructions.load_simmim(chain / "pretrain_clips" / "export")
    with pytest.raises(ValueError, match="was pretrained on images: load_simmim is for it"):
        reconstructions.load_video_simmim(chain / "pretrain" / "export")
    for layout, name in (("timm", "a"), ("official", "a.pth")):
        with pytest.raises(ValueError, match="has no Swin encoder of clips: use --to native, onnx or torch-export"):
            convert(export, tmp_path / name, layout)
    said: list[str] = []
    for layout, name in (("native", "same"), ("torch-export", "a.pt2")):
        convert(export, tmp_path / name, layout, report=said.append)
    assert "torch-export format, 4 x 48 x 48 px" in said[-1]
    recipe = load_recipe(str(path), [f"data.path={videos}", "stages.finetune_scratch.video=null"])
    with pytest.raises(ValueError, match=r"expected images, found \d+ videos"):
        run_stage(recipe, "finetune_scratch", tmp_path)


def test_shapes_that_move_do_what_their_label_says():
    source, again = MovingShapes(24, (32, 32)), MovingShapes(24, (32, 32))
    motions = set()
    for number in range(24):
        video = source.decode(number)
        assert (len(video), video.size) == (16, (32, 32))
        clip = video.crops(range(16), [(0, 0, 32, 32)], (32, 32))[0].float()
        assert torch.equal(clip, again.read(number).float())
        label = source.classes[source.label(number)]
        motions.add(label.split(", ")[1])
        middle = clip[:, :, 8:24, 10:22]
        errors = {
            shift: float((middle[:, :-4] - clip[:, 4:, 8 + shift : 24 + shift, 10:22]).abs().mean())
            for shift in range(-6, 7)
        }
        best = min(errors, key=errors.__getitem__)
        texture = label.split(", ")[0]
        if texture != "plain" and best:  # a plain one looks the same a little further on
            assert (best > 0) == label.endswith("sinking"), (number, label, best)
    assert motions == {"sinking", "rising"}
    assert isinstance(video, object) and not isinstance(video, Video)


def test_objectives_of_a_recipe_follow_the_encoder(tmp_path):
    recipe = load_recipe(str(written(tmp_path)))
    names = [type(make_fake_task(recipe, name, 4)).__name__ for name in recipe.stages]
    assert names == ["SimMIM", "VideoSimMIM", "Classification", "Classification", "Classification"]
    with torch.device("meta"):
        encoder = VideoEncoder(config_of(recipe, "pretrain_clips"))
        task = PRETRAIN_TYPE.make_task(recipe, recipe.stages["pretrain_clips"], encoder)
    assert task.description() == {"mask_patch_size": 8, "mask_ratio": 0.6, "mask_strategy": "random"}
