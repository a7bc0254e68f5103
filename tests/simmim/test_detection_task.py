"""Detection: losses against torchvision, average precision against pycocotools, and learning."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.models.detection.mask_rcnn import MaskRCNN
from torchvision.ops import box_iou, nms

import swin
from simmim.data import evaluation_batches
from simmim.data.box_transforms import EvaluationSize
from simmim.data.boxes import open_coco
from simmim.metrics.average_precision import AveragePrecision, coco_results
from simmim.tasks.detection import Detection
from simmim.tasks.detection_head import Anchors
from simmim.tasks.nms import soft_nms, suppress
from simmim.training.optim import make_optimizer
from tests.simmim.test_detection_data import annotation, write_coco

STATISTICS = {"mean": [0.45] * 3, "std": [0.25] * 3}


def make_detector(seed=0, drop_path=0.0, **settings) -> Detection:
    torch.manual_seed(seed)
    encoder = swin.make_encoder(
        "swinv2_tiny",
        embed_dim=16,
        depths=(1, 1),
        num_heads=(1, 2),
        image_size=64,
        window_size=4,
        drop_path=drop_path,
    )
    settings = {"width": 32, "hidden": 64, "anchor_px": (8, 16, 32)} | settings
    model = Detection(encoder, ["green", "red"], **STATISTICS, **settings)
    model.head.rpn._post_nms_top_n = {"training": 60, "testing": 60}  # small images have few anchors
    for stage in model.head.regions.stages:
        stage.fg_bg_sampler.batch_size_per_image = 32
    return model


def make_batch(tmp_path, count=4, short_px=40):
    write_coco(tmp_path, "val", count=count)
    source = open_coco(tmp_path, "val", training=False)
    return next(iter(evaluation_batches(source, EvaluationSize(short_px, 200), batch_size=count))), source


def fit(model, batch, steps, lr=2e-3):
    optimizer = make_optimizer(
        model.train(), model.no_decay_parameters(), weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8
    )
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr
        loss = model(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A detector overfitted on four images, the batch of these images, and their source."""
    model = make_detector()
    batch, source = make_batch(tmp_path_factory.mktemp("coco"), short_px=60)
    fit(model, batch, 150)
    return model.eval(), batch, source


class Given(nn.Module):
    """A backbone that returns given feature maps."""

    out_channels = 32

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, images):
        return self.features


class Fixed(nn.Module):
    """A layer with a constant result that records its inputs."""

    def __init__(self, result, seen=None):
        super().__init__()
        self.result, self.seen = result, [] if seen is None else seen

    def forward(self, *given):
        self.seen.append(given)
        return self.result


