"""Recipes that stand for the large ones run from beginning to end, on pictures that are painted for them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import swin
from simmim.cli.main import main
from simmim.config.loading import load_recipe

ROOT = Path(__file__).parent.parent.parent
PAINT = {
    "segment_demo": ["paint_shapes.py", "--training", "40", "--validation", "10", "--size", "48"],
    "detect_miniature": ["paint_objects.py", "--images", "24", "--val-images", "10"],
    "detect_painted": ["paint_objects.py", "--images", "24", "--val-images", "10", "--size", "48"],
    "video_painted": ["paint_clips.py", "--videos", "40", "--val-videos", "9"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PAINT, "kinetics_mini", "video_demo"])
def test_a_miniature_runs_to_its_end(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(name)
    overrides = [
        f"stages.{stage}.schedule.{key}" for stage in recipe.stages for key in ("epochs=0.5", "warmup_epochs=0")
    ]
    if name in PAINT:
        script, *sizes = PAINT[name]
        subprocess.run([sys.executable, ROOT / "tools" / script, "painted", *sizes], check=True, capture_output=True)
        overrides += ["data.path=painted/images" if script == "paint_shapes.py" else "data.path=painted"]
    else:
        overrides += ["data.num_images=32"]
    overrides += [
        f"stages.{stage}.labels.{key}"
        for stage, its in recipe.stages.items()
        if its.kind != "pretrain"
        for key in {"segment": ["images=16"], "detect": []}.get(its.kind, ["val_images=8", "labels_per_class=null"])
    ]
    compared = any(its.kind != "pretrain" and its.init_from == "scratch" for its in recipe.stages.values())
    command = ["experiment", "label-efficiency"] if compared else ["run"]
    seeds = ["--seeds", "0"] if compared else []
    assert main([*command, name, *overrides, "--out", "runs", *seeds]) == 0
    for stage in recipe.stages:
        folder = Path("runs") / name / stage
        folder = folder if folder.exists() else folder.parent / "seeds" / "seed_0" / stage
        assert json.loads((folder / "summary.json").read_text()) and list(folder.glob("*/step_*.png"))
        swin.load_encoder(folder / "export")
    assert "warning" not in capsys.readouterr().out
    assert not compared or (Path("runs") / name / "page.png").exists()
