"""The command line reports mistakes in one line with exit code 2 and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simmim import __version__
from simmim.cli.main import main
from tests.simmim.test_data import write_images
from tests.simmim.test_training import ROOT, TINY


def pretrain(*arguments: str) -> int:
    return main(["pretrain", "demo", "name=tiny", *TINY, *arguments])


def error_of(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return error


def test_pretraining_on_a_folder_with_a_corrupt_jpeg(tmp_path, capsys):
    write_images(tmp_path / "photos" / "nested", 20, suffix=".jpg")
    corrupt = tmp_path / "photos" / "nested" / "007.jpg"
    corrupt.write_bytes(corrupt.read_bytes()[:200])
    assert pretrain(f"data.path={tmp_path / 'photos'}", "--out", str(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert printed.count("skipped a corrupt image") == 1 and "007.jpg" in printed
    assert "1 corrupt image(s) skipped so far" in printed
    assert "007.jpg" in (tmp_path / "out/tiny/pretrain/corrupt_images.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.path=/does/not/exist"], "'/does/not/exist' is not a folder, a file or a pattern"),
        (["data.path=''"], "the recipe names no images: set data.path="),
        (["data.path=builtin:cats"], "the only builtin data is builtin:shapes"),
        (["stages.pretrain.image_size=36"], "mask_patch_size 8 does not divide the image size 36 x 36"),
        (["stages.pretrain.micro_batch_size=3"], "set micro_batch_size to one of 1, 2, 4, 8"),
        (["stages.pretrain.batch_size=x", "data.pth=1"], "2 problem(s) in demo"),
    ],
)
def test_mistakes_in_the_recipe(arguments, message, tmp_path, capsys):
    assert pretrain(*arguments, "--out", str(tmp_path)) == 2
    assert message in error_of(capsys)


def test_a_missing_recipe(capsys):
    assert main(["pretrain", "recipes/nothing.yaml"]) == 2
    assert "no recipe 'recipes/nothing.yaml'" in error_of(capsys)


def test_an_empty_folder_and_a_folder_of_text_files(tmp_path, capsys):
    out = str(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert pretrain(f"data.path={tmp_path / 'empty'}", "--out", out) == 2
    assert "no images in" in error_of(capsys)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("text")
    assert pretrain(f"data.path={tmp_path / 'text'}", "--out", out) == 2
    assert "(1 other files)" in error_of(capsys)
    for number in range(12):
        (tmp_path / "text" / f"{number}.jpg").write_text("text")
    assert pretrain(f"data.path={tmp_path / 'text'}", "--out", out) == 2
    assert "none of 11 images could be read, the last: " in error_of(capsys)


def test_an_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("a file, not a folder")
    assert pretrain("--out", str(tmp_path / "file")) == 2
    assert "file" in error_of(capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_without_permission(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert pretrain("--out", str(tmp_path / "out")) == 2
    assert "Permission denied" in error_of(capsys)


def test_unknown_arguments(capsys):
    with pytest.raises(SystemExit, match="2"):
        pretrain("--resum")
    assert "--resum (see simmim pretrain --help)" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["experiment", "activations", "--resum"])
    assert "(see simmim experiment activations --help)" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        pretrain("--out", "x", "extra")


@pytest.mark.slow
def test_the_tool_is_the_command(tmp_path):
    """A separate process: exit code 2 and one line on stderr."""
    command = [sys.executable, str(ROOT / "tools/pretrain.py"), "demo", "data.path=/does/not/exist"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith("error: ")
    assert not Path(tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_package_is_a_command(tmp_path):
    """``python -m simmim`` is what ``accelerate launch -m simmim`` starts."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "simmim"]
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 120}
    result = subprocess.run([*command, "--version"], **options)
    assert (result.returncode, result.stdout) == (0, f"simmim {__version__}\n")
    result = subprocess.run([*command, "show", "recipes/nothing.yaml"], **options)
    assert result.returncode == 2 and "no recipe" in result.stderr  # the exit code is passed on


def test_show_prints_what_can_be_run(capsys, tmp_path):
    assert main(["show"]) == 0
    assert "simmim_swinv2_h" in capsys.readouterr().out.split()
    assert main(["show", "demo", "seed=7"]) == 0
    path = tmp_path / "shown.yaml"
    path.write_text(capsys.readouterr().out)
    assert main(["show", str(path)]) == 0
    assert capsys.readouterr().out == path.read_text()