@pytest.mark.parametrize("masks", [True, False])
def test_losses_and_detections_equal_torchvision(trained, masks):
    """One box head, no padding: the same numbers as ``MaskRCNN`` with the same weights on the same pyramid."""
    model = copy.deepcopy(trained[0])
    images, sizes = torch.randn(2, 3, 64, 96), torch.tensor([[64, 96], [64, 96]])
    head = model.head
    features = OrderedDict((str(n), torch.randn(2, 32, 16 // 2**n, 24 // 2**n)) for n in range(3))
    features["pool"] = features.pop("2")
    targets = [
        {
            "boxes": torch.tensor([[4.0, 4.0, 30.0, 40.0], [50.0, 10.0, 80.0, 60.0]]),
            "labels": torch.tensor([1, 2]),
            "masks": torch.randint(0, 2, (2, 64, 96), dtype=torch.uint8),
        },
        {
            "boxes": torch.zeros(0, 4),
            "labels": torch.zeros(0, dtype=torch.int64),
            "masks": torch.zeros(0, 64, 96, dtype=torch.uint8),
        },
    ]
    stage = head.regions.stages[0]
    oracle = MaskRCNN(
        Given(features),
        rpn_anchor_generator=Anchors([(8,), (16,), (32,)], [4, 8, 16]),
        rpn_head=head.rpn.head,
        rpn_post_nms_top_n_train=60,
        rpn_post_nms_top_n_test=60,
        box_batch_size_per_image=32,
        box_roi_pool=copy.deepcopy(stage.box_roi_pool),
        box_head=stage.box_head,
        box_predictor=stage.box_predictor,
        mask_roi_pool=copy.deepcopy(head.regions.mask_pool),
        mask_head=head.regions.masks[0],
        mask_predictor=head.regions.masks[1],
        min_size=64,
        max_size=96,
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
    )
    oracle.transform.torch_choice = lambda sizes: sizes[0]  # avoids a random draw that our model does not make
    head.fpn = Given(features)
    maps = [torch.randn(2, 16, 16, 24), torch.randn(2, 32, 8, 12)]
    if not masks:
        oracle.roi_heads.mask_roi_pool = head.regions.masks = None
    torch.manual_seed(3)
    wanted = oracle.train()(list(images), targets)
    torch.manual_seed(3)
    _, losses = head.eval()(images, maps, [(64, 96)] * 2, targets)
    assert losses.keys() == wanted.keys() and len(losses) == 4 + masks
    for name in losses:
        assert losses[name].item() == pytest.approx(wanted[name].item(), rel=1e-5), name
    with torch.no_grad():
        expected = oracle.eval()(list(images))
        found, _ = head(images, maps, sizes.tolist())
    assert sum(len(own["boxes"]) for own in found) > 10
    for own, theirs in zip(found, expected, strict=True):
        for key in ("boxes", "scores", "labels"):
            assert torch.allclose(own[key], theirs[key], rtol=1e-5, atol=1e-5), key


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"masks": False}, {"cascade": True}], ids=str)
def test_training_reduces_the_loss_and_reaches_the_encoder(tmp_path, settings):
    model = make_detector(**settings)
    batch, _ = make_batch(tmp_path)
    model(batch).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # distributed training waits for every gradient
    assert model.encoder.patch_embed.proj.weight.grad.abs().sum() > 0
    model.zero_grad()
    losses = fit(model, batch, 40)
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    parts = model.eval().eval_step(batch)
    assert len(parts) == 1 + 4 + settings.get("masks", True) + 4 * settings.get("cascade", False)
    assert parts["loss"] == pytest.approx(sum(float(v) for k, v in parts.items() if k != "loss"), rel=1e-5)


def test_a_trained_detector_finds_its_training_objects(trained):
    """Predictions in original pixels, evaluated by average precision."""
    model, batch, source = trained
    assert batch["image"].shape[-2:] == (60, 90) and batch["original_size"].tolist() == [[40, 60]] * 4
    found = model.predict(batch)
    metric = AveragePrecision(masks=True)
    metric.add(found, [source.truth(image_id) for image_id in batch["image_id"].tolist()])
    numbers = metric.compute()
    assert numbers["box_ap50"] > 0.9 and numbers["mask_ap50"] > 0.9 and numbers["box_ap"] > 0.5
    assert found[0]["masks"].shape[1:] == (40, 60) and found[0]["masks"].dtype == torch.bool
    # With test-time augmentation it finds the same objects, each once.
    several = AveragePrecision(masks=True)
    model = copy.deepcopy(model)
    model.scales, model.flip = (0.9, 1.0), True
    views = model.predict(batch)
    several.add(views, [source.truth(image_id) for image_id in batch["image_id"].tolist()])
    assert several.compute()["mask_ap50"] > 0.9
    for own in views:
        for label in (1, 2):
            overlaps = box_iou(own["boxes"][own["labels"] == label], own["boxes"][own["labels"] == label])
            assert (overlaps - torch.eye(len(overlaps))).max() <= 0.5
    preview = model.visualize(batch)
    assert preview.width > 2 * 448 and len(np.unique(np.array(preview).reshape(-1, 3), axis=0)) > 100


