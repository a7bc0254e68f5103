"""Tests of storage containers: every container gives the same classes, samples and pixels."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.registry import _registry
from PIL import Image

from simmim.cli.main import main
from simmim.data import (
    Decoder,
    LabelledImages,
    RandomCrop,
    labelled_sources,
    open_files,
    open_images,
    split_validation,
    training_batches,
    training_images,
)
from simmim.data.loader import epoch_order
from simmim.data.manifest import load_manifest
from simmim.data.tables import SHUFFLED_BLOCKS

CLASSES = ("ant", "bee", "cow")
NAMES = [f"{CLASSES[number % 3]}/{number:02d}.png" for number in range(22)]


def random_image(number):
    return np.random.default_rng(number).integers(0, 256, (30 + number % 5, 40, 3), dtype=np.uint8)


def png(number):
    file = io.BytesIO()
    Image.fromarray(random_image(number)).save(file, "PNG")
    return file.getvalue()


FILES = {name: png(number) for number, name in enumerate(NAMES)}
SORTED = sorted(NAMES)


def write_folder(path, names=NAMES):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(FILES[name])
    return path


def write_zip(path, method=zipfile.ZIP_DEFLATED, prefix="", names=NAMES):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in names:
            archive.writestr(prefix + name, FILES[name])
    return path


def write_tar(path, prefix="", names=NAMES, **others):
    with tarfile.open(path, "w") as archive:
        for name, content in [*((prefix + name, FILES[name]) for name in names), *others.items()]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_shards(path):
    path.mkdir()
    for shard in range(3):
        write_tar(path / f"part-{shard}.tar", names=SORTED[shard * 8 : shard * 8 + 8])
    return path


def data_set(names=SORTED):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    images = [{"bytes": FILES[name], "path": None} for name in names]
    labels = [CLASSES.index(name[:3]) for name in names]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def write_parquet(path, rows_per_group=None, names=SORTED):
    rows = data_set(names)
    pq.write_table(rows.with_format("arrow")[:], path, row_group_size=rows_per_group)
    return path


def write_saved(path):
    data_set().save_to_disk(path)
    return path


def write_list(path, folder):
    path.write_text("# photographs\n" + "".join(f"{folder.name}/{name}\n" for name in SORTED))
    return path


def write_csv(path, folder):
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["weight", "label", "path"])
        rows.writerows([1, name[:3], folder / name] for name in SORTED)
    return path


@pytest.fixture(scope="module")
def containers(tmp_path_factory):
    home = tmp_path_factory.mktemp("containers")
    folder = write_folder(home / "folder")
    paths = {
        "folder": folder,
        "zip": write_zip(home / "deflated.zip", names=NAMES[::-1]),
        "zip stored": write_zip(home / "stored.zip", zipfile.ZIP_STORED, "photos/"),
        "tar": write_tar(home / "images.tar", "./photos/", NAMES[::-1]),
        "tar shards": write_shards(home / "shards"),
        "pattern": home / "shards" / "part-*.tar",
        "list": write_list(home / "list.txt", folder),
        "csv": write_csv(home / "table.csv", folder),
        "parquet": write_parquet(home / "images.parquet"),
        "saved data set": write_saved(home / "saved"),
        "hf": f"hf:{home / 'saved'}",
    }
    datasets.config.HF_DATASETS_CACHE = Path(home / "cache")
    return paths


ALL = ["folder", "zip", "zip stored", "tar", "tar shards", "pattern", "list", "csv", "parquet", "saved data set", "hf"]


def digest(source, **arguments):
    """Hash all samples of three steps in their order."""
    arguments = {"seed": 3, "batch_size": 16, "micro_batch_size": 16, "end_step": 3} | arguments
    hashed = hashlib.sha256()
    for batch in training_batches(source, RandomCrop((16, 16)), **arguments):
        assert not batch["corrupt"]
        for index, epoch, image in zip(batch["index"], batch["epoch"], batch["image"], strict=True):
            hashed.update(f"{index} {epoch}".encode() + image.numpy().tobytes())
    return hashed.hexdigest()


@pytest.mark.parametrize("kind", ALL)
def test_every_container_gives_the_same_samples_and_pixels(containers, kind):
    images, folder = open_images(containers[kind]), open_images(containers["folder"])
    assert len(images) == len(NAMES)
    assert digest(images) == digest(folder)
    if kind not in ("list",):
        labelled = LabelledImages(open_files(containers[kind]))
        assert labelled.classes == list(CLASSES)
        assert [labelled.label(number) for number in range(len(NAMES))] == [CLASSES.index(n[:3]) for n in SORTED]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind", ["folder", "zip", "tar shards", "parquet"])
def test_samples_do_not_depend_on_the_number_of_workers(containers, kind):
    images = open_images(containers[kind])
    alone = digest(images)
    for num_workers in (1, 2, 4):
        assert digest(images, num_workers=num_workers, micro_batch_size=4) == alone


@pytest.mark.parametrize("kind", ["folder", "zip", "parquet"])
def test_samples_are_the_same_with_two_processes_and_after_resume(containers, kind):
    images = open_images(containers[kind])
    steps = {"seed": 3, "batch_size": 16, "micro_batch_size": 8}

    def samples(**arguments):
        batches = training_batches(images, RandomCrop((16, 16)), **steps, **arguments)
        return [
            (int(i), image.numpy().tobytes()) for b in batches for i, image in zip(b["index"], b["image"], strict=True)
        ]

    alone = samples(end_step=4)
    first, second = (samples(end_step=4, rank=rank, world_size=2, num_workers=rank) for rank in (0, 1))
    merged = [pair for step in range(4) for part in (first, second) for pair in part[step * 8 : step * 8 + 8]]
    assert merged == alone
    assert samples(start_step=3, end_step=4, num_workers=1) == alone[48:]  # in the middle of the third epoch


def test_sources_can_be_pickled_for_spawned_workers(containers):
    folder = containers["folder"]
    for path in folder.rglob("*"):
        os.utime(path, (1e9, 1e9))
    os.utime(folder, (1e9, 1e9))
    for kind in ALL:
        images = open_images(containers[kind])
        again = pickle.loads(pickle.dumps(images))
        assert again.fetch(5) == images.fetch(5) and again.name(5) == images.name(5)
    assert len(pickle.dumps(open_images(folder))) < 600  # the path of the manifest, not its content
    part = open_files(write_folder(folder.parent / "two", [f"{n}" for n in NAMES[:4]])).part("ant")
    assert pickle.loads(pickle.dumps(part)).fetch(1) == part.fetch(1)


def test_image_names_contain_their_container(containers):
    expected = {
        "folder": f"{containers['folder']}/{SORTED[3]}",
        "zip": f"{containers['zip']}/{SORTED[3]}",
        "tar shards": f"{containers['tar shards']}/part-0.tar/{SORTED[3]}",
        "parquet": f"{containers['parquet']}/train/3",
    }
    for kind, name in expected.items():
        assert open_images(containers[kind]).name(3) == name


def test_train_and_val_parts_are_found_in_every_container(tmp_path):
    write_folder(tmp_path / "folder" / "train", NAMES[:14])
    write_folder(tmp_path / "folder" / "test", NAMES[14:])
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for file in sorted((tmp_path / "folder").rglob("*.png")):
            archive.write(file, "everything" / file.relative_to(tmp_path / "folder"))
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "animals-train-0.tar", names=NAMES[:14])
    write_tar(tmp_path / "shards" / "animals-validation-0.tar", names=NAMES[14:])
    (tmp_path / "parquet").mkdir()
    write_parquet(tmp_path / "parquet" / "train-0.parquet", names=sorted(NAMES[:14]))
    write_parquet(tmp_path / "parquet" / "test-0.parquet", names=sorted(NAMES[14:]))
    for container in ("folder", "a.zip", "shards", "parquet"):
        training, validation = labelled_sources(tmp_path / container, Decoder(), 5)
        assert (len(training), len(validation), list(validation.classes)) == (14, 8, list(CLASSES)), container
        assert [validation.label(n) for n in range(8)] == [CLASSES.index(n[:3]) for n in sorted(NAMES[14:])]
        unlabelled, own = training_images(tmp_path / container, Decoder(), 5)
        assert len(unlabelled) + len(own) == 14, container


def test_labels_are_read_from_webdataset_shards(tmp_path):
    classes = {f"{name[:-4]}.cls": str(CLASSES.index(name[:3])).encode() for name in NAMES}
    flat = {name.replace("/", "_"): content for name, content in {**FILES, **classes}.items()}
    write_tar(tmp_path / "a.tar", names=[], **flat)
    labelled = LabelledImages(open_files(tmp_path / "a.tar"))
    assert labelled.classes == ["0", "1", "2"] and [labelled.label(n) for n in (0, 10, 21)] == [0, 1, 2]


def test_stacked_and_single_arrays_give_the_same_samples(tmp_path):
    array = np.random.default_rng(0).integers(0, 2**16, (20, 13, 24, 32), dtype=np.uint16)
    np.save(tmp_path / "stack.npy", array)
    np.save(tmp_path / "last.npy", array.transpose(0, 2, 3, 1))
    (tmp_path / "folder").mkdir()
    for number, one in enumerate(array):
        np.save(tmp_path / "folder" / f"{number:02d}.npy", one)
    sources = [open_images(tmp_path / name, Decoder(13)) for name in ("stack.npy", "last.npy", "folder")]
    assert np.array_equal(sources[0].read(7).numpy(), array[7] >> 8)
    assert len({digest(source) for source in sources}) == 1
    assert pickle.loads(pickle.dumps(sources[0])).read(3).shape == (13, 24, 32)
    np.save(tmp_path / "table.npy", np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"shape \(3, 4\)"):
        open_images(tmp_path / "table.npy")


def test_stream_shuffles_within_few_row_groups_and_yields_every_sample(tmp_path):
    for shard in range(2):
        names = SORTED[shard * 11 : shard * 11 + 11]
        write_parquet(tmp_path / f"train-{shard}.parquet", 2, names)
    stream = open_images(f"stream:{tmp_path}/train-*.parquet")
    folder = open_images(write_folder(tmp_path / "folder"))
    assert len(stream) == 22 and stream.name(12) == f"file://{tmp_path}/train-1.parquet/0/1"
    assert all(torch.equal(stream.read(number), folder.read(number)) for number in range(22))
    alone = digest(stream)
    assert digest(stream, num_workers=2, micro_batch_size=4) == alone == digest(pickle.loads(pickle.dumps(stream)))
    for epoch in range(3):
        order = epoch_order(3, epoch, 22, stream.blocks)
        assert sorted(order.tolist()) == list(range(22))
        blocks = stream.blocks[order]
        # Only a few blocks are open at any position of the order, and each of them is open once.
        assert all(len(set(blocks[i : i + 4].tolist())) <= 2 * SHUFFLED_BLOCKS for i in range(19))
        spans = [max(np.flatnonzero(blocks == b)) - min(np.flatnonzero(blocks == b)) for b in range(12)]
        assert max(spans) < 2 * SHUFFLED_BLOCKS
    assert not torch.equal(epoch_order(3, 0, 22, stream.blocks), epoch_order(3, 1, 22, stream.blocks))
    assert LabelledImages(stream.files).classes == list(CLASSES)
    training, validation = split_validation(stream, 2)
    assert validation.indices.tolist() == [0, 1] and len(training.blocks) == 20
    with pytest.raises(ValueError, match="only these can be streamed"):
        open_files(f"stream:{tmp_path}/folder/*/*.png")


@pytest.mark.parametrize(("scheme", "package", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_missing_cloud_storage_package_is_named_in_one_line(scheme, package, extra, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)  # makes its import fail, even if it is installed
    for cached in (scheme, package):  # file systems that fsspec has imported before
        monkeypatch.delitem(_registry, cached, raising=False)
    assert main(["data", "check", f"stream:{scheme}://bucket/train-*.parquet"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and f"pip install 'simmim[{extra}]'" in error and f"{scheme}://bucket" in error


def settle(folder):
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (1e9, 1e9))


def test_manifest_is_cached_until_a_file_or_folder_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("SIMMIM_CACHE", str(tmp_path / "cache"))
    folder = write_folder(tmp_path / "folder")
    open_files(folder)
    assert not list(tmp_path.glob("cache/*/*"))  # just written: it may change again with the same time stamp
    settle(folder)
    assert len(open_files(folder)) == 22
    (cached,) = tmp_path.glob("cache/manifests/*.arrow")
    monkeypatch.setattr("simmim.data.sources.scan", None)  # opening again does not list the folder
    assert [open_files(folder).name(n) for n in (0, 21)] == [f"{folder}/{SORTED[n]}" for n in (0, 21)]
    monkeypatch.undo()
    monkeypatch.setenv("SIMMIM_CACHE", str(tmp_path / "cache"))
    (folder / "cow" / "zebra.png").write_bytes(png(50))
    assert len(open_files(folder)) == 23
    (folder / "cow" / "zebra.png").unlink()
    (folder / "dog").mkdir()
    assert len(open_files(folder)) == 22
    settle(folder)
    cached.write_bytes(cached.read_bytes()[:100])  # a damaged manifest is written again
    assert len(open_files(folder)) == 22 and load_manifest(cached) is not None
    archive = write_zip(tmp_path / "a.zip")
    os.utime(archive, (1e9, 1e9))
    assert len(open_files(archive)) == 22
    write_zip(archive, names=NAMES[:5])
    assert len(open_files(archive)) == 5


def test_manifest_of_a_relative_path_is_valid_in_any_working_directory(tmp_path, monkeypatch):
    settle(write_folder(tmp_path / "folder"))
    archive = write_zip(tmp_path / "a.zip")
    os.utime(archive, (1e9, 1e9))
    monkeypatch.chdir(tmp_path)
    for path in ("folder", "a.zip", "folder", "a.zip", "*.zip"):
        assert open_files(path).fetch(0) == FILES[SORTED[0]]
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    for path in ("../folder", "../a.zip"):
        assert open_files(path).fetch(0) == FILES[SORTED[0]]


def test_unwritable_cache_is_ignored(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("SIMMIM_CACHE", str(tmp_path / "file"))
    folder = write_folder(tmp_path / "folder")
    settle(folder)
    assert digest(open_images(folder), num_workers=1)


def test_directory_symlinks_are_followed_once(tmp_path):
    folder = write_folder(tmp_path / "folder")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a").symlink_to(folder)
    (folder / "ant" / "round").symlink_to(folder)
    (tmp_path / "linked" / "dangling.png").symlink_to(tmp_path / "nothing.png")
    assert len(open_files(tmp_path / "linked")) == 22


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.zip", b"PK\x03\x04 cut", "damaged or not an archive"),
        ("a.tar", b"no tar" * 300, "damaged or not an archive"),
        ("a.tar.gz", b"\x1f\x8b", "unpack it"),
        ("a.csv", b"colour,size\nred,3\n", "name the path column"),
        ("a.csv", b"label,path\nred,a.png\nblue\n", "has a row without a path: blue"),
        ("a.csv", b"path\n\xff.png\n", "is not UTF-8 text"),
        ("a.csv", b"path\n" + 200_000 * b"a" + b".png\n", "is not a table of paths"),
        ("a.csv", b"youtube_id,time_start,time_end\nabc,,10\n", "row 2 of .* is abc, , 10: expected youtube_id"),
        ("a.csv", b"youtube_id,time_start,time_end\nabc\n", "row 2 of .* is abc: expected youtube_id"),
        ("a.txt", b"\n# nothing\n", "lists no images"),
        ("a.parquet", b"PAR1", "cannot be opened"),
        ("a.npy", b"\x93NUMPY", "not a readable NumPy array"),
        ("a.jpg", b"\xff\xd8", "not a supported image container"),
    ],
)
def test_invalid_containers_are_refused_with_a_reason(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        open_files(tmp_path / name)


def test_tables_without_image_columns_and_empty_patterns_are_refused(tmp_path):
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    for path in (tmp_path / "a.parquet", f"stream:{tmp_path / 'a.parquet'}"):
        with pytest.raises(ValueError, match="no image column"):
            open_files(path)
    with pytest.raises(ValueError, match="not a folder, a file or a pattern that matches files"):
        open_files(tmp_path / "*.tar")
