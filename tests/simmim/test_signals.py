"""Tests of stop signals: the run saves after the current step and exits with code 75, so that it can be resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from simmim import signals, stages
from simmim.cli.main import main
from simmim.data import Shapes
from simmim.signals import Stopped, StopRequest, ignore_signals, raise_on_signals
from simmim.stages import initialization
from simmim.training.optim import make_lr
from tests.simmim.test_training import TINY, comparable_metrics, saved_state, tiny_recipe


def at_step(number: int, act, monkeypatch) -> None:
    """Call ``act`` while step ``number`` is computed."""

    def acting(**arguments):
        lr_at = make_lr(**arguments)

        def lr(step):
            if step == number - 1:
                act()
            return lr_at(step)

        return lr

    monkeypatch.setattr(initialization, "make_lr", acting)


def send(*numbers: signal.Signals):
    return lambda: [signal.raise_signal(number) for number in numbers]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_signal_saves_after_the_step_and_resume_is_bitwise_equal(number, tmp_path, monkeypatch, capsys):
    command = ["pretrain", "demo", "name=tiny", *TINY, "--out", str(tmp_path / "stopped")]
    with monkeypatch.context() as patch:
        at_step(5, send(number), patch)
        assert main(command) == os.EX_TEMPFAIL == 75
    stopped = f"simmim: stopped by {number.name} after step 5, which is saved: run the same command"
    assert stopped in capsys.readouterr().err
    folder = tmp_path / "stopped/tiny/pretrain"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000003", "step_00000005"]
    assert main(command) == 0
    straight = stages.run_stage(tiny_recipe(), "pretrain", tmp_path / "straight").parent
    one, two = (saved_state(path / "checkpoints/step_00000010") for path in (straight, folder))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert comparable_metrics(straight) == comparable_metrics(folder)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [(event["step"], event["event"]) for event in events] == [(5, "stopped"), (5, "resumed")]
    assert events[0]["text"] == f"by {number.name}" and "time" in events[0]


def test_second_ctrl_c_stops_immediately(tmp_path, monkeypatch, capsys):
    at_step(5, send(signal.SIGINT, signal.SIGINT), monkeypatch)
    assert main(["pretrain", "demo", "name=tiny", *TINY, "--out", str(tmp_path)]) == 130
    assert [path.name for path in (tmp_path / "tiny/pretrain/checkpoints").iterdir()] == ["step_00000003"]
    assert "run the same command to resume from the last checkpoint" in capsys.readouterr().err


def test_signal_in_the_last_step_defers_evaluation_and_export_to_the_next_run(tmp_path, monkeypatch):
    command = ["pretrain", "demo", "name=tiny", *TINY, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        at_step(10, send(signal.SIGTERM), patch)
        assert main(command) == 75
    assert not (tmp_path / "tiny/pretrain/export").exists()
    assert main(command) == 0
    assert (tmp_path / "tiny/pretrain/export/encoder.json").exists()


def test_signal_outside_the_training_loop_stops_immediately(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("simmim.stages.pretrain.PretrainType.evaluate", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert main(["pretrain", "demo", "name=tiny", *TINY, "--out", str(tmp_path)]) == 75
    assert "stopped by SIGTERM; run the same command again to resume" in capsys.readouterr().err


def test_signal_during_decoding_does_not_mark_the_image_as_corrupt(tmp_path, monkeypatch):
    """Validation images, whose ``start`` is not 0, are decoded in the training process."""
    original = Shapes.decode

    def decode(self, content):
        if self.start and (tmp_path / "tiny/pretrain/checkpoints/step_00000010").exists():
            signal.raise_signal(signal.SIGTERM)
        return original(self, content)

    monkeypatch.setattr(Shapes, "decode", decode)
    assert main(["pretrain", "demo", "name=tiny", *TINY, "--out", str(tmp_path)]) == 75
    assert not (tmp_path / "tiny/pretrain/corrupt_images.csv").exists()


def test_signal_after_the_last_check_is_raised_on_exit():
    with raise_on_signals(), pytest.raises(Stopped, match="stopped by SIGUSR1"), StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR1)
        assert stop.reason() == "SIGUSR1"


def test_signal_handlers_are_restored():
    before = [signal.getsignal(number) for number in (*signals.STOP_SIGNALS, signal.SIGINT)]
    with raise_on_signals(), StopRequest():
        assert signal.getsignal(signal.SIGINT) not in before
    assert [signal.getsignal(number) for number in (*signals.STOP_SIGNALS, signal.SIGINT)] == before


def test_training_in_another_thread_is_possible():
    reasons = []

    def train():
        with raise_on_signals(), StopRequest() as stop:
            reasons.append(stop.reason())

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert reasons == [None]


def test_end_of_the_launcher_is_a_reason_to_stop(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    stop = StopRequest()
    assert stop.reason() is None
    monkeypatch.setattr(signals, "PARENT_PID", -1)  # the launcher ended before the loop began
    assert StopRequest().reason() == "the end of its launcher"
    monkeypatch.setattr(os, "getppid", lambda: -2)  # an ID that no process has
    assert stop.reason() == "the end of its launcher"
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    alone = StopRequest()  # the end of a shell, which is not a launcher, does not count
    monkeypatch.setattr(os, "getppid", lambda: 2)
    assert alone.reason() is None


@pytest.mark.slow
def test_data_loader_workers_ignore_signals(tmp_path):
    """Schedulers signal every process of a job, terminals every process of the foreground group."""
    script = (
        "import os, signal, sys\n"
        "from simmim.stages import initialization\n"
        "from tests.simmim import test_signals as t\n"
        "import pytest\n"
        "t.at_step(5, lambda: os.killpg(0, signal.Signals[sys.argv[1]]), pytest.MonkeyPatch())\n"
        "from simmim.cli.main import main\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    for name in ("SIGTERM", "SIGINT"):
        command = ["pretrain", "demo", "name=tiny", *TINY, "data.num_workers=2", "--out", str(tmp_path / name)]
        result = subprocess.run(
            [sys.executable, "-c", script, name, *command],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=120,
            start_new_session=True,
        )
        assert result.returncode == 75, result.stderr[-2000:]
        assert "Traceback" not in result.stderr and f"stopped by {name} after step 5" in result.stderr


def test_ignore_signals_lets_the_process_continue():
    child = os.fork()
    if child == 0:
        ignore_signals()
        for number in (*signals.STOP_SIGNALS, signal.SIGINT):
            signal.raise_signal(number)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