def test_detections_of_scaled_and_mirrored_views_map_back(tmp_path):
    """A fake model that returns the bounding box of bright pixels, to test the geometry alone."""
    model = make_detector(masks=True)
    images = torch.zeros(1, 3, 48, 80, dtype=torch.uint8)
    images[:, :, 8:20, 12:36] = 255
    sizes = torch.tensor([[40, 60]])

    def brightest(seen, own_sizes, targets=None):
        y, x = (seen[0, 0] > 0).nonzero().unbind(dim=1)
        box = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()
        mask = torch.zeros(1, 1, 28, 28)
        mirrored = bool(box[0] > 20 * seen.shape[-1] / 80)
        mask[..., slice(14, 28) if mirrored else slice(14)] = 1.0
        scores = torch.full((1,), 1.0 if mirrored else 0.9)  # suppression keeps the mirrored view
        return [{"boxes": box[None], "scores": scores, "labels": torch.ones(1).long(), "masks": mask}], {}

    model._run = brightest
    (own,) = model.detections(images, sizes, flip=True, scales=(1.0, 0.5, 2.0))
    assert torch.allclose(own["boxes"], torch.tensor([[12.0, 8.0, 36.0, 20.0]]), atol=1.1)
    regions, kept = model.head.regions, []
    regions.limit = 1
    for factor, flip in ((1.0, False), (0.5, False), (2.0, False), (1.0, True)):
        (own,) = model.detections(images, sizes, flip=flip, scales=(factor,))
        kept.append(own["boxes"])
        assert own["masks"][..., :14].all() and not own["masks"][..., 14:].any()
    assert torch.allclose(torch.cat(kept), torch.tensor([[12.0, 8.0, 36.0, 20.0]]), atol=1.1)
    assert torch.equal(kept[0], kept[3])
    batch = {"image": images, "image_size": sizes, "original_size": torch.tensor([[80, 120]])}
    (own,) = model.predict(batch)
    assert own["boxes"].tolist() == [[24, 16, 72, 40]] and own["masks"].shape == (1, 80, 120)
    y, x = own["masks"][0].nonzero().unbind(dim=1)  # the left half of the box
    assert (int(y.min()), int(y.max()), int(x.min()), int(x.max())) == (16, 39, 24, 47)


def test_padding_does_not_change_detections(tmp_path):
    """An image gives the same input on a larger canvas, whatever the padding contains."""
    model = make_detector(masks=True).eval()
    batch, _ = make_batch(tmp_path, count=1, short_px=40)
    seen = []
    model.head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    garbage = torch.full((1, 3, 64, 64), 200, dtype=torch.uint8)
    garbage[:, :, :40, :60] = batch["image"]
    for image in (batch["image"], garbage):
        model.detections(image, batch["image_size"])
    assert torch.equal(seen[0], seen[1][..., :40, :64]) and not seen[1][..., 40:, :].any()
    assert seen[0].shape[-2:] == (40, 64) and not seen[0][..., 60:].any()


def test_eval_step_is_repeatable_and_restores_the_generator(tmp_path):
    model = make_detector(drop_path=0.9).eval()
    for stage in model.encoder.layers:
        for block in stage.blocks:
            nn.init.ones_(block.norm1.weight)  # with norm weights of 0, dropping a path would not be visible
    batch, _ = make_batch(tmp_path)
    before = torch.get_rng_state()
    first = model.eval_step(batch)
    torch.rand(3)
    assert model.eval_step(batch) == first
    torch.set_rng_state(before)
    model.eval_step(batch)
    assert torch.equal(torch.get_rng_state(), before) and not model.encoder.training
    assert not any(value.requires_grad for value in first.values())
    model.train()  # paths are dropped in training
    torch.manual_seed(0)
    assert not torch.isclose(model(batch), first["loss"])


def test_cascade_heads_refine_the_boxes_of_the_previous_head():
    """At test time, each head moves the proposals, scores are the mean, and boxes are those of the last head."""
    model = make_detector(cascade=True).eval()
    regions = model.head.regions
    seen, deltas = [], [torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0, 0.0]), torch.zeros(4)]
    for index, stage in enumerate(regions.stages):
        stage.box_roi_pool = Fixed(torch.zeros(1, 1), seen)
        logits = torch.tensor([[0.0, float(index), -9.0]])
        stage.box_head, stage.box_predictor = nn.Identity(), Fixed((logits, deltas[index].repeat(1, 3)))
    regions.masks = None
    (found,), _ = regions({}, [torch.tensor([[10.0, 10.0, 30.0, 20.0]])], [(100, 100)], (100, 100))
    boxes = [[10, 10, 30, 20], [12, 10, 32, 20], [12, 11, 32, 21]]  # 1/10 of the width, then 2/20 of the height
    assert torch.allclose(torch.cat([proposals[0] for _, proposals, _ in seen]), torch.tensor(boxes).float())
    assert torch.allclose(found["boxes"][0], torch.tensor(boxes[-1]).float())
    wanted = torch.stack([torch.tensor([0.0, float(n), -9.0]).softmax(0) for n in range(3)]).mean(dim=0)
    assert found["scores"][0] == pytest.approx(wanted[1].item(), rel=1e-5) and found["labels"].tolist() == [1]


