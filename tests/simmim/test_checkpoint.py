"""Checkpoints: atomic writing, verification, fallback to the last valid one."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from simmim import stages
from simmim.training.checkpoint import (
    Checkpoints,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    remove_unfinished,
    training_state,
    verify,
)
from tests.simmim.test_training import comparable_metrics, saved_state, tiny_recipe


def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 40), nn.LayerNorm(40))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(8, 300)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def write(folder: Path, *steps: int, **options) -> Checkpoints:
    checkpoints = Checkpoints(folder, {"seed": 0}, **{"keep": 10, **options})
    for step in steps:
        checkpoints.save(step, training_state(*trained(step)))
    checkpoints.wait()
    return checkpoints


def test_a_saved_state_is_restored_exactly(tmp_path):
    write(tmp_path, 3)
    checkpoint, about, damaged = newest_checkpoint(tmp_path)
    assert (checkpoint.name, about["step"], about["settings"], damaged) == ("step_00000003", 3, {"seed": 0}, [])
    model, optimizer = trained(0)
    load_checkpoint(checkpoint, model, optimizer)
    expected = training_state(*trained(3))
    state = training_state(model, optimizer)
    assert state.keys() == expected.keys() and len(state) == 4 + 12
    assert all(torch.equal(state[key], expected[key]) for key in state)


def test_training_may_continue_while_a_checkpoint_is_written(tmp_path):
    model, optimizer = trained(2)
    expected = {key: value.clone() for key, value in training_state(model, optimizer).items()}
    checkpoints = Checkpoints(tmp_path, {}, keep=1)
    checkpoints.save(2, training_state(model, optimizer))
    for tensor in training_state(model, optimizer).values():
        tensor.data.fill_(7)
    checkpoints.wait()
    saved = saved_state(tmp_path / "step_00000002")
    assert all(torch.equal(saved[key], expected[key]) for key in expected)


def test_the_newest_and_every_nth_are_kept(tmp_path):
    write(tmp_path, *range(1, 10), keep=2, keep_every_steps=4)
    assert [int(path.name[-2:]) for path in list_checkpoints(tmp_path)] == [4, 8, 9]
    assert not list(tmp_path.glob(".*"))


def test_damaged_newer_checkpoints_do_not_displace_valid_ones(tmp_path):
    write(tmp_path, 3, 6, 9)
    for name in ("step_00000006", "step_00000009"):
        (tmp_path / name / "state.json").write_text("{}")
    assert newest_checkpoint(tmp_path)[0].name == "step_00000003"
    write(tmp_path, 4, keep=2)
    assert newest_checkpoint(tmp_path)[0].name == "step_00000004"
    write(tmp_path, 6, 9, keep=2)
    assert newest_checkpoint(tmp_path)[0].name == "step_00000009"


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def remove(file: Path) -> None:
    file.unlink()


DAMAGES = [truncate, flip_a_bit, empty, remove]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("pattern", ["*.safetensors", "state.json"])
def test_a_damaged_file_is_detected(pattern, damage, tmp_path):
    write(tmp_path, 1, 2)
    (file,) = (tmp_path / "step_00000002").glob(pattern)
    damage(file)
    checkpoint, _, damaged = newest_checkpoint(tmp_path)
    assert checkpoint.name == "step_00000001"
    assert damaged[0].startswith(f"checkpoint {tmp_path}/step_00000002 is damaged (")
    damage(next((tmp_path / "step_00000001").glob(pattern)))
    with pytest.raises(ValueError, match=r"is damaged .*; checkpoint .*step_00000001 is damaged .*no checkpoint in"):
        newest_checkpoint(tmp_path)


def test_an_added_file_is_detected(tmp_path):
    write(tmp_path, 1, 2)
    shutil.copy(next((tmp_path / "step_00000001").glob("*.safetensors")), tmp_path / "step_00000002/more.safetensors")
    checkpoint, _, damaged = newest_checkpoint(tmp_path)
    assert checkpoint.name == "step_00000001" and "files are missing or were added" in damaged[0]


@pytest.mark.parametrize("name", ["state.json", "*.safetensors"])
def test_a_read_error_counts_as_damage(name, tmp_path):
    write(tmp_path, 1, 2)
    (file,) = (tmp_path / "step_00000002").glob(name)
    file.unlink()
    file.symlink_to("/proc/self/mem")  # gives an I/O error
    checkpoint, _, damaged = newest_checkpoint(tmp_path)
    assert checkpoint.name == "step_00000001" and "step_00000002: Input/output error" in damaged[0]


def test_errors_of_the_writing_thread_are_raised(tmp_path, monkeypatch):
    def fail(path):
        raise MemoryError("none left")

    monkeypatch.setattr("simmim.training.checkpoint.checksum", fail)
    with pytest.raises(MemoryError, match="none left"):
        write(tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_a_symlinked_old_checkpoint_is_unlinked(tmp_path):
    """The checkpoint was moved elsewhere, with a link in its place."""
    write(tmp_path / "here", 1)
    (tmp_path / "here/step_00000001").rename(tmp_path / "archived")
    (tmp_path / "here/step_00000001").symlink_to(tmp_path / "archived")
    write(tmp_path / "here", 2, keep=1)
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["step_00000002"]
    assert (tmp_path / "archived/state.json").exists()


def test_loading_only_weights_requires_all_of_them(tmp_path):
    write(tmp_path, 1)
    model, _ = trained(0)
    load_weights(tmp_path / "step_00000001", model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained(1)[0].parameters(), strict=True))
    with pytest.raises(ValueError, match=r"1 tensors are missing, for instance model/2\.weight"):
        load_weights(tmp_path / "step_00000001", nn.Sequential(*model, nn.Linear(40, 2, bias=False)))


def test_every_byte_of_state_json_is_verified(tmp_path):
    write(tmp_path, 1)
    file = tmp_path / "step_00000001/state.json"
    content = file.read_bytes()
    for offset in range(0, len(content), 7):
        changed = bytearray(content)
        changed[offset] ^= 1
        file.write_bytes(changed)
        try:
            assert verify(file.parent) == {k: v for k, v in json.loads(content).items() if k != "sha256"}
        except ValueError as error:
            assert "is damaged" in str(error)


def test_a_renamed_folder_is_not_a_checkpoint_of_another_step(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "step_00000001").rename(tmp_path / "step_00000005")
    with pytest.raises(ValueError, match="no checkpoint in"):
        newest_checkpoint(tmp_path)


def test_incomplete_checkpoints_are_ignored_and_removed(tmp_path):
    write(tmp_path, 1)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / ".writing_step_00000002")
    (tmp_path / "step_notes").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001"]
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_notes"]


def test_tensors_of_another_model_are_refused(tmp_path):
    write(tmp_path, 1)
    model = nn.Linear(300, 40)
    with pytest.raises(ValueError, match=r"tensors are missing or unexpected, for instance model/0\.bias"):
        load_checkpoint(tmp_path / "step_00000001", model, torch.optim.AdamW(model.parameters()))


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_pickle_named_like_a_checkpoint_is_refused(tmp_path, monkeypatch):
    """Refused even if its checksum is right."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, 1)
    (file,) = (tmp_path / "step_00000001").glob("*.safetensors")
    file.write_bytes(pickle.dumps(Evil()))
    (tmp_path / "step_00000001/.metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="does not match its checksum"):
        newest_checkpoint(tmp_path)
    monkeypatch.setattr("simmim.training.checkpoint.verify", lambda checkpoint: {"step": 1})
    model, optimizer = trained(0)
    with pytest.raises(ValueError, match="is damaged"):
        load_checkpoint(newest_checkpoint(tmp_path)[0], model, optimizer)
    assert not (tmp_path / "executed").exists()
    os.system("touch executed")  # proves that unpickling would have been noticed
    assert (tmp_path / "executed").exists()


@pytest.fixture
def small_files():
    """Limit the size of files to 20 kB, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_keeps_the_last_valid_checkpoint(tmp_path, request):
    write(tmp_path, 1)
    before = sorted(tmp_path.iterdir())
    request.getfixturevalue("small_files")
    checkpoints = Checkpoints(tmp_path, {}, keep=1)
    checkpoints.save(2, training_state(*trained(2)))
    text = r"checkpoint of step 2 could not be written \(File too large\): it needs about 0 MB, and .* MB are free"
    last = r".*; the last valid checkpoint is step_00000001\. Free or repair the disk"
    with pytest.raises(OSError, match=text + last):
        checkpoints.wait()
    checkpoints.wait()  # raised once
    assert sorted(tmp_path.iterdir()) == before
    assert newest_checkpoint(tmp_path)[0].name == "step_00000001"


def test_resume_from_the_checkpoint_before_a_damaged_one_is_bitwise_equal(tmp_path, capsys):
    stages.run_stage(tiny_recipe(), "pretrain", tmp_path / "straight")
    stages.run_stage(tiny_recipe(), "pretrain", tmp_path / "damaged")
    folder = tmp_path / "damaged/tiny/pretrain"
    shutil.rmtree(folder / "export")
    flip_a_bit(next((folder / "checkpoints/step_00000010").glob("*.safetensors")))
    stages.run_stage(tiny_recipe(), "pretrain", tmp_path / "damaged")
    printed = capsys.readouterr().out
    assert "step_00000010 is damaged (shard-00001" in printed and "checkpoint skipped: " in printed
    assert f"resumes at step 9 from {folder}/checkpoints/step_00000009" in printed
    straight = tmp_path / "straight/tiny/pretrain"
    name = "checkpoints/step_00000010"
    one, two = saved_state(straight / name), saved_state(folder / name)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert comparable_metrics(straight) == comparable_metrics(folder)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [(event["step"], event["event"]) for event in events] == [(9, "damaged_checkpoint"), (9, "resumed")]


def test_a_damaged_export_is_written_again(tmp_path):
    export = stages.run_stage(tiny_recipe(), "pretrain", tmp_path)
    expected = {file.name: file.read_bytes() for file in export.iterdir()}
    assert set(expected) == {"encoder.json", "encoder.safetensors", "decoder.safetensors", "checksums.json"}
    for name, damage in (("encoder.safetensors", truncate), ("encoder.json", empty), ("checksums.json", remove)):
        damage(export / name)
        assert stages.run_stage(tiny_recipe(), "pretrain", tmp_path) == export
        assert {file.name: file.read_bytes() for file in export.iterdir()} == expected


def test_changed_settings_need_allow_changes(tmp_path, capsys):
    stages.run_stage(tiny_recipe(), "pretrain", tmp_path)
    slower = tiny_recipe("stages.pretrain.schedule.base_lr=0.01", "stages.pretrain.schedule.epochs=3")
    with pytest.raises(ValueError, match=r"base_lr: 0\.05 -> 0\.01.*--allow-changes resumes anyway"):
        stages.run_stage(slower, "pretrain", tmp_path)
    stages.run_stage(slower, "pretrain", tmp_path, allow_changes=True)
    printed = capsys.readouterr().out
    assert "warning: settings changed since then: stage.schedule.base_lr: 0.05 -> 0.01" in printed
    folder = tmp_path / "tiny/pretrain"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [(event["step"], event["event"]) for event in events] == [(10, "settings_changed"), (10, "resumed")]
    rows = [row for row in comparable_metrics(folder) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 16)) and rows[-1]["lr"] < 0.0002
    stages.run_stage(slower, "pretrain", tmp_path)
    assert "finished before" in capsys.readouterr().out
