"""The training loop: accumulation, exact resume, non-finite steps, records of a run, learning rates, launch checks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from PIL import Image
from safetensors.torch import load_file

import swin
from simmim import stages
from simmim.config import FinetuneStage, PretrainStage, encoder_config
from simmim.config.image_stages import Augment
from simmim.config.loading import load_recipe
from simmim.data import RandomCrop, Shapes, evaluation_batches, training_batches
from simmim.data.transforms import CenterCrop
from simmim.masking import MaskGenerator
from simmim.signals import StopRequest
from simmim.stages import initialization
from simmim.stages.pretrain import PRETRAIN
from simmim.tasks.simmim import SimMIM
from simmim.training import distributed, engine
from simmim.training.checkpoint import Checkpoints
from simmim.training.optim import LearningRate, make_lr, make_optimizer
from simmim.training.run_log import RunLog

ROOT = Path(__file__).parents[2]

TINY = [
    "data.path=builtin:shapes",
    "data.num_images=40",
    "data.validation_images=4",
    "data.num_workers=0",
    "encoder.embed_dim=8",
    "encoder.depths=[2, 2]",
    "encoder.num_heads=[1, 2]",
    "stages.pretrain.image_size=32",
    "stages.pretrain.window_size=4",
    "stages.pretrain.drop_path=0.2",
    "stages.pretrain.batch_size=8",
    "stages.pretrain.micro_batch_size=4",
    "stages.pretrain.mask.patch_size=8",
    "stages.pretrain.schedule.epochs=2",
    "stages.pretrain.schedule.warmup_epochs=0.4",
    "stages.pretrain.schedule.base_lr=0.05",
    "stages.pretrain.log.metrics_every_steps=1",
    "stages.pretrain.log.evaluate_every_steps=4",
    "stages.pretrain.log.checkpoint_every_steps=3",
]


def tiny_recipe(*overrides: str):
    return load_recipe("demo", ["name=tiny", *TINY, *overrides])


def train_in_float64(
    tmp_path: Path,
    micro_batch_size: int,
    *,
    clip_grad_norm: float | None = 0.05,
    lr_at: LearningRate = lambda step: 0.01,
) -> SimMIM:
    torch.manual_seed(0)
    encoder = swin.make_encoder(
        "swinv2_tiny", embed_dim=8, depths=(2, 2), num_heads=(1, 2), image_size=32, window_size=4
    )
    model = SimMIM(encoder, MaskGenerator((32, 32), 8, 0.6), mean=[0.5] * 3, std=[0.3] * 3).double()
    optimizer = make_optimizer(model, model.no_decay_parameters(), weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    source = Shapes(20, (32, 32))
    batches = training_batches(
        source, RandomCrop((32, 32)), seed=0, batch_size=8, micro_batch_size=micro_batch_size, end_step=3
    )
    engine.fit(
        accelerator,
        prepared,
        optimizer,
        batches,
        engine.LoopSettings(
            start_step=0,
            total_steps=3,
            accumulation=8 // micro_batch_size,
            images_per_epoch=20,
            seed=0,
            clip_grad_norm=clip_grad_norm,
            metrics_every_steps=1,
            evaluate_every_steps=100,
            checkpoint_every_steps=100,
        ),
        lr_at=lr_at,
        log=RunLog(tmp_path, is_main=True),
        checkpoints=Checkpoints(tmp_path / "checkpoints", {}, keep=1),
        stop=StopRequest(),
        validation=[],
        preview=next(iter(evaluation_batches(source, CenterCrop((32, 32)), batch_size=2))),
    )
    return model


def test_accumulation_equals_one_large_batch(tmp_path):
    expected_model = train_in_float64(tmp_path / "8", 8)
    before = expected_model.head.weight.detach().clone()
    for micro_batch_size in (4, 2):
        model = train_in_float64(tmp_path / str(micro_batch_size), micro_batch_size)
        for (name, expected), parameter in zip(expected_model.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(parameter, expected, rtol=1e-9, atol=1e-12, msg=name)
        for expected, got in zip(
            comparable_metrics(tmp_path / "8"), comparable_metrics(tmp_path / str(micro_batch_size)), strict=True
        ):
            assert got == pytest.approx(expected, rel=1e-9)
    other = train_in_float64(tmp_path / "other", 8, clip_grad_norm=None)
    assert not torch.allclose(other.head.weight, before)


def test_a_nonfinite_loss_stops_before_the_step(tmp_path):
    original = SimMIM.loss
    calls = []

    def loss(self, images, patch_mask):
        calls.append(1)
        return original(self, images, patch_mask) * (float("nan") if len(calls) == 2 else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimMIM, "loss", loss)
        with pytest.raises(engine.NonFiniteLoss, match=r"step 2: loss nan.*the step was not taken"):
            train_in_float64(tmp_path, 8)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


@contextmanager
def interrupted(at_step: int) -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` before a step, and expect it."""
    original = initialization.make_lr

    def interrupting(**arguments):
        lr_at = original(**arguments)

        def lr(step):
            if step == at_step:
                raise KeyboardInterrupt
            return lr_at(step)

        return lr

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(initialization, "make_lr", interrupting)
        yield


