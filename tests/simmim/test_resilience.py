"""Tests of unusual and corrupt input: converted, or skipped, counted and reported, without ending the run."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import re
import shutil
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simmim import stages
from simmim.cli.main import main
from simmim.data import CenterCrop, RandomCrop, evaluation_batches, open_images, training_batches
from simmim.data.reading import THREADS, Reader
from simmim.training.run_log import RunLog
from tests.simmim.test_training import tiny_recipe

GOOD = ("cmyk.jpg", "palette.png", "deep.png", "turned.jpg", "animated.gif", "one.png", "long.png", "really_a.jpg")
BAD = {
    "truncated.jpg": "truncated",
    "empty.jpg": "empty",
    "page.jpg": "unrecognized image format",
    "bomb.png": "exceeds the limit of 89 megapixels",
    "denied.png": "Permission denied",
    "vanished.png": "No such file",
}


def noise(width=40, height=30, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_everything(folder: Path) -> None:
    """Write 24 ordinary images, one of each unusual kind and one of each kind of corrupt image."""
    folder.mkdir(parents=True)
    for number in range(24):
        noise(seed=number).save(folder / f"plain_{number:02d}.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise().convert("CMYK").save(folder / "cmyk.jpg")
    noise().quantize(16).save(folder / "palette.png", transparency=3)
    Image.fromarray(np.full((30, 40), 0x8000, np.uint16)).save(folder / "deep.png")
    noise().save(folder / "turned.jpg", exif=exif)
    noise().save(folder / "animated.gif", save_all=True, append_images=[noise(seed=1)])
    noise(1, 1).save(folder / "one.png")
    noise(10_000, 20).save(folder / "long.png")
    (folder / "really_a.jpg").write_bytes(encoded(noise()))
    (folder / "truncated.jpg").write_bytes(encoded(noise(200, 200), "JPEG")[:4000])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>not found</html>")
    Image.new("1", (15_000, 10_000)).save(folder / "bomb.png")
    noise().save(folder / "denied.png")
    noise().save(folder / "vanished.png")


@pytest.fixture
def everything(tmp_path, monkeypatch):
    """Open a folder, then delete one file and make another unreadable, also for root."""
    folder = tmp_path / "photos"
    write_everything(folder)
    images = open_images(folder)
    (folder / "vanished.png").unlink()
    fetch = type(images.files).fetch

    def refuse(self, index):
        if self.name(index).endswith("denied.png"):
            raise PermissionError(13, "Permission denied", self.name(index))
        return fetch(self, index)

    monkeypatch.setattr(type(images.files), "fetch", refuse)
    return images


def test_unusual_images_are_read_and_corrupt_ones_reported_with_a_reason(everything):
    batches = evaluation_batches(everything, CenterCrop((16, 16)), batch_size=8)
    seen = sum(len(batch["image"]) for batch in batches)
    assert seen == 24 + len(GOOD) and len(everything) == seen + len(BAD)
    found = {Path(name).name: reason for name, reason in batches.corrupt.items()}
    assert found.keys() == BAD.keys()
    for name, reason in BAD.items():
        assert reason in found[name], found[name]


def test_batches_keep_their_size_despite_corrupt_images(everything):
    steps = {"seed": 0, "batch_size": 12, "micro_batch_size": 6, "end_step": 6}
    alone = list(training_batches(everything, RandomCrop((16, 16)), **steps))
    assert all(batch["image"].shape == (6, 3, 16, 16) for batch in alone)
    assert {Path(name).name for batch in alone for name, _ in batch["corrupt"]} == BAD.keys()
    by_workers = list(training_batches(everything, RandomCrop((16, 16)), num_workers=2, **steps))
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(alone, by_workers, strict=True))


@pytest.mark.slow
def test_training_finishes_and_lists_corrupt_images(everything, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("simmim.data.sources.Images", lambda files, decoder: everything)
    recipe = tiny_recipe(
        f"data.path={tmp_path / 'photos'}", "data.num_workers=1", "data.validation_images=0", *without_exclusions()
    )
    stages.run_stage(recipe, "pretrain", tmp_path / "runs")
    with (tmp_path / "runs/tiny/pretrain/corrupt_images.csv").open(newline="") as file:
        rows = {Path(name).name: reason for name, reason in csv.reader(file)}
    assert rows.keys() == BAD.keys()
    assert (tmp_path / "runs/tiny/pretrain/export/encoder.safetensors").exists()
    assert "6 corrupt image(s) skipped so far" in capsys.readouterr().out


def test_too_many_corrupt_images_end_the_run(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(60):
        noise(seed=number).save(folder / f"{number:02d}.png")
        if number % 4 == 0:
            (folder / f"{number:02d}.png").write_bytes(b"broken")
    arguments = [
        "demo",
        "--out",
        str(tmp_path / "runs"),
        f"data.path={folder}",
        "data.validation_images=0",
        *without_exclusions(),
    ]
    assert main(["pretrain", *arguments, "name=strict", *small()]) == 2
    error = capsys.readouterr().err
    assert re.search(r"11 images could not be read.*max_corrupt_fraction.*\(10\).*corrupt_images\.csv", error)
    assert main(["pretrain", *arguments, "name=lenient", "data.max_corrupt_fraction=0.3", *small()]) == 0
    assert "15 corrupt image(s)" in capsys.readouterr().out


def without_exclusions():
    """Use other data for the stages with labels, so that none of the images are excluded as their validation data."""
    return [f"stages.{name}.labels.path=elsewhere" for name in tiny_recipe().stages if name != "pretrain"]


def small():
    recipe = tiny_recipe()
    stage, encoder = recipe.stages["pretrain"], recipe.encoder
    return [
        f"encoder.embed_dim={encoder.embed_dim}",
        f"encoder.depths={list(encoder.depths)}",
        f"encoder.num_heads={list(encoder.num_heads)}",
        f"stages.pretrain.image_size={list(stage.image_size)}",
        f"stages.pretrain.window_size={list(stage.window_size)}",
        "stages.pretrain.batch_size=8",
        "stages.pretrain.micro_batch_size=8",
        "stages.pretrain.schedule.epochs=3",
        "stages.pretrain.schedule.warmup_epochs=1",
        "data.num_workers=0",
    ]


def test_corrupt_image_limit_counts_images_of_all_processes(tmp_path):
    first, second = (RunLog(tmp_path, is_main=main, max_corrupt=2) for main in (True, False))
    first.log_corrupt_images([("a", "x"), ("a", "x"), ("b", "x")])
    second.log_corrupt_images([("b", "x")])
    with pytest.raises(ValueError, match="3 images could not be read"):
        second.log_corrupt_images([("c", "x")])


def test_truncated_shards_are_reported(tmp_path):
    def write(path, count):
        with tarfile.open(path, "w") as tar:
            for number in range(count):
                content = encoded(noise(seed=number))
                info = tarfile.TarInfo(f"{path.stem}_{number}.png")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    for name in ("a", "b"):
        write(tmp_path / f"{name}.tar", 6)
    valid = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(valid[: 4 * (len(valid) // 10)])  # before it is opened
    (tmp_path / "c.tar").write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("d_0.png", encoded(noise()))
    (tmp_path / "d.zip").write_bytes((tmp_path / "d.zip").read_bytes()[:-30])
    shutil.copy(tmp_path / "a.tar", tmp_path / "e.tar")
    images = open_images(tmp_path)
    (tmp_path / "e.tar").write_bytes(valid[:2000])  # after it was opened
    batches = evaluation_batches(images, CenterCrop((16, 16)), batch_size=4)
    seen = sum(len(batch["image"]) for batch in batches)
    corrupt = {name[len(str(tmp_path)) + 1 :].split("/")[0] for name in batches.corrupt}
    assert corrupt == {"b.tar", "c.tar", "d.zip", "e.tar"}
    assert all("truncated" in reason for reason in batches.corrupt.values())
    assert seen + len(batches.corrupt) == len(images) and 8 <= seen <= 10


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs named pipes")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_reads_that_hang_time_out(tmp_path, num_workers):
    for number in range(8):
        noise(seed=number).save(tmp_path / f"{number}.png")
    images = open_images(tmp_path)
    for number in (2, 5):
        (tmp_path / f"{number}.png").unlink()
        os.mkfifo(tmp_path / f"{number}.png")  # opening it waits for a writer that never comes
    steps = {"seed": 0, "batch_size": 8, "micro_batch_size": 8, "end_step": 2}
    batches = list(training_batches(images, RandomCrop((16, 16)), num_workers=num_workers, timeout_s=0.5, **steps))
    assert all(len(batch["image"]) == 8 for batch in batches)
    corrupt = dict(pair for batch in batches for pair in batch["corrupt"])
    assert {Path(name).name: reason for name, reason in corrupt.items()} == {
        "2.png": "no answer within 0.5 s",
        "5.png": "no answer within 0.5 s",
    }


def test_reader_continues_when_all_its_threads_hang():
    release = threading.Event()

    def fetch(index):
        if index < 2 * THREADS:
            release.wait()
        return index

    reader = Reader(fetch, timeout_s=0.05)
    results = []
    for content in reader.many(range(2 * THREADS + 6)):
        try:
            results.append(content())
        except TimeoutError:
            results.append(None)
    release.set()
    assert results[-6:] == list(range(2 * THREADS, 2 * THREADS + 6))
    assert results[: 2 * THREADS] == [None] * (2 * THREADS)


def test_reader_returns_contents_in_order():
    def fetch(index):
        time.sleep(0.002 * (index % 5))
        if index == 7:
            raise OSError(5, "Input/output error")
        return index

    results = []
    for content in Reader(fetch).many(range(40)):
        try:
            results.append(content())
        except OSError:
            results.append(-1)
    assert results == [-1 if index == 7 else index for index in range(40)]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_worker_memory_does_not_grow(tmp_path):
    """A worker reads many images, including corrupt ones and their replacements."""
    write_everything(tmp_path / "photos")
    images = open_images(tmp_path / "photos")
    batches = training_batches(
        images, RandomCrop((64, 64)), seed=0, batch_size=16, micro_batch_size=16, end_step=400, num_workers=1
    )
    sizes: list[float] = []
    for step, _ in enumerate(batches):
        (worker,) = (child.pid for child in multiprocessing.active_children())
        if step % 50 == 49:
            pages = Path(f"/proc/{worker}/statm").read_text().split()[1]
            sizes.append(int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20)
    assert len(sizes) == 8 and max(sizes[4:]) < max(sizes[:3]) + 8, sizes  # MiB


def test_manifest_memory_is_close_to_its_text(tmp_path):
    from simmim.data.listing import Entry
    from simmim.data.manifest import Manifest, make_table

    count = 200_000
    manifest = Manifest(
        make_table(Entry(f"n{number % 1000:04d}/{number:08d}.JPEG") for number in range(count)), tmp_path, []
    )
    assert manifest.table.nbytes / count < 70
    assert manifest.name(150_000) == f"{tmp_path}/n0000/00150000.JPEG"
