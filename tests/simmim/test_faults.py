"""Fault injection: runs that are killed, whose files are damaged or whose disk is full recover exactly or report why.

A few faults are tested always, all of them by ``make test-faults``.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from simmim.cli.main import main
from simmim.training.checkpoint import list_checkpoints
from tests.simmim.test_checkpoint import DAMAGES
from tests.simmim.test_training import TINY, comparable_metrics

STEPS = 40
COMMAND = [
    "pretrain",
    "demo",
    "name=tiny",
    *(word for word in TINY if "every_steps" not in word and "epochs" not in word),
    "data.num_images=80",
    f"stages.pretrain.schedule.epochs={STEPS // 10}",
    "stages.pretrain.schedule.warmup_epochs=1",
    "stages.pretrain.log.metrics_every_steps=1",
    "stages.pretrain.log.evaluate_every_steps=10",
    "stages.pretrain.log.checkpoint_every_steps=2",
]
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["simmim.cli.main", "simmim.stages", "tests.simmim.test_faults"])


def work(command: list[str], output: Path) -> None:
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # as without a launcher
    with output.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(command))


def start(out: Path, *overrides: str) -> multiprocessing.process.BaseProcess:
    out.mkdir(exist_ok=True)
    process = PROCESSES.Process(
        target=work, args=([*COMMAND, *overrides, "--precision", "fp32", "--out", str(out)], out / "output.txt")
    )
    process.start()
    return process


def finish(out: Path, *overrides: str) -> int:
    process = start(out, *overrides)
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def outcome(out: Path) -> tuple[str, list[dict]]:
    """Return a hash of all trained tensors, and the metrics."""
    folder = out / "tiny/pretrain"
    digest = hashlib.sha256()
    for file in (folder / "export/encoder.safetensors", *folder.glob(f"checkpoints/step_{STEPS:08d}/*.safetensors")):
        for name, tensor in sorted(load_file(file).items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest(), comparable_metrics(folder)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[str, list[dict]]:
    out = tmp_path_factory.mktemp("straight") / "out"
    assert finish(out) == 0, (out / "output.txt").read_text()
    return outcome(out)


def kill_when(process, condition: Callable[[], bool]) -> bool:
    """Send SIGKILL as soon as ``condition`` holds; return whether the process was still alive."""
    deadline = time.monotonic() + 60
    while process.exitcode is None and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0002)
    alive = process.exitcode is None
    process.kill()
    process.join()
    return alive


def after(seconds: float) -> Callable[[], bool]:
    begin = time.monotonic()
    return lambda: time.monotonic() - begin > seconds


def killed_repeatedly(folder: Path, kills: int, seed: int) -> tuple[list[Path], int]:
    """Kill runs ``kills`` times at random moments, every third time while a checkpoint is written.

    Returns:
        The runs, and the number of kills that left an incomplete checkpoint.
    """
    draw, saving, killed = random.Random(seed), 0, 0
    runs = [folder / "0"]
    while killed < kills:
        checkpoints = runs[-1] / "tiny/pretrain/checkpoints"
        left = set(checkpoints.glob(".writing_*"))
        process = start(runs[-1])
        if killed % 3 == 0:
            hit = kill_when(process, lambda now=checkpoints, left=left: bool(set(now.glob(".writing_*")) - left))
        else:
            hit = kill_when(process, after(draw.uniform(0.1, 3.0)))
        killed += hit
        saving += hit and bool(list(checkpoints.glob(".writing_*")))
        if not hit and process.exitcode == 0:
            runs.append(folder / str(len(runs)))
    return runs, saving


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.faults)])
def test_resume_after_kill_is_bitwise_equal(kills, straight, tmp_path):
    runs, saving = killed_repeatedly(tmp_path, kills, seed=kills)
    assert saving >= max(1, kills // 5)
    for out in runs:
        assert finish(out) == 0, (out / "output.txt").read_text()
        assert outcome(out) == straight
        assert not list((out / "tiny/pretrain/checkpoints").glob(".*"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run whose export is missing, so that it resumes from its last checkpoint."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert finish(out) == 0
    shutil.rmtree(out / "tiny/pretrain/export")
    return out


@pytest.mark.faults
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("pattern", ["*.safetensors", "state.json"])
def test_damaged_checkpoints(pattern, damage, finished, straight, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    newest = list_checkpoints(out / "tiny/pretrain/checkpoints")[-1]
    damage(next(newest.glob(pattern)))
    assert finish(out) == 0
    assert f"{newest} is damaged" in (out / "output.txt").read_text()
    assert outcome(out) == straight

    shutil.rmtree(out / "tiny/pretrain/export")
    for checkpoint in list_checkpoints(out / "tiny/pretrain/checkpoints"):
        damage(next(checkpoint.glob(pattern)))
    assert finish(out) == 2
    last = (out / "output.txt").read_text().splitlines()[-1]
    assert last.startswith("error: checkpoint ") and last.endswith("remove the folder to start again")


@pytest.mark.faults
@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "recipe.yaml", "environment.json"])
def test_truncated_records_do_not_prevent_a_resume(name, straight, tmp_path):
    out = tmp_path / "out"
    process = start(out)
    checkpoints = out / "tiny/pretrain/checkpoints"
    assert kill_when(process, lambda: len(list_checkpoints(checkpoints)) > 1)
    assert finish(out, "stages.pretrain.schedule.epochs=5") == 2  # a different recipe is refused
    file = out / "tiny/pretrain" / name
    # A power failure may leave an incomplete last line in appended files, and truncate the others.
    file.write_bytes(file.read_bytes() + b'{"step": 5, "lo' if name.endswith("jsonl") and file.exists() else b"{")
    assert finish(out) == 0, (out / "output.txt").read_text()
    assert outcome(out) == straight


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_signals_at_random_moments(number, straight, tmp_path):
    out, draw, codes = tmp_path / "out", random.Random(int(number)), []
    for _ in range(4):
        process = start(out)
        begin = after(draw.uniform(1.0, 2.5))
        while process.exitcode is None and not begin():
            time.sleep(0.01)
        if process.exitcode is None:
            os.kill(process.pid, number)
        process.join(60)
        codes.append(process.exitcode)
    # While Python starts, before the command runs, signals have their default effect.
    assert set(codes) <= {75, 0, 130, -int(number)} and 75 in codes, codes
    assert finish(out) == 0
    assert outcome(out) == straight


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]).returncode:
        pytest.skip("only root can make a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.faults
def test_a_full_disk(small_disk, straight):
    out = small_disk / "out"
    process = start(out)
    checkpoints = out / "tiny/pretrain/checkpoints"
    while len(list_checkpoints(checkpoints)) < 2:
        time.sleep(0.01)
    filler = small_disk / "filler"
    with filler.open("wb") as file:  # leave room for metrics
        file.write(b"0" * (shutil.disk_usage(small_disk).free - 250_000))
    process.join(60)
    assert process.exitcode == 2
    last = (out / "output.txt").read_text().splitlines()[-1]
    assert "could not be written (No space left on device)" in last and "the last valid checkpoint is step_" in last
    assert list_checkpoints(checkpoints) and not list(checkpoints.glob(".writing_*"))
    filler.unlink()
    assert finish(out) == 0
    assert outcome(out) == straight


@pytest.mark.faults
def test_a_completely_full_disk(small_disk, straight):
    out = small_disk / "out"
    process = start(out)
    while len(list_checkpoints(out / "tiny/pretrain/checkpoints")) < 2:
        time.sleep(0.01)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"0" * 4096)
        except OSError:
            pass
    process.join(60)
    assert process.exitcode == 2
    last = (out / "output.txt").read_text().splitlines()
    assert not last or "No space left on device" in last[-1]  # there may be no room for the output either
    filler.unlink()
    assert finish(out) == 0
    assert outcome(out) == straight


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(straight, tmp_path):
    out = tmp_path / "out"
    first = start(out)
    metrics = out / "tiny/pretrain/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        time.sleep(0.01)
    second = tmp_path / "second.txt"
    process = PROCESSES.Process(target=work, args=([*COMMAND, "--out", str(out)], second))
    process.start()
    process.join(60)
    assert first.exitcode is None, "the first had ended too early for this test"
    assert process.exitcode == 2
    printed = second.read_text()
    assert f"error: {out}/tiny/pretrain is in use by process {first.pid} on " in printed
    assert "stop it, or give" in printed
    first.join(60)
    assert first.exitcode == 0
    assert outcome(out) == straight


@pytest.mark.slow
def test_a_killed_run_leaves_no_lock_while_its_workers_are_alive(straight, tmp_path):
    out = tmp_path / "out"
    process = start(out, "data.num_workers=2")
    assert kill_when(process, lambda: bool(list_checkpoints(out / "tiny/pretrain/checkpoints")))
    assert finish(out) == 0, (out / "output.txt").read_text()
    assert outcome(out) == straight
