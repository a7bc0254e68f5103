"""Semantic segmentation: heads, loss, sliding-window prediction, and scores."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex

import swin
from simmim.data.segments import read_label_map
from simmim.metrics.mean_iou import MeanIoU
from simmim.tasks.segmentation import Segmentation, pixel_loss
from simmim.tasks.sliding_window import averaged_log_probabilities, sliding_window_logits, window_starts
from simmim.tasks.upernet import (
    POOLS,
    ChannelNorm,
    FCNHead,
    UPerHead,
    interpolation_matrix,
    pooling_matrix,
    resample,
    upsample,
)
from simmim.training.optim import make_optimizer
from simmim.visualization import drawing

STATISTICS = {"mean": [0.5] * 3, "std": [0.25] * 3}


def make_segmenter(classes=4, depths=(1, 1), in_chans=3, **settings) -> Segmentation:
    torch.manual_seed(0)
    encoder = swin.make_encoder(
        "swinv2_tiny",
        embed_dim=8,
        depths=depths,
        num_heads=(1,) * len(depths),
        image_size=32,
        window_size=4,
        in_chans=in_chans,
    )
    settings = {"channels": 16, "auxiliary_channels": 8, "dropout": 0.0} | settings
    settings |= {"mean": [0.5] * in_chans, "std": [0.25] * in_chans}
    return Segmentation(encoder, [f"class {number}" for number in range(classes)], **settings)


def make_batch(count=2, size=(32, 32), classes=4, seed=0):
    """Return images of 8 px squares, in one color per class, and their label maps."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randint(0, classes, (count, 1, -(-size[0] // 8), -(-size[1] // 8)), generator=generator)
    segments = grid.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, 0, : size[0], : size[1]]
    colors = torch.randint(0, 256, (classes, 3), generator=generator)
    return {"image": colors[segments].permute(0, 3, 1, 2).to(torch.uint8), "segments": segments.to(torch.uint8)}


def scores_of(predicted, segments, classes) -> MeanIoU:
    scores = MeanIoU(classes)
    scores.add(predicted, segments)
    return scores


def test_parameter_count_is_that_of_upernet():
    """Swin-T with UPerNet for ADE20K is published with 60 M parameters; the exact count follows from the layers."""
    with torch.device("meta"):
        model = Segmentation(swin.make_encoder("swin_tiny"), [str(n) for n in range(150)], **STATISTICS)

    def block(in_channels, channels, kernel):
        return in_channels * channels * kernel**2 + 2 * channels

    widths, c = (96, 192, 384, 768), 512
    head = len(POOLS) * block(768, c, 1) + block(768 + 4 * c, c, 3) + sum(block(w, c, 1) for w in widths[:3])
    head += 3 * block(c, c, 3) + block(4 * c, c, 3) + 150 * (c + 1)
    auxiliary = block(384, 256, 3) + 150 * 257
    assert sum(p.numel() for p in model.head.parameters()) == head
    assert sum(p.numel() for p in model.auxiliary_head.parameters()) == auxiliary
    total = sum(p.numel() for p in model.parameters())
    assert total == head + auxiliary + sum(p.numel() for p in model.encoder.parameters()) + 2 * sum(widths[:3])
    assert round(total / 1e6) == 60


