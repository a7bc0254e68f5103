"""Images with label maps: sources, invalid annotations, and alignment of image and map under transforms."""

from __future__ import annotations

import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from simmim.data import Decoder, TensorImage, evaluation_batches, open_files, training_batches
from simmim.data.segment_transforms import CenterSegmentCrop, RandomSegmentCrop, ShortSideResize, distort_colors
from simmim.data.segments import (
    IGNORED,
    SegmentedImage,
    SegmentedImages,
    read_class_names,
    read_label_map,
    segmented_sources,
)

COLORS = np.array([[250, 20, 20], [20, 250, 20], [20, 20, 250], [240, 240, 20], [120, 120, 120]], dtype=np.uint8)
MEAN = [0.5, 0.5, 0.5]


def blocks(seed, size=(60, 80), classes=4, side=20):
    """Return labels ``(H, W)`` in squares."""
    grid = np.random.default_rng(seed).integers(0, classes, (size[0] // side, size[1] // side), dtype=np.uint8)
    return grid.repeat(side, 0).repeat(side, 1)


def write_pair(root, name, labels, part=""):
    """Write an image in the colors of its labels, and the label map."""
    for folder, pixels in (("images", COLORS[labels]), ("annotations", labels)):
        (root / folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / folder / part / f"{name}.png")


def write_ade(root, training=4, validation=2):
    for part, count, start in (("training", training, 0), ("validation", validation, 100)):
        for index in range(start, start + count):
            write_pair(root, f"ADE_{index:04d}", blocks(index, classes=5), part)
    (root / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n1\t0.2\t9\t1\twall\n2\t0.2\t9\t1\tbuilding, edifice\n3\t0.1\t9\t1\tsky\n"
        "4\t0.1\t9\t1\tfloor, flooring\n"
    )
    return root


def opened(root, **settings) -> SegmentedImages:
    return SegmentedImages(open_files(root / "images"), open_files(root / "annotations"), **settings)


def decoded(source, index=0):
    return source.decode(source.fetch(index))


def test_layout_of_ade20k(tmp_path):
    found = segmented_sources(write_ade(tmp_path), Decoder(), 10, ignore_zero=True)
    assert (len(found.training), len(found.validation), found.problems) == (4, 2, [])
    assert found.classes == ["wall", "building, edifice", "sky", "floor, flooring"]
    assert found.training.name(0).endswith("images/training/ADE_0000.png")
    segments, labels = decoded(found.validation).segments.numpy(), blocks(100, classes=5)
    assert (labels == 0).any() and segments.dtype == np.uint8
    assert np.array_equal(segments, np.where(labels == 0, IGNORED, labels - 1))


def test_without_subfolders_a_fixed_tenth_is_the_validation_split(tmp_path):
    for index in range(30):
        write_pair(tmp_path, f"{index:02d}", blocks(index))
    found = segmented_sources(tmp_path, Decoder(), 10)
    names = [{source.name(n) for n in range(len(source))} for source in (found.training, found.validation)]
    assert (len(names[0]), len(names[1]), len(names[0] | names[1])) == (27, 3, 30)
    again = segmented_sources(tmp_path, Decoder(), 10).validation
    assert {again.name(n) for n in range(3)} == names[1]
    assert found.classes == ["0", "1", "2", "3"]  # counted


def test_annotation_and_validation_paths_can_be_given(tmp_path):
    write_ade(tmp_path)
    images, maps = tmp_path / "images", tmp_path / "annotations"
    paths = {
        "annotations": maps / "training",
        "val_path": images / "validation",
        "val_annotations": maps / "validation",
    }
    found = segmented_sources(images / "training", Decoder(), 10, **paths)
    assert (len(found.training), len(found.validation)) == (4, 2)
    del paths["val_annotations"]
    with pytest.raises(ValueError, match="need both val_path and val_annotations"):
        segmented_sources(images / "training", Decoder(), 10, **paths)
    with pytest.raises(ValueError, match="only 4 images: a validation split of a tenth needs at least 10"):
        segmented_sources(images / "training", Decoder(), 10, annotations=maps / "training")
    with pytest.raises(ValueError, match="does not contain the folders images and annotations"):
        segmented_sources(images, Decoder(), 10)


def test_files_without_a_counterpart_are_left_out_and_listed(tmp_path):
    for name in ("a", "b", "c"):
        write_pair(tmp_path, name, blocks(1))
    (tmp_path / "annotations" / "a.png").unlink()
    (tmp_path / "images" / "b.png").unlink()
    (tmp_path / "images" / "c.jpg").write_bytes((tmp_path / "images" / "c.png").read_bytes())
    source = opened(tmp_path)
    assert [source.name(n)[-5:] for n in range(len(source))] == ["c.jpg"]
    assert [(name.removeprefix(f"{tmp_path}/"), reason.split(" as ")[0]) for name, reason in source.problems] == [
        ("images/c.png", "has the same name"),
        ("images/a.png", "has no annotation"),
        ("annotations/b.png", "has no image"),
    ]
    (tmp_path / "annotations" / "c.png").unlink()
    with pytest.raises(ValueError, match="none of 2 images has an annotation"):
        opened(tmp_path)


def test_empty_folders_and_unsupported_channels_are_errors(tmp_path):
    write_pair(tmp_path, "a", blocks(1))
    with pytest.raises(ValueError, match="image files have 1, 3 or 4 channels, but the encoder has in_chans=5"):
        opened(tmp_path, decoder=Decoder(5))
    (tmp_path / "annotations" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"no images in .*annotations"):
        segmented_sources(tmp_path, Decoder(), 10)


def test_annotations_can_be_in_a_zip(tmp_path):
    write_pair(tmp_path, "a", blocks(1))
    for folder in ("images", "annotations"):
        with zipfile.ZipFile(tmp_path / f"{folder}.zip", "w") as file:
            file.write(tmp_path / folder / "a.png", "a.png")
    source = SegmentedImages(open_files(tmp_path / "images.zip"), open_files(tmp_path / "annotations.zip"), classes=4)
    assert np.array_equal(decoded(source).segments, blocks(1))


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "1"])
def test_label_maps_hold_indices_and_not_colors(tmp_path, mode):
    labels = blocks(3, classes=2 if mode == "1" else 4)
    if mode == "P":
        image = Image.fromarray(labels, "P")
        image.putpalette(COLORS[::-1].ravel().tolist())
        image.info["transparency"] = 0
    else:
        image = Image.fromarray({"L": labels, "I;16": labels.astype(np.uint16), "1": labels.astype(bool)}[mode])
    image.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == mode
    assert np.array_equal(read_label_map((tmp_path / "a.png").read_bytes()), labels)


