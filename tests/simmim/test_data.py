"""Tests of sources, crops, sample order and generated shapes."""

from __future__ import annotations

import math
import pickle
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

from simmim.data import (
    CenterCrop,
    Decoder,
    RandAugmentedCrop,
    RandomCrop,
    Shapes,
    TensorImage,
    evaluation_batches,
    open_images,
    split_validation,
    training_batches,
)
from simmim.data.loader import ResumableBatchSampler
from simmim.data.shapes import TEXTURES
from simmim.rng import uniform


def write_images(folder, count=5, size=(40, 30), suffix=".png", start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(start, start + count):
        pixels = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03d}{suffix}")


def test_folder_is_read_recursively_in_sorted_order(tmp_path):
    write_images(tmp_path / "b" / "deep", 2)
    write_images(tmp_path / "a", 1, suffix=".JPEG")
    write_images(tmp_path, 1, suffix=".jpg")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    folder = open_images(tmp_path)
    names = ["000.jpg", "a/000.JPEG", "b/deep/000.png", "b/deep/001.png"]
    assert [folder.name(index) for index in range(4)] == [str(tmp_path / name) for name in names]
    assert folder.read(2).shape == (3, 30, 40)
    expected = np.asarray(Image.open(tmp_path / "b/deep/001.png"))
    assert np.array_equal(folder.read(3).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_every_color_mode_is_converted_to_the_requested_channels(tmp_path, channels, mode):
    for index, source in enumerate(["L", "RGB", "RGBA", "P", "CMYK", "1", "LA"]):
        Image.new(source, (8, 6), 1).save(tmp_path / f"{index}.{'tif' if source == 'CMYK' else 'png'}")
    folder = open_images(tmp_path, Decoder(channels))
    assert {folder.read(index).shape for index in range(len(folder))} == {(channels, 6, 8)}


def test_16_bit_images_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16)).save(tmp_path / "a.png")
    assert open_images(tmp_path, Decoder(1)).read(0).unique().tolist() == [0x80]