def comparable_metrics(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_s"} for line in lines]


def saved_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    (file,) = checkpoint.glob("*.safetensors")
    return load_file(file)


@pytest.mark.slow
def test_resume_after_interrupt_is_bitwise_equal(tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    stages.run_stage(tiny_recipe(), "pretrain", straight)
    with interrupted(5):
        stages.run_stage(tiny_recipe(), "pretrain", resumed)  # resumes from step 3
    with interrupted(8):
        stages.run_stage(tiny_recipe(), "pretrain", resumed)
    stages.run_stage(tiny_recipe("data.num_workers=1"), "pretrain", resumed)
    a, b = straight / "tiny" / "pretrain", resumed / "tiny" / "pretrain"
    one, two = saved_state(a / "checkpoints/step_00000010"), saved_state(b / "checkpoints/step_00000010")
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert {key.split("/")[0] for key in one} == {"model", "optimizer"}
    assert comparable_metrics(a) == comparable_metrics(b)
    assert [path.name for path in sorted((b / "checkpoints").iterdir())] == ["step_00000009", "step_00000010"]


def test_the_files_of_a_run(tmp_path, capsys):
    export = stages.run_stage(tiny_recipe(), "pretrain", tmp_path)
    folder = tmp_path / "tiny" / "pretrain"
    assert export == folder / "export"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in metrics if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 11))
    assert set(training[0]) == {"step", "epoch", "loss", "lr", "grad_norm", "images_per_s"}
    assert training[-1]["epoch"] == 2
    assert [line["step"] for line in metrics if "validation_loss" in line] == [4, 8, 10]
    assert load_recipe(str(folder / "recipe.yaml")) == tiny_recipe()
    assert json.loads((folder / "environment.json").read_text())["packages"]["torch"] == torch.__version__.split("+")[0]
    images = sorted((folder / "reconstructions").iterdir())
    assert [path.stem for path in images] == ["step_00000004", "step_00000008", "step_00000010"]
    assert Image.open(images[-1]).width > 300

    encoder = swin.load_encoder(export)
    trained = saved_state(folder / "checkpoints/step_00000010")
    assert all(torch.equal(value, trained[f"model/encoder.{name}"]) for name, value in encoder.state_dict().items())
    description = swin.load_description(export)
    assert description["pixels"]["mean"] == [0.49, 0.49, 0.49] and description["trained"]["steps"] == 10

    summary = json.loads((folder / "summary.json").read_text())["validation_masked_l1"]
    assert set(summary) == {"predict zero", "mean of the visible pixels", "copy the nearest visible pixel", "model"}
    printed = capsys.readouterr().out
    assert "validation masked L1" in printed and f"{summary['model']:.4f}  model" in printed
    assert summary["model"] == pytest.approx(metrics[-1]["validation_loss"], rel=1e-5)


def test_running_a_finished_stage_again_changes_nothing(tmp_path, capsys):
    stages.run_stage(tiny_recipe(), "pretrain", tmp_path)
    checkpoint = tmp_path / "tiny/pretrain/checkpoints/step_00000010/state.json"
    written = checkpoint.stat().st_mtime_ns
    stages.run_stage(tiny_recipe("stages.pretrain.log.metrics_every_steps=5"), "pretrain", tmp_path)
    assert checkpoint.stat().st_mtime_ns == written
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds a run with other settings \(seed: 0 -> 1\)"):
        stages.run_stage(tiny_recipe("seed=1"), "pretrain", tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match=r"other settings \(precision: no -> bf16\)"):
        stages.run_stage(tiny_recipe(), "pretrain", tmp_path, precision="bf16")


@pytest.mark.slow
def test_other_channels_rectangles_and_normalized_targets_train(tmp_path):
    recipe = tiny_recipe(
        "encoder.in_chans=5",
        "data.mean=[0.5, 0.5, 0.5, 0.5, 0.5]",
        "data.std=[0.3, 0.3, 0.3, 0.3, 0.3]",
        "stages.pretrain.image_size=[32, 56]",
        "stages.pretrain.target.norm_window=9",
    )
    export = stages.run_stage(recipe, "pretrain", tmp_path, precision="bf16")
    assert swin.load_encoder(export).config.in_chans == 5
    summary = json.loads((export.parent / "summary.json").read_text())
    assert set(summary["validation_masked_l1"]) == {"predict zero", "model"}