def packed_gray(labels, depth):
    """Encode a gray PNG of 1 to 8 bits, which Pillow can read but not write."""
    rows = [np.packbits((row[:, None] >> np.arange(depth)[::-1]) & 1).tobytes() for row in labels]
    height, width = labels.shape
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0),
        b"IDAT": zlib.compress(b"".join(b"\0" + row for row in rows)),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts.items()
    )


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_labels_of_few_bits_are_not_stretched(depth):
    labels = np.random.default_rng(0).integers(0, 2**depth, (5, 7), dtype=np.uint8)
    assert np.array_equal(read_label_map(packed_gray(labels, depth)), labels)


def damage(path, kind):
    """Damage an annotation and return the expected error message."""
    image, content = Image.open(path), path.read_bytes()
    if kind == "colors":
        image.convert("RGB").save(path)
        return r"its annotation is not a label map \(PNG RGB\): expected one integer per pixel"
    if kind == "lossy":
        image.save(path, format="JPEG")
        return r"its annotation is not a label map \(JPEG L\)"
    if kind == "empty":
        path.write_bytes(b"")
        return "its annotation is an empty file"
    if kind == "text":
        path.write_bytes(b"not an image")
        return r"its annotation is not an image \(starts with b'not an image'\)"
    if kind == "short":
        path.write_bytes(content[: len(content) - 40])
        return "its annotation is damaged"
    if kind == "size":
        image.resize((40, 40)).save(path)
        return "is 60 x 80 px, but its annotation is 40 x 40 px"
    if kind == "bomb":
        Image.new("1", (15_000, 10_000)).save(path)
        return "15000 x 10000 px exceeds the limit of 89 megapixels"
    if kind == "larger bomb":
        Image.new("1", (20_000, 10_000)).save(path)
        return "200000000 pixels"
    Image.fromarray(np.full((60, 80), 300 if kind == "wide label" else 4, np.uint16)).save(path)
    return f"contains the label {300 if kind == 'wide label' else 4}, but there are 4 classes, 0 to 3"


