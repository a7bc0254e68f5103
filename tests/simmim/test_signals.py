"""Signals end a run after a step, with everything saved, and a code that asks for another start."""

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
from simmim.signals import Stopped, StopRequest, ignore_signals, obey_signals
from simmim.stages import initialization
from simmim.training.optim import make_lr
from tests.simmim.test_training import TINY, comparable_metrics, saved_state, tiny_recipe


def at_step(number: int, act, monkeypatch) -> None:
    """Call ``act`` while a step is computed."""

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_saves_after_the_step_and_asks_for_another_start(number, tmp_path, monkeypatch, capsys):
    command = ["pretrain", "demo", "name=tiny", *TINY, "--out", str(tmp_path / "stopped")]
    with monkeypatch.context() as patch:
        at_step(5, send(number), patch)
        assert main(command) == os.EX_TEMPFAIL == 75
    assert f"simmim: stopped by {number.name} after step 5, which is saved: the same command" in capsys.readouterr().err
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


def test_a_second_ctrl_c_leaves_at_once(tmp_path, monkeypatch, capsys):
    at_step(5, send(signal.SIGINT, signal.SIGINT), monkeypatch)
    assert main(["pretrain", "demo", "name=tiny", *TINY, "--out", str(tmp_path)]) == 130
    assert [path.name for path in (tmp_path / "tiny/pretrain/checkpoints").iterdir()] == ["step_00000003"]
    assert "the same command continues from the last checkpoint" in capsys.readouterr().err


def test_a_signal_in_the_last_step_leaves_evaluation_and_export_to_the_next_start(tmp_path, monkeypatch):
    command = ["pretrain", "demo", "name=tiny", *TINY, "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        at_step(10, send(signal.SIGTERM), patch)
        assert main(command) == 75
    assert not (tmp_path / "tiny/pretrain/export").exists()
    assert main(command) == 0
    assert (tmp_path / "tiny/pretrain/export/encoder.json").exists()


def test_outside_of_the_loop_there_is_nothing_to_save(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("simmim.stages.pretrain.PretrainType.evaluate", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert main(["pretrain", "demo", "name=tiny", *TINY, "--out", str(tmp_path)]) == 75
    assert "stopped by SIGTERM; the same command continues" in capsys.readouterr().err


def test_a_signal_while_an_image_is_decoded_is_not_its_fault(tmp_path, monkeypatch):
    """Held-out images, which have a start, are decoded in the training process; faults are named after images."""
    original = Shapes.decode

    def decode(self, content):
        if self.start and (tmp_path / "tiny/pretrain/checkpoints/step_00000010").exists():
            signal.raise_signal(signal.SIGTERM)
        return original(self, content)

    monkeypatch.setattr(Shapes, "decode", decode)
    assert main(["pretrain", "demo", "name=tiny", *TINY, "--out", str(tmp_path)]) == 75
    assert not (tmp_path / "tiny/pretrain/corrupt_images.csv").exists()


def test_a_signal_that_the_loop_has_not_seen_is_not_lost():
    with obey_signals(), pytest.raises(Stopped, match="stopped by SIGUSR1"), StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR1)
        assert stop.reason() == "SIGUSR1"


def test_handlers_are_as_before_afterwards():
    before = [signal.getsignal(number) for number in (*signals.ASKS, signal.SIGINT)]
    with obey_signals(), StopRequest():
        assert signal.getsignal(signal.SIGINT) not in before
    assert [signal.getsignal(number) for number in (*signals.ASKS, signal.SIGINT)] == before


def test_other_threads_may_train():
    reasons = []

    def train():
        with obey_signals(), StopRequest() as stop:
            reasons.append(stop.reason())

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert reasons == [None]


def test_the_end_of_a_launcher_is_noticed(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    stop = StopRequest()
    assert stop.reason() is None
    monkeypatch.setattr(signals, "PARENT", -1)  # it has ended before the loop began
    assert StopRequest().reason() == "the end of its launcher"
    monkeypatch.setattr(os, "getppid", lambda: -2)  # of no process, whoever has started this one
    assert stop.reason() == "the end of its launcher"
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    alone = StopRequest()  # a shell that is left behind is no launcher
    monkeypatch.setattr(os, "getppid", lambda: 2)
    assert alone.reason() is None


def test_loader_processes_pass_over_signals(tmp_path):
    """A scheduler signals every process of a job, a terminal every process of the foreground."""
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


def test_what_ignores_signals_can_still_be_ended():
    child = os.fork()
    if child == 0:
        ignore_signals()
        for number in (*signals.ASKS, signal.SIGINT):
            signal.raise_signal(number)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
