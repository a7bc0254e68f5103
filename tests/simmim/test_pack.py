"""Packing: the same samples from fewer and smaller files, whatever happens on the way; checking and probing."""

from __future__ import annotations

import csv
import json
import math
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from simmim.cli.main import main
from simmim.data import Decoder, LabelledImages, RandomCrop, labelled_sources, open_files, open_images
from simmim.data import pack as packing_module
from simmim.data.pack import Packing, pack
from simmim.data.worker_probe import format_probe, probe
from tests.simmim.test_containers import CLASSES, SORTED, digest, write_folder, write_parquet


def smooth(number, height=90, width=120):
    coarse = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def test_without_loss_training_sees_the_very_same(tmp_path):
    folder = write_folder(tmp_path / "folder")
    result = pack(str(folder), tmp_path / "packed", Packing(short_side=0, quality=0, shard_images=5), num_workers=2)
    assert (result["images"], result["corrupt"], result["channels"]) == (22, 0, 3)
    assert len(list((tmp_path / "packed").glob("*.tar"))) == 5
    images = open_images(tmp_path / "packed")
    assert digest(images, num_workers=1) == digest(open_images(folder))
    assert images.name(7) == f"{tmp_path}/packed/shard-00001.tar/{SORTED[7]}"
    labelled, original = (LabelledImages(open_files(place)) for place in (tmp_path / "packed", folder))
    assert [labelled.label(n) for n in range(22)] == [original.label(n) for n in range(22)]
    moved = shutil.move(tmp_path / "packed", tmp_path / "elsewhere")
    assert digest(open_images(moved)) == digest(open_images(folder))
    images = open_images(moved)
    (moved / "index.arrow").unlink()  # then it is a set of shards like any other
    assert digest(open_images(moved)) == digest(open_images(folder))
    shards = str(moved / "*.tar")
    rows = datasets.load_dataset("webdataset", data_files=shards, split="train", cache_dir=tmp_path)
    assert rows[7]["json"]["name"] == SORTED[7] and rows[7]["png"].size == (40, images.read(7).shape[1])


