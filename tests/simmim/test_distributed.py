"""DDP and FSDP2 compute the same as a single process, and each FSDP2 process holds its shard."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from safetensors.torch import load_file

from simmim.training.checkpoint import list_checkpoints, verify
from simmim.training.footprint import Sizes, states_bytes
from tests.simmim.test_training import TINY, comparable_metrics

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parent / "worker.py"
# With three validation images the processes get different numbers of images.
SAME = ["stages.pretrain.drop_path=0", "data.validation_images=3"]
LABELS = json.dumps(
    {
        "finetune": {
            "init_from": "scratch",
            "image_size": 32,
            "window_size": 4,
            "drop_path": 0.2,
            "batch_size": 8,
            "micro_batch_size": 2,
            "ema_decay": 0.9,
            "labels": {"val_images": 5},
            "augment": {"rand_augment": None},
            "schedule": {"epochs": 2, "warmup_epochs": 0.4, "base_lr": 0.05},
            "log": {"metrics_every_steps": 1, "evaluate_every_steps": 4, "checkpoint_every_steps": 1},
        }
    }
)
FINETUNE = ["finetune", "demo", "name=tiny", *(word for word in TINY if "stages." not in word), f"stages={LABELS}"]
PRETRAIN = ["pretrain", "demo", "name=tiny", *TINY]


def launch(processes: int, out: Path, *command: str, options: tuple[str, ...] = ("--double",)) -> subprocess.Popen:
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--multi_gpu", "--main_process_port", "0"]
    out.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, *(launcher if processes == 2 else []), str(WORKER), *options, *command, "--out", str(out)],
        cwd=out,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(processes: int, out: Path, *command: str, options: tuple[str, ...] = ("--double",), code: int = 0) -> str:
    process = launch(processes, out, *command, options=options)
    printed, _ = process.communicate(timeout=250)
    assert process.returncode == code, printed[-3000:]
    return printed


def exported(out: Path, stage: str = "pretrain") -> dict[str, torch.Tensor]:
    return load_file(out / "tiny" / stage / "export/encoder.safetensors")


def reports(out: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(out.glob("process_*.json"))]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one")
    run(1, out, *PRETRAIN, *SAME)
    return out


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sharded")
    printed = run(2, out, *PRETRAIN, *SAME, options=("--sharded", "--double"))
    assert "2 process(es) x 1 x 4 on cpu (FSDP)" in printed and printed.count("validation masked L1") == 1
    return out


def assert_same(out: Path, expected: Path, tolerance: float) -> None:
    weights = exported(out)
    for name, value in exported(expected).items():
        torch.testing.assert_close(weights[name], value, rtol=tolerance, atol=tolerance, msg=name)
    rows, others = (comparable_metrics(path / "tiny/pretrain") for path in (out, expected))
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=tolerance)
    images = [(path / "tiny/pretrain/reconstructions/step_00000010.png").read_bytes() for path in (out, expected)]
    assert images[0] == images[1]


@pytest.mark.slow
def test_two_processes_equal_one(one, tmp_path):
    printed = run(2, tmp_path, *PRETRAIN, *SAME)
    assert "2 process(es) x 1 x 4 on cpu (MULTI_CPU)" in printed and printed.count("validation masked L1") == 1
    for copy in reports(tmp_path):
        assert copy["sent"]["allreduce_"] / copy["weights"] == pytest.approx(10, rel=0.01)  # gradients, once per step
    assert_same(tmp_path, one, 1e-6)


def test_two_shards_equal_one_process(one, sharded):
    assert_same(sharded, one, 1e-6)


def test_each_process_holds_half_of_the_state(one, sharded):
    (full,), halves = reports(one), reports(sharded)
    assert [half["kind"] for half in halves] == ["FSDP", "FSDP"] and full["kind"] == "NO"
    for what in ("weights", "optimizer_state"):
        assert sum(half[what] for half in halves) == pytest.approx(full[what], rel=0.02)  # step counts are not sharded
        for half in halves:
            assert 0.45 * full[what] < half[what] < 0.55 * full[what]
    parameters = full["weights"] // 8  # float64: twice the planned bytes of fp32
    expected = 2 * states_bytes(Sizes(parameters, parameters, 0), "3", 2)
    for half in halves:
        # Gradients are as large as weights.
        assert 2 * half["weights"] + half["optimizer_state"] == pytest.approx(expected, rel=0.1)
    checkpoint = list_checkpoints(sharded / "tiny/pretrain/checkpoints")[-1]
    sizes = [file.stat().st_size for file in checkpoint.glob("*.safetensors")]
    assert len(sizes) == 2 and max(sizes) < 0.6 * sum(sizes)
    assert verify(checkpoint)["processes"] == 2


def test_communication_volume_of_shards(one, sharded):
    """In each of ten steps weights are gathered twice and gradients scattered once; evaluations gather as well."""
    size = reports(one)[0]["weights"]
    for half in reports(sharded):
        assert half["sent"]["_reduce_scatter_base_"] / size == pytest.approx(10, rel=0.1)  # shards are padded
        assert 20 - 2 < half["sent"]["_allgather_base_"] / size < 20 + 8


@pytest.mark.parametrize("first", ["two shards", pytest.param("one process", marks=pytest.mark.faults)])
def test_a_checkpoint_resumes_on_any_number_of_processes(first, one, tmp_path, monkeypatch):
    """A run stopped after step 5 resumes on two processes instead of one, or on one instead of two."""
    launches = [(2, ("--sharded", "--double")), (1, ("--double",))]
    begin, end = launches if first == "two shards" else launches[::-1]
    run(begin[0], tmp_path, *PRETRAIN, *SAME, options=(*begin[1], "--stop=5"), code=75 if begin[0] == 1 else 1)
    assert list_checkpoints(tmp_path / "tiny/pretrain/checkpoints")[-1].name == "step_00000005"
    printed = run(end[0], tmp_path, *PRETRAIN, *SAME, options=end[1])
    assert "resumes at step 5 from" in printed
    assert_same(tmp_path, one, 1e-6)


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["copies", "shards"])
def test_resume_of_fine_tuning_with_ema_is_bitwise_equal(kind, tmp_path):
    """Two processes with mixup, stochastic depth, EMA and accumulation."""
    options = ("--sharded",) if kind == "shards" else ()
    for out, command in (("straight", ()), ("stopped", ("--stop=3",))):
        run(2, tmp_path / out, *FINETUNE, options=(*options, *command), code=1 if command else 0)
    run(2, tmp_path / "stopped", *FINETUNE, options=options)
    one, two = (exported(tmp_path / out, "finetune") for out in ("straight", "stopped"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    rows = [comparable_metrics(tmp_path / out / "tiny/finetune") for out in ("straight", "stopped")]
    assert rows[0] == rows[1] and "validation_top1" in rows[0][-1]
    checkpoints = [tmp_path / out / "tiny/finetune/checkpoints/step_00000010" for out in ("straight", "stopped")]
    for file in checkpoints[0].glob("*.safetensors"):
        a, b = load_file(file), load_file(checkpoints[1] / file.name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        assert {key.split("/")[0] for key in a} == {"model", "optimizer", "ema"}


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(tmp_path):
    printed = run(2, tmp_path, *PRETRAIN, *SAME, options=("--fail=4",), code=1)
    assert "error (process 1): planted in step 4" in printed
    assert "error (process 0): another process has failed: see its error output" in printed


@pytest.mark.faults
def test_resume_after_one_process_is_killed(tmp_path):
    straight = tmp_path / "straight"
    run(2, straight, *PRETRAIN)
    killed = tmp_path / "killed"
    process = launch(2, killed, *PRETRAIN, options=("--double", "--kill=5"))
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 1 and "Signal 9 (SIGKILL)" in printed
    assert [path.name for path in list_checkpoints(killed / "tiny/pretrain/checkpoints")] == ["step_00000003"]
    run(2, killed, *PRETRAIN)
    one, two = exported(straight), exported(killed)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert comparable_metrics(straight / "tiny/pretrain") == comparable_metrics(killed / "tiny/pretrain")


@pytest.mark.faults
def test_a_launcher_that_is_stopped_lets_its_processes_save(tmp_path):
    process = launch(2, tmp_path, *PRETRAIN, "stages.pretrain.schedule.epochs=200")
    metrics = tmp_path / "tiny/pretrain/metrics.jsonl"
    deadline = time.time() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=100)
    assert "stopped by SIGTERM after step" in printed, printed[-2000:]
    newest = list_checkpoints(tmp_path / "tiny/pretrain/checkpoints")[-1]
    assert f"after step {verify(newest)['step']}, which is saved" in printed


@pytest.mark.parametrize("file", sorted((ROOT / "recipes/accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_configurations_of_accelerate_are_valid(file):
    config = ClusterConfig.from_yaml_file(str(file))
    assert config.mixed_precision == "bf16"
    text = yaml.safe_load(file.read_text())
    if text["distributed_type"] == "FSDP":
        assert text["fsdp_config"]["fsdp_version"] == 2
        assert text["fsdp_config"]["fsdp_reshard_after_forward"] is (file.stem.startswith("zero3"))
        assert not text["fsdp_config"]["fsdp_activation_checkpointing"]
        assert not text["fsdp_config"]["fsdp_cpu_ram_efficient_loading"]


SMALL_3B = [  # a small version of 3b: extra norms, one deep stage
    *("encoder.name=swinv2_3b", "encoder.embed_dim=8", "encoder.depths=[2,8]", "encoder.num_heads=[1,2]"),
    *(
        "encoder.patch_size=4",
        "encoder.mlp_ratio=2",
        "data.validation_images=3",
        "stages.pretrain.log.evaluate_every_steps=10",
    ),
]


@pytest.mark.parametrize("checkpointing", ["full", pytest.param("selective", marks=pytest.mark.faults)])
def test_a_small_version_of_3b_with_memory_options(checkpointing, tmp_path):
    """Two shards with recomputation and attention chunks equal one process without memory options."""
    plain = ["stages.pretrain.drop_path=0", "stages.pretrain.memory.attention_chunks=1"]
    saving = [f"stages.pretrain.memory.checkpointing={checkpointing}", "stages.pretrain.memory.attention_chunks=[3,1]"]
    run(1, tmp_path / "one", *PRETRAIN, *SMALL_3B, *plain)
    run(2, tmp_path / "two", *PRETRAIN, *SMALL_3B, plain[0], *saving, options=("--sharded", "--double"))
    assert_same(tmp_path / "two", tmp_path / "one", 1e-6)
    assert any(name.endswith("blocks.5.norm3.weight") for name in exported(tmp_path / "two"))
    # No process ever held the weights of the other one, not even during initialization.
    (full,), halves = reports(tmp_path / "one"), reports(tmp_path / "two")
    sizes = [weight.nbytes for weight in exported(tmp_path / "one").values()]
    assert full["building"] >= sum(sizes)
    for half in halves:
        assert half["building"] < half["weights"] + 4 * max(sizes) < 0.65 * sum(sizes)
    # Stochastic depth drops the same branches when a block is recomputed.
    deep = ["stages.pretrain.drop_path=0.4"]
    for name, memory in (("kept", []), ("again", saving)):
        run(2, tmp_path / name, *PRETRAIN, *SMALL_3B, *deep, *memory, options=("--sharded", "--double"))
    assert_same(tmp_path / "again", tmp_path / "kept", 1e-6)