def test_exif_rotation_is_applied(tmp_path):
    image, exif = Image.new("RGB", (20, 10)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_images(tmp_path).read(0).shape == (3, 20, 10)


def test_decompression_bomb_is_refused(tmp_path):
    Image.new("1", (15_000, 10_000)).save(tmp_path / "bomb.png")
    with pytest.raises(ValueError, match="15000 x 10000 px exceeds the limit of 89 megapixels"):
        open_images(tmp_path).read(0)


def test_unusable_folders_are_refused_with_a_reason(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        open_images(tmp_path / "missing")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"no images in .* \(1 other files\)"):
        open_images(tmp_path)
    write_images(tmp_path, 1)
    with pytest.raises(ValueError, match="1, 3 or 4 channels"):
        open_images(tmp_path, Decoder(7))


def test_corrupt_images_are_replaced_and_reported(tmp_path):
    write_images(tmp_path, 6)
    (tmp_path / "002.png").write_bytes((tmp_path / "002.png").read_bytes()[:300])
    (tmp_path / "004.png").write_bytes(b"")
    steps = {"batch_size": 6, "micro_batch_size": 6, "end_step": 1}
    (batch,) = training_batches(open_images(tmp_path), RandomCrop((16, 16)), seed=0, **steps)
    assert batch["image"].shape == (6, 3, 16, 16)
    assert sorted(name[-7:] for name, _ in batch["corrupt"]) == ["002.png", "004.png"]
    for index in range(6):
        (tmp_path / f"{index:03d}.png").write_text("not an image")
    for num_workers in (0, 1):
        with pytest.raises(ValueError, match="20 images in a row could not be read"):
            images, crop = open_images(tmp_path), RandomCrop((16, 16))
            list(training_batches(images, crop, seed=0, num_workers=num_workers, **steps))


def test_batches_do_not_depend_on_workers_or_micro_batches(tmp_path):
    write_images(tmp_path, 7)

    def samples(**arguments):
        arguments = {"batch_size": 6, "micro_batch_size": 6, "end_step": 4} | arguments
        batches = list(training_batches(open_images(tmp_path), RandomCrop((16, 16)), seed=3, **arguments))
        return torch.cat([b["index"] for b in batches]), torch.cat([b["image"] for b in batches])

    index, images = samples()
    for arguments in ({"num_workers": 2}, {"micro_batch_size": 2}, {"num_workers": 1, "micro_batch_size": 3}):
        other_index, other_images = samples(**arguments)
        assert torch.equal(other_index, index) and torch.equal(other_images, images)
    resumed_index, resumed_images = samples(start_step=2)
    assert torch.equal(resumed_index, index[12:]) and torch.equal(resumed_images, images[12:])


def test_sampler_yields_every_image_once_per_epoch_across_batches():
    keys = [
        key
        for batch in ResumableBatchSampler(10, seed=1, batch_size=4, micro_batch_size=4, end_step=5)
        for key in batch
    ]
    assert sorted(index for epoch, index in keys if epoch == 0) == list(range(10))
    assert sorted(index for epoch, index in keys if epoch == 1) == list(range(10))
    first, second = ([index for epoch, index in keys if epoch == e] for e in (0, 1))
    assert first != second and first != list(range(10))


def test_processes_split_the_batches_of_a_single_process():
    def keys(**arguments):
        return list(
            ResumableBatchSampler(50, seed=1, batch_size=12, micro_batch_size=3, start_step=1, end_step=3, **arguments)
        )

    single, split = keys(), [keys(rank=rank, world_size=2) for rank in range(2)]
    merged = [a + b for a, b in zip(*split, strict=True)]
    assert list(chain(*single)) == list(chain(*merged))


def test_random_crops_stay_within_their_area_and_aspect_ranges():
    crop = RandomCrop((16, 16), (0.25, 0.5), (0.5, 2.0))
    draws = uniform("crop", 0, torch.zeros(500, dtype=torch.int64), torch.arange(500), crop.num_draws)
    boxes = [crop.box(300, 400, u[1:]) for u in draws.tolist()]
    areas = np.array([h * w / 120_000 for _, _, h, w in boxes])
    ratios = np.array([w / h for _, _, h, w in boxes])
    assert areas.min() > 0.24 and areas.max() < 0.51 and 0.36 < areas.mean() < 0.39
    assert ratios.min() > 0.49 and ratios.max() < 2.02 and abs(np.log(ratios).mean()) < 0.06
    assert all(0 <= top <= 300 - h and 0 <= left <= 400 - w for top, left, h, w in boxes)
    assert max(top + h for top, _, h, _ in boxes) == 300 and max(left + w for _, left, _, w in boxes) == 400


def test_unsatisfiable_aspect_ratio_falls_back_to_the_central_crop():
    crop = RandomCrop((16, 16), (0.9, 1.0), (0.75, 4 / 3))
    assert crop.box(100, 900, [0.5] * 40) == (0, 383, 100, 133)


def test_crops_are_resized_and_flipped():
    image = torch.arange(64, dtype=torch.uint8).view(1, 8, 8).repeat(5, 1, 1)
    draws = [0.999] * RandomCrop.num_draws
    full_crop = RandomCrop((8, 8), (1, 1), (1, 1))
    decoded = TensorImage(image)
    assert torch.equal(full_crop(decoded, draws), image)
    draws[0] = 0.0
    assert torch.equal(full_crop(decoded, draws), image.flip(-1))
    assert torch.equal(CenterCrop((4, 8))(decoded, draws), image[:, 2:6])


def test_validation_split_is_disjoint_and_at_most_a_tenth(tmp_path):
    write_images(tmp_path, 30)
    training, validation = split_validation(open_images(tmp_path), 64)
    assert len(training) == 27 and len(validation) == 3
    assert not set(training.indices.tolist()) & set(validation.indices.tolist())
    write_images(tmp_path / "few", 9)
    training, validation = split_validation(open_images(tmp_path / "few"), 64)
    assert len(training) == 9 and validation is None


def test_evaluation_batches_contain_every_image_once_and_can_be_iterated_again(tmp_path):
    write_images(tmp_path, 5)
    batches = evaluation_batches(open_images(tmp_path), CenterCrop((16, 16)), batch_size=2)
    assert [b["index"].tolist() for b in batches] == [[0, 1], [2, 3], [4]]
    assert len(list(batches)) == 3


def test_shapes_depend_only_on_index_and_split():
    shapes, validation = Shapes(100), Shapes(100, validation=True)
    assert torch.equal(shapes.read(7), Shapes(8).read(7))
    assert not torch.equal(shapes.read(7), validation.read(7))
    assert not torch.equal(shapes.read(7), shapes.read(8))
    assert shapes.read(0).dtype == torch.uint8


@pytest.mark.parametrize(("size", "channels"), [((64, 64), 3), ((32, 80), 1), ((96, 48), 6)])
def test_shapes_have_the_requested_size_and_channels(size, channels):
    assert Shapes(3, size, channels).read(1).shape == (channels, *size)


def test_shapes_show_the_same_scene_at_any_size():
    scenes = [Shapes(3, (side, side)).read(1).float() for side in (64, 128)]
    small, large = (torch.nn.functional.adaptive_avg_pool2d(scene, 16) for scene in scenes)
    assert (large - small).abs().mean() < 5 < (large - small.flip(-1)).abs().mean()


def test_shape_labels_are_balanced_and_independent_of_color():
    shapes = Shapes(3000, (16, 16))
    labels = torch.tensor([shapes.label(index) for index in range(3000)])
    counts = labels.bincount(minlength=len(TEXTURES))
    assert len(counts) == len(TEXTURES) and counts.min() > 0.7 * 3000 / len(TEXTURES)
    means = torch.stack([shapes.read(index).float().mean(dim=(1, 2)) for index in range(1000)])
    by_class = torch.stack([means[labels[:1000] == label].mean(dim=0) for label in range(len(TEXTURES))])
    spread = means.std(dim=0).mean() / math.sqrt(1000 / len(TEXTURES))
    assert by_class.std(dim=0).mean() < 2 * spread


def test_rand_augment_posterize_keeps_at_least_one_bit():
    """In a few percent of the official draws timm asks for 0 bits, which Pillow refuses."""
    crop = RandAugmentedCrop((16, 16), rand_augment="rand-m10-inc1", mean=[0.5, 0.5, 0.5])
    (posterize,) = [op for op in crop.rand_augment.ops if op.name.startswith("Posterize")]
    posterize.prob = 1.0
    image = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    result = np.array(posterize(Image.fromarray(image.permute(1, 2, 0).numpy())))
    assert set(np.unique(result)) == {0, 128}
    assert pickle.loads(pickle.dumps(crop)).size == (16, 16)  # workers may be spawned