@pytest.mark.parametrize(
    "kind", ["colors", "lossy", "empty", "text", "short", "size", "bomb", "larger bomb", "label", "wide label"]
)
def test_unusable_annotations_make_corrupt_examples(tmp_path, kind):
    for name in ("a", "b", "c"):
        write_pair(tmp_path, name, blocks(1))
    message = damage(tmp_path / "annotations" / "b.png", kind)
    source = opened(tmp_path, classes=4)
    with pytest.raises(ValueError, match=message):
        decoded(source, 1)
    if "label" not in kind:
        assert opened(tmp_path).classes == ["0", "1", "2", "3"]  # counted from the other annotations
    transform = RandomSegmentCrop((32, 32), mean=MEAN)
    (batch,) = training_batches(source, transform, seed=0, batch_size=3, micro_batch_size=3, end_step=1)
    assert batch["segments"].shape == (3, 32, 32)
    assert [name[-12:] for name, _ in batch["corrupt"]] == ["images/b.png"]


def test_ignored_labels(tmp_path):
    labels = blocks(1)
    labels[:20, :20], labels[20:40, :20] = IGNORED, 0
    Image.fromarray(labels).save(tmp_path / "x.png")
    write_pair(tmp_path, "a", blocks(1))
    (tmp_path / "x.png").rename(tmp_path / "annotations" / "a.png")
    plain, from_one = decoded(opened(tmp_path)).segments, decoded(opened(tmp_path, ignore_zero=True)).segments
    assert plain[0, 0] == IGNORED and plain[20, 0] == 0
    assert from_one[0, 0] == IGNORED and from_one[20, 0] == IGNORED
    assert torch.equal(from_one == IGNORED, (plain == IGNORED) | (plain == 0))
    assert opened(tmp_path).classes == ["0", "1", "2", "3"] and len(opened(tmp_path, ignore_zero=True).classes) == 3
    with pytest.raises(ValueError, match=r"label 3, but there are 2 classes, 1 to 2$"):
        decoded(opened(tmp_path, ignore_zero=True, classes=2))
    with pytest.raises(ValueError, match="if 0 is not a class, set ignore_zero"):
        decoded(opened(tmp_path, classes=3))


def test_invalid_class_counts_are_errors(tmp_path):
    write_pair(tmp_path, "a", np.zeros((20, 20), np.uint8))
    with pytest.raises(ValueError, match=r"^1 classes .*highest label, 0, is in .*a.png\): expected 2 to 255"):
        opened(tmp_path)
    with pytest.raises(ValueError, match="255 classes in label maps: expected 2 to 254"):
        opened(tmp_path, classes=255, ignore_zero=True)
    assert len(opened(tmp_path, classes=255).classes) == 255
    Image.fromarray(np.full((20, 20), 256, np.uint16)).save(tmp_path / "annotations" / "a.png")
    with pytest.raises(ValueError, match=r"257 classes .*highest label, 256, is in .*a\.png"):
        opened(tmp_path)