def test_head_equals_that_of_transformers():
    """The norms, which differ on purpose, are removed from both."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.upernet.modeling_upernet import UperNetHead

    torch.manual_seed(0)
    widths, sizes = (8, 16, 32, 64), (32, 16, 8, 4)
    own = UPerHead(widths, classes=5, channels=12).eval()
    config = transformers.UperNetConfig(
        backbone_config=transformers.SwinConfig(), hidden_size=12, pool_scales=list(POOLS), num_labels=5
    )
    theirs = UperNetHead(config, in_channels=widths).eval()
    for block in [module for module in own.modules() if isinstance(module, nn.Sequential)]:
        block[1] = nn.Identity()
    for module in theirs.modules():
        if hasattr(module, "batch_norm"):
            module.batch_norm = nn.Identity()

    def copied(theirs, block):
        theirs.conv.weight.data = block[0].weight.data

    for index, block in enumerate(own.psp_modules):
        copied(theirs.psp_modules.blocks[index].layers[1], block)
    for name in ("bottleneck", "fpn_bottleneck"):
        copied(getattr(theirs, name), getattr(own, name))
    for name in ("lateral_convs", "fpn_convs"):
        for block, other in zip(getattr(own, name), getattr(theirs, name), strict=True):
            copied(other, block)
    theirs.classifier.weight.data = own.classifier.linear.weight.data[:, :, None, None]
    theirs.classifier.bias.data = own.classifier.linear.bias.data
    maps = [torch.randn(2, width, size, size + size // 2) for width, size in zip(widths, sizes, strict=True)]
    with torch.no_grad():
        torch.testing.assert_close(own(maps), theirs(maps), rtol=1e-4, atol=1e-6)


def test_resize_matrices_equal_the_operators():
    x = torch.randn(2, 3, 7, 10)
    resized = resample(x, interpolation_matrix(7, 21, x), interpolation_matrix(10, 13, x))
    torch.testing.assert_close(resized, F.interpolate(x, (21, 13), mode="bilinear"), rtol=1e-5, atol=1e-6)
    for bins in POOLS:
        torch.testing.assert_close(
            resample(x, pooling_matrix(7, bins, x), pooling_matrix(10, bins, x)),
            F.adaptive_avg_pool2d(x, bins),
            rtol=1e-5,
            atol=1e-6,
        )


def test_upsampling_keeps_positions():
    """A ramp over pixels remains a ramp, also if a side is not a multiple of the factor."""
    grid = torch.arange(6.0).expand(1, 1, 5, 6) * 4 + 1.5  # the centers of 4 px tokens
    pixels = upsample(grid, 4, (18, 21))
    assert pixels.shape == (1, 1, 18, 21)
    torch.testing.assert_close(pixels[0, 0, 3, 2:], torch.arange(21.0)[2:])
    assert upsample(grid, 1, (5, 6)) is grid


def test_channels_are_normalized_at_each_position():
    norm, x = ChannelNorm(6), torch.randn(2, 6, 3, 4)
    torch.testing.assert_close(norm(x)[1, :, 2, 3], F.layer_norm(x[1, :, 2, 3], (6,)))


@pytest.mark.parametrize("size", [(32, 32), (37, 51), (5, 90)])
@pytest.mark.parametrize("depths", [(1, 1), (1, 1, 1, 1)])
def test_any_size(depths, size):
    model = make_segmenter(depths=depths)
    batch = make_batch(size=size)
    model(batch).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.predict(batch["image"]).shape == (2, 4, *size)


@pytest.mark.parametrize("in_chans", [1, 2, 6])
def test_any_number_of_channels(in_chans):
    model, batch = make_segmenter(in_chans=in_chans), make_batch()
    batch["image"] = batch["image"][:, [channel % 3 for channel in range(in_chans)]]
    model(batch).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.head.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.auxiliary_head.parameters())
    assert model.encoder.patch_embed.proj.weight.grad.abs().max() > 0
    assert model.visualize(batch).height > 2 * 32


def test_a_few_steps_reduce_the_loss():
    model, batch = make_segmenter(), make_batch(4)
    optimizer = make_optimizer(model, model.no_decay_parameters(), weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    before = model.eval_step(batch)
    for _ in range(40):
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.eval_step(batch)
    assert after["loss"] < 0.3 * before["loss"] and after["pixel_accuracy"] > 0.9
    scores = scores_of(model.scores(batch).argmax(dim=1), batch["segments"], 4).compute()
    assert scores["mean_iou"] > 0.8 and scores["pixel_accuracy"] == pytest.approx(after["pixel_accuracy"].item())


def test_splitting_a_batch_does_not_change_the_gradient():
    """The images have different numbers of labeled pixels."""
    model, batch = make_segmenter(), make_batch(4)
    batch["segments"][0, :20], batch["segments"][3] = 255, 255
    model(batch).backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for piece in (slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4)):
        (model({key: value[piece] for key, value in batch.items()}) / 4).backward()
    for p, expected in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-6)


def test_ignored_pixels_change_neither_loss_nor_scores():
    logits = torch.randn(2, 4, 6, 5)
    segments = make_batch(2, (6, 5))["segments"]
    wide, wide_segments = F.pad(logits, (0, 3, 0, 2), value=7.0), F.pad(segments, (0, 3, 0, 2), value=255)
    torch.testing.assert_close(pixel_loss(wide, wide_segments), pixel_loss(logits, segments))
    torch.testing.assert_close(pixel_loss(logits, segments), F.cross_entropy(logits, segments.long()))
    found = [
        scores_of(x.argmax(dim=1), y, 4).confusion_matrix() for x, y in ((wide, wide_segments), (logits, segments))
    ]
    assert torch.equal(*found) and found[0].sum() == 60
    model, batch = make_segmenter(), make_batch()
    batch["segments"][:, :, 16:] = 255
    other = {**batch, "segments": batch["segments"].clone()}
    half = model.predict(batch["image"])[:, :, :, :16]
    measured = model.eval_step(other)
    torch.testing.assert_close(measured["loss"], F.cross_entropy(half, batch["segments"][:, :, :16].long()))
    right = (half.argmax(dim=1) == batch["segments"][:, :, :16]).float().mean()
    assert measured["pixel_accuracy"] == pytest.approx(right.item())


def test_unlabeled_images_have_no_gradient():
    model, batch = make_segmenter(), make_batch()
    batch["segments"][:] = 255
    loss = model(batch)
    loss.backward()
    assert loss.item() == 0 and all((p.grad == 0).all() for p in model.parameters())
    assert model.eval_step(batch)["pixel_accuracy"] == 0
    scores = scores_of(model.scores(batch).argmax(dim=1), batch["segments"], 4)
    assert scores.confusion_matrix().sum() == 0 and scores.iou_per_class() == [None] * 4


def test_training_loss_includes_the_weighted_auxiliary_loss():
    model, batch = make_segmenter(depths=(1, 1, 1)), make_batch()
    images = model.normalize(batch["image"])
    with torch.no_grad():
        maps = model.maps(images)
        main = F.interpolate(model.head(maps), (32, 32), mode="bilinear")
        auxiliary = F.interpolate(model.auxiliary_head(maps[1]), (32, 32), mode="bilinear")
        expected = [F.cross_entropy(x, batch["segments"].long()) for x in (main, auxiliary)]
        torch.testing.assert_close(model(batch), expected[0] + 0.4 * expected[1])
        torch.testing.assert_close(model.eval_step(batch)["loss"], expected[0])
        torch.testing.assert_close(maps[-1], model.encoder(images).permute(0, 3, 1, 2))
        model.auxiliary_weight = 0.0
        torch.testing.assert_close(model(batch), expected[0])


def test_autocast_computes_the_loss_in_float32():
    model, batch = make_segmenter(), make_batch()
    full = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch)
        assert model.predict(batch["image"]).dtype == loss.dtype == torch.float32
    assert loss.item() == pytest.approx(full.item(), rel=0.02)


def test_dropout_is_active_in_training_only():
    model, batch = make_segmenter(dropout=0.5), make_batch()
    torch.manual_seed(0)
    assert model(batch).item() != model(batch).item()
    model.eval()
    assert model(batch).item() == model(batch).item()


def test_windows_cover_every_pixel():
    assert window_starts(100, 40, 30) == [0, 30, 60] and window_starts(101, 40, 30) == [0, 30, 60, 61]
    assert window_starts(40, 40, 30) == [0] and window_starts(41, 40, 30) == [0, 1]


def test_one_window_equals_the_full_image():
    images = make_batch(size=(40, 56))["image"]
    whole = make_segmenter().predict(images)
    for window in ((40, 56), (64, 64)):
        assert torch.equal(make_segmenter(window=window).predict(images), whole)
    assert not torch.equal(make_segmenter(window=(32, 32)).predict(images), whole)


def test_windows_are_averaged_where_they_overlap():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 23, 31, generator=generator)
    weight = torch.randn(4, 3, 1, 1, generator=generator)
    by_pixel = sliding_window_logits(lambda x: F.conv2d(x, weight), images, (10, 12), (7, 9))
    torch.testing.assert_close(by_pixel, F.conv2d(images, weight))

    def mean_of_window(x):
        return x.mean(dim=(2, 3), keepdim=True).expand(-1, -1, *x.shape[-2:])

    found = sliding_window_logits(mean_of_window, images, (23, 20), (23, 11))
    left, right = images[..., :20].mean(dim=(2, 3)), images[..., 11:].mean(dim=(2, 3))
    torch.testing.assert_close(found[..., 0, 0], left)
    torch.testing.assert_close(found[..., 5, 15], (left + right) / 2)
    torch.testing.assert_close(found[..., 22, 30], right)
    seen = []
    sliding_window_logits(lambda x: seen.append(tuple(x.shape[-2:])) or x, images, (10, 50), (10, 10))
    assert seen == [(10, 31)] * 3  # the image is narrower than the window


def test_views_are_averaged_as_probabilities():
    images = torch.randn(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(averaged_log_probabilities(lambda x: x, images), images.log_softmax(dim=1))
    torch.testing.assert_close(averaged_log_probabilities(lambda x: x, images, flip=True), images.log_softmax(dim=1))
    ramp = torch.linspace(0, 3, 24).expand(1, 2, 16, 24) * torch.tensor([1.0, -1.0])[:, None, None]
    found = averaged_log_probabilities(lambda x: ramp, images, flip=True)
    torch.testing.assert_close(found, ((ramp.softmax(1) + ramp.flip(-1).softmax(1)) / 2).log())
    far = averaged_log_probabilities(lambda x: x * 400, torch.tensor([1.0, -1.0]).view(1, 2, 1, 1), flip=True)
    assert far.flatten().tolist() == [0, -800]  # a class with probability near 0 has a finite loss
    sizes = []

    def at_any_size(x):
        sizes.append(tuple(x.shape[-2:]))
        return x.new_ones(1, 2, *x.shape[-2:])

    assert averaged_log_probabilities(at_any_size, images, (0.5, 1.0, 1.75), flip=True).shape == (1, 2, 16, 24)
    assert sizes == [(8, 12)] * 2 + [(16, 24)] * 2 + [(28, 42)] * 2


def test_predict_uses_scales_flip_and_window():
    batch = make_batch()
    plain, model = (
        make_segmenter().predict(batch["image"]),
        make_segmenter(scales=(1.0, 1.5), flip=True, window=(24, 24)),
    )
    found = model.predict(batch["image"])
    torch.testing.assert_close(found.exp().sum(dim=1), torch.ones(2, 32, 32))
    assert not torch.allclose(found, plain.log_softmax(dim=1), atol=1e-3)
    assert model.eval_step(batch)["loss"].isfinite()


def test_scores_by_hand():
    segments = torch.tensor([[[0, 0, 0, 1], [1, 1, 255, 255]]], dtype=torch.uint8)
    predicted = torch.tensor([[[0, 0, 1, 1], [1, 2, 0, 2]]])
    found = scores_of(predicted, segments, 5)
    assert found.confusion_matrix().tolist() == [[2, 1, 0, 0, 0], [0, 2, 1, 0, 0]] + [[0] * 5] * 3
    scores = found.compute()
    assert scores["mean_iou"] == pytest.approx((2 / 3 + 2 / 4 + 0 / 1) / 3)  # 2 is predicted only, 3 and 4 do not occur
    assert scores["mean_accuracy"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert scores["pixel_accuracy"] == pytest.approx(4 / 6)
    assert found.iou_per_class() == [pytest.approx(2 / 3), 0.5, 0.0, None, None]


def test_scores_of_a_data_set_equal_those_of_numpy_and_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    processes, pairs = [MeanIoU(7), MeanIoU(7)], []
    for size in ((9, 14), (20, 5), (11, 11)):
        segments = torch.randint(0, 6, (1, *size), generator=generator).to(torch.uint8)  # class 6 does not occur
        predicted = torch.where(torch.rand(1, *size, generator=generator) < 0.6, segments, 3).long()
        segments[torch.rand(1, *size, generator=generator) < 0.2] = 255
        processes[len(pairs) % 2].add(predicted, segments)
        pairs.append((predicted.flatten().numpy(), segments.flatten().numpy()))
    predicted, truth = (np.concatenate(side) for side in zip(*pairs, strict=True))
    predicted, truth = predicted[truth != 255], truth[truth != 255]
    ious = [((predicted == k) & (truth == k)).sum() / ((predicted == k) | (truth == k)).sum() for k in range(6)]
    accuracies = [(predicted[truth == k] == k).mean() for k in range(6)]
    matrices = [process.confusion_matrix() for process in processes]
    processes[0].gather(lambda own: [*own, matrices[1]])
    scores = processes[0].compute()
    assert scores["mean_iou"] == pytest.approx(np.mean(ious))
    assert scores["mean_accuracy"] == pytest.approx(np.mean(accuracies))
    assert scores["pixel_accuracy"] == pytest.approx((predicted == truth).mean())
    metric = MulticlassJaccardIndex(7, ignore_index=255)
    for found, known in pairs:
        metric.update(torch.from_numpy(found), torch.from_numpy(known).long())
    assert scores["mean_iou"] == pytest.approx(metric.compute().item(), rel=1e-6)
    assert processes[0].iou_per_class() == [*(pytest.approx(iou) for iou in ious), None]


def test_255_classes_and_ignored_pixels():
    segments = torch.tensor([[[254, 254, 255, 0]]], dtype=torch.uint8)
    scores = scores_of(torch.tensor([[[254, 0, 254, 0]]]), segments, 255)
    assert scores.compute()["mean_iou"] == pytest.approx(1 / 2) and scores.iou_per_class()[254] == 0.5


def test_missing_torchmetrics_raises_with_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.classification", None)
    with pytest.raises(ValueError, match=r"pip install 'simmim\[segmentation\]'"):
        MeanIoU(4)


def test_label_maps_may_be_larger_than_images():
    model, batch = make_segmenter(), make_batch()
    large = {**batch, "segments": batch["segments"].repeat_interleave(2, 1).repeat_interleave(3, 2)}
    assert model.scores(large).shape == (2, 4, 64, 96)
    scores = F.interpolate(model.predict(batch["image"]), (64, 96), mode="bilinear")
    assert model.eval_step(large)["loss"] == pytest.approx(F.cross_entropy(scores, large["segments"].long()).item())
    assert model.visualize(large).height > 2 * 64


def test_weight_decay_groups_and_layer_depths():
    model = make_segmenter(depths=(1, 2))
    no_decay, depths = model.no_decay_parameters(), model.depth_of_parameters()
    for name, parameter in model.named_parameters():
        if not name.startswith("encoder."):
            assert depths[parameter] == 4, name
            assert (parameter in no_decay) == (parameter.ndim == 1), name
    own = {p: depth for p, depth in depths.items() if p in set(model.encoder.parameters())}
    expected = model.encoder.depth_of_parameters()
    assert own == {p: expected[name] for name, p in model.encoder.named_parameters()}
    assert model.encoder.no_decay_parameters() <= no_decay


def test_heads_can_be_initialized_after_meta_construction():
    with torch.device("meta"):
        heads = nn.ModuleList([UPerHead((8, 16), 3, 8), FCNHead(8, 3, 8)])
    heads.to_empty(device="cpu")
    for module in heads.modules():
        if list(module.parameters(recurse=False)):
            module.reset_parameters()
    assert all(p.isfinite().all() and p.abs().max() < 2 for p in heads.parameters())
    assert heads[0].classifier.linear.weight.std().item() == pytest.approx(0.02, rel=0.5)


def test_preview_has_a_legend():
    model, batch = make_segmenter(), make_batch(3)
    batch["segments"][0, :8] = 255
    preview = model.visualize(batch)
    assert preview.width > 4 * 128 and preview.height > 3 * 128 and preview.info["rows"] == "3"


def test_previews_without_truth_and_label_map_images(tmp_path):
    model, batch = make_segmenter(), make_batch()
    found = model.predict(batch["image"]).argmax(dim=1)
    preview = drawing.draw_segmentation(batch["image"] / 255, None, found, model.classes)
    both = drawing.draw_segmentation(batch["image"] / 255, found, found, model.classes)
    assert preview.width < both.width and preview.height == both.height
    half = torch.arange(2).repeat_interleave(8).repeat(16, 1)
    painted = drawing.draw_segmentation(torch.ones(1, 3, 16, 16), None, half[None], ["a", "b"])
    shown = torch.from_numpy(np.asarray(painted)[30, [6 + 128 + 6 + 20, 6 + 128 + 6 + 110]] / 255).float()
    torch.testing.assert_close(shown, 0.35 + 0.65 * drawing.class_colors(2), rtol=0, atol=0.01)
    drawing.label_map_image(half, 2, first=1).save(tmp_path / "a.png")
    assert np.array_equal(read_label_map((tmp_path / "a.png").read_bytes()), half.numpy() + 1)
    color = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))[0, 15] / 255
    assert color == pytest.approx(drawing.class_colors(2)[1].numpy(), abs=0.01)


def test_invalid_settings_raise():
    encoder = swin.make_encoder("swinv2_tiny", embed_dim=8, depths=(1,), num_heads=(1,), image_size=32, window_size=4)
    with pytest.raises(ValueError, match="encoder with one stage has no feature pyramid"):
        Segmentation(encoder, ["a", "b"], **STATISTICS)
    with pytest.raises(ValueError, match="mean and std have 2 and 3 numbers for 3 channels"):
        Segmentation(encoder, ["a", "b"], mean=[0.5] * 2, std=[0.25] * 3)
    for wrong, message in (
        ({"stride": (8, 8)}, "without a window"),
        ({"window": (16, 16), "stride": (8, 17)}, r"every \[8, 17\] px leave gaps"),
        ({"window": (16, 16), "stride": (0, 8)}, "leave gaps"),
        ({"scales": ()}, "expected numbers above 0"),
        ({"scales": (1.0, -0.5)}, "expected numbers above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make_segmenter(**wrong)