def test_larger_images_are_reduced_and_the_statistics_are_right(tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(6):
        smooth(number, 90 + 10 * number).save(tmp_path / "photos" / f"{number}.jpg", quality=95)
    smooth(9, 30, 20).convert("CMYK").save(tmp_path / "photos" / "9.jpg")
    result = pack(str(tmp_path / "photos"), tmp_path / "packed", Packing(short_side=48, quality=0))
    originals, images = open_images(tmp_path / "photos"), open_images(tmp_path / "packed")
    assert [images.read(n).shape[1:] for n in (0, 3, 6)] == [(48, 64), (48, 48), (30, 20)]
    shapes = [originals.read(n).shape for n in range(7)]
    assert result["height"] == {"min": 30, "median": 110, "max": 140}
    assert sorted(shape[1] for shape in shapes)[3] == 110
    pixels = [images.read(n).double() / 255 for n in range(7)]
    mean = sum(one.mean(dim=(1, 2)) for one in pixels) / 7
    square = sum(one.square().mean(dim=(1, 2)) for one in pixels) / 7
    assert np.allclose(result["mean"], mean, atol=1e-4)
    assert np.allclose(result["std"], (square - mean**2).sqrt(), atol=1e-4)
    assert result["bytes_after"] > 0 and result["kinds"] == {"JPEG": 6, "JPEG CMYK": 1}
    crop = originals.decode(originals.fetch(0)).crop((0, 0, 90, 120), (48, 64)).float()
    difference = (crop - images.read(0).float()).square().mean()
    assert 10 * math.log10(255**2 / difference) > 35


def test_small_jpegs_are_not_encoded_again(tmp_path):
    (tmp_path / "photos").mkdir()
    smooth(0).save(tmp_path / "photos" / "0.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth(1).save(tmp_path / "photos" / "1.jpg", exif=exif)
    pack(str(tmp_path / "photos"), tmp_path / "packed", Packing())
    images = open_images(tmp_path / "packed")
    assert images.fetch(0) == (tmp_path / "photos" / "0.jpg").read_bytes()
    assert images.fetch(1) != (tmp_path / "photos" / "1.jpg").read_bytes()
    assert images.read(1).shape == (3, 120, 90)


def test_packing_goes_on_where_it_was_broken_off(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "folder")
    settings = Packing(short_side=16, shard_images=5)
    written = []
    encode = packing_module.encode

    def fail(original, picture, packing):
        written.append(1)
        if len(written) == 13:
            raise KeyboardInterrupt
        return encode(original, picture, packing)

    monkeypatch.setattr(packing_module, "encode", fail)
    with pytest.raises(KeyboardInterrupt):
        pack(str(folder), tmp_path / "packed", settings)
    assert not (tmp_path / "packed/index.arrow").exists()
    assert len(list((tmp_path / "packed").glob("shard-*.tar"))) == 2
    with pytest.raises(ValueError, match="short_side 16"):
        pack(str(folder), tmp_path / "packed", Packing(short_side=20, shard_images=5))
    pack(str(folder), tmp_path / "packed", settings)
    assert len(written) == 13 + 12  # two shards were kept
    monkeypatch.undo()
    straight = tmp_path / "straight"
    pack(str(folder), straight, settings, num_workers=1)
    for file in straight.glob("*.tar"):
        assert file.read_bytes() == (tmp_path / "packed" / file.name).read_bytes()
    left = {path.name for path in (tmp_path / "packed").iterdir()}
    assert left == {path.name for path in straight.iterdir()} and not any(name.startswith(".shard") for name in left)
    assert pack(str(folder), straight, settings) == json.loads((straight / "dataset.json").read_text())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="is not empty"):
        pack(str(folder), tmp_path / "full", settings)


def test_broken_images_are_left_out_and_named(tmp_path):
    folder = write_folder(tmp_path / "folder")
    for name in (SORTED[3], SORTED[11]):
        (folder / name).write_bytes(b"broken")
    result = pack(str(folder), tmp_path / "packed", Packing(short_side=0, quality=0))
    assert (result["images"], result["corrupt"]) == (20, 2)
    with (tmp_path / "packed/corrupt_images.csv").open(newline="") as file:
        assert [Path(row[0]) for row in csv.reader(file)] == [folder / SORTED[3], folder / SORTED[11]]
    kept = write_folder(tmp_path / "kept", [name for name in SORTED if name not in (SORTED[3], SORTED[11])])
    assert digest(open_images(tmp_path / "packed")) == digest(open_images(kept))
    for name in SORTED:
        (folder / name).write_bytes(b"broken")
    with pytest.raises(ValueError, match="none of 22 images could be read"):
        pack(str(folder), tmp_path / "nothing", Packing())
    assert not list((tmp_path / "nothing").iterdir())


def test_a_table_with_two_parts_keeps_them_and_its_labels(tmp_path):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train-0.parquet", names=SORTED[:14])
    write_parquet(tmp_path / "data" / "validation-0.parquet", names=SORTED[14:])
    pack(str(tmp_path / "data"), tmp_path / "packed", Packing(short_side=0, quality=0))
    training, validation = labelled_sources(tmp_path / "packed", Decoder(), 5)
    assert (len(training), len(validation), training.classes) == (14, 8, list(CLASSES))
    assert [validation.label(n) for n in range(8)] == [CLASSES.index(name[:3]) for name in SORTED[14:]]


@pytest.mark.parametrize(("channels", "suffix"), [(1, "jpg"), (4, "png"), (13, "npy")])
def test_any_number_of_channels(tmp_path, channels, suffix):
    array = np.random.default_rng(0).integers(0, 2**16, (3, channels, 60, 80), dtype=np.uint16)
    np.save(tmp_path / "stack.npy", array)
    pack(str(tmp_path / "stack.npy"), tmp_path / "packed", Packing(short_side=30, channels=channels))
    with tarfile.open(tmp_path / "packed/shard-00000.tar") as tar:
        assert f"000000002.{suffix}" in tar.getnames()
    images = open_images(tmp_path / "packed", Decoder(channels))
    assert images.read(1).shape == (channels, 30, 40)
    assert digest(images)


def test_the_command_line(tmp_path, capsys):
    folder = write_folder(tmp_path / "folder")
    report = tmp_path / "bad.csv"
    check = ["data", "check", str(folder), "--report", str(report), "--num-workers", "1"]
    assert main(check) == 0 and not report.exists()
    assert "22 good images, 0 broken" in capsys.readouterr().out
    (folder / SORTED[0]).write_bytes(b"broken")
    assert main(check) == 1
    printed = capsys.readouterr().out
    assert "21 good images, 1 broken" in printed and "1 x no kind of image" in printed
    assert SORTED[0] in report.read_text()
    packed = tmp_path / "packed"
    assert main(["data", "pack", str(folder), str(packed), "--short-side", "24", "--num-workers", "2"]) == 0
    assert f"data.path={packed}" in capsys.readouterr().out
    assert open_images(packed).read(0).shape[1] == 24
    assert main(["data", "pack", str(folder), str(packed), "--quality", "101"]) == 2
    assert "quality must be 0 to 100, got 101" in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path / "nothing")]) == 2


def test_the_probe_counts_what_it_says(tmp_path):
    images = open_images(write_folder(tmp_path / "folder"))
    speeds = probe(images, RandomCrop((16, 16)), batch_size=8, workers=[0, 1], seconds=0.2)
    assert set(speeds) == {0, 1} and min(speeds.values()) > 0
    with pytest.raises(ValueError, match="a batch of 0 out of 22"):
        probe(images, RandomCrop((16, 16)), batch_size=0)
    text = format_probe({0: 100.0, 1: 240.0, 2: 470.0, 4: 480.0})
    assert "data.num_workers=2" in text and text.splitlines()[3].endswith("470  <-")
