"""COCO sources and detection transforms: reading, problems, and alignment of images, boxes and masks."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from simmim.data import RandomCrop, Subset, TensorImage, evaluation_batches, training_batches
from simmim.data.box_transforms import EvaluationSize, LargeScaleJitter, ShortSideJitter, crop_scene, fitted_size
from simmim.data.boxes import CocoImages, Scene, open_coco
from simmim.data.coco import decode_rle_counts

COLORS = {7: (230, 20, 20), 3: (20, 200, 20)}  # by category id
CATEGORIES = [{"id": 7, "name": "red"}, {"id": 3, "name": "green"}]


def rectangle(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def annotation(annotation_id, image, category, box, **more):
    x, y, w, h = box
    return {
        "id": annotation_id,
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "area": w * h,
        "iscrowd": 0,
        "segmentation": rectangle(x, y, w, h),
    } | more


def write_coco(root, split="train", count=6, size=(40, 60), extra=(), seed=0, **changes):
    """Write gray noise with a red and a green rectangle each; image ids decrease as file names increase."""
    rng = np.random.default_rng(seed)
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    height, width = size
    images, annotations = [], []
    for index in range(count):
        pixels = rng.integers(100, 130, (height, width, 1)).repeat(3, axis=2).astype(np.uint8)
        image_id = 100 - index
        for half, category in enumerate(COLORS):
            w, h = (int(side) for side in rng.integers(8, 20, 2))
            x, y = int(rng.integers(0, width // 2 - w + 1)) + half * width // 2, int(rng.integers(0, height - h + 1))
            pixels[y : y + h, x : x + w] = COLORS[category]
            annotations.append(annotation(len(annotations) + 1, image_id, category, (x, y, w, h)))
        Image.fromarray(pixels).save(root / split / f"{index}.png")
        images.append({"id": image_id, "file_name": f"{index}.png", "height": height, "width": width})
    content = {"images": images, "annotations": annotations + list(extra), "categories": CATEGORIES} | changes
    (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return content


def scene_of(source, image_id):
    index = source.annotations.image_ids.tolist().index(image_id)
    return source.decode(source.fetch(index))


def has_color(image, label):
    """Return which pixels have the color of a class, bool ``(H, W)``."""
    return image[0 if label == 2 else 1] > 165


def test_objects_equal_those_of_pycocotools(tmp_path):
    crowd = {"counts": [0, 100, 40 * 60 - 100], "size": [40, 60]}
    packed = coco_mask.encode(np.asfortranarray(np.tri(40, 60, 5, dtype=np.uint8)))
    extra = [
        annotation(91, 97, 3, (0, 0, 3, 40), iscrowd=1, segmentation=crowd, area=100),
        annotation(92, 97, 7, (0, 0, 45, 40), segmentation={"size": [40, 60], "counts": packed["counts"].decode()}),
        annotation(
            93,
            98,
            7,
            (5.25, 5.5, 20.3, 30.1),
            segmentation=[[5.3, 5.5, 25.5, 7.25, 11, 35.6], [30, 30, 36, 30, 30, 36.5]],
        ),
    ]
    write_coco(tmp_path, "val", extra=extra)
    source = open_coco(tmp_path, "val", training=False)
    assert source.problems == [] and source.classes == ["green", "red"] and source.category_ids == [3, 7]
    oracle = COCO(str(tmp_path / "annotations" / "val.json"))
    assert source.annotations.image_ids.tolist() == sorted(oracle.imgs)
    for image_id in oracle.imgs:
        truth = source.truth(image_id)
        wanted = oracle.loadAnns(oracle.getAnnIds(image_id))
        assert [source.category_ids[label - 1] for label in truth["labels"]] == [a["category_id"] for a in wanted]
        x, y, w, h = np.array([a["bbox"] for a in wanted]).T
        np.testing.assert_allclose(truth["boxes"], np.stack([x, y, x + w, y + h], axis=1), rtol=1e-6)
        assert truth["iscrowd"].tolist() == [a["iscrowd"] for a in wanted]
        assert truth["area"].tolist() == [a["area"] for a in wanted]
        for mask, a in zip(truth["masks"], wanted, strict=True):
            assert np.array_equal(mask, oracle.annToMask(a)), a["id"]
    assert len(scene_of(source, 97).boxes) == 3  # all but the crowd
    training = CocoImages(tmp_path / "annotations" / "val.json", tmp_path / "val")
    assert training.annotations.crowds.sum() == 0 and len(training.truth(97)["boxes"]) == 3


def test_decode_rle_counts_covers_masks_of_pycocotools():
    rng = np.random.default_rng(0)
    for density in (0.01, 0.5, 0.99):
        mask = np.asfortranarray((rng.random((37, 53)) < density).astype(np.uint8))
        lengths = decode_rle_counts(coco_mask.encode(mask)["counts"])
        assert sum(lengths) == mask.size and sum(lengths[1::2]) == mask.sum()
    for bad in (b"\x10", b"zzz", b"P"):
        with pytest.raises(ValueError, match="run lengths"):
            decode_rle_counts(bad)


def test_bad_annotations_are_left_out_and_listed(tmp_path):
    bad = {
        50: annotation(50, 12345, 3, (1, 1, 5, 5)),
        51: annotation(51, 100, 99, (1, 1, 5, 5)),
        52: annotation(52, 100, 3, (61, 1, 5, 5)),
        53: annotation(53, 100, 3, (59.5, 1, 5, 5)),
        54: annotation(54, 100, 3, (1, 1, 0, 5)),
        55: annotation(55, 100, 3, (1, 1, -4, 5)),
        56: annotation(56, 100, 3, (1, math.nan, 4, 5)),
        57: annotation(57, 100, 3, (1, 1, 4, 5)) | {"bbox": [1, 2, 3]},
        58: annotation(58, 100, 3, (1, 1, 4, 5)) | {"bbox": None},
        59: annotation(59, 100, 3, (1, 1, 4, 5), segmentation=[]),
        60: annotation(60, 100, 3, (1, 1, 4, 5), segmentation=[[1, 2, 3, 4]]),
        61: annotation(61, 100, 3, (1, 1, 4, 5), segmentation=[[1, 2, 3, 4, math.inf, 6]]),
        62: annotation(62, 100, 3, (1, 1, 4, 5), segmentation={"size": [40, 60], "counts": [1, 2]}),
        63: annotation(63, 100, 3, (1, 1, 4, 5), segmentation={"size": [40, 60], "counts": "abc"}),
        64: annotation(64, 100, 3, (1, 1, 4, 5), segmentation={"size": [60, 40], "counts": [0, 2400]}),
        65: annotation(65, 100, 3, (1, 1, 4, 5), segmentation=None),
        66: {"id": 66, "category_id": 3, "bbox": [1, 1, 4, 5]},
        1: annotation(1, 100, 3, (1, 1, 5, 5)),
    }
    clipped = annotation(70, 100, 3, (50, -20, 200, 50), segmentation=rectangle(50, -1e9, 2e9, 2e9))
    write_coco(tmp_path, extra=[*bad.values(), clipped, "text", None])
    source = open_coco(tmp_path, "train")
    reasons = dict(source.problems)
    assert set(reasons) == {f"annotation {annotation_id}" for annotation_id in [*bad, 70]} | {
        "annotation 31",
        "annotation 32",
    }
    for key, word in ((50, "not listed"), (51, "category"), (53, "less than a pixel"), (54, "area"), (1, "same id")):
        assert word in reasons[f"annotation {key}"]
    assert all("no usable segmentation" in reasons[f"annotation {key}"] for key in range(59, 66))
    assert "image_id" in reasons["annotation 66"] and "clipped" in reasons["annotation 70"]
    truth = source.truth(100)
    assert len(truth["boxes"]) == 3 and truth["boxes"][2].tolist() == [50, 0, 60, 30]
    assert truth["masks"][2].nonzero().amin(dim=0).tolist() == [0, 50]
    # Without masks, segmentations are not read; in evaluation, an object without one becomes a crowd.
    assert len(open_coco(tmp_path, "train", masks=False).truth(100)["boxes"]) == 3 + 7
    evaluated = open_coco(tmp_path, "train", training=False)
    assert evaluated.truth(100)["iscrowd"].sum() == 7 and len(scene_of(evaluated, 100).boxes) == 2 + 2
    crowds = evaluated.truth(100)["iscrowd"] > 0
    assert (evaluated.truth(100)["masks"][crowds].sum(dim=(1, 2)) == 4 * 5).all()


def test_bad_images_are_left_out_and_listed(tmp_path):
    content = write_coco(tmp_path)
    images = content["images"]
    images += [{**images[0], "file_name": "twice.png"}, {"id": 5, "file_name": "no_size.png"}, None]
    images += [{**images[0], "id": 2**63, "file_name": "large.png"}]
    images += [{"id": 6, "file_name": "gone.png", "height": 40, "width": 60}]
    images[1] = images[1] | {"height": 41}
    content["annotations"].append(annotation(99, 6, 3, (1, 1, 9, 9)))
    content["categories"] = [*CATEGORIES, {"id": 3, "name": "again"}, {"name": "none"}]
    (tmp_path / "annotations" / "train.json").write_text(json.dumps(content))
    source = open_coco(tmp_path, "train")
    assert len(source) == 6 and source.classes == ["green", "red"]
    reasons = dict(source.problems)
    assert reasons["gone.png"] == "is missing" and "same id 100 as 0.png" in reasons["twice.png"]
    assert "expected a 64-bit integer" in reasons["large.png"]
    assert {"image 7 of the list", "image 8 of the list", "category again"} <= set(reasons)
    assert len(reasons) == 7
    for (
        image_id
    ) in source.annotations.image_ids:  # segmentations still match after those of the missing image are removed
        truth = source.truth(image_id)
        for mask, box in zip(truth["masks"], truth["boxes"].tolist(), strict=True):
            y, x = mask.nonzero().unbind(dim=1)
            assert [x.min(), y.min(), x.max() + 1, y.max() + 1] == box
    batches = evaluation_batches(source, EvaluationSize(40, 60), batch_size=8)
    (batch,) = batches
    assert len(batch["image"]) == 5 and "41 x 60" in batches.corrupt[source.name(4)]


def test_images_without_objects_are_kept_only_in_evaluation(tmp_path):
    content = write_coco(tmp_path)
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in (99, 97)]
    (tmp_path / "annotations" / "train.json").write_text(json.dumps(content))
    assert [len(open_coco(tmp_path, "train", training=training)) for training in (True, False)] == [4, 6]
    assert len(open_coco(tmp_path, "train", keep_empty=True)) == 6
    assert len(open_coco(tmp_path, "train", training=False, keep_empty=False)) == 4
    dropped, complete = open_coco(tmp_path, "train"), open_coco(tmp_path, "train", training=False)
    for image_id in dropped.annotations.image_ids:
        few, all_ = dropped.truth(image_id), complete.truth(image_id)
        assert all(torch.equal(few[key], all_[key]) for key in all_)
    (batch,) = evaluation_batches(Subset(complete, [1, 0, 2]), EvaluationSize(40, 60), batch_size=4)
    assert batch["box_counts"].tolist() == [2, 2, 0] and batch["image_id"].tolist() == [96, 95, 97]
    assert batch["boxes"].shape == (4, 4) and batch["masks"].shape == (4, 40, 60)


def test_open_coco_reports_missing_layout_files_and_lists(tmp_path):
    with pytest.raises(ValueError, match=r"instances_train2017\.json.*, or .*train\.json"):
        open_coco(tmp_path, "train")
    write_coco(tmp_path)
    file = tmp_path / "annotations" / "train.json"
    with pytest.raises(ValueError, match=r"none of the 6 images .* for example 5\.png"):
        CocoImages(file, tmp_path)
    for text, message in (
        ("[1, 2]", "expected the lists images, annotations, categories, found a list"),
        ('{"images": [], "info": 1}', "found images, info"),
        ("{", "not valid JSON"),
        ('{"images": [], "annotations": [], "categories": []}', "no categories"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            open_coco(tmp_path, "train")
    write_coco(tmp_path, annotations=[annotation(1, 100, 3, (1, 1, 0, 5))])
    with pytest.raises(ValueError, match=r"no image .* annotation 1: bbox .* has no area"):
        open_coco(tmp_path, "train")


def test_validation_uses_the_labels_of_training(tmp_path):
    write_coco(tmp_path)
    write_coco(tmp_path, "val", categories=[{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}])
    classes = open_coco(tmp_path, "train").classes
    source = open_coco(tmp_path, "val", training=False, categories=classes)
    assert source.classes == ["green", "red"] and source.category_ids == [-1, 3]
    assert set(source.annotations.labels.tolist()) == {2} and len(source.problems) == 6


def test_open_coco_accepts_the_names_of_coco_2017(tmp_path):
    write_coco(tmp_path, "train")
    (tmp_path / "train").rename(tmp_path / "train2017")
    (tmp_path / "annotations" / "train.json").rename(tmp_path / "annotations" / "instances_train2017.json")
    assert len(open_coco(tmp_path, "train")) == 6


def check_alignment(example):
    """Check that the box, mask and color of every object agree within the blur of a resize."""
    for box, label, mask in zip(example["boxes"], example["box_labels"], example["masks"], strict=True):
        for found in (has_color(example["image"], int(label)), mask > 0):
            y, x = found.nonzero().unbind(dim=1)
            edges = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
            assert (edges - box).abs().max() <= 1.01, (edges, box)
        both = has_color(example["image"], int(label)) & (mask > 0)
        assert both.sum() >= 0.7 * mask.sum()


@pytest.mark.parametrize(
    "transform",
    [
        ShortSideJitter((32, 40, 56, 80), 96),
        LargeScaleJitter((64, 64), (0.4, 2.0)),
        LargeScaleJitter((48, 80), (0.6, 3.0)),
        EvaluationSize(70, 200),
    ],
    ids=lambda t: type(t).__name__,
)
def test_transforms_keep_boxes_masks_and_pixels_aligned(tmp_path, transform):
    write_coco(tmp_path)
    source = open_coco(tmp_path, "train")
    generator = torch.Generator().manual_seed(0)
    sizes, counts = set(), 0
    for index in range(len(source)):
        scene = source.decode(source.fetch(index))
        for draws in torch.rand(8, transform.num_draws, generator=generator, dtype=torch.float64).tolist():
            example = transform(scene, draws)
            again = transform(source.decode(source.fetch(index)), draws)
            assert all(torch.equal(value, again[key]) for key, value in example.items())
            check_alignment(example)
            sizes.add(tuple(example["image"].shape[1:]))
            counts += len(example["boxes"])
            assert example["masks"].shape[1:] == example["image"].shape[1:]
    assert counts > 40 and (len(sizes) > 3 or not transform.num_draws)


def test_flip_mirrors_image_boxes_and_masks(tmp_path):
    write_coco(tmp_path)
    scene = scene_of(open_coco(tmp_path, "train"), 100)
    plain, flipped = (ShortSideJitter((40,), 60)(scene, [0.0, draw]) for draw in (0.7, 0.2))
    assert torch.equal(plain["image"], scene.crop((0, 0, 40, 60), (40, 60)))
    assert torch.equal(flipped["image"], plain["image"].flip(-1))
    assert torch.equal(flipped["masks"], plain["masks"].flip(-1))
    assert flipped["boxes"][:, 0].tolist() == (60 - plain["boxes"][:, 2]).tolist()
    assert not torch.equal(flipped["boxes"], plain["boxes"])


def test_fitted_size_limits_the_long_side():
    assert fitted_size((480, 640), 800, 1333) == (800, 1067)
    assert fitted_size((300, 1200), 800, 1333) == (333, 1333)
    transform = ShortSideJitter()
    assert [transform.short_px[int(u * 11)] for u in (0, 0.5, 0.999)] == [480, 640, 800]


def test_objects_outside_the_crop_are_left_out(tmp_path):
    write_coco(tmp_path)
    scene = scene_of(open_coco(tmp_path, "train"), 100)
    first, _ = scene.boxes.round().int().tolist()
    box = (first[1], first[0], first[3] - first[1], first[2] - first[0])
    example = crop_scene(scene, box, box[2:], "bilinear")
    assert example["box_labels"].tolist() == [scene.labels[0]]
    assert example["boxes"].tolist() == [[0, 0, box[3], box[2]]] and example["masks"].all()
    nothing = crop_scene(scene, (0, 0, 1, 1), (9, 9), "bilinear")
    assert nothing["boxes"].shape == (0, 4) and nothing["masks"].shape == (0, 9, 9)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("width", "resized"), [(21, 57), (22, 26), (25, 53), (40, 40)])
def test_cut_boxes_end_at_the_border_of_the_resized_crop(width, resized, flip):
    """In float32, 21 * (57 / 21) is less than 57: boxes must be clamped after the resize."""
    image = TensorImage(torch.zeros(3, 50, 80, dtype=torch.uint8))
    scene = Scene(image, 0, torch.tensor([[0.0, 0, 80, 50]]), torch.tensor([1]), None)
    example = crop_scene(scene, (5, 10, 30, width), (60, resized), "bilinear", flip=flip)
    assert example["boxes"].tolist() == [[0, 0, resized, 60]] and type(example["boxes"]) is torch.Tensor


def test_batches_are_padded_and_hold_image_sizes(tmp_path):
    write_coco(tmp_path)
    source = open_coco(tmp_path, "train")
    batches = training_batches(
        source, ShortSideJitter((32, 48), 96), seed=1, batch_size=4, micro_batch_size=4, end_step=2
    )
    first, second = batches
    assert {tuple(size) for size in first["image_size"].tolist()} == {(32, 48), (48, 72)}
    assert first["image"].shape == (4, 3, 48, 72) and first["image"].dtype == torch.uint8
    start = 0
    for image, (h, w), count in zip(first["image"], first["image_size"].tolist(), first["box_counts"], strict=True):
        assert not image[:, h:].any() and not image[:, :, w:].any() and image[:, :h, :w].all()
        part = slice(start, start + int(count))
        assert not first["masks"][part, h:].any()
        check_alignment({"image": image} | {key: first[key][part] for key in ("boxes", "box_labels", "masks")})
        start += int(count)
    assert start == len(first["boxes"]) == len(first["masks"]) and "image_id" not in first
    assert all(isinstance(value, torch.Tensor) for key, value in second.items() if key != "corrupt")


def test_pretraining_crops_accept_scenes(tmp_path):
    write_coco(tmp_path)
    batches = training_batches(
        open_coco(tmp_path, "train", masks=False),
        RandomCrop((32, 32)),
        seed=0,
        batch_size=4,
        micro_batch_size=4,
        end_step=1,
    )
    assert next(iter(batches))["image"].shape == (4, 3, 32, 32)