def test_read_class_names(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("\ufeffname\ncat \n\nline two\n", encoding="utf-8")
    assert read_class_names(file) == ["name", "cat", "line two"]
    file.write_text("Id\tName\n")
    with pytest.raises(ValueError, match="contains no class names"):
        read_class_names(file)


def assert_aligned(image, segments, margin=2):
    """Check that the image has the color of a class wherever a neighborhood is of that class."""
    kernel = 2 * margin + 1
    high = F.max_pool2d(segments[None, None].float(), kernel, stride=1, padding=margin)
    low = -F.max_pool2d(-segments[None, None].float(), kernel, stride=1, padding=margin)
    inside = (high == low)[0, 0] & (segments != IGNORED)
    assert inside.sum() > 100
    expected = torch.from_numpy(COLORS)[segments[inside].long()].T
    assert (image[:, inside].int() - expected).abs().max() <= 1


@pytest.mark.parametrize("size", [(48, 48), (64, 40)])
def test_image_and_label_map_are_cropped_alike(tmp_path, size):
    write_pair(tmp_path, "a", 2 * blocks(5, classes=3))
    pair = decoded(opened(tmp_path))
    transform = RandomSegmentCrop(size, mean=MEAN, distort=False)
    generator = torch.Generator().manual_seed(0)
    padded, sizes = 0, set()
    for draws in torch.rand(40, transform.num_draws, generator=generator).tolist():
        example = transform(pair, draws)
        image, segments = example["image"], example["segments"]
        assert image.shape == (3, *size) and segments.shape == size and segments.dtype == image.dtype == torch.uint8
        assert_aligned(image, segments)
        assert set(segments.unique().tolist()) <= {0, 2, 4, IGNORED}  # no interpolated labels
        fill = segments == IGNORED
        assert (image[:, fill] == 128).all()
        padded += bool(fill.any())
        sizes.add(int(fill.sum()))
        other = transform(pair, [draws[0], 1 - draws[1], *draws[2:]])  # mirrored, with the padding in the same position
        visible = segments[~fill.all(dim=1)][:, ~fill.all(dim=0)]
        assert torch.equal(other["segments"][~fill.all(dim=1)][:, ~fill.all(dim=0)], visible.flip(-1))
    assert 5 < padded < 35 and len(sizes) > 5


def test_scale_ranges_from_half_to_twice(tmp_path):
    """In a ramp of columns, the difference between neighbors gives the scale."""
    ramp = torch.arange(200, dtype=torch.uint8).repeat(100, 1)
    pair = SegmentedImage(TensorImage(ramp.repeat(3, 1, 1)), ramp)
    transform = RandomSegmentCrop((50, 50), mean=MEAN, distort=False, flip=0.0)
    for u, scale in ((0.0, 0.25), (0.5, 0.625), (0.999999, 1.0)):
        row = transform(pair, [u] + [0.5] * (transform.num_draws - 1))["image"][0, 10]
        assert (float(row[24]) - float(row[0])) / 24 == pytest.approx(1 / scale, rel=0.05)
    twice = RandomSegmentCrop((50, 50), mean=MEAN, short_px=200, distort=False, flip=0.0)
    row = twice(pair, [0.0] + [0.5] * (twice.num_draws - 1))["image"][0, 10]
    assert row[-1] - row[0] == 49  # half of 200 px is the original size


def test_max_fraction_limits_the_dominant_class():
    segments = torch.zeros(100, 100, dtype=torch.uint8)
    segments[40:60, 40:60] = 1
    segments[:, :30] = IGNORED
    pair = SegmentedImage(TensorImage(torch.zeros(3, 100, 100, dtype=torch.uint8)), segments)
    fractions = {}
    for max_fraction in (0.75, 1.0):
        transform = RandomSegmentCrop((25, 25), mean=MEAN, short_px=100, scale=(1, 1), max_fraction=max_fraction)
        generator = torch.Generator().manual_seed(0)
        found = []
        for draws in torch.rand(100, transform.num_draws, generator=generator).tolist():
            labels = transform(pair, draws)["segments"]
            counts = torch.bincount(labels[labels != IGNORED].long(), minlength=2)
            found.append(0 < counts.max() <= 0.75 * counts.sum())
        fractions[max_fraction] = sum(found)
    assert fractions[1.0] < 35 and fractions[0.75] > 75


def test_color_distortion_leaves_labels_unchanged(tmp_path):
    write_pair(tmp_path, "a", blocks(5))
    pair = decoded(opened(tmp_path))
    plain = RandomSegmentCrop((48, 48), mean=MEAN, distort=False)
    transform = RandomSegmentCrop((48, 48), mean=MEAN)
    draws = torch.rand(20, transform.num_draws, generator=torch.Generator().manual_seed(0)).tolist()
    changed = 0
    for u in draws:
        one, again, other = transform(pair, u), transform(pair, u), plain(pair, u)
        assert torch.equal(one["image"], again["image"]) and torch.equal(one["segments"], other["segments"])
        changed += not torch.equal(one["image"], other["image"])
        untouched = transform(pair, [*u[:-9], *[0.9] * 9])
        assert torch.equal(untouched["image"], other["image"])
    assert changed >= 15
    with pytest.raises(ValueError, match="color distortion needs 3 channels, got 4"):
        RandomSegmentCrop((48, 48), mean=[0.5] * 4)


def test_each_color_distortion_against_its_formula():
    image = torch.randint(60, 180, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    off = [0.9, 0.5]
    brighter = distort_colors(image, [0.9, 0.0, 0.9999999, *off, *off, *off])
    assert (brighter.float() - image * 1.125).abs().max() <= 1
    gray = image.float().mul(torch.tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(dim=0)
    flatter = distort_colors(image, [0.9, *off, 0.0, 0.0, *off, *off])
    assert (flatter.float() - (image * 0.5 + gray.floor().mean() * 0.5)).abs().max() <= 1
    paler = distort_colors(image, [0.9, *off, *off, 0.0, 0.0, *off])
    assert (paler.float() - (image * 0.5 + gray.floor() * 0.5)).abs().max() <= 1
    turned = distort_colors(
        torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None], [0.9, *off, *off, *off, 0.0, 1.0]
    )
    assert (turned[:, 0, 0].int() - torch.tensor([255, 153, 0])).abs().max() <= 1  # 36 degrees from red
    all_on = [0.0, 0.7, 0.0, 0.9, 0.0, 0.9, 0.0, 0.1]
    assert not torch.equal(
        distort_colors(image, [0.0, *all_on]), distort_colors(image, [0.9, *all_on])
    )  # order of contrast


def test_batches_do_not_depend_on_workers(tmp_path):
    write_ade(tmp_path)
    source = segmented_sources(tmp_path, Decoder(), 10, ignore_zero=True).training
    transform = RandomSegmentCrop((32, 32), mean=MEAN)
    steps = {"seed": 3, "batch_size": 4, "micro_batch_size": 4, "end_step": 2}
    one, two = (list(training_batches(source, transform, num_workers=n, **steps)) for n in (0, 1))
    for a, b in zip(one, two, strict=True):
        assert a["segments"].shape == (4, 32, 32) and a["image"].shape == (4, 3, 32, 32)
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["segments"], b["segments"])


def test_evaluation_keeps_label_maps_at_original_size(tmp_path):
    write_pair(tmp_path, "a", blocks(1, (60, 80)))
    write_pair(tmp_path, "b", blocks(2, (80, 60)))
    source = opened(tmp_path)
    first, second = evaluation_batches(source, ShortSideResize(30), batch_size=1)
    assert first["image"].shape == (1, 3, 30, 40) and second["image"].shape == (1, 3, 40, 30)
    assert np.array_equal(first["segments"][0], blocks(1)) and second["segments"].shape == (1, 80, 60)
    with pytest.raises(ValueError, match="batch_size 1"):
        list(evaluation_batches(source, ShortSideResize(30), batch_size=2))
    (views,) = evaluation_batches(source, CenterSegmentCrop((32, 32)), batch_size=2)
    assert views["segments"].shape == (2, 32, 32)
    for image, segments in zip(views["image"], views["segments"], strict=True):
        assert_aligned(image, segments)