def test_each_cascade_head_is_trained_on_closer_boxes(tmp_path):
    model = make_detector(cascade=True).train()
    batch, _ = make_batch(tmp_path)
    chosen = []
    for stage in model.head.regions.stages:
        choose = stage.select_training_samples

        def watched(proposals, targets, choose=choose):
            result = choose(proposals, targets)
            for boxes, labels, target in zip(result[0], result[2], targets, strict=True):
                overlaps = box_iou(boxes, target["boxes"]).amax(dim=1)
                chosen[-1][0].extend(overlaps[labels > 0].tolist())
                chosen[-1][1].extend(overlaps[labels == 0].tolist())
            return result

        stage.select_training_samples = lambda *given, watched=watched: chosen.append(([], [])) or watched(*given)
    model(batch)
    for (objects, background), threshold in zip(chosen, (0.5, 0.6, 0.7), strict=True):
        assert min(objects) >= threshold and max(background) < threshold
    coders = [stage.box_coder.weights for stage in model.head.regions.stages]
    assert coders == [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]


def test_batches_without_objects(tmp_path):
    for settings in ({}, {"cascade": True}):
        model = make_detector(**settings)
        batch, _ = make_batch(tmp_path, count=2)
        batch |= {"boxes": torch.zeros(0, 4), "box_labels": torch.zeros(0).long(), "box_counts": torch.zeros(2).long()}
        batch |= {"masks": torch.zeros(0, *batch["image"].shape[-2:], dtype=torch.uint8)}
        loss = model(batch)
        loss.backward()
        assert torch.isfinite(loss) and all(p.grad is not None for p in model.parameters())
        assert model.eval().visualize(batch).width > 0 and torch.isfinite(model.eval_step(batch)["loss"])


def test_anchors_use_exact_strides_in_float32():
    """At 800 px the coarsest map has 13 x 64 px, not 61 px, and bfloat16 would round centers to 4 px."""
    generator = Anchors([(32,), (512,)], [4, 64])
    maps = [torch.zeros(1, 1, size, size, dtype=torch.bfloat16) for size in (200, 13)]
    images = type("Images", (), {"image_sizes": [(800, 800)]})()
    (anchors,) = generator(images, maps)
    assert anchors.dtype == torch.float32
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    for side in (0, 1):
        assert centers[3 * 200**2 :: 3, side].unique().tolist() == [64.0 * n for n in range(13)]
        assert len(centers[: 3 * 200**2 : 3, side].unique()) == 200


def test_strides_are_exact_for_small_images_on_a_large_canvas():
    """torchvision would derive them from the sizes of the first images and keep them."""
    model = make_detector().eval()
    batch = {"image": torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8), "image_size": torch.tensor([[40, 40]])}
    model.detections(batch["image"], batch["image_size"])
    for pool in (model.head.regions.stages[0].box_roi_pool, model.head.regions.mask_pool):
        assert pool.scales == [1 / 4, 1 / 8]


def test_autocast_keeps_boxes_in_float32(trained):
    model, batch, _ = trained
    exact_losses, model = model.eval_step(batch), copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        found, measured = model.detections(batch["image"], batch["image_size"]), model.eval_step(batch)
        loss = model.train()(batch)
        loss.backward()
    assert all(own["boxes"].dtype == own["scores"].dtype == torch.float32 for own in found)
    # Rounded scores select other regions for the box heads, and a few of them change the loss of four images.
    assert loss.dtype == torch.float32 and measured["loss"] == pytest.approx(float(exact_losses["loss"]), rel=0.5)
    for name in ("loss_objectness", "loss_rpn_box_reg"):
        assert measured[name] == pytest.approx(float(exact_losses[name]), rel=0.2, abs=1e-3), name


def test_weight_decay_groups_layer_depths_and_invalid_settings():
    model = make_detector(cascade=True)
    depths, no_decay = model.depth_of_parameters(), model.no_decay_parameters()
    assert set(depths) == set(model.parameters())
    assert max(depths.values()) == depths[model.encoder.norm.weight] == depths[model.head.fpn.layer_blocks[0][0].weight]
    assert all((parameter in no_decay) or parameter.ndim > 1 for parameter in model.parameters())
    assert model.encoder.no_decay_parameters() <= no_decay
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    with pytest.raises(ValueError, match="anchor_px"):
        make_detector(anchor_px=(8, 16))
    with pytest.raises(ValueError, match="one number per channel"):
        Detection(model.encoder, ["a"], mean=[0.5], std=[0.5])


