"""A folder that explains itself: settings, machine, commit, numbers, events; and no second run in it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simmim import stages
from simmim.cli.main import main
from simmim.training import run_log
from simmim.training.run_log import RunLog, locked, read_json_lines
from tests.simmim.test_training import TINY, tiny_recipe

ROOT = Path(__file__).parents[2]


def test_the_environment_says_what_and_where(tmp_path):
    folder = stages.run_stage(tiny_recipe(), "pretrain", tmp_path).parent
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["processes"] == 1 and environment["distribution"] == "NO" and environment["host"]
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", environment["commit"])


def test_no_commit_is_made_up(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "__file__", str(tmp_path / "simmim/runlog.py"))
    assert run_log._commit() is None
    (tmp_path / ".git").mkdir()  # not a repository after all
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert run_log._commit() is None
    monkeypatch.setenv("PATH", "")
    assert run_log._commit() is None


def test_trackers_receive_the_metrics(tmp_path):
    recipe = tiny_recipe("stages.pretrain.log.trackers=[tensorboard]")
    folder = stages.run_stage(recipe, "pretrain", tmp_path).parent
    events = EventAccumulator(str(folder / "tiny"))
    events.Reload()
    rows = [row for row in read_json_lines(folder / "metrics.jsonl") if "loss" in row]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (row["step"], pytest.approx(row["loss"])) for row in rows
    ]
    assert len(rows) == 10 and "validation_loss" in events.Tags()["scalars"]


def test_no_tracker_unless_asked_for(tmp_path):
    folder = stages.run_stage(tiny_recipe(), "pretrain", tmp_path).parent
    assert not list(folder.rglob("*tfevents*"))


def test_lines_that_were_cut_off_are_passed_over(tmp_path):
    log = RunLog(tmp_path, is_main=True)
    log.log_event(3, "warning", "a")
    with log.events_file.open("a") as file:
        file.write('{"step": 4, "ev')
    log.log_event(5, "resumed", "b")
    with log.events_file.open("ab") as file:
        file.write(b"\0\0\xff\n5\n")
    log.log_event(6, "warning", "c")
    assert [row["step"] for row in read_json_lines(log.events_file)] == [3, 5, 6]
    log.start(4, 10)  # warnings come again, what happened does not
    assert [row["step"] for row in read_json_lines(log.events_file)] == [3, 5]


def test_a_locked_folder_is_refused_and_says_by_whom(tmp_path):
    with locked(tmp_path, is_main=True):
        child = os.fork()
        if child == 0:
            try:
                with locked(tmp_path, is_main=True):
                    os._exit(1)
            except ValueError as error:
                ok = f"in use by process {os.getppid()} on" in str(error) and "another name=" in str(error)
                os._exit(0 if ok else 2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with locked(tmp_path, is_main=False):
            pass  # the other processes of the same run
    with locked(tmp_path, is_main=True):
        pass


def test_run_continues_on_file_systems_without_locks(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with locked(tmp_path, is_main=True):
        pass
    assert "cannot be locked (No locks available): start no second run in it" in capsys.readouterr().out


def test_a_recipe_with_a_tag_is_refused(tmp_path, capsys):
    recipe = tmp_path / "evil.yaml"
    recipe.write_text(f"name: !!python/object/apply:os.system ['touch {tmp_path}/executed']\n")
    assert main(["pretrain", str(recipe), "--out", str(tmp_path / "out")]) == 2
    assert "is not valid YAML: could not determine a constructor" in capsys.readouterr().err
    assert main(["pretrain", "demo", f"name=!!python/object/apply:os.system ['touch {tmp_path}/executed']"]) == 2
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


FAKES = {
    "scontrol": 'if [ "$1" = requeue ]; then echo "$2" >> requeued; else echo 127.0.0.1; fi',
    # Two tasks beside each other; the highest exit code of them.
    "srun": """shift
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=($!); done
echo "${tasks[@]}" > tasks
for task in "${tasks[@]}"; do wait $task; code=$?; [ $code -gt "${highest:-0}" ] && highest=$code; done
exit ${highest:-0}""",
}


@pytest.mark.faults
def test_a_scheduler_puts_the_job_in_its_queue_again(tmp_path):
    """The script of recipes/slurm.sh, with a scheduler that signals the tasks and starts the job again."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in FAKES.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    simmim = tools / "simmim"
    simmim.symlink_to(Path(sys.executable).parent / "simmim")
    environment = {
        **os.environ,
        **{"PATH": f"{tools}:{os.environ['PATH']}", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        **{
            "SLURM_JOB_ID": "4711",
            "SLURM_NTASKS": "2",
            "SLURM_NNODES": "1",
            "SLURM_JOB_NODELIST": "n",
            "PRECISION": "fp32",
        },
    }
    job = ["bash", str(ROOT / "recipes/slurm.sh"), "demo", "name=tiny", *TINY, "--stage", "pretrain"]
    job += ["stages.pretrain.schedule.epochs=12", "--out", str(tmp_path / "out")]
    started = subprocess.Popen(job, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out/tiny/pretrain/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert started.poll() is None
    for task in (tmp_path / "tasks").read_text().split():
        os.kill(int(task), 10)  # SIGUSR1
    _, printed = started.communicate(timeout=100)
    assert started.returncode == 75, printed
    assert (tmp_path / "requeued").read_text() == "4711\n"
    assert "stopped by SIGUSR1 after step" in printed
    again = subprocess.run(job, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0 and "resumes at step" in again.stdout, again.stderr
    assert (tmp_path / "requeued").read_text() == "4711\n"
    assert (tmp_path / "out/tiny/pretrain/export/encoder.json").exists()


def test_broken_images_are_events_of_their_step(tmp_path):
    log = RunLog(tmp_path, is_main=True)
    log.start(4, 10)
    log.count_step(8)
    log.log_corrupt_images([("a.jpg", "truncated")])
    log.log_corrupt_images([("a.jpg", "truncated")])
    (event,) = read_json_lines(log.events_file)
    assert (event["step"], event["event"], event["text"]) == (6, "corrupt_image", "a.jpg (truncated)")


def test_processes_that_outlive_a_run_do_not_keep_its_lock(tmp_path):
    ready, done = os.pipe()
    run = os.fork()
    if run == 0:
        with locked(tmp_path, is_main=True):
            if os.fork() == 0:  # a loader process, which notices the end of its parent after seconds
                os.write(done, str(os.getpid()).encode())
                time.sleep(60)
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
    loader = int(os.read(ready, 20))
    os.waitpid(run, 0)
    with locked(tmp_path, is_main=True):
        os.kill(loader, 0)  # it is still there
    os.kill(loader, signal.SIGKILL)


def test_a_full_disk_is_called_so(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("simmim.stages.run_folder.write_environment", full)
    assert main(["pretrain", "demo", "name=tiny", *TINY, "--out", str(tmp_path)]) == 2
    said = "error: the disk is full (No space left on device): free some space and run the same command to resume"
    assert said in capsys.readouterr().err
