"""Images with boxes and masks: what COCO files say, what is wrong with them, and transforms that keep all aligned."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from simmim.data import RandomCrop, Subset, evaluation_batches, training_batches
from simmim.data.box_transforms import EvaluationSize, LargeScaleJitter, ShortSideJitter, fitted_size, view
from simmim.data.boxes import CocoImages, open_coco
from simmim.data.coco import run_lengths

COLOURS = {7: (230, 20, 20), 3: (20, 200, 20)}  # by category id
CATEGORIES = [{"id": 7, "name": "red"}, {"id": 3, "name": "green"}]


def rectangle(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def annotation(number, image, category, box, **more):
    x, y, w, h = box
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "area": w * h,
        "iscrowd": 0,
        "segmentation": rectangle(x, y, w, h),
    } | more


def write_coco(root, split="train", count=6, size=(40, 60), extra=(), seed=0, **changes):
    """Grey noise with one red and one green rectangle; image ids go down while file names go up."""
    rng = np.random.default_rng(seed)
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    height, width = size
    images, annotations = [], []
    for number in range(count):
        pixels = rng.integers(100, 130, (height, width, 1)).repeat(3, axis=2).astype(np.uint8)
        image_id = 100 - number
        for place, category in enumerate(COLOURS):
            w, h = (int(side) for side in rng.integers(8, 20, 2))
            x, y = int(rng.integers(0, width // 2 - w + 1)) + place * width // 2, int(rng.integers(0, height - h + 1))
            pixels[y : y + h, x : x + w] = COLOURS[category]
            annotations.append(annotation(len(annotations) + 1, image_id, category, (x, y, w, h)))
        Image.fromarray(pixels).save(root / split / f"{number}.png")
        images.append({"id": image_id, "file_name": f"{number}.png", "height": height, "width": width})
    content = {"images": images, "annotations": annotations + list(extra), "categories": CATEGORIES} | changes
    (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return content


def scene_of(source, image_id):
    number = source.annotations.image_ids.tolist().index(image_id)
    return source.decode(source.fetch(number))


def coloured(image, label):
    """Which pixels have the colour of a class: bool (H, W)."""
    return image[0 if label == 2 else 1] > 165


def test_objects_are_those_of_pycocotools(tmp_path):
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


def test_packed_run_lengths_are_read():
    rng = np.random.default_rng(0)
    for density in (0.01, 0.5, 0.99):
        mask = np.asfortranarray((rng.random((37, 53)) < density).astype(np.uint8))
        lengths = run_lengths(coco_mask.encode(mask)["counts"])
        assert sum(lengths) == mask.size and sum(lengths[1::2]) == mask.sum()
    for bad in (b"\x10", b"zzz", b"P"):
        with pytest.raises(ValueError, match="run lengths"):
            run_lengths(bad)


def test_bad_annotations_are_named_and_left_out(tmp_path):
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
    mended = annotation(70, 100, 3, (50, -20, 200, 50), segmentation=rectangle(50, -1e9, 2e9, 2e9))
    write_coco(tmp_path, extra=[*bad.values(), mended, "text", None])
    source = open_coco(tmp_path, "train")
    reasons = dict(source.problems)
    assert set(reasons) == {f"annotation {number}" for number in [*bad, 70]} | {"annotation 31", "annotation 32"}
    for number, word in ((50, "not listed"), (51, "category"), (53, "less than a pixel"), (54, "area"), (1, "id")):
        assert word in reasons[f"annotation {number}"]
    assert all("no usable segmentation" in reasons[f"annotation {number}"] for number in range(59, 66))
    assert "image_id" in reasons["annotation 66"] and "clipped" in reasons["annotation 70"]
    truth = source.truth(100)
    assert len(truth["boxes"]) == 3 and truth["boxes"][2].tolist() == [50, 0, 60, 30]
    assert truth["masks"][2].nonzero().amin(dim=0).tolist() == [0, 50]
    # For boxes alone, segmentations do not matter; judging, an object without one is not asked for.
    assert len(open_coco(tmp_path, "train", masks=False).truth(100)["boxes"]) == 3 + 7
    judged = open_coco(tmp_path, "train", training=False)
    assert judged.truth(100)["iscrowd"].sum() == 7 and len(scene_of(judged, 100).boxes) == 2 + 2
    crowds = judged.truth(100)["iscrowd"] > 0
    assert (judged.truth(100)["masks"][crowds].sum(dim=(1, 2)) == 4 * 5).all()


def test_bad_images_are_named_and_left_out(tmp_path):
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
    assert reasons["gone.png"] == "is missing" and "id 100 of 0.png" in reasons["twice.png"]
    assert "expected one of 64 bits" in reasons["large.png"]
    assert {"image 7 of the list", "image 8 of the list", "category again"} <= set(reasons)
    assert len(reasons) == 7
    for image_id in source.annotations.image_ids:  # the objects of the missing image left no shape behind
        truth = source.truth(image_id)
        for mask, box in zip(truth["masks"], truth["boxes"].tolist(), strict=True):
            y, x = mask.nonzero().unbind(dim=1)
            assert [x.min(), y.min(), x.max() + 1, y.max() + 1] == box
    batches = evaluation_batches(source, EvaluationSize(40, 60), batch_size=8)
    (batch,) = batches
    assert len(batch["image"]) == 5 and "41 x 60" in batches.corrupt[source.name(4)]


def test_images_without_objects(tmp_path):
    content = write_coco(tmp_path)
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in (99, 97)]
    (tmp_path / "annotations" / "train.json").write_text(json.dumps(content))
    assert [len(open_coco(tmp_path, "train", training=training)) for training in (True, False)] == [4, 6]
    assert len(open_coco(tmp_path, "train", keep_empty=True)) == 6
    assert len(open_coco(tmp_path, "train", training=False, keep_empty=False)) == 4
    dropped, whole = open_coco(tmp_path, "train"), open_coco(tmp_path, "train", training=False)
    for image_id in dropped.annotations.image_ids:
        few, all_ = dropped.truth(image_id), whole.truth(image_id)
        assert all(torch.equal(few[key], all_[key]) for key in all_)
    (batch,) = evaluation_batches(Subset(whole, [1, 0, 2]), EvaluationSize(40, 60), batch_size=4)
    assert batch["box_counts"].tolist() == [2, 2, 0] and batch["image_id"].tolist() == [96, 95, 97]
    assert batch["boxes"].shape == (4, 4) and batch["masks"].shape == (4, 40, 60)


def test_errors_say_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match=r"instances_train2017\.json.*, or .*train\.json"):
        open_coco(tmp_path, "train")
    write_coco(tmp_path)
    file = tmp_path / "annotations" / "train.json"
    with pytest.raises(ValueError, match=r"none of the 6 images .* 5\.png for one"):
        CocoImages(file, tmp_path)
    for text, message in (
        ("[1, 2]", "expected the lists images, annotations, categories, found a list"),
        ('{"images": [], "info": 1}', "found images, info"),
        ("{", "not JSON"),
        ('{"images": [], "annotations": [], "categories": []}', "no categories"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            open_coco(tmp_path, "train")
    write_coco(tmp_path, annotations=[annotation(1, 100, 3, (1, 1, 0, 5))])
    with pytest.raises(ValueError, match=r"no image .* annotation 1: bbox .* has no area"):
        open_coco(tmp_path, "train")


def test_a_validation_set_takes_its_numbers_from_training(tmp_path):
    write_coco(tmp_path)
    write_coco(tmp_path, "val", categories=[{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}])
    classes = open_coco(tmp_path, "train").classes
    source = open_coco(tmp_path, "val", training=False, categories=classes)
    assert source.classes == ["green", "red"] and source.category_ids == [-1, 3]
    assert set(source.annotations.labels.tolist()) == {2} and len(source.problems) == 6


def test_names_as_coco_has_them(tmp_path):
    write_coco(tmp_path, "train")
    (tmp_path / "train").rename(tmp_path / "train2017")
    (tmp_path / "annotations" / "train.json").rename(tmp_path / "annotations" / "instances_train2017.json")
    assert len(open_coco(tmp_path, "train")) == 6


def check_alignment(example):
    """The box, the mask and the colour of every object say the same, within the blur of a resize."""
    for box, label, mask in zip(example["boxes"], example["box_labels"], example["masks"], strict=True):
        for found in (coloured(example["image"], int(label)), mask > 0):
            y, x = found.nonzero().unbind(dim=1)
            edges = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
            assert (edges - box).abs().max() <= 1.01, (edges, box)
        both = coloured(example["image"], int(label)) & (mask > 0)
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
def test_detection_data_masks_and_pixels_stay_together(tmp_path, transform):
    write_coco(tmp_path)
    source = open_coco(tmp_path, "train")
    generator = torch.Generator().manual_seed(0)
    sizes, counts = set(), 0
    for number in range(len(source)):
        scene = source.decode(source.fetch(number))
        for draws in torch.rand(8, transform.num_draws, generator=generator, dtype=torch.float64).tolist():
            example = transform(scene, draws)
            again = transform(source.decode(source.fetch(number)), draws)
            assert all(torch.equal(value, again[key]) for key, value in example.items())
            check_alignment(example)
            sizes.add(tuple(example["image"].shape[1:]))
            counts += len(example["boxes"])
            assert example["masks"].shape[1:] == example["image"].shape[1:]
    assert counts > 40 and (len(sizes) > 3 or not transform.num_draws)


def test_flips_mirror_everything(tmp_path):
    write_coco(tmp_path)
    scene = scene_of(open_coco(tmp_path, "train"), 100)
    plain, flipped = (ShortSideJitter((40,), 60)(scene, [0.0, draw]) for draw in (0.7, 0.2))
    assert torch.equal(plain["image"], scene.crop((0, 0, 40, 60), (40, 60)))
    assert torch.equal(flipped["image"], plain["image"].flip(-1))
    assert torch.equal(flipped["masks"], plain["masks"].flip(-1))
    assert flipped["boxes"][:, 0].tolist() == (60 - plain["boxes"][:, 2]).tolist()
    assert not torch.equal(flipped["boxes"], plain["boxes"])


def test_sizes():
    assert fitted_size((480, 640), 800, 1333) == (800, 1067)
    assert fitted_size((300, 1200), 800, 1333) == (333, 1333)
    transform = ShortSideJitter()
    assert [transform.short_px[int(u * 11)] for u in (0, 0.5, 0.999)] == [480, 640, 800]


def test_what_a_crop_leaves_nothing_of_is_left_out(tmp_path):
    write_coco(tmp_path)
    scene = scene_of(open_coco(tmp_path, "train"), 100)
    first, _ = scene.boxes.round().int().tolist()
    box = (first[1], first[0], first[3] - first[1], first[2] - first[0])
    example = view(scene, box, box[2:], "bilinear")
    assert example["box_labels"].tolist() == [scene.labels[0]]
    assert example["boxes"].tolist() == [[0, 0, box[3], box[2]]] and example["masks"].all()
    nothing = view(scene, (0, 0, 1, 1), (9, 9), "bilinear")
    assert nothing["boxes"].shape == (0, 4) and nothing["masks"].shape == (0, 9, 9)


def test_a_batch_is_padded_and_remembers_sizes(tmp_path):
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


def test_scenes_are_pictures_too(tmp_path):
    """Pretraining on them needs no other source."""
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