def test_only_meta_modules_of_the_encoder_are_initialized_later():
    """A stage starts with an encoder on the meta device; the head is initialized, equally on every process."""
    from simmim.training.distributed import allocate_parameters, initialize_parameters

    with torch.device("meta"):
        encoder = swin.make_encoder("swinv2_tiny", embed_dim=16, depths=(1, 1), num_heads=(1, 2), image_size=64)
    model = Detection(encoder, ["a"], **STATISTICS, width=16, hidden=16)
    open_modules = allocate_parameters(model, torch.device("cpu"))
    assert open_modules and not any(module in open_modules for module in model.head.modules())
    initialize_parameters(open_modules)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def slow_soft_nms(boxes, scores, labels, method, iou, sigma, least):
    """Implement figure 2 of the Soft-NMS paper literally, class by class."""
    result = []
    for label in labels.unique().tolist():
        b, s = boxes[labels == label].tolist(), scores[labels == label].tolist()
        while b:
            m = max(range(len(s)), key=s.__getitem__)
            best, score = b.pop(m), s.pop(m)
            if score >= least:
                result.append((score, label, *best))
            for i, other in enumerate(b):
                overlap = float(box_iou(torch.tensor([best]), torch.tensor([other])))
                if method == "gaussian":
                    s[i] *= float(np.exp(-(overlap**2) / sigma))
                elif overlap > iou:
                    s[i] *= 1 - overlap
    return sorted(result, reverse=True)


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_equals_the_paper(method):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(60, 2, generator=generator) * 40
    boxes = torch.cat([corners, corners + 5 + torch.rand(60, 2, generator=generator) * 30], dim=1)
    scores, labels = torch.rand(60, generator=generator), torch.randint(1, 4, (60,), generator=generator)
    kept, final = soft_nms(boxes, scores, labels, method=method, iou=0.3, sigma=0.5, least_score=0.01)
    wanted = torch.tensor(slow_soft_nms(boxes, scores, labels, method, 0.3, 0.5, 0.01))
    assert len(kept) == len(wanted) and len(kept) < 60
    assert torch.allclose(final, wanted[:, 0], atol=1e-5)
    assert torch.equal(labels[kept].float(), wanted[:, 1]) and torch.allclose(boxes[kept], wanted[:, 2:])
    few, _ = soft_nms(boxes, scores, labels, method=method, iou=0.3, sigma=0.5, least_score=0.01, limit=7)
    assert torch.equal(few, kept[:7])
    none, _ = soft_nms(boxes[:0], scores[:0], labels[:0], method=method)
    assert none.shape == (0,) and none.dtype == torch.int64


def test_hard_suppression_equals_torchvision():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(50, 2, generator=generator) * 30
    boxes, scores = torch.cat([corners, corners + 15], dim=1), torch.rand(50, generator=generator)
    kept, final = suppress(boxes, scores, torch.ones(50).long(), iou=0.5, limit=100)
    assert torch.equal(kept, nms(boxes, scores, 0.5)) and torch.equal(final, scores[kept])


def test_soft_nms_in_the_detector(trained):
    hard, batch, _ = trained
    soft = make_detector(soft_nms="gaussian")
    soft.load_state_dict(hard.state_dict())
    few, many = (model.eval().detections(batch["image"], batch["image_size"]) for model in (hard, soft))
    for own, other in zip(few, many, strict=True):
        assert len(other["boxes"]) > len(own["boxes"]) and other["scores"].diff().le(0).all()
        assert torch.equal(own["boxes"][0], other["boxes"][0])


