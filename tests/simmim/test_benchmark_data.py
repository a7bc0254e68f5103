"""The data-loading benchmark runs and reports correct counts; its timings are not tested."""

from __future__ import annotations

import os

import pytest
import torch

from simmim.benchmarks.data import BATCH, data_speed, format_speeds
from tests.simmim.test_pack import smooth


@pytest.mark.slow
def test_all_loaders_run(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMMIM_CACHE", str(tmp_path / "before"))
    for index in range(BATCH):
        smooth(index).save(tmp_path / f"{index:02d}.jpg")
    lines: list[str] = []
    threads = torch.get_num_threads()
    results = data_speed(tmp_path, rounds=2, files=1200, echo=lines.append)
    assert torch.get_num_threads() == threads and os.environ["SIMMIM_CACHE"] == str(tmp_path / "before")
    assert [len(speeds) for speeds in results.values()] == [4, 5]
    assert all(len(values) == 2 and min(values) > 0 for speeds in results.values() for values in speeds.values())
    text = "\n".join(lines)
    assert "official 460,808, simmim 110,608 (4.17x)" in text
    assert text.count("(1,200 found)") == 4
    with pytest.raises(ValueError, match="needs at least 50"):
        data_speed(_few(tmp_path))


def _few(folder):
    few = folder / "few"
    few.mkdir()
    smooth(0).save(few / "0.jpg")
    return few


def test_ratios_are_taken_within_each_round():
    text = format_speeds("task", {"a": [100.0, 50.0, 100.0], "b": [200.0, 100.0, 210.0]})
    assert text.splitlines()[1].split()[-4:] == ["1.00", "(1.00", "to", "1.00)"]
    assert text.splitlines()[2].split()[1:3] == ["200", "2.00"]
