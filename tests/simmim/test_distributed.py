"""Several processes compute what one computes, and each holds its share."""

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
SAME = ["stages.pretrain.drop_path=0", "data.validation_images=3"]  # three images: the shares are not equal
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


def held(out: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(out.glob("held_*.json"))]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one")
    run(1, out, *PRETRAIN, *SAME)
    return out


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sharded")
    printed = run(2, out, *PRETRAIN, *SAME, options=("--sharded", "--double"))
    assert "2 process(es) x 1 x 4 on cpu (FSDP)" in printed and printed.count("held-out masked L1") == 1
    return out


def assert_same(out: Path, expected: Path, tolerance: float) -> None:
    weights = exported(out)
    for name, value in exported(expected).items():
        torch.testing.assert_close(weights[name], value, rtol=tolerance, atol=tolerance, msg=name)
    rows, others = (comparable_metrics(path / "tiny/pretrain") for path in (out, expected))
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=tolerance)
    pictures = [(path / "tiny/pretrain/reconstructions/step_00000010.png").read_bytes() for path in (out, expected)]
    assert pictures[0] == pictures[1]


def test_two_processes_are_one(one, tmp_path):
    printed = run(2, tmp_path, *PRETRAIN, *SAME)
    assert "2 process(es) x 1 x 4 on cpu (MULTI_CPU)" in printed and printed.count("held-out masked L1") == 1
    for copy in held(tmp_path):
        assert copy["sent"]["allreduce_"] / copy["weights"] == pytest.approx(10, rel=0.01)  # gradients, once a step
    assert_same(tmp_path, one, 1e-6)


def test_two_shards_are_one(one, sharded):
    assert_same(sharded, one, 1e-6)


def test_each_process_holds_half(one, sharded):
    (whole,), halves = held(one), held(sharded)
    assert [half["kind"] for half in halves] == ["FSDP", "FSDP"] and whole["kind"] == "NO"
    for what in ("weights", "moments"):
        assert sum(half[what] for half in halves) == pytest.approx(whole[what], rel=0.02)  # step counts are everywhere
        for half in halves:
            assert 0.45 * whole[what] < half[what] < 0.55 * whole[what]
    parameters = whole["weights"] // 8  # float64, twice what is planned for fp32
    planned = 2 * states_bytes(Sizes(parameters, parameters, 0), "3", 2)
    for half in halves:
        assert 2 * half["weights"] + half["moments"] == pytest.approx(planned, rel=0.1)  # gradients are as weights
    checkpoint = list_checkpoints(sharded / "tiny/pretrain/checkpoints")[-1]
    sizes = [file.stat().st_size for file in checkpoint.glob("*.safetensors")]
    assert len(sizes) == 2 and max(sizes) < 0.6 * sum(sizes)
    assert verify(checkpoint)["processes"] == 2


def test_shards_send_what_the_formulas_say(one, sharded):
    """Ten steps: weights gathered twice, gradients scattered once; each measure or picture gathers once more."""
    size = held(one)[0]["weights"]
    for half in held(sharded):
        assert half["sent"]["_reduce_scatter_base_"] / size == pytest.approx(10, rel=0.1)  # shards are padded
        assert 20 - 2 < half["sent"]["_allgather_base_"] / size < 20 + 8


@pytest.mark.parametrize("first", ["two shards", pytest.param("one process", marks=pytest.mark.faults)])
def test_a_checkpoint_is_for_any_number_of_processes(first, one, tmp_path, monkeypatch):
    """Stopped after step 5, it goes on as two where it was one, or as one where it was two."""
    launches = [(2, ("--sharded", "--double")), (1, ("--double",))]
    begin, end = launches if first == "two shards" else launches[::-1]
    run(begin[0], tmp_path, *PRETRAIN, *SAME, options=(*begin[1], "--stop=5"), code=75 if begin[0] == 1 else 1)
    assert list_checkpoints(tmp_path / "tiny/pretrain/checkpoints")[-1].name == "step_00000005"
    printed = run(end[0], tmp_path, *PRETRAIN, *SAME, options=end[1])
    assert "continues at step 5 from" in printed
    assert_same(tmp_path, one, 1e-6)


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["copies", "shards"])
def test_fine_tuning_with_an_average_continues_bit_for_bit(kind, tmp_path):
    """Mixup, stochastic depth, the average of the weights, accumulation: two processes, stopped and not."""
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
        assert {key.split("/")[0] for key in a} == {"model", "optimizer", "average"}


def test_when_one_process_fails_all_end_and_its_error_is_shown(tmp_path):
    printed = run(2, tmp_path, *PRETRAIN, *SAME, options=("--fail=4",), code=1)
    assert "error (process 1): planted in step 4" in printed
    assert "error (process 0): another process has failed: see its error output" in printed


@pytest.mark.faults
def test_when_one_process_is_killed_all_end_and_the_same_command_goes_on(tmp_path):
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
def test_a_launcher_that_is_told_to_stop_lets_its_processes_save(tmp_path):
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
def test_configurations_are_what_accelerate_reads(file):
    config = ClusterConfig.from_yaml_file(str(file))
    assert config.mixed_precision == "bf16"
    text = yaml.safe_load(file.read_text())
    if text["distributed_type"] == "FSDP":
        assert text["fsdp_config"]["fsdp_version"] == 2
        assert text["fsdp_config"]["fsdp_reshard_after_forward"] is (file.stem.startswith("zero3"))
        assert not text["fsdp_config"]["fsdp_activation_checkpointing"]
        assert not text["fsdp_config"]["fsdp_cpu_ram_efficient_loading"]


TWIN = [  # of 3b in small: its extra norms, deep in one stage
    *("encoder.name=swinv2_3b", "encoder.embed_dim=8", "encoder.depths=[2,8]", "encoder.num_heads=[1,2]"),
    *(
        "encoder.patch_size=4",
        "encoder.mlp_ratio=2",
        "data.validation_images=3",
        "stages.pretrain.log.evaluate_every_steps=10",
    ),
]


@pytest.mark.parametrize("saver", ["full", pytest.param("selective", marks=pytest.mark.faults)])
def test_three_billion_in_small(saver, tmp_path):
    """Two shards that compute blocks again, attention in chunks, are one process that keeps everything."""
    plain = ["stages.pretrain.drop_path=0", "stages.pretrain.memory.attention_chunks=1"]
    saving = [f"stages.pretrain.memory.checkpointing={saver}", "stages.pretrain.memory.attention_chunks=[3,1]"]
    run(1, tmp_path / "one", *PRETRAIN, *TWIN, *plain)
    run(2, tmp_path / "two", *PRETRAIN, *TWIN, plain[0], *saving, options=("--sharded", "--double"))
    assert_same(tmp_path / "two", tmp_path / "one", 1e-6)
    assert any(name.endswith("blocks.5.norm3.weight") for name in exported(tmp_path / "two"))
    # No process ever held the weights of the other one, nor while they were drawn.
    (whole,), halves = held(tmp_path / "one"), held(tmp_path / "two")
    sizes = [weight.nbytes for weight in exported(tmp_path / "one").values()]
    assert whole["building"] >= sum(sizes)
    for half in halves:
        assert half["building"] < half["weights"] + 4 * max(sizes) < 0.65 * sum(sizes)
    # Stochastic depth drops the same when a block is computed again.
    deep = ["stages.pretrain.drop_path=0.4"]
    for name, memory in (("kept", []), ("again", saving)):
        run(2, tmp_path / name, *PRETRAIN, *TWIN, *deep, *memory, options=("--sharded", "--double"))
    assert_same(tmp_path / "again", tmp_path / "kept", 1e-6)