def accumulation(batch_size: int, micro_batch_size: int, processes: int, **settings) -> int:
    sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size, **settings}
    kind = FinetuneStage if settings else PretrainStage
    return initialization.derive_accumulation(kind.model_construct(**sizes), processes)


def test_accumulation_must_divide():
    assert accumulation(2048, 128, 4) == 4
    with pytest.raises(ValueError, match="set micro_batch_size to one of 1, 2, 3, 4, 6, 12"):
        accumulation(24, 5, 2)
    with pytest.raises(ValueError, match="cannot be divided among 7 processes"):
        accumulation(24, 2, 7)
    mixed = {"augment": Augment(mixup=0.8)}
    with pytest.raises(ValueError, match=r"set micro_batch_size to one of 2, 4, 6, 12$"):
        accumulation(24, 8, 2, **mixed)
    with pytest.raises(ValueError, match="leaves 3 images to each of 8"):
        accumulation(24, 2, 8, **mixed)


def test_learning_rates():
    arguments = {
        "batch_size": 2048,
        "steps_per_epoch": 10,
        "total_steps": 1000,
        "base_lr": 1e-4,
        "warmup_epochs": 10,
        "warmup_lr": 5e-7,
    }
    steps = make_lr("multistep", milestones_epochs=[70], gamma=0.1, **arguments)
    assert steps(0) == pytest.approx(2e-6) and steps(50) == pytest.approx((2e-6 + 4e-4) / 2)
    assert steps(100) == steps(699) == pytest.approx(4e-4) and steps(700) == pytest.approx(4e-5)
    cosine = make_lr("cosine", min_lr=1e-6, **arguments)
    assert cosine(100) == pytest.approx(4e-4) and cosine(550) == pytest.approx((4e-4 + 4e-6) / 2)
    assert cosine(1000) == pytest.approx(4e-6)
    values = [cosine(step) for step in range(1001)]
    assert all(a > b for a, b in pairwise(values[100:])) and all(a < b for a, b in pairwise(values[:101]))


def test_every_parameter_is_in_exactly_one_group():
    recipe = tiny_recipe()
    encoder = swin.SwinEncoder(encoder_config(recipe.encoder, recipe.stages["pretrain"]))
    model = PRETRAIN.make_task(recipe, recipe.stages["pretrain"], encoder)
    optimizer = make_optimizer(model, model.no_decay_parameters(), weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert {name.split(".")[-1] for name in names} == {"weight"}
    assert not any("cpb_mlp" in name or "norm" in name for name in names)
    assert "head.weight" in names and "mask_token" not in names


def test_independent_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but each of them sees 1"):
        distributed.make_accelerator(None)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("distributed_type", DistributedType.DEEPSPEED, "configured for DEEPSPEED, which is not supported: use one of"),
        ("mixed_precision", "fp16", "mixed precision 'fp16' is not supported: use bf16"),
    ],
)
def test_unsupported_configurations_of_accelerate_are_refused(attribute, value, message, monkeypatch):
    monkeypatch.setattr(Accelerator, attribute, value)
    with pytest.raises(ValueError, match=message):
        distributed.make_accelerator(None)


def test_default_precision_is_bf16_on_cpus_with_bf16_instructions(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": True}, raising=False)
    assert distributed.default_precision() is None  # set by the launcher
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert distributed.default_precision() == "bf16"
    stages.run_stage(tiny_recipe(), "pretrain", tmp_path)
    assert " in bf16; seed " in capsys.readouterr().out
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_bf16": False}, raising=False)
    assert distributed.default_precision() is None
    stages.run_stage(tiny_recipe(), "pretrain", tmp_path)  # precision recorded in the run folder
    assert "finished before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"fsdp_version": 1}, "fsdp_version must be 2"),
        ({"activation_checkpointing": True}, "fsdp_activation_checkpointing must be false .it gives wrong gradients"),
        ({"cpu_ram_efficient_loading": True}, "fsdp_cpu_ram_efficient_loading must be false"),
    ],
)
def test_sharding_settings_that_change_results_are_refused(setting, message):
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "cpu_ram_efficient_loading": False, **setting})
    with pytest.raises(ValueError, match=message):
        distributed._configure_sharding(plugin)


def test_a_missing_tracker_is_reported(monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"log.trackers names wandb, which is not installed: pip install wandb"):
        distributed.make_accelerator(None, ["wandb"])