def perturbed(truth, generator, categories=2):
    """Return predictions near the truth: some moved, some of another class, some twice, some missing."""
    keep = torch.rand(len(truth["boxes"]), generator=generator) < 0.8
    boxes = truth["boxes"][keep].repeat(2, 1)
    moved = (torch.rand(boxes.shape, generator=generator) * 6 - 3).round()
    boxes = (boxes + moved).clamp(min=0)
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 2)
    labels = truth["labels"][keep].repeat(2)
    wrong = torch.rand(len(labels), generator=generator) < 0.2
    labels = torch.where(wrong, categories + 1 - labels, labels)
    masks = torch.zeros(len(boxes), *truth["masks"].shape[1:], dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return {"boxes": boxes, "labels": labels, "scores": torch.rand(len(boxes), generator=generator), "masks": masks}


@pytest.mark.parametrize("backend", ["pycocotools", "faster_coco_eval"])
def test_average_precision_equals_pycocotools(tmp_path, backend, capsys):
    """The data has a crowd, objects of several sizes, an image without objects and one without detections."""
    pytest.importorskip(backend)
    crowd = [[2, 2, 30, 2, 30, 38, 2, 38]]
    extra = [
        annotation(90, 99, 3, (2, 2, 28, 36), iscrowd=1, segmentation={"size": [120, 160], "counts": [0, 4000, 15200]}),
        annotation(91, 98, 7, (2, 2, 28, 36), segmentation=crowd, area=1500.0),
        annotation(92, 98, 3, (40, 10, 110, 105), area=11000.0),
    ]
    content = write_coco(tmp_path, "val", count=12, size=(120, 160), extra=extra)
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 95]
    file = tmp_path / "annotations" / "val.json"
    file.write_text(json.dumps(content))
    source = open_coco(tmp_path, "val", training=False)
    ids, generator = source.annotations.image_ids.tolist(), torch.Generator().manual_seed(0)
    truths = [source.truth(image_id) for image_id in ids]
    found = [perturbed(truth, generator) for truth in truths]
    crowded = ids.index(99)  # a detection inside a crowd is ignored
    found[crowded]["boxes"][0] = torch.tensor([4.0, 4.0, 20.0, 30.0])
    found[crowded]["labels"][0] = 1
    found[ids.index(97)] = {key: value[:0] for key, value in found[0].items()}
    extra_image = found[0] | {"labels": found[0]["labels"].clone()}
    assert len(truths[ids.index(95)]["boxes"]) == 0
    found[ids.index(95)] = extra_image  # detections in an image without objects

    metric = AveragePrecision(masks=True, backend=backend)
    for start in range(0, len(ids), 5):
        metric.add(found[start : start + 5], truths[start : start + 5])
    numbers = metric.compute()

    oracle = COCO(str(file))
    detections = oracle.loadRes(coco_results(found, ids, source.category_ids))
    names = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
    for kind, prefix in (("bbox", "box"), ("segm", "mask")):
        evaluate = COCOeval(oracle, copy.deepcopy(detections), kind)
        evaluate.evaluate()
        evaluate.accumulate()
        evaluate.summarize()
        wanted = dict(zip(names, evaluate.stats[:6], strict=True)) | {"ar": evaluate.stats[8]}
        for name, value in wanted.items():
            assert numbers[f"{prefix}_{name}"] == pytest.approx(value, abs=1e-6), (prefix, name)
        assert 0.05 < wanted["ap"] < 0.9


def test_perfect_predictions_have_average_precision_1(tmp_path):
    write_coco(tmp_path, "val")
    source = open_coco(tmp_path, "val", training=False)
    truths = [source.truth(image_id) for image_id in source.annotations.image_ids.tolist()]
    found = [truth | {"scores": torch.ones(len(truth["boxes"]))} for truth in truths]
    metric = AveragePrecision(masks=True)
    metric.add(found, truths)
    numbers = metric.compute()
    assert numbers == {
        f"{kind}_{name}": 1.0 for kind in ("box", "mask") for name in ("ap", "ap50", "ap75", "ap_small", "ar")
    }
    # Two processes with half of the images each give the same numbers after gathering.
    halves = [AveragePrecision(masks=True), AveragePrecision(masks=True)]
    for index, half in enumerate(halves):
        half.add([{**own, "labels": own["labels"] * 0 + 1} for own in found[index::2]], truths[index::2])
    all_images = AveragePrecision(masks=True)
    all_images.add([{**own, "labels": own["labels"] * 0 + 1} for own in found], truths)
    states = {name: [list(getattr(h.metric, name)) for h in halves] for name in halves[0].metric.metric_state}
    waiting = iter(states.values())
    halves[0].gather(lambda own: [x for part in next(waiting) for x in part])
    assert halves[0].compute() == pytest.approx(all_images.compute()) and all_images.compute()["box_ap"] < 1
    boxes_only = AveragePrecision(masks=False)
    boxes_only.add(found, [{key: value for key, value in truth.items() if key != "masks"} for truth in truths])
    assert boxes_only.compute()["box_ap"] == 1.0
